"""Whether a module may be left uncalled, and computed from its parameters instead."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn


def unhooked(*modules: nn.Module) -> bool:
    """Whether these may be left uncalled: nobody hooked them, or replaced their forward (as device maps do)."""
    return not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        for m in modules
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors that a kernel can read: no DTensor, quantised or fake one."""
    return all(t is None or type(t) in (nn.Parameter, Tensor) for t in tensors)


def plain_parts(module: nn.Module, *known: type[nn.Module]) -> bool:
    """Whether a module that is called itself may compute from the parameters of its parts, without calling these.

    Not with a part of another type than the `known` ones (an adapter in a layer's place, a parametrization), nor with a
    hook. Nor in a replica of DataParallel, whose weights are no parameters.
    """
    parts = [part for part in module.modules() if part is not module]
    parameters = list(module.parameters())
    ours = all(type(part) in known for part in parts) and unhooked(*parts)
    return ours and bool(parameters) and plain(*parameters)


def plain_conv(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """As `plain_linear`, of a convolution."""
    return type(module) is nn.Conv2d and plain(module.weight, module.bias) and unhooked(module)


def plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is nothing but a matrix product, and may be computed from its parameters.

    Not with an adapter in its place, a parametrization or a hook.
    """
    return type(module) is nn.Linear and plain(module.weight, module.bias) and unhooked(module)
