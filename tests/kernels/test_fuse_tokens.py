"""Kernels of `fuse_tokens` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import testing
from any4d_fast.ops._library import launchers
from any4d_fast.ops.fuse_tokens import fuse_tokens
from any4d_fast.reference.fuse_tokens import fuse_tokens as reference
from tests.kernels_common import DEVICE, GPU, KERNEL_BACKENDS, gpu_only, kernel_test

pytestmark = kernel_test

NAMES = ["image_tokens", "weight", "bias", "scale_token"]


@pytest.fixture(params=KERNEL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend with kernels of its own."""
    return str(request.param)


class Case:
    """Inputs of one call: size (views, batch, tokens, channels), how many dense maps and vectors, whether masked."""

    def __init__(
        self, size: tuple[int, int, int, int], dense: int, vectors: int, *, dtype: torch.dtype = torch.float32,
        features: torch.dtype = torch.float32, masked: bool = True, scale: bool = True,
    ) -> None:  # fmt: skip
        views, self.batch, tokens, channels = size
        self.generator = torch.Generator().manual_seed(tokens * 101 + channels)
        n = views * self.batch
        # The class token's row is skipped, as the encoder's output has it.
        self.tensors: list[Tensor | None] = [self.normal(n, tokens + 1, channels).to(dtype)[:, 1:]]
        self.tensors += [self.normal(channels), self.normal(channels), self.normal(1, channels) if scale else None]
        self.tensors += [self.normal(n, tokens, channels).to(features) for _ in range(dense)]
        self.tensors += [self.normal(n, channels).to(features) for _ in range(vectors)]
        flags = [torch.rand(n, generator=self.generator) > 0.4 for _ in range(dense + vectors)]
        self.masks = [f.to(DEVICE) if masked else None for f in flags]
        self.dense, self.vectors = dense, vectors

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE)

    def call(self, function: Any, *tensors: Tensor | None, **options: Any) -> Tensor:
        image, weight, bias, scale, *rest = tensors
        dense, vectors = rest[: self.dense], rest[self.dense :]
        out: Tensor = function(
            image, dense, vectors, weight, bias, dense_masks=self.masks[: self.dense],
            vector_masks=self.masks[self.dense :], scale_token=scale, batch=self.batch, **options,
        )  # fmt: skip
        return out


def check(case: Case, backend: str, out_dtype: torch.dtype = torch.float32) -> None:
    """Forward and every gradient within the budget that plain PyTorch sets."""
    given = case.tensors
    wide = [None if t is None else t.double() for t in given]
    options = {"out_dtype": out_dtype}
    exact = {"out_dtype": torch.float64}
    with torch.no_grad():
        oracle, plain = case.call(reference, *wide, **exact), case.call(reference, *given, **options)
    cotangent = case.normal(*oracle.shape).to(out_dtype)
    oracles = testing.gradients(lambda *a: case.call(reference, *a, **exact), wide, [cotangent.double()])
    plains = testing.gradients(lambda *a: case.call(reference, *a, **options), given, [cotangent])
    options["backend"] = backend
    with testing.poisoned_empty():
        actual = case.call(fuse_tokens, *given, **options)
        grads = testing.gradients(lambda *a: case.call(fuse_tokens, *a, **options), given, [cotangent])
    assert actual.dtype == plain.dtype and actual.is_contiguous()
    testing.assert_within_budget(actual, oracle, plain)
    names = NAMES + [f"modality {i}" for i in range(len(given) - 4)]
    for name, grad, fine, base, source in zip(names, grads, oracles, plains, given, strict=True):
        if source is not None:
            assert grad is not None and fine is not None and base is not None
            assert grad.dtype == source.dtype and grad.shape == source.shape
            testing.assert_within_budget(grad, fine, base, name=f"gradient of {name}")


@pytest.mark.parametrize(("dense", "vectors"), [(0, 0), (1, 0), (0, 2), (3, 4)])
@pytest.mark.parametrize("size", [(1, 1, 1, 16), (2, 1, 5, 24), (3, 2, 7, 64)])
def test_parity(backend: str, size: tuple[int, int, int, int], dense: int, vectors: int) -> None:
    check(Case(size, dense, vectors), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype, features: torch.dtype) -> None:
    check(Case((2, 2, 6, 48), 2, 2, dtype=dtype, features=features), backend)
    check(Case((2, 1, 6, 48), 0, 1, dtype=dtype, features=features), backend, out_dtype=dtype)


def test_given_everywhere_and_no_scale_token(backend: str) -> None:
    check(Case((2, 2, 5, 32), 2, 3, masked=False, scale=False), backend)


@pytest.mark.parametrize("channels", [128, 132, 256, 512, 768])
def test_widths(backend: str, channels: int) -> None:
    check(Case((2, 2, 3, channels), 1, 2), backend)


def test_wider_rows_leave_nothing_behind(backend: str) -> None:
    """Shared memory keeps what the last kernel wrote: wide rows of NaN, in as many blocks as fit the device."""
    wide = Case((330 if GPU else 1, 2, 4, 1020), 0, 1, masked=False)
    assert wide.tensors[4] is not None
    wide.tensors[4].fill_(float("nan"))
    case = Case((3, 2, 9, 32), 1, 1)
    cotangent = case.normal(2, 3 * 9 + 1, 32)
    expected = case.call(reference, *case.tensors)
    gradients = testing.gradients(lambda *a: case.call(reference, *a), case.tensors, [cotangent])
    wide.call(fuse_tokens, *wide.tensors, backend=backend)
    # float32 sums of up to 54 terms in another order.
    torch.testing.assert_close(case.call(fuse_tokens, *case.tensors, backend=backend), expected, rtol=1e-5, atol=1e-5)

    def run(*tensors: Tensor | None) -> Tensor:
        wide.call(fuse_tokens, *wide.tensors, backend=backend)
        return case.call(fuse_tokens, *tensors, backend=backend)

    for actual, wanted in zip(testing.gradients(run, case.tensors, [cotangent]), gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_rows_on_odd_addresses(backend: str) -> None:
    case = Case((2, 1, 5, 48), 1, 1)
    for i in (0, 4):
        tensor = case.tensors[i]
        assert tensor is not None
        case.tensors[i] = torch.cat([torch.zeros_like(tensor[..., :1]), tensor], dim=-1)[..., 1:]
    check(case, backend)


def test_more_samples_than_tokens(backend: str) -> None:
    check(Case((1, 9, 1, 16), 1, 1), backend)
    check(Case((2, 1, 11, 100), 1, 1), backend)


def test_absent_modalities_add_exactly_zero_even_when_nan(backend: str) -> None:
    case = Case((3, 2, 4, 16), 3, 4)
    clean = case.call(fuse_tokens, *case.tensors, backend=backend)
    cotangent = torch.ones_like(clean)

    def run(*tensors: Tensor | None) -> Tensor:
        return case.call(fuse_tokens, *tensors, backend=backend)

    expected = testing.gradients(run, case.tensors, [cotangent])
    for values, mask in zip(case.tensors[4:], case.masks, strict=True):
        assert values is not None and mask is not None
        values[~mask] = float("nan")
    assert torch.equal(run(*case.tensors), clean)
    for grad, clean_grad in zip(testing.gradients(run, case.tensors, [cotangent]), expected, strict=True):
        assert grad is not None and clean_grad is not None and torch.equal(grad, clean_grad)
    for grad, mask in zip(testing.gradients(run, case.tensors, [cotangent])[4:], case.masks, strict=True):
        assert grad is not None and mask is not None and not grad[~mask].any()


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_sums_do_not_depend_on_chunks(backend: str, chunk: int) -> None:
    """Of one token: more partial sums than the second stage adds in a step; of 3: the last is shorter; of 16: one."""
    case = Case((10, 2, 14, 12), 1, 2, masked=False)
    kernels = launchers("fuse_tokens", backend)
    image, weight, bias, _, dense, *vectors = case.tensors
    assert image is not None and dense is not None
    _, mean, rstd, total = kernels.fuse_tokens_forward(
        image, [dense], [None], vectors, [None, None], weight, bias, None, 2, 1e-6, torch.float32, True
    )
    arguments = (case.normal(2, 140, 12), total, [], [], mean, rstd, weight, [None], torch.float32, [None], True, 2)
    found, expected = (kernels.fuse_tokens_backward(*arguments, chunk=size) for size in (chunk, 14))
    assert torch.equal(found[0], expected[0])
    # float32 sums of 280 and of 14 terms in another order.
    torch.testing.assert_close(found[2:], expected[2:], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[2][1], arguments[0].sum((0, 1)), rtol=1e-5, atol=1e-4)


def test_backward_is_deterministic(backend: str) -> None:
    case = Case((3, 2, 9, 32), 1, 1)
    cotangent = case.normal(2, 3 * 9 + 1, 32)

    def run() -> list[Tensor | None]:
        return testing.gradients(lambda *a: case.call(fuse_tokens, *a, backend=backend), case.tensors, [cotangent])

    for first, second in zip(run(), run(), strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_share_memory_where_those_of_a_sum_do(backend: str, masked: bool) -> None:
    """The terms of PyTorch's `a + b` get one tensor as their gradient, too; a mask makes it a tensor of its own."""
    case = Case((2, 1, 4, 16), 2, 2, masked=masked)
    cotangent = case.normal(1, 9, 16)
    grads = testing.gradients(lambda *a: case.call(fuse_tokens, *a, backend=backend), case.tensors, [cotangent])
    maps, vectors = ({g.data_ptr() for g in part if g is not None} for part in ((grads[0], *grads[4:6]), grads[6:]))
    assert not maps & vectors
    assert (len(maps), len(vectors)) == ((3, 2) if masked else (1, 1))


def test_strided_gradients_and_only_what_is_needed(backend: str) -> None:
    case = Case((2, 2, 4, 16), 2, 2)
    assert case.tensors[4] is not None
    leaf = case.tensors[4].requires_grad_()
    out = case.call(fuse_tokens, *case.tensors, backend=backend)
    expected = case.call(reference, *case.tensors)
    cotangent = case.normal(9, 2, 16).transpose(0, 1)
    (actual,) = torch.autograd.grad(out, leaf, cotangent)
    (wanted,) = torch.autograd.grad(expected, leaf, cotangent)
    # float32 sums of 16 terms in another order.
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("views", "tokens"), [(0, 4), (2, 0)])
def test_empty_leaves_the_scale_token(backend: str, views: int, tokens: int) -> None:
    case = Case((views, 2, tokens, 16), 1, 1)
    leaves = [None if t is None else t.detach().requires_grad_() for t in case.tensors]
    out = case.call(fuse_tokens, *leaves, backend=backend)
    scale = leaves[3]
    assert out.shape == (2, 1, 16) and scale is not None and torch.equal(out[:, 0], scale.expand(2, -1))
    out.sum().backward()
    assert scale.grad is not None and torch.equal(scale.grad, torch.full_like(scale, 2))
    assert leaves[1] is not None and leaves[1].grad is not None and not leaves[1].grad.any()


def test_opcheck(backend: str) -> None:
    case = Case((2, 2, 3, 16), 2, 1)
    image, weight, bias, scale, *rest = case.tensors
    masks = case.masks
    forward = torch.ops.any4d_fast.fuse_tokens_forward.default
    given = (image, rest[:2], [masks[0], None], rest[2:], masks[2:], weight, bias, scale, 2, 1e-6)
    for save_sum in (True, False):
        torch.library.opcheck(forward, (*given, torch.bfloat16, save_sum, backend))
    _, mean, rstd, total = forward(*given, torch.float32, True, backend)
    grad = case.normal(2, 7, 16)
    arguments = (grad, total, [], [], mean, rstd, weight, [masks[0], None], torch.float32, torch.bfloat16, None, None)
    for need_rows in (True, False):
        torch.library.opcheck(torch.ops.any4d_fast.fuse_tokens_backward.default, (*arguments, need_rows, backend))


@pytest.mark.parametrize("dense", [0, 2])
def test_compiles_fullgraph_with_dynamic_shapes(backend: str, dense: int) -> None:
    def step(*tensors: Tensor | None) -> Tensor:
        return case.call(fuse_tokens, *tensors, backend=backend)

    for size in ((2, 2, 4, 16), (3, 2, 6, 16)):
        case = Case(size, dense, 1)
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager", dynamic=True)
        cotangent = case.normal(2, size[0] * size[2] + 1, 16)
        for actual, expected in zip(
            testing.gradients(compiled, case.tensors, [cotangent]),
            testing.gradients(step, case.tensors, [cotangent]),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected)


class TestRealSizes:
    pytestmark = gpu_only

    @pytest.mark.parametrize(("dense", "vectors"), [(0, 0), (3, 4)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("views", [1, 2, 41])
    def test_parity(self, backend: str, views: int, dtype: torch.dtype, dense: int, vectors: int) -> None:
        check(Case((views, 1, 888, 1024), dense, vectors, dtype=dtype), backend)

    def test_beyond_31_bits(self, backend: str) -> None:
        """2,400 views of 888 x 1,024: 2.2e9 elements; the last view is compared."""
        case = Case((1, 1, 888, 1024), 0, 1, dtype=torch.bfloat16, masked=False)
        image, weight, bias, scale, vector = case.tensors
        assert image is not None and vector is not None and weight is not None and bias is not None
        many = torch.zeros(2400, 888, 1024, dtype=torch.bfloat16, device=DEVICE)
        many[-1] = image[0]
        vectors = torch.zeros(2400, 1024, device=DEVICE)
        vectors[-1] = vector[0]
        many.requires_grad_()
        actual = fuse_tokens(many, [], [vectors], weight, bias, out_dtype=torch.bfloat16, backend=backend)
        one = image.detach().clone().requires_grad_()
        expected = fuse_tokens(one, [], [vector], weight, bias, out_dtype=torch.bfloat16, backend=backend)
        assert torch.equal(actual[:, -888:], expected)
        actual.backward(torch.ones_like(actual))
        expected.backward(torch.ones_like(expected))
        assert many.grad is not None and one.grad is not None and torch.equal(many.grad[-1], one.grad[0])
