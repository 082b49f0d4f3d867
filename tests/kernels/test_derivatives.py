"""What differentiable ops promise alike: which gradients they give, for which strides, how often, under autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import any4d_fast.modules.dense_training  # noqa: F401  (its function is among those below)
from any4d_fast import ops, testing
from any4d_fast.ops import dense_maps
from tests.kernels_common import DEVICE, INTERPRETING, KERNEL_BACKENDS, kernel_test
from tests.loss_inputs import make_maps, make_targets

Call = Callable[..., Any]

GENERATOR = torch.Generator()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def half(*shape: int) -> Tensor:
    return normal(*shape).half()


def attention(backend: str) -> tuple[Call, list[Tensor]]:
    segments = ops.Segments.frame(1, 2, 3)
    return lambda qkv: ops.attention(qkv, segments=segments, backend=backend, return_lse=True), [half(7, 3, 2, 64)]


def compose_factors(backend: str) -> tuple[Call, list[Tensor]]:
    given = [normal(4, 3, 5, 6), normal(4, 3, 5, 3), normal(4, 4), normal(4, 3), normal(2, 1)]
    return lambda *a: [o for o in ops.compose_factors(*a, backend=backend) if o.is_floating_point()], given


def finish(backend: str) -> tuple[Call, list[Tensor]]:
    flag = dense_maps.new_flag(torch.device(DEVICE))
    maps = [half(2, 6, 4, 16) for _ in range(2)]

    def call(value: Tensor, bias: Tensor, residual: Tensor) -> Any:
        return dense_maps.finish(value, bias, flag, residual=residual, relu=True, backend=backend)

    return call, [maps[0], normal(16), maps[1]]


def fuse_tokens(backend: str) -> tuple[Call, list[Tensor]]:
    mask = torch.tensor([True, False, True, True], device=DEVICE)

    def call(image: Tensor, dense: Tensor, vector: Tensor, weight: Tensor, bias: Tensor, token: Tensor) -> Tensor:
        return ops.fuse_tokens(
            image, [dense], [vector], weight, bias, dense_masks=[mask], vector_masks=[mask],
            scale_token=token, batch=2, backend=backend,
        )  # fmt: skip

    return call, [normal(4, 6, 64), normal(4, 6, 64), normal(4, 64), normal(64), normal(64), normal(1, 1, 64)]


def layer_norm(backend: str) -> tuple[Call, list[Tensor]]:
    return lambda *a: ops.layer_norm(*a, backend=backend), [normal(5, 48), normal(48), normal(48)]


def linear(backend: str) -> tuple[Call, list[Tensor]]:
    return lambda *a: ops.linear(*a, backend=backend), [half(20, 32), normal(48, 32), normal(48)]


def linear_gelu(backend: str) -> tuple[Call, list[Tensor]]:
    return lambda *a: ops.linear_gelu(*a, backend=backend), [half(20, 32), normal(48, 32), normal(48)]


def linear_residual(backend: str) -> tuple[Call, list[Tensor]]:
    scale = normal(4).to(DEVICE)
    given = [half(20, 32), half(48, 32), half(48), normal(20, 48), normal(48)]
    return lambda *a: ops.linear_residual(*a, row_scale=scale, rows_per_scale=5, backend=backend), given


def map_losses(backend: str) -> tuple[Call, list[Tensor]]:
    targets = ops.TargetMaps(*(t.to(DEVICE) for t in make_targets(1, 2, 3, 4) if t is not None))
    given = [m for m in make_maps(1, 2, 3, 4) if m is not None]
    return lambda *maps: ops.map_losses(maps, targets, backend=backend), given


def normalize_depth(backend: str) -> tuple[Call, list[Tensor]]:
    return lambda depth: ops.normalize_depth(depth, backend=backend), [normal(2, 4, 5, 1).abs()]


def residual_norm(backend: str) -> tuple[Call, list[Tensor]]:
    scale = normal(2).to(DEVICE)
    given = [normal(6, 48), half(6, 48), normal(48), normal(48), normal(48)]
    return lambda *a: ops.residual_norm(*a, row_scale=scale, rows_per_scale=3, backend=backend), given


def resize_bilinear(backend: str) -> tuple[Call, list[Tensor]]:
    return lambda x: ops.resize_bilinear(x, (7, 9), backend=backend), [normal(2, 4, 5, 16)]


def resize_conv(backend: str) -> tuple[Call, list[Tensor]]:
    given = [half(1, 4, 5, 16), half(16, 16, 3, 3), half(16), half(4, 16), half(4)]
    return lambda x, *a: ops.resize_conv(x, (7, 9), *a, backend=backend), given


def tokenize(backend: str) -> tuple[Call, list[Tensor]]:
    given = [normal(2, 3, 28, 14), half(64, 3, 14, 14), half(64), half(3, 64), half(64), half(1, 2, 64)]
    return lambda *a: ops.tokenize(*a, backend=backend), given


def unproject(backend: str) -> tuple[Call, list[Tensor]]:
    intrinsics = torch.tensor([[5.0, 0, 2], [0, 6, 1], [0, 0, 1]]).expand(2, 3, 3).contiguous()
    given = [normal(2, 3, 5).abs(), intrinsics, normal(2, 4, 4), normal(2, 3, 5, 3)]
    return lambda *a: ops.unproject(*a, backend=backend), given


def unshuffle_conv(backend: str) -> tuple[Call, list[Tensor]]:
    given = [half(1, 8, 12, 2), half(32, 32, 3, 3), half(32)]
    return lambda *a: ops.unshuffle_conv(*a, 4, backend=backend), given


def upsample(backend: str) -> tuple[Call, list[Tensor]]:
    flag = dense_maps.new_flag(torch.device(DEVICE))
    return lambda x: dense_maps.upsample(x, flag, backend=backend), [half(1, 3, 4, 16)]


OPS: dict[str, Callable[[str], tuple[Call, list[Tensor]]]] = {
    make.__name__: make
    for make in (
        attention, compose_factors, finish, fuse_tokens, layer_norm, linear, linear_gelu, linear_residual, map_losses,
        normalize_depth, residual_norm, resize_bilinear, resize_conv, tokenize, unproject, unshuffle_conv, upsample,
    )
}  # fmt: skip
CUDA = ("attention", "compose_factors", "fuse_tokens", "tokenize", "unproject")
CASES = [(op, backend) for op in OPS for backend in KERNEL_BACKENDS if backend == "triton" or op in CUDA]
# The interpreter takes a minute for each of these, and their own tests ask it the same.
THOROUGH = [case for case in CASES if not (INTERPRETING and case[0] in ("compose_factors", "map_losses"))]


def made(op: str, backend: str) -> tuple[Call, list[Tensor]]:
    GENERATOR.manual_seed(len(op))
    call, given = OPS[op](backend)

    def outputs(*arguments: Tensor) -> list[Tensor]:
        found = call(*arguments)
        return [found] if isinstance(found, Tensor) else [o for o in found if o is not None]

    return outputs, [t.to(DEVICE) for t in given]


def leaves(given: Sequence[Tensor], needed: Sequence[int]) -> list[Tensor]:
    return [t.detach().requires_grad_(i in needed) for i, t in enumerate(given)]


def every_other_element(tensor: Tensor) -> Tensor:
    return tensor.new_full((*tensor.shape, 2), float("nan"))[..., 0].copy_(tensor)


def first_dimension_last(tensor: Tensor) -> Tensor:
    backwards = range(tensor.ndim)[::-1]
    return tensor.permute(*backwards).contiguous().permute(*backwards)


def rows_of_twice_the_length(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    return wide[..., : tensor.shape[-1]].copy_(tensor)


LAYOUTS = (every_other_element, first_dimension_last, rows_of_twice_the_length)


def gradients(outputs: Call, arguments: list[Tensor], cotangents: Callable[[int, Tensor], Tensor | None]) -> list[Any]:
    with testing.poisoned_empty():
        found = outputs(*arguments)
        pairs = [(o, cotangents(i, o)) for i, o in enumerate(found)]
        used = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
        torch.autograd.backward([o for o, _ in used], [g for _, g in used])
    return [t.grad for t in arguments]


def ones(_: int, output: Tensor) -> Tensor:
    return torch.full_like(output, 0.5, memory_format=torch.contiguous_format)


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        if not expected.is_floating_point():  # map_losses counts
            assert torch.equal(actual, expected)
            return
        tolerance = 4 * testing.ROUNDING[expected.dtype]  # other strides may take sums in another order
        assert testing.relative_error(actual, expected) <= tolerance


@pytest.mark.parametrize(("op", "backend"), THOROUGH)
class TestGradients:
    pytestmark = kernel_test

    def test_of_one_argument_alone(self, op: str, backend: str) -> None:
        outputs, given = made(op, backend)
        everything = gradients(outputs, leaves(given, range(len(given))), ones)
        assert all(g is not None and bool(g.isfinite().all()) for g in everything)
        for i in range(len(given)):
            alone = gradients(outputs, leaves(given, [i]), ones)
            assert [g is not None for g in alone] == [j == i for j in range(len(given))]
            assert_same(alone[i], everything[i])

    def test_of_one_output_alone(self, op: str, backend: str) -> None:
        outputs, given = made(op, backend)
        every = range(len(given))
        for k in {0, len(outputs(*leaves(given, every))) - 1}:
            alone = gradients(outputs, leaves(given, every), lambda i, o, k=k: ones(i, o) if i == k else None)
            others = gradients(outputs, leaves(given, every), lambda i, o, k=k: ones(i, o) * (i == k))
            for found, expected in zip(alone, others, strict=True):
                if found is None:  # no output that is used depends on it
                    assert expected is None or not expected.any()
                else:
                    assert_same(found, expected)

    def test_for_cotangents_of_any_strides(self, op: str, backend: str) -> None:
        outputs, given = made(op, backend)
        every = range(len(given))
        expected = gradients(outputs, leaves(given, every), ones)
        for cotangent in (
            lambda _, o: torch.full((), 0.5, dtype=o.dtype, device=o.device).expand(o.shape),
            lambda _, o: torch.full((*o.shape, 2), 0.5, dtype=o.dtype, device=o.device)[..., 0],
            lambda _, o: torch.full(o.shape[::-1], 0.5, dtype=o.dtype, device=o.device).permute(*range(o.ndim)[::-1]),
        ):
            for found, wanted in zip(gradients(outputs, leaves(given, every), cotangent), expected, strict=True):
                assert_same(found, wanted)

    def test_for_arguments_of_any_strides(self, op: str, backend: str) -> None:
        outputs, given = made(op, backend)
        every = range(len(given))
        expected = outputs(*given), gradients(outputs, leaves(given, every), ones)
        for layout in LAYOUTS[2 if op == "attention" else 0 :]:  # its channels must be contiguous
            strided = [layout(t) for t in given]
            for found, wanted in zip(outputs(*strided), expected[0], strict=True):
                assert_same(found, wanted)
            for found, wanted in zip(gradients(outputs, leaves(strided, every), ones), expected[1], strict=True):
                assert_same(found, wanted)

    def test_autocast_changes_nothing(self, op: str, backend: str) -> None:
        outputs, given = made(op, backend)
        every = range(len(given))
        expected = outputs(*given), gradients(outputs, leaves(given, every), ones)
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = outputs(*given), gradients(outputs, leaves(given, every), ones)
        for found, wanted in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
            assert_same(found, wanted)
            # cuDNN's gradients of weights need not be the same bits twice.
            assert op == "unshuffle_conv" or torch.equal(found, wanted)


@pytest.mark.parametrize(("op", "backend"), CASES)
class TestEveryOp:
    pytestmark = kernel_test

    def test_is_differentiable_once(self, op: str, backend: str) -> None:
        outputs, given = made(op, backend)
        arguments = leaves(given, range(len(given)))
        total = torch.stack([o.float().square().sum() for o in outputs(*arguments) if o.requires_grad]).sum()
        found = torch.autograd.grad(total, arguments, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.stack([g.float().square().sum() for g in found]).sum().backward()

    def test_none_where_none_is_wanted(self, op: str, backend: str) -> None:
        outputs, given = made(op, backend)
        assert not any(o.requires_grad for o in outputs(*leaves(given, [])))
        with torch.no_grad():
            assert not any(o.requires_grad for o in outputs(*leaves(given, range(len(given)))))


def twice_in_residual_norm(x: Tensor, vector: Tensor) -> Tensor:
    return torch.stack(ops.residual_norm(x, x, vector, vector, vector, backend="triton"))


def twice_in_linear_residual(x: Tensor, vector: Tensor) -> Tensor:
    return ops.linear_residual(x, vector.outer(vector), vector, x, vector, backend="triton")


def twice_in_fuse_tokens(x: Tensor, vector: Tensor) -> Tensor:
    maps, mask = x.view(2, 3, 48), torch.tensor([True, False], device=x.device)
    return ops.fuse_tokens(maps, [maps, maps], [], vector, vector, dense_masks=[mask, mask], backend="triton")


@pytest.mark.parametrize("call", [twice_in_residual_norm, twice_in_linear_residual, twice_in_fuse_tokens])
class TestOneTensorAsTwoArguments:
    pytestmark = kernel_test

    def test_compiles(self, call: Call) -> None:
        GENERATOR.manual_seed(0)
        given = [normal(6, 48).to(DEVICE), normal(48).to(DEVICE)]
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        results = []
        for function in (call, compiled):
            arguments = leaves(given, [0, 1])
            out = function(*arguments)
            results.append([out, *torch.autograd.grad(out.square().sum(), arguments)])
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("op", OPS)
def test_autocast_does_not_change_eager_results(op: str) -> None:
    outputs, given = made(op, "eager")
    expected = outputs(*given)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = outputs(*given)
    for found, wanted in zip(actual, expected, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_every_function_is_differentiable_once() -> None:
    """`autograd.Function`s: operators behind a backward pass have no derivatives, which autograd would only warn of."""
    ours = [f for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith("any4d_fast.")]
    assert len(ours) == len(OPS) + 1
    for function in ours:
        assert hasattr(function.backward, "__wrapped__"), function  # by once_differentiable
