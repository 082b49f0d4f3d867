"""One line of the table of what `accelerate` knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .swap import Swap, owner, qualified


@dataclass(frozen=True)
class Recogniser:
    """What to do with the modules of some classes.

    Attributes:
        classes: regular expression for the qualified name of the class that a module's forward comes from.
        swap: methods to give such a module; None leaves it as it is.
        ours: what it then runs on, for the report.
        reasons: why a module of such a class does not fit; no reason: it does.
        norms: submodules to swap for the fused LayerNorm, where they are LayerNorms.
        unsupported: why modules of these classes stay as they are.
    """

    classes: str
    swap: type[Swap] | None = None
    ours: str = ""
    reasons: Callable[[nn.Module], list[str]] = lambda module: []
    norms: tuple[str, ...] = ()
    unsupported: str = ""

    def matches(self, cls: type) -> bool:
        """Whether the forward of a class is that of one of these classes."""
        return re.fullmatch(self.classes, qualified(owner(cls))) is not None

    def why_not(self, module: nn.Module) -> list[str]:
        """Reasons to leave a module that matches as it is."""
        if self.unsupported:
            return [self.unsupported]
        if "forward" in module.__dict__:
            return ["its forward was replaced on the instance"]
        return self.reasons(module)
