"""The moving average of the weights, which is what a run is there for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .parallel import local


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
    def update(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weights."""
        torch._foreach_lerp_(list(self.tensors.values()), self._live, 1.0 - decay)

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
