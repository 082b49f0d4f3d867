"""csrc/attention_fp8_sm90*.cu on a Hopper GPU: every configuration against its emulation and the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast import backends
from any4d_fast.ops.attention import Segments
from any4d_fast.ops.attention_fp8 import attention_fp8
from any4d_fast.reference.attention import attention as reference_attention
from any4d_fast.reference.attention_fp8 import attention_fp8 as reference_attention_fp8
from any4d_fast.testing import poisoned_empty, relative_error
from tests.kernels_common import DEVICE, GPU, gpu_only

SCALE = 0.125
LINEAR_RUNS = (8, 4, 0, 4)
E4M3 = 0.0265
"""Root mean square of the relative error of rounding to e4m3; at most it is 2^-4."""

pytestmark = [
    *gpu_only,
    pytest.mark.skipif(
        not GPU or bool(backends.cuda_reasons(torch.empty(0, device=DEVICE), architecture="90a")),
        reason="needs the CUDA extension and a GPU of compute capability 9.0",
    ),
]


LAYOUTS = {
    "one row": (Segments.batched(3, 1), 3),
    "odd": (Segments(length=5, count=3, stride=7, groups=2, group_stride=30, start=3), 70),
    "129": (Segments.global_(1, 129), 129),
    "192": (Segments.global_(2, 192), 384),
    "split": (Segments.global_(1, 1777), 1777),
    "frame": (Segments.frame(2, 11, 888), 2 * (11 * 888 + 1)),
    "gaps": (Segments(length=100, count=3, stride=150, groups=2, group_stride=500, start=7), 1100),
    "long gaps": (Segments(length=1100, count=2, stride=1150, groups=2, group_stride=2400, start=7), 4800),
}
SHORT = {
    **{f"{rows}": (Segments.global_(1, rows), rows) for rows in (1, 63, 64, 65, 127, 128, 129, 888, 1023, 1024, 1025)},
    "8 views": (Segments.frame(1, 8, 888), 8 * 888 + 1),
    "encoder": (Segments.batched(9, 889), 9 * 889),
    "many of one block": (Segments.batched(300, 65), 300 * 65),
    "many of one tile": (Segments(length=17, count=150, stride=19, groups=2, group_stride=3000, start=5), 6000),
    "many of eight blocks": (Segments(length=1024, count=5, stride=1030, groups=3, group_stride=5200), 15600),
    "gaps": (Segments(length=889, count=3, stride=900, groups=2, group_stride=2800, start=7), 5700),
}
"""Around what the kernel for short segments is cut by: tiles of 64 queries, blocks of 128 keys, 8 blocks a segment; and
more or fewer tiles than multiprocessors, so that runs of tiles begin and end inside a segment or span several."""


def sample(rows: int, dtype: torch.dtype, heads: int = 3, spread: float = 1.0, bias: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    qkv = torch.randn(rows, 3, heads, 64, generator=generator)
    qkv[:, 0] *= spread
    qkv[:, 1] += bias * torch.randn(heads, 64, generator=generator)
    return qkv.to(DEVICE, dtype)


def run(qkv: Tensor, segments: Segments, variant: int | None = None) -> tuple[Tensor, Tensor]:
    from any4d_fast.cuda.attention_fp8 import forward

    with poisoned_empty():
        return forward(qkv, segments.as_list(), SCALE, variant)


def oracle(qkv: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    found = reference_attention(qkv.double(), segments, SCALE, return_lse=True)
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", range(4))
class TestEveryVariant:
    def test_is_its_emulation(self, variant: int, layout: str, dtype: torch.dtype) -> None:
        """The same roundings but for ties and the units' exponentials: far closer than to the exact result."""
        segments, rows = LAYOUTS[layout]
        qkv = sample(rows, dtype)
        out, lse = run(qkv, segments, variant)
        expected, expected_lse = reference_attention_fp8(qkv.float(), segments, SCALE, LINEAR_RUNS[variant])
        assert out.dtype == dtype
        assert relative_error(out, expected) < 1e-2
        # One probability of five keys that rounds the other way is a step of 2^-4 in a fifth of the sum.
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2.5e-2)
        uncovered = expected_lse.eq(0).all(0)
        assert not out[uncovered].any() and not lse[:, uncovered].any()

    @pytest.mark.parametrize(("spread", "bias"), [(1.0, 0.0), (1.0, 3.0), (3.0, 0.0)])
    def test_errs_as_e4m3_does(self, variant: int, layout: str, dtype: torch.dtype, spread: float, bias: float) -> None:
        segments, rows = LAYOUTS[layout]
        qkv = sample(rows, dtype, spread=spread, bias=bias)
        out, lse = run(qkv, segments, variant)
        expected, expected_lse = oracle(qkv, segments)
        assert relative_error(out, expected) < 1.25 * E4M3 * (2 * spread**2 + 2.3) ** 0.5
        assert (lse - expected_lse).abs().max() < 8 * E4M3 * spread


@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("layout", SHORT)
def test_short_segments_are_their_emulation(layout: str, heads: int) -> None:
    segments, rows = SHORT[layout]
    for dtype in (torch.bfloat16, torch.float16):
        qkv = sample(rows, dtype, heads, bias=1.0)
        out, lse = run(qkv, segments)
        expected, expected_lse = reference_attention_fp8(qkv.float(), segments, SCALE)
        assert relative_error(out, expected) < 1e-2
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2.5e-2)
        uncovered = expected_lse.eq(0).all(0)
        assert not out[uncovered].any() and not lse[:, uncovered].any()
        for _ in range(3):
            again = run(qkv, segments)
            assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", range(3))
def test_not_finite_stays_in_its_segment_and_head(part: int, value: float) -> None:
    """Of short segments, whose blocks of keys take the places of the one before them."""
    qkv, segments = sample(9 * 888, torch.bfloat16, heads=16), Segments.batched(9, 888)
    qkv[4 * 888 + 700, part, 7, 5] = value
    out, _ = run(qkv, segments)
    expected = torch.zeros_like(out[..., 0], dtype=torch.bool)
    expected[4 * 888 + 700 if part == 0 else slice(4 * 888, 5 * 888), 7] = True
    assert torch.equal(~out.isfinite().all(-1), expected)


@pytest.mark.parametrize("rows", [7_105, 36_409])
def test_long_rows(rows: int) -> None:
    qkv, segments = sample(rows, torch.bfloat16, heads=2), Segments.global_(1, rows)
    out, lse = run(qkv, segments)
    some = torch.linspace(0, rows - 1, 500).long().to(DEVICE)
    q, k, v = qkv.double().unbind(1)
    scores = torch.einsum("qhc,khc->hqk", q[some], k) * SCALE
    expected = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v)
    assert relative_error(out[some], expected) < 1.25 * E4M3 * 4.3**0.5
    # Over so many keys roundings even out; sums of e4m3 products that were kept in 14 bits would not.
    assert (lse[:, some] - scores.logsumexp(-1)).mean().abs() < 5e-3
    assert (lse[:, some] - scores.logsumexp(-1)).abs().max() < 5e-2


def test_scores_that_grow_along_the_keys() -> None:
    """Every block of keys passes the last one's maximum: the reference must follow, also from far below zero."""
    rows = 1_000
    qkv = sample(rows, torch.bfloat16)
    qkv[:, 0] = 1.0
    qkv[:, 1] = torch.linspace(-40, 40, rows, device=DEVICE)[:, None, None]
    for segments in (Segments.global_(1, rows), Segments.batched(10, 100)):
        for flipped in (False, True):
            given = qkv.clone()
            given[:, 1] = qkv[:, 1].flip(0) if flipped else qkv[:, 1]
            out, lse = run(given, segments)
            expected, expected_lse = reference_attention_fp8(given.float(), segments, SCALE)
            assert relative_error(out, expected) < 2e-2
            torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-2)


def test_one_key_that_takes_all() -> None:
    """Of all rows the last is every query's key, far above the others: its value comes out as e4m3 has it."""
    rows = 300
    qkv = sample(rows, torch.bfloat16)
    qkv[:, 0] = 8.0
    qkv[-1, 1] = 8.0
    qkv[-1, 2] = torch.arange(64, device=DEVICE) % 8 + 8.0
    out, _ = run(qkv, Segments.global_(1, rows))
    assert torch.equal(out, qkv[-1:, 2].expand(rows, -1, -1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", range(3))
def test_not_finite_in_not_finite_out(part: int, value: float) -> None:
    qkv, segments = sample(300, torch.bfloat16), Segments.batched(2, 150)
    qkv[200, part, 1, 5] = value
    out, _ = run(qkv, segments)
    bad = ~out.isfinite().all(-1)
    expected = torch.zeros_like(bad)
    if part == 0:
        expected[200, 1] = True
    else:
        expected[150:, 1] = True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_are_bitwise_equal(layout: str) -> None:
    segments, rows = LAYOUTS[layout]
    qkv = sample(rows, torch.bfloat16, heads=12)
    first = run(qkv, segments)
    for _ in range(3):
        again = run(qkv, segments)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("layout", ["odd", "129", "frame", "gaps", "long gaps"])
def test_reads_strided_rows_and_nothing_else(layout: str) -> None:
    segments, rows = LAYOUTS[layout]
    qkv = sample(rows, torch.bfloat16)
    expected = run(qkv, segments)
    inside = expected[1].ne(0).any(0)
    wide = torch.full((rows, 3, 3, 96), float("nan"), device=DEVICE, dtype=torch.bfloat16)[..., 16:80]
    wide.copy_(qkv)
    wide[~inside] = float("nan")
    found = run(wide, segments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_operator_compiles_and_is_captured() -> None:
    segments = Segments.global_(1, 1777)
    qkv = sample(1777, torch.bfloat16)
    torch.library.opcheck(torch.ops.any4d_fast.attention_fp8_forward.default, (qkv, segments.as_list(), SCALE, "cuda"))

    def call(x: Tensor) -> Tensor:
        found = attention_fp8(x, segments=segments, backend="cuda")
        assert isinstance(found, Tensor)
        return found

    expected = call(qkv)
    assert torch.equal(torch.compile(call, fullgraph=True)(qkv), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(qkv)
    found.fill_(float("nan"))
    graph.replay()
    assert torch.equal(found, expected)
