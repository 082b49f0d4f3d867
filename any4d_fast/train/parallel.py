"""One process or several: DistributedDataParallel, and FSDP2's sharding of every large layer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import ConfigError
from ..devices import find_device
from ..modules.block import Block

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank, size: this process among them.
        device: its own.
        kind: "none", "ddp" or "fsdp".
    """

    rank: int
    size: int
    device: torch.device
    kind: str
    started_here: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def agree(self, flag: bool) -> bool:
        """Whether any process says so; all must ask at the same time."""
        if self.size == 1:
            return flag
        raised = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised.item())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of a tensor of statistics."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def close(self) -> None:
        """Leave the process group, if `start` made it."""
        if self.started_here:
            dist.destroy_process_group()


def start(kind: str, device: str | None) -> World:
    """Join the processes that torchrun started, on a device for each.

    Raises:
        ConfigError: the device is not there, or torchrun has not started this process although `kind` needs it.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "none":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError('run.parallel: torchrun started several processes; expected "ddp" or "fsdp", got "none"')
        return World(0, 1, _checked(wanted), kind)
    if "RANK" not in os.environ and not dist.is_initialized():
        raise ConfigError(
            f"run.parallel: {kind!r} needs processes that torchrun started: "
            "torchrun --nproc-per-node N -m any4d_fast.train CONFIG"
        )
    if wanted == "cuda":
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    chosen = _checked(wanted)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), chosen, kind, started)


def _checked(name: str) -> torch.device:
    try:
        device = find_device(name)
    except ValueError as error:
        raise ConfigError(f"run.{error}") from error
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"run.device: expected cuda, cuda:N or cpu, got {name!r}")
    return device


def shard(step: nn.Module, world: World) -> None:
    """Shard parameters, gradients and optimizer states over the processes (FSDP2), in place.

    A block's attention and its MLP are gathered when they run; not the whole block, because a block's last operation
    reads the LayerNorm of the next one. What lies between (norms, tokens, tokenizers) is gathered with the model, and
    so are the heads: their outputs are views, on which FSDP's hooks may be lost.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh: DeviceMesh = init_device_mesh(world.device.type, (world.size,))
    for module in list(step.modules()):
        if isinstance(module, Block):
            for part in (module.attn, module.mlp):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
    # Resharded too, where the default keeps it: between a step and a validation the shards are exchanged.
    fully_shard(step, mesh=mesh, reshard_after_forward=True)


def distributed(step: nn.Module, world: World, find_unused: bool) -> nn.Module:
    """The step averaging gradients over processes, where there are several."""
    if world.kind != "ddp":
        return step
    from torch.nn.parallel import DistributedDataParallel

    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        step, device_ids=devices, find_unused_parameters=find_unused, gradient_as_bucket_view=True
    )


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a sharded one's shard, else all of it; always the same memory."""
    shard_of = getattr(tensor, "to_local", None)
    return tensor if shard_of is None else shard_of()


def gathered(owned: Tensor, parameter: Tensor) -> Tensor:
    """The whole of a tensor that is sharded as `parameter` is; all processes must call it. Itself where none is."""
    if not hasattr(parameter, "full_tensor"):
        return owned
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    if owned.shape != local(parameter).shape:  # AdamW's count of steps is a number in every process
        return owned
    whole = DTensor.from_local(
        owned,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return whole.full_tensor()


def scattered(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a tensor, as `parameter` is sharded; no communication. Itself where it is not."""
    if not hasattr(parameter, "full_tensor") or whole.shape != parameter.shape:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    # Every process read the same file: its own part needs no broadcast.
    sharded = distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    return sharded.to_local()
