"""attention: the reference against a plain softmax in float64, the public function on the CPU, its errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from any4d_fast import backends
from any4d_fast.ops.attention import Segments, attention, attention_scale
from any4d_fast.reference.attention import attention as reference_attention
from any4d_fast.reference.attention import merge_segments, split_segments
from any4d_fast.testing import assert_within_budget, gradients

LAYOUTS = {
    "global": (Segments.global_(2, 7), 14),
    "frame": (Segments.frame(2, 3, 5), 32),
    "frame without extra rows": (Segments.frame(2, 3, 5, extra=0), 30),
    "batched": (Segments.batched(3, 4), 12),
    "one row": (Segments(length=1), 1),
    "odd": (Segments(length=3, count=3, stride=5, groups=2, group_stride=17, start=2), 35),
    "gap cut off": (Segments(length=3, count=2, stride=5, groups=2, group_stride=8), 16),
}


def member_rows(segments: Segments) -> list[list[int]]:
    """Row numbers of every segment, straight from the definition."""
    return [
        [segments.start + g * segments.group_stride + i * segments.stride + r for r in range(segments.length)]
        for g in range(segments.groups)
        for i in range(segments.count)
    ]


def plain(qkv: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """Attention by loops over segments and heads."""
    rows, _, heads, _ = qkv.shape
    out, lse = torch.zeros_like(qkv[:, 0]), qkv.new_zeros(heads, rows)
    for members in member_rows(segments):
        for head in range(heads):
            q, k, v = qkv[members, :, head].unbind(1)
            scores = scale * q @ k.T
            out[members, head] = scores.softmax(-1) @ v
            lse[head, members] = scores.logsumexp(-1)
    return out, lse


def sample(rows: int, heads: int = 2, head_dim: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_is_softmax_attention(layout: str) -> None:
    segments, rows = LAYOUTS[layout]
    qkv = sample(rows)
    out, lse = reference_attention(qkv, segments, 0.3, return_lse=True)
    expected_out, expected_lse = plain(qkv, segments, 0.3)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(reference_attention(qkv, segments, 0.3), expected_out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_gradients(layout: str) -> None:
    segments, rows = LAYOUTS[layout]
    qkv = sample(rows, heads=1, head_dim=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference_attention(x, segments, 0.7, return_lse=True), (qkv,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_and_merge_are_inverse(layout: str) -> None:
    segments, rows = LAYOUTS[layout]
    x = torch.arange(1.0, rows + 1)[:, None]
    covered = torch.zeros(rows, 1)
    covered[sum(member_rows(segments), [])] = 1
    torch.testing.assert_close(merge_segments(split_segments(x, segments), segments, rows), x * covered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_function_on_the_cpu(layout: str, dtype: torch.dtype) -> None:
    segments, rows = LAYOUTS[layout]
    qkv = sample(rows, head_dim=32, dtype=dtype)
    oracle, _ = plain(qkv.double(), segments, 32**-0.5)
    baseline, _ = plain(qkv, segments, 32**-0.5)
    out = attention(qkv, segments=segments, backend="eager")
    assert out.dtype == dtype
    assert_within_budget(out, oracle, baseline)
    out, lse = attention(qkv, segments=segments, backend="eager", return_lse=True)
    assert lse.shape == (2, rows) and lse.dtype == torch.float32
    assert_within_budget(out, oracle, baseline)


def test_rows_outside_segments_are_not_read_and_get_zeros() -> None:
    segments, rows = LAYOUTS["frame"]
    qkv = sample(rows, head_dim=32, dtype=torch.float32)
    qkv[15] = qkv[31] = float("nan")
    (grad,) = gradients(lambda x: attention(x, segments=segments, backend="eager"), [qkv], [torch.ones(rows, 2, 32)])
    out = attention(qkv, segments=segments, backend="eager")
    assert grad is not None and out.isfinite().all() and grad.isfinite().all()
    assert not out[[15, 31]].any() and not grad[[15, 31]].any()


@pytest.mark.parametrize("segments", [Segments.global_(0, 5), Segments.batched(3, 0), Segments.frame(1, 0, 5, extra=2)])
def test_no_segments(segments: Segments) -> None:
    qkv = torch.full((2, 3, 2, 32), float("nan"), requires_grad=True)
    out, lse = attention(qkv, segments=segments, backend="eager", return_lse=True)
    assert out.shape == (2, 2, 32) and lse.shape == (2, 2)
    assert not out.any() and not lse.any()
    out.sum().backward()
    assert not qkv.grad.any()


def test_no_rows() -> None:
    out = attention(torch.empty(0, 3, 2, 32), segments=Segments.global_(1, 0), backend="eager")
    assert out.shape == (0, 2, 32)


def test_compiles_eagerly_with_dynamic_length() -> None:
    def call(qkv: Tensor) -> Tensor:
        return attention(qkv, segments=Segments.global_(1, qkv.shape[0]), backend="eager")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9):
        qkv = sample(rows, head_dim=32, dtype=torch.float32)
        torch.testing.assert_close(compiled(qkv), call(qkv))


def test_scale_of_upstream() -> None:
    assert attention_scale(64, 100) == 0.125
    assert attention_scale(64, 100, scalable_softmax=True) == pytest.approx(0.125 * math.log(100))
    entropy = math.sqrt(1.4 * math.log(888) / math.log(444))
    assert attention_scale(64, 888, entropy_scaling=True) == pytest.approx(0.125 * entropy)
    both = attention_scale(64, 888, scalable_softmax=True, entropy_scaling=True)
    assert both == pytest.approx(0.125 * math.log(888) * entropy)
    with pytest.raises(ValueError, match="length: expected at least 1"):
        attention_scale(64, 0, scalable_softmax=True)
    with pytest.raises(ValueError, match="base_token_count: expected at least 2"):
        attention_scale(64, 8, entropy_scaling=True, base_token_count=1)


@pytest.mark.parametrize(
    ("qkv", "segments", "message"),
    [
        (torch.zeros(4, 3, 64), Segments(4), r"qkv: expected \[rows, 3, heads, head_dim\], got \[4, 3, 64\] float32"),
        (torch.zeros(4, 2, 1, 64), Segments(4), r"qkv: expected \[rows, 3, heads, head_dim\], got \[4, 2, 1, 64\]"),
        (
            torch.zeros(4, 3, 1, 64, dtype=torch.int64),
            Segments(4),
            "qkv: expected a floating-point dtype, got .*64",
        ),
        (torch.zeros(4, 3, 0, 64), Segments(4), "qkv: expected at least one head"),
        (torch.zeros(4, 3, 64, 2).transpose(2, 3), Segments(4), "qkv: expected a contiguous last dimension"),
        (torch.zeros(4, 3, 1, 64), Segments(5), "segments: expected to end within qkv's 4 rows"),
    ],
)
def test_errors_name_the_argument(qkv: Tensor, segments: Segments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(qkv, segments=segments)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_scale_must_be_finite_and_not_negative(scale: float) -> None:
    with pytest.raises(ValueError, match="scale: expected a finite factor"):
        attention(torch.zeros(4, 3, 1, 64), segments=Segments(4), scale=scale)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": -1}, "segments.length: expected 0 or more"),
        ({"length": 4, "count": 2, "stride": 3}, "segments.stride: expected at least the length 4, got 3"),
        ({"length": 4, "groups": 2, "group_stride": 3}, "segments.group_stride: expected at least 4"),
    ],
)
def test_segments_must_not_overlap(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments(**fields)


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_library_backends_say_why_not(backend: str) -> None:
    with pytest.raises(backends.BackendError, match=f"backend='{backend}' cannot run this call: tensors are on cpu"):
        attention(torch.zeros(4, 3, 1, 64), segments=Segments(4), backend=backend)


def test_triton_backend_says_why_not() -> None:
    with pytest.raises(backends.BackendError, match="head_dim 40 is not one of 32, 48, 64, 80, 96, 128"):
        attention(torch.zeros(4, 3, 1, 40), segments=Segments(4), backend="triton")
    with pytest.raises(backends.BackendError, match="float64 is not bfloat16"):
        attention(torch.zeros(4, 3, 1, 64, dtype=torch.float64), segments=Segments(4), backend="triton")
