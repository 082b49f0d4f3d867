"""`layer_norm` without Triton: the eager path, its errors, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast.backends import BackendError
from any4d_fast.ops.layer_norm import layer_norm
from any4d_fast.reference.layer_norm import layer_norm as reference
from any4d_fast.testing import assert_within_budget


def formula(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_matches_the_formula_in_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((2, 7, 48), (48,), (48,)))
    oracle = formula(x.double(), weight.double(), bias.double(), 1e-6)
    actual = layer_norm(x, weight, bias, backend="eager")
    assert actual.dtype == dtype
    assert_within_budget(actual, oracle, formula(x, weight, bias, 1e-6))


def test_out_dtype_and_mixed_parameters() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(8)
    assert layer_norm(x, weight, out_dtype=torch.float32, backend="eager").dtype == torch.float32
    assert layer_norm(x, backend="eager").dtype == torch.bfloat16


def test_gradcheck() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (6,), (6,))]
    torch.autograd.gradcheck(reference, inputs)


def test_empty_rows() -> None:
    x = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    out = layer_norm(x, weight, backend="eager")
    out.sum().backward()
    assert out.shape == (0, 8) and x.grad is not None and weight.grad is not None
    assert weight.grad.eq(0).all()


def test_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(lambda x, w: layer_norm(x, w, backend="eager"), fullgraph=True, backend="aot_eager")
    x, weight = torch.randn(5, 8), torch.randn(8)
    torch.testing.assert_close(compiled(x, weight), layer_norm(x, weight, backend="eager"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, r"x: expected \[\.\.\., C\] floating point"),
        ({"x": torch.zeros(())}, r"x: expected \[\.\.\., C\]"),
        ({"x": torch.zeros(2, 8), "weight": torch.zeros(7)}, r"weight: expected \[8\] floating point"),
        ({"x": torch.zeros(2, 8), "weight": torch.zeros(1, 8)}, r"weight: expected \[8\].*got \[1, 8\]"),
        (
            {"x": torch.zeros(2, 8), "bias": torch.zeros(8, dtype=torch.int32)},
            r"bias: expected .*torch.int32",
        ),
        ({"x": torch.zeros(2, 8), "out_dtype": torch.int8}, "out_dtype: expected a floating dtype"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_norm(**arguments)  # type: ignore[arg-type]


def test_triton_says_why_it_cannot_run() -> None:
    with pytest.raises(BackendError, match="float64"):
        layer_norm(torch.zeros(2, 8, dtype=torch.float64), backend="triton")
    with pytest.raises(BackendError, match="5000 channels"):
        layer_norm(torch.zeros(2, 5000), backend="triton")
