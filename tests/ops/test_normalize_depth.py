"""`normalize_depth` on the eager path: values, gradients, arguments, torch.compile."""

from __future__ import annotations

import pytest
import torch

from any4d_fast.ops.normalize_depth import normalize_depth


def test_values() -> None:
    depth = torch.tensor([0.0, 2.0, 4.0, 0.0, 6.0, 8.0], dtype=torch.float64).reshape(1, 2, 3, 1)
    scaled, log_factor = normalize_depth(depth)
    torch.testing.assert_close(scaled, torch.log1p(depth / 5))
    torch.testing.assert_close(log_factor, torch.tensor([5.0], dtype=torch.float64).log(), rtol=1e-8, atol=0)


def test_unknown_everywhere_and_nan_pixels() -> None:
    depth = torch.zeros(2, 2, 2, 1)
    depth[1] = 3.0
    depth[1, 0, 0] = float("nan")
    scaled, log_factor = normalize_depth(depth)
    assert torch.equal(scaled[0], torch.zeros(2, 2, 1))
    assert scaled[1].isnan().sum() == 1
    # log(1e-8 + 1e-8), and the mean of the three pixels that are numbers.
    torch.testing.assert_close(log_factor, torch.tensor([2e-8, 3.0]).log())


def test_gradcheck() -> None:
    depth = torch.rand(2, 3, 2, 1, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(normalize_depth, [depth.requires_grad_()])


def test_compiles_fullgraph() -> None:
    depth = torch.rand(2, 4, 6, 1, requires_grad=True)
    compiled = torch.compile(normalize_depth, fullgraph=True, backend="aot_eager", dynamic=True)
    for actual, expected in zip(compiled(depth), normalize_depth(depth), strict=True):
        torch.testing.assert_close(actual, expected)
    compiled(depth)[0].sum().backward()


@pytest.mark.parametrize("depth", [torch.zeros(2, 4, 6), torch.zeros(2, 4, 6, 1, dtype=torch.int64)])
def test_errors_name_the_argument(depth: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"depth: expected \[N, H, W, 1\] float"):
        normalize_depth(depth)
