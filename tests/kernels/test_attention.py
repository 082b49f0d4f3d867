"""attention's Triton kernels against the float64 oracle: in the interpreter, and on a GPU with real sizes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast.ops.attention import HEAD_DIMS, Segments, attention
from any4d_fast.reference.attention import attention as reference_attention
from any4d_fast.testing import assert_within_budget, gradients, poisoned_empty
from tests.kernels_common import DEVICE, GPU, gpu_only, kernel_test

pytestmark = kernel_test

SCALE = 0.2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# On a GPU the kernels' exponentials come from the special function unit, whose ex2.approx errs by 2 ulp (PTX ISA) where
# PyTorch's float32 exp errs by 1: half as much again on top of the project's factor of 2. 16 bits hide it.
FLOAT32_FACTOR = 3.0 if GPU else 2.0


def factor(dtype: torch.dtype) -> float:
    return FLOAT32_FACTOR if dtype == torch.float32 else 2.0


ODD = Segments(length=5, count=3, stride=7, groups=2, group_stride=30, start=3)
SEGMENTS = {
    "1": (Segments.global_(3, 1), 3),
    "7": (Segments.batched(3, 7), 21),
    "64": (Segments.frame(2, 1, 64), 130),
    "65": (Segments(length=65, count=2, stride=70, start=1), 150),
    "100": (Segments.frame(1, 2, 100), 201),
    "129": (Segments.global_(1, 129), 129),
    "odd": (ODD, 70),
}


def sample(rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rows)
    return torch.randn(rows, 3, heads, head_dim, generator=generator).to(DEVICE, dtype)


def both(x: Tensor, segments: Segments) -> Any:
    return reference_attention(x, segments, SCALE, return_lse=True)


def check(qkv: Tensor, segments: Segments, deterministic: bool = False, with_lse: bool = True) -> None:
    """Forward and every gradient of the triton backend within the budget; rows of no segment exactly zero."""
    rows, _, heads, head_dim = qkv.shape
    generator = torch.Generator().manual_seed(rows)
    grad_out = torch.randn(rows, heads, head_dim, generator=generator).to(qkv.device, qkv.dtype)
    grad_lse = torch.randn(heads, rows, generator=generator).to(qkv.device) * with_lse

    def ours(x: Tensor) -> Any:
        return attention(
            x, segments=segments, scale=SCALE, backend="triton", deterministic=deterministic, return_lse=True
        )

    with poisoned_empty():
        out, lse = ours(qkv)
        (grad,) = gradients(ours, [qkv], [grad_out, grad_lse])
    oracle, oracle_lse = both(qkv.double(), segments)
    (oracle_grad,) = gradients(lambda x: both(x, segments), [qkv.double()], [grad_out, grad_lse])
    (baseline_grad,) = gradients(lambda x: both(x, segments), [qkv], [grad_out, grad_lse])
    assert grad is not None and oracle_grad is not None and baseline_grad is not None
    assert out.dtype == qkv.dtype and lse.dtype == torch.float32
    assert_within_budget(out, oracle, reference_attention(qkv, segments, SCALE), factor=factor(qkv.dtype), name="out")
    assert_within_budget(lse, oracle_lse, both(qkv.float(), segments)[1], factor=FLOAT32_FACTOR, name="lse")
    uncovered = oracle_lse.eq(0).all(0)
    assert not out[uncovered].any() and not lse[:, uncovered].any() and not grad[uncovered].any()
    if qkv.dtype == torch.float32 and GPU:
        # With one or two keys dq and dk are differences of nearly equal numbers: noise, unless seen beside dv.
        # The error of a probability enters twice: as a factor of its own gradient, and in dv.
        assert_within_budget(grad, oracle_grad, baseline_grad, factor=FLOAT32_FACTOR + 1, name="gradient")
        return
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_within_budget(grad[:, i], oracle_grad[:, i], baseline_grad[:, i], name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SEGMENTS)
def test_matches_oracle(layout: str, dtype: torch.dtype) -> None:
    segments, rows = SEGMENTS[layout]
    check(sample(rows, 2, 64, dtype), segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [d for d in HEAD_DIMS if d != 64])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(sample(42, 1, head_dim, dtype), Segments.frame(1, 1, 41), deterministic=True)


def test_without_gradient_of_the_log_sum_exp() -> None:
    segments, rows = SEGMENTS["odd"]
    qkv = sample(rows, 2, 64, torch.float32).requires_grad_()
    out = attention(qkv, segments=segments, scale=SCALE, backend="triton")
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.sum(), qkv)  # an expanded, zero-stride gradient
    (expected,) = gradients(lambda x: reference_attention(x, segments, SCALE), [qkv.double()], [torch.ones_like(out)])
    (baseline,) = gradients(lambda x: reference_attention(x, segments, SCALE), [qkv], [torch.ones_like(out)])
    assert expected is not None and baseline is not None
    assert_within_budget(grad, expected, baseline)


def test_only_the_log_sum_exp_is_used() -> None:
    segments, rows = SEGMENTS["odd"]
    qkv = sample(rows, 1, 64, torch.float32).requires_grad_()
    _, lse = attention(qkv, segments=segments, scale=SCALE, backend="triton", return_lse=True)
    (grad,) = torch.autograd.grad(lse.sum(), qkv)
    (expected,) = torch.autograd.grad(both(qkv.double(), segments)[1].sum(), qkv)
    # Two roundings of float32 in the forward's log-sum-exp and the backward's probabilities.
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_strided_rows() -> None:
    segments, rows = SEGMENTS["odd"]
    wide = sample(rows, 4, 96, torch.bfloat16)
    check(wide[:, :, 1::2, 16:80], segments)
    check(sample(2 * rows, 2, 64, torch.float32)[::2], segments)


def test_rows_outside_segments_are_not_read() -> None:
    segments = Segments.frame(2, 2, 9)
    qkv = sample(38, 1, 64, torch.bfloat16)
    qkv[[18, 37]] = float("nan")
    grad = torch.ones(38, 1, 64, device=DEVICE)
    (found,) = gradients(lambda x: attention(x, segments=segments, backend="triton"), [qkv], [grad])
    assert found is not None and found.isfinite().all() and not found[[18, 37]].any()


@pytest.mark.parametrize("segments", [Segments.global_(0, 5), Segments.batched(3, 0)])
@pytest.mark.parametrize("rows", [0, 4])
def test_empty(segments: Segments, rows: int) -> None:
    qkv = torch.full((rows, 3, 2, 64), float("nan"), device=DEVICE).requires_grad_()
    with poisoned_empty():
        out, lse = attention(qkv, segments=segments, backend="triton", return_lse=True)
        (grad,) = torch.autograd.grad(out.sum() + lse.sum(), qkv)
    assert out.shape == (rows, 2, 64) and lse.shape == (2, rows) and grad.shape == qkv.shape
    assert not out.any() and not lse.any() and not grad.any()


@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_extreme_scales(scale: float) -> None:
    qkv = sample(70, 1, 64, torch.float32)
    segments = Segments.global_(1, 70)
    out = attention(qkv, segments=segments, scale=scale, backend="triton")
    oracle = reference_attention(qkv.double(), segments, scale)
    assert_within_budget(out, oracle, reference_attention(qkv, segments, scale), factor=FLOAT32_FACTOR)


def test_very_negative_scores() -> None:
    """A log-sum-exp far below -128 in log2 units: exp2(-lse) is infinite, and absent keys must not see it."""
    qkv = torch.ones(70, 3, 1, 64, device=DEVICE)
    qkv[:, 0] = -40.0 + 0.01 * sample(70, 1, 64, torch.float32)[:, 0]
    segments = Segments.global_(1, 70)
    for tiles in backward_variants():
        assert direct_gradient(qkv, segments, tiles).isfinite().all()


def forward_variants() -> list[Any]:
    from any4d_fast.kernels._attention_tiles import ForwardTile

    flags = ({}, {"tma": True}, {"lazy": True}, {"polynomial": True}, {"tma": True, "lazy": True, "polynomial": True})
    return [ForwardTile(64, 32, 4, 2, **flag) for flag in flags]


def backward_variants() -> list[Any]:
    from any4d_fast.kernels._attention_tiles import BackwardTiles, KeyTile, QueryTile

    query = QueryTile(64, 32, 4, 2)
    # The copy engine's addition does not run in the interpreter.
    modes = [{}, {"tma": True}, {"single": True}, {"tma": True, "single": True}]
    modes += [{"tma": True, "single": True, "reduce": True}] if GPU else []
    return [
        BackwardTiles(KeyTile(32, 64, 4, 2, **mode), QueryTile(64, 32, 4, 2, tma=True) if mode else query)
        for mode in modes
    ]


def direct_gradient(qkv: Tensor, segments: Segments, tiles: Any) -> Tensor:
    from any4d_fast.kernels import attention as forward_kernels
    from any4d_fast.kernels import attention_backward as backward_kernels

    listed = segments.as_list()
    with poisoned_empty():
        out, lse = forward_kernels.forward(qkv, listed, SCALE)
        ones = torch.linspace(-1, 2, out.numel(), device=qkv.device, dtype=qkv.dtype).view_as(out)
        return backward_kernels.backward(ones, None, qkv, out, lse, listed, SCALE, False, tiles)


@pytest.mark.parametrize("head_dim", [48, 64])
@pytest.mark.parametrize("index", range(5))
def test_forward_variants(index: int, head_dim: int) -> None:
    from any4d_fast.kernels import attention as kernels

    qkv = sample(70, 2, head_dim, torch.bfloat16)
    out, lse = kernels.forward(qkv, ODD.as_list(), SCALE, forward_variants()[index])
    oracle, oracle_lse = both(qkv.double(), ODD)
    assert_within_budget(out, oracle, reference_attention(qkv, ODD, SCALE))
    # The polynomial's relative error of 7.5e-5 is the largest of all variants; the log-sum-exp is of order 1.
    assert (lse - oracle_lse).abs().max() < 1e-4


@pytest.mark.parametrize("head_dim", [48, 64])
@pytest.mark.parametrize("index", range(5 if GPU else 4))
def test_backward_variants(index: int, head_dim: int) -> None:
    qkv = sample(70, 2, head_dim, torch.float32)
    grad = direct_gradient(qkv, ODD, backward_variants()[index])
    cotangent = torch.linspace(-1, 2, grad[:, 0].numel(), device=DEVICE).view_as(grad[:, 0])
    (oracle,) = gradients(lambda x: reference_attention(x, ODD, SCALE), [qkv.double()], [cotangent])
    (baseline,) = gradients(lambda x: reference_attention(x, ODD, SCALE), [qkv], [cotangent])
    assert oracle is not None and baseline is not None
    assert_within_budget(grad, oracle, baseline)


def test_tiles_of_a_backward_must_fit() -> None:
    from any4d_fast.kernels._attention_tiles import BackwardTiles, KeyTile, QueryTile

    with pytest.raises(ValueError, match="query.queries: expected a multiple of key.queries"):
        BackwardTiles(KeyTile(64, 64, 4, 2), QueryTile(32, 64, 4, 2))


def test_deterministic_backward_is_bitwise_equal() -> None:
    segments, rows = SEGMENTS["100"]
    qkv = sample(rows, 2, 64, torch.bfloat16).requires_grad_()
    found = []
    for _ in range(2):
        out = attention(qkv, segments=segments, backend="triton", deterministic=True)
        assert isinstance(out, Tensor)
        found.append(torch.autograd.grad(out.square().sum(), qkv)[0])
    assert torch.equal(found[0], found[1])


def test_operators_are_well_behaved() -> None:
    segments = SEGMENTS["odd"][0].as_list()
    qkv = sample(70, 2, 64, torch.float32)
    ops = torch.ops.any4d_fast
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.attention_forward.default, (qkv, segments, SCALE), test_utils=checks)
    out, lse = ops.attention_forward(qkv, segments, SCALE)
    for grad_lse in (None, torch.ones_like(lse)):
        arguments = (torch.ones_like(out), grad_lse, qkv, out, lse, segments, SCALE, True)
        torch.library.opcheck(ops.attention_backward.default, arguments, test_utils=checks)


def test_second_derivative_is_refused() -> None:
    qkv = sample(5, 1, 64, torch.float32).requires_grad_()
    out = attention(qkv, segments=Segments.global_(1, 5), backend="triton")
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("return_lse", [False, True])
def test_compiles_with_dynamic_length(return_lse: bool) -> None:
    def call(qkv: Tensor) -> Any:
        rows = qkv.shape[0] - 1
        return attention(qkv, segments=Segments.frame(1, 1, rows), backend="triton", return_lse=return_lse)

    def loss(found: Any) -> Tensor:
        return found.square().sum() if isinstance(found, Tensor) else found[0].square().sum() + found[1].sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 10):
        qkv = sample(rows, 1, 64, torch.float32).requires_grad_()
        expected, found = call(qkv), compiled(qkv)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(loss(x), qkv)[0] for x in (expected, found)]
        torch.testing.assert_close(grads[1], grads[0])


def sdpa_oracle(qkv: Tensor, segments: Segments, rows: Tensor) -> Tensor:
    """Exact output of some rows of the last segment, without the whole score matrix."""
    last = qkv[segments.end - segments.length : segments.end].double()
    q, k, v = last.permute(1, 2, 0, 3)
    return ((q[:, rows] @ k.transpose(1, 2) * SCALE).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "segments",
    [
        Segments.global_(1, 887),
        Segments.frame(1, 8, 888),
        Segments.batched(8, 889),
        Segments.global_(2, 1777),
        Segments.global_(1, 7105),
    ],
    ids=str,
)
class TestRealSizes:
    """Every configuration's numbers on the real compiler: several seeds and lengths."""

    pytestmark = gpu_only

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_matches_oracle(self, segments: Segments, seed: int, dtype: torch.dtype, deterministic: bool) -> None:
        check(sample(segments.end + 1, 2, 64, dtype, seed), segments, deterministic)


@pytest.mark.parametrize("backend", ["triton", "cudnn", "flash"])
@pytest.mark.parametrize(("layout", "dtype"), list(itertools.product(["100", "129", "odd"], DTYPES[1:])))
class TestLibraries:
    pytestmark = gpu_only

    def test_backend_matches_oracle(self, layout: str, dtype: torch.dtype, backend: str) -> None:
        segments, rows = SEGMENTS[layout]
        qkv = sample(rows, 2, 64, dtype)
        grad_out = torch.ones(rows, 2, 64, device=DEVICE, dtype=dtype)

        def ours(x: Tensor) -> Any:
            return attention(x, segments=segments, scale=SCALE, backend=backend)

        oracle = reference_attention(qkv.double(), segments, SCALE)
        assert_within_budget(ours(qkv), oracle, reference_attention(qkv, segments, SCALE))
        (grad,) = gradients(ours, [qkv], [grad_out])
        (expected,) = gradients(lambda x: reference_attention(x, segments, SCALE), [qkv.double()], [grad_out])
        (baseline,) = gradients(lambda x: both(x, segments)[0], [qkv], [grad_out])
        assert grad is not None and expected is not None and baseline is not None
        assert_within_budget(grad, expected, baseline)


@pytest.mark.skipif(
    not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a CUDA device of compute capability 9"
)
@pytest.mark.parametrize("segments", [ODD, Segments.frame(2, 3, 887), Segments.global_(1, 1777)], ids=str)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("groups", [2, 3])
class TestHopper:
    pytestmark = gpu_only

    def test_matches_oracle(self, groups: int, overlap: bool, segments: Segments) -> None:
        from any4d_fast.kernels import attention as kernels
        from any4d_fast.kernels._attention_tiles import HopperTile

        for seed, head_dim in itertools.product(range(3), (48, 64)):
            qkv = sample(segments.end + 2, 2, head_dim, torch.bfloat16, seed)
            out, lse = kernels.forward(qkv, segments.as_list(), SCALE, HopperTile(groups, 64, 128, 2, overlap))
            oracle, oracle_lse = both(qkv.double(), segments)
            assert_within_budget(out, oracle, reference_attention(qkv, segments, SCALE), name="out")
            assert_within_budget(lse, oracle_lse, both(qkv.float(), segments)[1], name="lse")


class TestLargeBuffers:
    pytestmark = gpu_only

    def test_global_attention_of_41_views(self) -> None:
        segments = Segments.global_(1, 36_409)
        qkv = sample(36_409, 12, 64, torch.bfloat16)
        out = attention(qkv, segments=segments, scale=SCALE, backend="triton")
        rows = torch.tensor([0, 1, 18_000, 36_400, 36_408], device=DEVICE)
        oracle = sdpa_oracle(qkv, segments, rows)
        baseline = reference_attention(qkv, segments, SCALE)
        assert isinstance(out, Tensor) and isinstance(baseline, Tensor)
        assert_within_budget(out[rows], oracle, baseline[rows])

    def test_offsets_beyond_32_bits(self) -> None:
        """1,050,000 rows of 3 x 12 x 64 are 2.4e9 elements; the last segment lies beyond 2^31."""
        segments = Segments(length=100, count=10_000, stride=105)
        qkv = torch.zeros(1_050_000, 3, 12, 64, device=DEVICE, dtype=torch.bfloat16)
        qkv[-205:] = sample(205, 12, 64, torch.bfloat16)
        assert qkv.numel() > 2**31
        qkv.requires_grad_()
        out = attention(qkv, segments=segments, scale=SCALE, backend="triton")
        assert isinstance(out, Tensor)
        tail = qkv.detach()[-105:-5].clone().requires_grad_()
        alone = Segments.global_(1, 100)
        oracle = reference_attention(tail.double(), alone, SCALE)
        assert isinstance(oracle, Tensor)
        expected = reference_attention(tail, alone, SCALE)
        assert isinstance(expected, Tensor)
        assert_within_budget(out[-105:-5], oracle, expected)
        out[-105:-5].float().square().sum().backward()
        (oracle_grad,) = torch.autograd.grad(oracle.square().sum(), tail)
        (baseline_grad,) = torch.autograd.grad(expected.float().square().sum(), tail)
        assert qkv.grad is not None
        assert_within_budget(qkv.grad[-105:-5], oracle_grad, baseline_grad)
        assert not qkv.grad[-5:].any()
