"""The moving average of the weights, which is what a run is there for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .parallel import local

_TOGETHER = 64  # parameters that are averaged at once: few launches, and little memory besides


class Average:
    """Exponential moving average of the trained parameters that this process holds.

    Attributes:
        tensors: the averages by parameter, in the parameters' precision.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        kept = [(name, local(p).detach()) for name, p in named if p.requires_grad]
        self._live = [tensor for _, tensor in kept]
        self.tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in kept}

    @torch.no_grad()
    def update(self, decay: float, changed: Tensor) -> None:
        """average = decay * average + (1 - decay) * weights, where the step changed the weights.

        Args:
            decay: of this step.
            changed: [] bool on the weights' device: False leaves the averages as they are, without waiting for it.
        """
        averages, share = list(self.tensors.values()), (1.0 - decay) * changed
        for first in range(0, len(averages), _TOGETHER):
            part = averages[first : first + _TOGETHER]
            # Not a lerp: its weight is a number of the host, or a tensor as large as the averages.
            moves = torch._foreach_sub(self._live[first : first + _TOGETHER], part)
            torch._foreach_mul_(moves, share)
            torch._foreach_add_(part, moves)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over averages that were stored."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages as its weights inside; afterwards its own again, to the bit."""
        averages = list(self.tensors.values())
        with torch.no_grad():
            before = [tensor.clone() for tensor in self._live]
            torch._foreach_copy_(self._live, averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, before)
