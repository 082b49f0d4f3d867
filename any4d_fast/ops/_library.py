"""Registration of operators in the namespace `any4d_fast`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "any4d_fast"


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
