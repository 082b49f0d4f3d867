"""`linear` without Triton: the eager path, errors, autocast, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from any4d_fast import backends
from any4d_fast.backends import BackendError
from any4d_fast.ops.linear import linear
from any4d_fast.ops.linear_gelu import linear_gelu
from any4d_fast.reference.linear import linear as reference


def tensors(dtype: torch.dtype = torch.float32, parameters: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"x": (2, 3, 8), "weight": (5, 8), "bias": (5,)}
    given = {name: torch.randn(*s, generator=generator) for name, s in shapes.items()}
    return {name: t.to(dtype if name == "x" else parameters or dtype) for name, t in given.items()}


def test_eager_is_the_matrix_product() -> None:
    given = tensors(torch.float64)
    expected = given["x"] @ given["weight"].T + given["bias"]
    torch.testing.assert_close(linear(**given, backend="eager"), expected)
    torch.testing.assert_close(linear(given["x"], given["weight"], backend="eager"), expected - given["bias"])


def test_float32_is_torchs_own_layer() -> None:
    given = tensors()
    assert torch.equal(linear(**given, backend="eager"), F.linear(given["x"], given["weight"], given["bias"]))


@pytest.mark.parametrize("op", [linear, linear_gelu])
def test_gradients_have_the_parameters_dtypes(op: Any) -> None:
    given = {name: t.requires_grad_() for name, t in tensors(torch.bfloat16, torch.float32).items()}
    out = op(**given, backend="eager")
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out.sum(), list(given.values()))
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]


def test_gradcheck() -> None:
    torch.autograd.gradcheck(reference, [t.requires_grad_() for t in tensors(torch.float64).values()])


def test_autocast_changes_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = tensors(dtype, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = linear(**given, backend="eager")
        assert torch.equal(out, linear(**given, backend="eager"))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_breaks(autocast: bool) -> None:
    def step(**kw: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return linear(**kw, backend="eager")

    for dtype in (torch.float32, torch.bfloat16):
        given = tensors(dtype, torch.float32)
        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(**given), step(**given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 7)}, r"weight: expected \[N, 7\]"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int64)}, "x: expected"),
        ({"x": torch.zeros(())}, "x: expected"),
        ({"weight": torch.zeros(5)}, r"weight: expected \[N, 8\].*got \[5\]"),
        ({"weight": torch.zeros(0, 8)}, "weight: expected"),
        ({"weight": torch.zeros(5, 8, dtype=torch.int8)}, "weight: expected a floating dtype, got torch.int8"),
        ({"bias": torch.zeros(8)}, r"bias: expected \[5\]"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, "bias: expected"),
    ],
)
@pytest.mark.parametrize("op", [linear, linear_gelu])
def test_errors_name_the_argument(op: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(**{**tensors(), **changes})


def test_backends_say_why_they_cannot_run() -> None:
    with pytest.raises(BackendError, match=r"expected one of \['triton', 'eager'\] or 'auto', got 'cublas'"):
        linear(**tensors(), backend="cublas")
    with pytest.raises(BackendError, match="float64"):
        linear(**tensors(torch.float32, torch.float64), backend="triton")
    assert backends.registered("linear") == ["triton", "eager"]
