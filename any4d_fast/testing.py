"""What "equal" means here: errors against a float64 oracle, within a budget set by plain PyTorch's own error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Largest relative error of rounding to nearest, one step."""


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """||actual - oracle|| / ||oracle|| in float64; the plain norm of `actual` where the oracle is all zero.

    NaN anywhere gives NaN, which is never within a budget.
    """
    a = actual.detach().double()
    b = oracle.detach().to(a.device).double()
    if a.shape != b.shape:
        raise AssertionError(f"shape {tuple(a.shape)} differs from the oracle's {tuple(b.shape)}")
    if a.numel() == 0:
        return 0.0
    scale = b.norm().item()
    return (a - b).norm().item() / (scale if scale > 0 else 1.0)


def assert_within_budget(
    actual: Tensor,
    oracle: Tensor,
    baseline: Tensor,
    *,
    factor: float = 2.0,
    name: str = "output",
    rounding: torch.dtype | None = None,
    floor: float = 0.0,
) -> None:
    """Assert that `actual` errs at most `factor` times as much as `baseline`, plus one rounding step.

    Args:
        actual: the result under test.
        oracle: the reference op in float64, on inputs already rounded to the tested dtype.
        baseline: plain PyTorch in the tested dtype, on the same inputs.
        factor: 2 by the project's rule (DESIGN: "at most 2x that of plain PyTorch, plus one rounding step").
        name: what to call it in the message.
        rounding: dtype whose rounding step is granted; the result's own dtype by default.
        floor: error that plain PyTorch is credited with at least; for results of a few numbers, which it can get
            almost exactly right by luck.
    """
    error, base = relative_error(actual, oracle), relative_error(baseline, oracle)
    budget = factor * max(base, floor) + ROUNDING[rounding or actual.dtype]
    if not error <= budget:
        raise AssertionError(f"{name}: relative error {error:.3e} exceeds {budget:.3e} (plain PyTorch: {base:.3e})")


def gradients(
    function: Callable[..., Any], inputs: list[Tensor | None], cotangents: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` for the given cotangents, one per input (None where it needs none)."""
    leaves = [t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o.is_floating_point()]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found = torch.autograd.grad([o for o, _ in pairs], wanted, [g.to(o.dtype) for o, g in pairs], allow_unused=True)
    lookup = dict(zip(map(id, wanted), found, strict=True))
    return [lookup.get(id(t)) if t is not None else None for t in leaves]


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill uninitialised floating-point memory with NaN, so that an element nobody wrote shows."""
    names = ("empty", "empty_like", "empty_strided")
    originals = {name: getattr(torch, name) for name in names}

    def poisoning(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            out = original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return allocate

    for name, original in originals.items():
        setattr(torch, name, poisoning(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
