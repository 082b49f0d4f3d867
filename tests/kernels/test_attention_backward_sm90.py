"""Every configuration of csrc/attention_backward_sm90.cu against the float64 oracle, on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast import backends
from any4d_fast.ops.attention import Segments
from any4d_fast.reference.attention import attention as reference_attention
from any4d_fast.testing import assert_within_budget, gradients, poisoned_empty
from tests.kernels_common import DEVICE, GPU, gpu_only

SCALE = 0.2
VARIANTS = range(5)
LAYOUTS = {
    "one row": (Segments.batched(3, 1), 3),
    "odd": (Segments(length=5, count=3, stride=7, groups=2, group_stride=30, start=3), 70),
    "129": (Segments.global_(1, 129), 129),
    "split": (Segments.global_(1, 1777), 1777),
    "frame": (Segments.frame(2, 11, 888), 2 * (11 * 888 + 1)),
}

pytestmark = [
    *gpu_only,
    pytest.mark.skipif(
        not GPU or bool(backends.cuda_reasons(torch.empty(0, device=DEVICE), architecture="90a")),
        reason="needs the CUDA extension and a GPU of compute capability 9.0",
    ),
]


def inputs(layout: str, dtype: torch.dtype, queries: float | None = None) -> tuple[Tensor, ...]:
    """qkv, out, lse, and gradients of the latter two; with `queries`, every key is 1 and queries are about that."""
    segments, rows = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(rows)

    def sample(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    heads = 3
    qkv = sample(rows, 3, heads, 64)
    if queries is not None:
        qkv[:, 0] = queries + 0.01 * qkv[:, 0]
        qkv[:, 1] = 1.0
    qkv = qkv.to(dtype)
    out, lse = reference_attention(qkv.double(), segments, SCALE, return_lse=True)
    return qkv, out.to(dtype), lse.float(), sample(rows, heads, 64).to(dtype), sample(heads, rows)


def ours(layout: str, given: tuple[Tensor, ...], variant: int, deterministic: bool) -> Tensor:
    from any4d_fast.cuda.attention_backward import backward

    qkv, out, lse, grad_out, grad_lse = given
    with poisoned_empty():
        segments = LAYOUTS[layout][0].as_list()
        return backward(grad_out, grad_lse, qkv, out, lse, segments, SCALE, deterministic, variant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_oracle(variant: int, layout: str, deterministic: bool, dtype: torch.dtype) -> None:
    segments, _ = LAYOUTS[layout]
    given = inputs(layout, dtype)
    grad = ours(layout, given, variant, deterministic)
    qkv, _, _, grad_out, grad_lse = given

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        found = reference_attention(x, segments, SCALE, return_lse=True)
        assert isinstance(found, tuple)
        return found

    (oracle,) = gradients(both, [qkv.double()], [grad_out, grad_lse])
    (baseline,) = gradients(both, [qkv], [grad_out, grad_lse])
    assert oracle is not None and baseline is not None
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_within_budget(grad[:, i], oracle[:, i], baseline[:, i], name=name)


@pytest.mark.parametrize("layout", ["split", "frame"])
def test_deterministic_is_bitwise_equal(layout: str) -> None:
    given = inputs(layout, torch.bfloat16)
    found = [ours(layout, given, 0, True) for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_absent_keys_with_very_negative_scores() -> None:
    """A log-sum-exp far below -128 in log2 units: absent keys' probabilities are infinite, and must not matter."""
    given = inputs("129", torch.bfloat16, queries=-40.0)
    assert given[2].max() < -400
    assert ours("129", given, 0, False).isfinite().all()


def test_works_in_a_graph() -> None:
    given = inputs("split", torch.bfloat16)
    expected = ours("split", given, 0, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ours("split", given, 0, True)
    found.fill_(float("nan"))
    graph.replay()
    assert torch.equal(found, expected)
