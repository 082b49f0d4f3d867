"""Whether a module may be left uncalled, and computed from its parameters instead."""

from __future__ import annotations

from torch import nn


def unhooked(*modules: nn.Module) -> bool:
    """Whether nobody would notice that these modules are not called."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )
