"""Registration of operators in the namespace `any4d_fast`."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "any4d_fast"

_LAUNCHERS = {"triton": "any4d_fast.kernels", "cuda": "any4d_fast.cuda"}


def define(name: str, schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register one operator for every device and return the function that calls it.

    Args:
        name: operator name without the namespace.
        schema: for example `"(Tensor x, float eps) -> Tensor"`.
        impl: the function that runs; it sees real tensors only.
        fake: shapes, strides and dtypes of the outputs, from fake tensors.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", impl)
    torch.library.register_fake(qualified, fake)
    packet: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return packet


def own_dtypes(x: Tensor, *, uniform: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Products in their operands' own dtypes: autocast is on inside an operator too, and would round them.

    Args:
        x: a tensor of the call.
        uniform: all operands have x's dtype, so that nothing need be done where that is autocast's.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    if uniform and torch.get_autocast_dtype(kind) == x.dtype:
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, those given twice as views: torch.compile cannot trace an `autograd.Function` otherwise."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in found):
            tensor = tensor.view_as(tensor)
        found.append(tensor)
    return tuple(found)


@functools.cache
def launchers(op: str, backend: str) -> ModuleType:
    """The module with an op's launchers: `any4d_fast.kernels.<op>` ("triton") or `any4d_fast.cuda.<op>` ("cuda").

    Raises:
        ValueError: no package of launchers belongs to `backend`.
    """
    if backend not in _LAUNCHERS:
        raise ValueError(f"{op}: backend: expected one of {list(_LAUNCHERS)}, got {backend!r}")
    return importlib.import_module(f"{_LAUNCHERS[backend]}.{op}")
