"""`linear_gelu` and `linear_residual` without Triton: the eager path, errors, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from any4d_fast import backends
from any4d_fast.backends import BackendError
from any4d_fast.ops.linear_gelu import linear_gelu, linear_residual
from any4d_fast.reference.linear_gelu import linear_gelu as reference_gelu
from any4d_fast.reference.linear_gelu import linear_residual as reference_residual


def tensors(dtype: torch.dtype = torch.float32, residual: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"x": (2, 3, 8), "weight": (5, 8), "bias": (5,)}
    if residual:
        shapes |= {"residual": (2, 3, 5), "gamma": (5,)}
    return {name: torch.randn(*s, generator=generator).to(dtype) for name, s in shapes.items()}


def test_eager_gelu_is_the_exact_one() -> None:
    given = tensors(torch.float64, residual=False)
    pre = given["x"] @ given["weight"].T + given["bias"]
    expected = 0.5 * pre * (1 + torch.erf(pre / 2**0.5))
    torch.testing.assert_close(linear_gelu(**given, backend="eager"), expected)


def test_eager_residual_is_the_composition_of_its_parts() -> None:
    given = tensors(torch.float64)
    scale = torch.tensor([2.0, 0.0], dtype=torch.float64)
    branch = given["x"] @ given["weight"].T + given["bias"]
    expected = given["residual"] + scale[:, None, None] * given["gamma"] * branch
    actual = linear_residual(**given, row_scale=scale, rows_per_scale=3, backend="eager")
    torch.testing.assert_close(actual, expected)


def test_the_stream_keeps_its_dtype() -> None:
    given = tensors(torch.bfloat16)
    given["residual"] = given["residual"].float()
    assert linear_residual(**given, backend="eager").dtype == torch.float32
    assert linear_gelu(given["x"], given["weight"], given["bias"].float(), backend="eager").dtype == torch.bfloat16


def test_gradcheck() -> None:
    given = {name: t.requires_grad_() for name, t in tensors(torch.float64).items()}
    scale = torch.tensor([2.0, 0.0], dtype=torch.float64)
    torch.autograd.gradcheck(reference_gelu, [given[name] for name in ("x", "weight", "bias")])
    torch.autograd.gradcheck(lambda *a: reference_residual(*a, row_scale=scale, rows_per_scale=3), list(given.values()))


def test_compiles_without_graph_breaks() -> None:
    given = tensors()
    compiled = torch.compile(lambda **kw: linear_residual(**kw, backend="eager"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), linear_residual(**given, backend="eager"))
    given = tensors(residual=False)
    compiled = torch.compile(lambda **kw: linear_gelu(**kw, backend="eager"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), linear_gelu(**given, backend="eager"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 7)}, r"weight: expected \[N, 7\]"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int64)}, "x: expected"),
        ({"weight": torch.zeros(5)}, r"weight: expected \[N, 8\].*got \[5\]"),
        ({"weight": torch.zeros(1, 5, 8)}, "weight: expected"),
        ({"weight": torch.zeros(5, 8, dtype=torch.bfloat16)}, "weight: expected torch.float32 like x"),
        ({"bias": torch.zeros(8)}, r"bias: expected \[5\]"),
        ({"residual": torch.zeros(2, 3, 8)}, r"residual: expected \[2, 3, 5\]"),
        ({"residual": torch.zeros(2, 3, 5, dtype=torch.int32)}, "residual: expected"),
        ({"gamma": torch.zeros(5, 1)}, r"gamma: expected \[5\]"),
        ({"row_scale": torch.ones(5)}, r"row_scale: expected \[rows / rows_per_scale\].*6 rows"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_residual(**{**tensors(), **changes})


def test_backends_say_why_they_cannot_run() -> None:
    given = tensors(residual=False)
    with pytest.raises(BackendError, match="cuBLAS runs on CUDA devices"):
        linear_gelu(**given, backend="cublas")
    with pytest.raises(BackendError, match="float64"):
        linear_gelu(**tensors(torch.float64, residual=False), backend="triton")
    assert backends.registered("linear_gelu")[-1] == "eager"
