"""float32 weights that stay in host memory while a GPU computes with 16-bit copies of them.

A part of the model is packed when its matrices lie on the CPU and its vectors (biases, gains) on the GPU: no flag says
so, the parameters themselves do. `state_dict`, `load_state_dict`, an optimizer and edits in place work on parameters
wherever they lie; `.to(device)` brings all of them to one device as always, which ends it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..model import Any4D

_SWAPPING = threading.RLock()  # two threads must not put parameters back under each other


def home(tensors: Sequence[Tensor]) -> torch.device:
    """Where a module computes: the device of its parameters that is not the CPU, where there is one."""
    return next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)


@contextlib.contextmanager
def resident(parameters: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Parameters in host memory are copies on `device` inside; afterwards they are what they were, unseen by `Derived`.

    Changes made to them inside are lost. While a call is traced nothing happens.
    """
    away = [] if torch.compiler.is_compiling() else [p for p in parameters if _away(p, device)]
    if not away:
        yield
        return
    with _SWAPPING:
        masters = [p.data for p in away]
        try:
            with torch.inference_mode(False):
                for p, master in zip(away, masters, strict=True):
                    p.data = _copied(master, device)
            yield
        finally:
            with torch.inference_mode(False):
                for p, master in zip(away, masters, strict=True):
                    p.data = master


def _away(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == "cpu" != device.type


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)


def require_here(what: str, weight: Tensor, like: Tensor) -> None:
    """Raise unless a module can compute on `like` with its own weights.

    Raises:
        RuntimeError: `weight` is in host memory.
    """
    if _away(weight, like.device):
        raise RuntimeError(
            f"{what}: expected float32 weights on {like.device}, got them in host memory (pack_weights_): packed "
            "weights serve inference in 16 bits alone, under torch.no_grad() and torch.autocast in bfloat16 or float16,"
            " in eval mode, without torch.compile, the eager backend or hooks inside of blocks; call "
            "model.unpack_weights_() before training or computing in float32"
        )


def head_parameters(model: Any4D) -> Iterator[Tensor]:
    """Parameters of the heads that may be in host memory."""
    return itertools.chain.from_iterable(module.parameters() for module in _heads(model))


def _heads(model: Any4D) -> list[nn.Module]:
    heads = [
        model.dpt_feature_head,
        model.dpt_regressor_head,
        model.scene_flow_dpt_feature_head,
        model.scene_flow_dpt_regressor_head,
    ]
    return [*heads, model.pose_head.proj, model.pose_head.res_conv] if hasattr(model, "pose_head") else heads


def packable(model: Any4D) -> Iterator[Tensor]:
    """Matrices whose 16-bit copies are all that inference under autocast reads."""
    from .block import Block
    from .packing import known, matrices

    for module in model.modules():
        if isinstance(module, Block) and known(module):
            yield from matrices(module)
    if isinstance(model.info_sharing.proj_embed, nn.Linear):
        yield model.info_sharing.proj_embed.weight
    tokenizers: list[nn.Module] = [model.ray_dirs_encoder, model.depth_encoder, model.scene_flow_encoder]
    for module in (*_heads(model), *tokenizers):
        yield from (p for p in module.parameters() if p.ndim > 1)


def pack_(model: Any4D, device: torch.device) -> None:
    """Matrices to the host, everything else to `device`; see `Any4D.pack_weights_`."""
    hosted = {id(p) for p in packable(model)}
    cpu = torch.device("cpu")
    with torch.inference_mode(False):
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.to(cpu if id(tensor) in hosted else device)


def unpack_(model: Any4D) -> None:
    """Everything to where the model computes; see `Any4D.unpack_weights_`."""
    with torch.inference_mode(False):
        for p in model.parameters():
            p.data = p.data.to(model.scale_token.device)
