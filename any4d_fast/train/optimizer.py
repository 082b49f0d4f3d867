"""AdamW with a learning rate for each part of the model, clipping, and steps without effect where a gradient is broken.

Nothing here waits for the device: the norm of the gradient, the factor that clips it and whether it is finite are
tensors that the fused kernel of AdamW reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import ConfigError
from .config import OptimizerOptions
from .parallel import local

_PREFIXES = {
    "encoder": ("encoder.",),
    "tokenizers": (
        "ray_dirs_encoder.", "depth_encoder.", "depth_scale_encoder.", "cam_rot_encoder.", "cam_trans_encoder.",
        "cam_trans_scale_encoder.", "scene_flow_encoder.",
    ),
    "heads": ("dpt_", "scene_flow_dpt_", "dense_head.", "scene_flow_dense_head."),
    "pose": ("pose_head.",),
    "scale": ("scale_head.",),
}  # fmt: skip
_UNDECAYED = ("cls_token", "pos_embed", "register_tokens", "scale_token")


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, one of `config.PARTS`."""
    for part, prefixes in _PREFIXES.items():
        if name.startswith(prefixes):
            return part
    return "transformer"


def decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and convolutions, not to norms, biases and tokens."""
    return parameter.ndim >= 2 and not name.endswith(_UNDECAYED)


class Optimizer:
    """AdamW over the parameters that this process holds (all, or its shard of each).

    Attributes:
        skipped: [] int64 on the device: steps so far whose gradient was not finite. They changed nothing.
        norm: [] norm of the last gradient before clipping.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], options: OptimizerOptions, sharded: bool) -> None:
        self.options = options
        self.sharded = sharded
        self.parameters = [(n, p) for n, p in named if p.requires_grad]
        if not self.parameters:
            raise ConfigError(
                f"optimizer.parts: expected a part of the model that is trained, got {options.parts}; give one of them "
                "a factor above 0"
            )
        device = self.parameters[0][1].device
        groups: dict[tuple[str, bool], list[int]] = {}
        for i, (name, parameter) in enumerate(self.parameters):
            groups.setdefault((part_of(name), decayed(name, parameter)), []).append(i)
        # A shard is an ordinary tensor in the memory of its parameter.
        self.owned = [nn.Parameter(local(p).detach()) if sharded else p for _, p in self.parameters]
        self.peaks = torch.tensor([options.lr * options.parts.get(part, 1.0) for part, _ in groups], device=device)
        self.rates = self.peaks.clone()
        self.adamw = torch.optim.AdamW(
            [
                {
                    "params": [self.owned[i] for i in members if self.owned[i].numel()],
                    "lr": self.rates[row],
                    "weight_decay": options.weight_decay if decay else 0.0,
                }
                for row, ((_, decay), members) in enumerate(groups.items())
                if any(self.owned[i].numel() for i in members)
            ],
            betas=options.betas,
            eps=options.eps,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.norm = torch.zeros((), device=device)

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        for _, parameter in self.parameters:
            parameter.grad = None
        if self.sharded:
            for shard in self.owned:
                shard.grad = None

    def set_rate(self, factor: float) -> None:
        """Learning rates of the next steps: `factor` times the peaks."""
        torch.mul(self.peaks, factor, out=self.rates)

    @torch.no_grad()
    def step(self) -> None:
        """Clip and update; where the gradient's norm is not finite, count that and leave everything as it is."""
        if self.sharded:
            for shard, (_, parameter) in zip(self.owned, self.parameters, strict=True):
                shard.grad = None if parameter.grad is None else local(parameter.grad)
        gradients = [shard.grad for shard in self.owned if shard.grad is not None]
        self.norm.copy_(self._norm(gradients))
        broken = ~torch.isfinite(self.norm)
        self.skipped += broken
        self.adamw.found_inf = broken.to(torch.float32)  # type: ignore[attr-defined]
        if self.options.clip:
            self.adamw.grad_scale = (self.norm / self.options.clip).clamp(min=1.0)  # type: ignore[attr-defined]
        self.adamw.step()

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        norm = torch.stack(torch._foreach_norm([g for g in gradients if g.numel()])).norm()
        if not self.sharded:
            return norm
        square = norm.square()
        dist.all_reduce(square)
        return square.sqrt()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's tensors by parameter; of a shard where parameters are sharded."""
        found = {}
        for (name, _), shard in zip(self.parameters, self.owned, strict=True):
            kept = dict(self.adamw.state.get(shard, {}))
            if self.sharded and not kept:  # the same tensors in every process: they are gathered together
                zero = torch.zeros((), device=shard.device)
                kept = {"step": zero, "exp_avg": torch.zeros_like(shard), "exp_avg_sq": torch.zeros_like(shard)}
            found[name] = kept
        return found

    @torch.no_grad()
    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: it is of other parameters.
        """
        names = [name for name, _ in self.parameters]
        if set(state) != set(names):
            odd = sorted(set(state) ^ set(names))[:3]
            raise ValueError(f"optimizer: the state is of other parameters, beginning with {odd}")
        for name, shard in zip(names, self.owned, strict=True):
            if state[name] and shard.numel():
                self.adamw.state[shard] = {
                    key: value.to(shard.device, copy=True).contiguous() for key, value in state[name].items()
                }
