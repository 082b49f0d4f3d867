"""`residual_norm` without Triton: the eager path, its errors, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from any4d_fast.ops.residual_norm import residual_norm
from any4d_fast.reference.residual_norm import residual_norm as reference


def tensors(rows: int = 6, channels: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"residual": (rows, channels), "branch": (rows, channels)}
    shapes |= dict.fromkeys(("gamma", "weight", "bias"), (channels,))
    return {name: torch.randn(*s, generator=generator).to(dtype) for name, s in shapes.items()}


def test_eager_is_the_composition_of_its_parts() -> None:
    given = tensors()
    scale = torch.tensor([2.0, 0.0, 1.0])
    new, normed = residual_norm(**given, row_scale=scale, rows_per_scale=2, backend="eager")
    factor = scale.repeat_interleave(2)[:, None]
    expected = given["residual"] + factor * given["gamma"] * given["branch"]
    torch.testing.assert_close(new, expected)
    assert normed is not None
    layer_norm = torch.nn.functional.layer_norm(expected, (8,), given["weight"], given["bias"], 1e-6)
    torch.testing.assert_close(normed, layer_norm)


def test_dtypes() -> None:
    new, normed = residual_norm(torch.zeros(2, 8), torch.randn(2, 8, dtype=torch.bfloat16), backend="eager")
    assert normed is not None and (new.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    _, normed = residual_norm(torch.zeros(2, 8), torch.randn(2, 8), out_dtype=torch.float16, backend="eager")
    assert normed is not None and normed.dtype == torch.float16


def test_dropped_rows_may_hold_anything() -> None:
    given = tensors(rows=2)
    given["branch"][1] = torch.nan
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    new, normed = residual_norm(**leaves, row_scale=torch.tensor([1.0, 0.0]), backend="eager")
    assert normed is not None
    torch.testing.assert_close(new[1], leaves["residual"][1])
    (new.sum() + normed.square().sum()).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves.values())


def test_without_norm_and_in_place() -> None:
    given = tensors()
    expected, normed = residual_norm(**given, normalize=False, backend="eager")
    assert normed is None
    residual = given["residual"].clone()
    new, _ = residual_norm(**{**given, "residual": residual}, inplace=True, backend="eager")
    assert new is residual
    torch.testing.assert_close(residual, expected)


def test_gradcheck() -> None:
    inputs = [t.double().requires_grad_() for t in tensors(rows=3, channels=5).values()]
    scale = torch.tensor([1.5, 0.0, 0.5], dtype=torch.float64)
    torch.autograd.gradcheck(lambda *args: reference(*args, row_scale=scale), inputs)


def test_compiles_without_graph_breaks() -> None:
    compiled = torch.compile(lambda **kw: residual_norm(**kw, backend="eager"), fullgraph=True, backend="aot_eager")
    given = tensors()
    for actual, expected in zip(compiled(**given), residual_norm(**given, backend="eager"), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch": torch.zeros(5, 8)}, r"branch: expected \[6, 8\] floating point like the residual, got \[5, 8\]"),
        ({"branch": torch.zeros(6, 7)}, r"branch: expected \[6, 8\]"),
        ({"gamma": torch.zeros(1, 8)}, r"gamma: expected \[8\]"),
        ({"weight": torch.zeros(6)}, r"weight: expected \[8\]"),
        ({"bias": torch.zeros(8, dtype=torch.int64)}, "bias: .*torch.int64"),
        ({"residual": torch.zeros(6, 8, dtype=torch.int32)}, "residual: expected"),
        ({"row_scale": torch.ones(4)}, r"row_scale: expected \[rows / rows_per_scale\].*6 rows.*got \[4\]"),
        ({"row_scale": torch.ones(3)}, "rows_per_scale=1"),
        ({"row_scale": torch.ones(6, requires_grad=True)}, "row_scale: expected a tensor without requires_grad"),
        ({"out_dtype": torch.int8}, "out_dtype"),
        ({"gamma": torch.zeros(8, requires_grad=True), "inplace": True}, "inplace: expected no gradients"),
        ({"residual": torch.zeros(2, 5, 8)[:, :3], "branch": torch.zeros(2, 3, 8), "inplace": True}, "view"),
        ({"residual": torch.zeros(8, 6).T, "inplace": True}, "unit stride|view"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_norm(**{**tensors(), **changes})
