"""attention's kernels against the float64 oracle: Triton's in the interpreter, and all on a GPU with real sizes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast.ops.attention import HEAD_DIMS, Segments, attention
from any4d_fast.reference.attention import attention as reference_attention
from any4d_fast.testing import assert_within_budget, gradients, poisoned_empty
from tests.attention_checks import (
    BACKEND_DTYPES,
    DTYPES,
    EXACTEST,
    ODD,
    SCALE,
    SEGMENTS,
    both,
    check,
    factor,
    sample,
    skip_unless_offered,
)
from tests.kernels_common import DEVICE, GPU, KERNEL_BACKENDS, gpu_only, kernel_test

pytestmark = kernel_test


@pytest.fixture(params=KERNEL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    skip_unless_offered(name)
    return name


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
@pytest.mark.parametrize("layout", SEGMENTS)
def test_matches_oracle(layout: str, backend: str, dtype: torch.dtype) -> None:
    skip_unless_offered(backend)
    segments, rows = SEGMENTS[layout]
    check(sample(rows, 2, 64, dtype), segments, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [d for d in HEAD_DIMS if d != 64])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(sample(42, 1, head_dim, dtype), Segments.frame(1, 1, 41), "triton", deterministic=True)


def test_without_gradient_of_the_log_sum_exp(backend: str) -> None:
    segments, rows = SEGMENTS["odd"]
    qkv = sample(rows, 2, 64, EXACTEST[backend]).requires_grad_()
    out = attention(qkv, segments=segments, scale=SCALE, backend=backend)
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.sum(), qkv)  # an expanded, zero-stride gradient
    (expected,) = gradients(lambda x: reference_attention(x, segments, SCALE), [qkv.double()], [torch.ones_like(out)])
    (baseline,) = gradients(lambda x: reference_attention(x, segments, SCALE), [qkv], [torch.ones_like(out)])
    assert expected is not None and baseline is not None
    assert_within_budget(grad, expected, baseline)


def test_only_the_log_sum_exp_is_used(backend: str) -> None:
    segments, rows = SEGMENTS["odd"]
    qkv = sample(rows, 1, 64, EXACTEST[backend]).requires_grad_()
    _, lse = attention(qkv, segments=segments, scale=SCALE, backend=backend, return_lse=True)
    (grad,) = torch.autograd.grad(lse.sum(), qkv)
    (expected,) = torch.autograd.grad(both(qkv.double(), segments)[1].sum(), qkv)
    if qkv.dtype == torch.float32:
        # Two roundings of float32 in the forward's log-sum-exp and the backward's probabilities.
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
        return
    (baseline,) = torch.autograd.grad(both(qkv, segments)[1].sum(), qkv)
    assert_within_budget(grad, expected, baseline)


def test_strided_rows(backend: str) -> None:
    segments, rows = SEGMENTS["odd"]
    wide = sample(rows, 4, 96, torch.bfloat16)
    check(wide[:, :, 1::2, 16:80], segments, backend)
    check(sample(2 * rows, 2, 64, EXACTEST[backend])[::2], segments, backend)


def test_rows_outside_segments_are_not_read(backend: str) -> None:
    segments = Segments.frame(2, 2, 9)
    qkv = sample(38, 1, 64, torch.bfloat16)
    qkv[[18, 37]] = float("nan")
    grad = torch.ones(38, 1, 64, device=DEVICE)
    (found,) = gradients(lambda x: attention(x, segments=segments, backend=backend), [qkv], [grad])
    assert found is not None and found.isfinite().all() and not found[[18, 37]].any()


@pytest.mark.parametrize("segments", [Segments.global_(0, 5), Segments.batched(3, 0)])
@pytest.mark.parametrize("rows", [0, 4])
def test_empty(segments: Segments, rows: int, backend: str) -> None:
    qkv = torch.full((rows, 3, 2, 64), float("nan"), device=DEVICE, dtype=EXACTEST[backend]).requires_grad_()
    with poisoned_empty():
        out, lse = attention(qkv, segments=segments, backend=backend, return_lse=True)
        (grad,) = torch.autograd.grad(out.sum() + lse.sum(), qkv)
    assert out.shape == (rows, 2, 64) and lse.shape == (2, rows) and grad.shape == qkv.shape
    assert not out.any() and not lse.any() and not grad.any()


@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_extreme_scales(scale: float, backend: str) -> None:
    qkv = sample(70, 1, 64, EXACTEST[backend])
    segments = Segments.global_(1, 70)
    out = attention(qkv, segments=segments, scale=scale, backend=backend)
    oracle = reference_attention(qkv.double(), segments, scale)
    # PyTorch's fused attention makes NaN of a scale of 0; with the log-sum-exp its plain form runs.
    plain, _ = reference_attention(qkv, segments, scale, return_lse=True)
    assert_within_budget(out, oracle, plain, factor=factor(qkv.dtype))


def very_negative() -> Tensor:
    """A log-sum-exp far below -128 in log2 units: exp2(-lse) is infinite, and absent keys must not see it."""
    qkv = torch.ones(70, 3, 1, 64, device=DEVICE)
    qkv[:, 0] = -40.0 + 0.01 * sample(70, 1, 64, torch.float32)[:, 0]
    return qkv


def test_very_negative_scores(backend: str) -> None:
    qkv = very_negative().to(EXACTEST[backend])
    for deterministic in (False, True):
        out = attention(
            qkv.requires_grad_(), segments=Segments.global_(1, 70), backend=backend, deterministic=deterministic
        )
        assert isinstance(out, Tensor)
        (grad,) = torch.autograd.grad(out.square().sum(), qkv)
        # Every value is 1, and so is every average of them, but for the roundings of the weights.
        torch.testing.assert_close(out, torch.ones_like(out), rtol=2**-7, atol=0)
        assert grad.isfinite().all()


def test_very_negative_scores_in_every_variant() -> None:
    for tiles in backward_variants():
        assert direct_gradient(very_negative(), Segments.global_(1, 70), tiles).isfinite().all()


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


def test_operators_are_well_behaved(backend: str) -> None:
    segments = SEGMENTS["odd"][0].as_list()
    qkv = sample(70, 2, 64, EXACTEST[backend])
    ops = torch.ops.any4d_fast
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.attention_forward.default, (qkv, segments, SCALE, backend), test_utils=checks)
    out, lse = ops.attention_forward(qkv, segments, SCALE, backend)
    for grad_lse in (None, torch.ones_like(lse)):
        arguments = (torch.ones_like(out), grad_lse, qkv, out, lse, segments, SCALE, True, backend)
        torch.library.opcheck(ops.attention_backward.default, arguments, test_utils=checks)


def test_second_derivative_is_refused(backend: str) -> None:
    qkv = sample(5, 1, 64, EXACTEST[backend]).requires_grad_()
    out = attention(qkv, segments=Segments.global_(1, 5), backend=backend)
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("return_lse", [False, True])
def test_compiles_with_dynamic_length(return_lse: bool, backend: str) -> None:
    def call(qkv: Tensor) -> Any:
        segments = Segments.frame(1, 1, qkv.shape[0] - 1)
        return attention(qkv, segments=segments, backend=backend, deterministic=True, return_lse=return_lse)

    def loss(found: Any) -> Tensor:
        return found.square().sum() if isinstance(found, Tensor) else found[0].square().sum() + found[1].sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 10):
        qkv = sample(rows, 1, 64, EXACTEST[backend]).requires_grad_()
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
    def test_matches_oracle(
        self, segments: Segments, seed: int, dtype: torch.dtype, deterministic: bool, backend: str
    ) -> None:
        check(sample(segments.end + 1, 2, 64, dtype, seed), segments, backend, deterministic)


@pytest.mark.parametrize("backend", ["triton", "cuda", "cudnn", "flash", "flash_attn", "flash_attn_4"])
@pytest.mark.parametrize(("layout", "dtype"), list(itertools.product(["100", "129", "odd"], DTYPES[1:])))
class TestLibraries:
    pytestmark = gpu_only

    def test_backend_matches_oracle(self, layout: str, dtype: torch.dtype, backend: str) -> None:
        skip_unless_offered(backend)
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

    def test_global_attention_of_41_views(self, backend: str) -> None:
        segments = Segments.global_(1, 36_409)
        qkv = sample(36_409, 12, 64, torch.bfloat16)
        out = attention(qkv, segments=segments, scale=SCALE, backend=backend)
        rows = torch.tensor([0, 1, 18_000, 36_400, 36_408], device=DEVICE)
        oracle = sdpa_oracle(qkv, segments, rows)
        baseline = reference_attention(qkv, segments, SCALE)
        assert isinstance(out, Tensor) and isinstance(baseline, Tensor)
        assert_within_budget(out[rows], oracle, baseline[rows])

    def test_offsets_beyond_32_bits(self, backend: str) -> None:
        """1,050,000 rows of 3 x 12 x 64 are 2.4e9 elements; the last segment lies beyond 2^31."""
        segments = Segments(length=100, count=10_000, stride=105)
        qkv = torch.zeros(1_050_000, 3, 12, 64, device=DEVICE, dtype=torch.bfloat16)
        qkv[-205:] = sample(205, 12, 64, torch.bfloat16)
        assert qkv.numel() > 2**31
        qkv.requires_grad_()
        out = attention(qkv, segments=segments, scale=SCALE, backend=backend)
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
