"""Registration of operators in the namespace `any4d_fast`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

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


@functools.cache
def launchers(op: str, backend: str) -> ModuleType:
    """The module with an op's launchers: `any4d_fast.kernels.<op>` ("triton") or `any4d_fast.cuda.<op>` ("cuda").

    Raises:
        ValueError: no package of launchers belongs to `backend`.
    """
    if backend not in _LAUNCHERS:
        raise ValueError(f"{op}: backend: expected one of {list(_LAUNCHERS)}, got {backend!r}")
    return importlib.import_module(f"{_LAUNCHERS[backend]}.{op}")
