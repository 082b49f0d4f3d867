"""Kernels of `tokenize` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import backends, testing
from any4d_fast.ops.tokenize import tokenize
from any4d_fast.reference.tokenize import tokenize as reference
from tests.kernels_common import DEVICE, GPU, KERNEL_BACKENDS, gpu_only, kernel_test

pytestmark = kernel_test

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ("image", "weight", "bias", "pos_embed", "cls_token", "register_tokens")


@pytest.fixture(params=KERNEL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend with kernels of its own."""
    return str(request.param)


def narrowest(backend: str, dtype: torch.dtype = torch.float32) -> torch.dtype:
    """A dtype of the weight that the backend multiplies, float32 if it can."""
    if backend == "cuda" and dtype == torch.float32:
        return torch.bfloat16
    return dtype


def inputs(
    size: tuple[int, int, int],
    channels: int,
    dtype: torch.dtype,
    *,
    image: torch.dtype = torch.float32,
    patch: int = 14,
    cls: bool = True,
    registers: int = 0,
) -> list[Tensor | None]:
    """image, weight, bias, pos_embed, cls_token, register_tokens, scaled so that outputs are of order one."""
    generator = torch.Generator().manual_seed(size[0] * 7 + channels)
    n, height, width = size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pixels = normal(n, 3, height, width).to(image)
    if image == torch.uint8:
        pixels = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    tokens = (height // patch) * (width // patch)
    parameters = [
        normal(channels, 3, patch, patch) / (patch * 3**0.5),
        normal(channels),
        normal(tokens + cls, channels),
        normal(1, 1, channels) if cls else None,
        normal(1, registers, channels) if registers else None,
    ]
    return [pixels.to(DEVICE), *[None if t is None else t.to(DEVICE, dtype) for t in parameters]]


def check(given: list[Tensor | None], backend: str, **options: Any) -> None:
    """Forward and every gradient within the budget that plain PyTorch sets."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in given]
    exact = {k: v for k, v in options.items() if k != "out_dtype"}
    with torch.no_grad():
        oracle, plain = reference(*wide, **exact), reference(*given, **options)
    cotangent = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, plain.dtype)
    oracles = testing.gradients(lambda *a: reference(*a, **exact), wide, [cotangent.double()])
    plains = testing.gradients(lambda *a: reference(*a, **options), given, [cotangent])
    with testing.poisoned_empty():
        actual = tokenize(*given, backend=backend, **options)
        grads = testing.gradients(lambda *a: tokenize(*a, backend=backend, **options), given, [cotangent])
    assert actual.dtype == plain.dtype and actual.is_contiguous()
    testing.assert_within_budget(actual, oracle, plain)
    for name, grad, fine, base, source in zip(NAMES, grads, oracles, plains, given, strict=True):
        if source is not None and source.is_floating_point():
            assert grad is not None and fine is not None and base is not None
            assert grad.dtype == source.dtype and grad.shape == source.shape
            testing.assert_within_budget(grad, fine, base, name=f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "channels"), [((1, 14, 14), 16), ((2, 28, 42), 40), ((3, 42, 28), 64)])
def test_parity(backend: str, size: tuple[int, int, int], channels: int, dtype: torch.dtype) -> None:
    check(inputs(size, channels, narrowest(backend, dtype)), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_uint8_with_normalisation_folded_in(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    given = inputs((2, 28, 42), 40, narrowest(backend, dtype), image=torch.uint8)
    if channels_last:
        assert given[0] is not None
        given[0] = given[0].permute(0, 2, 3, 1).contiguous()
    check(given, backend, mean=MEAN, std=STD, out_dtype=torch.float32)


def test_float_image_with_normalisation(backend: str) -> None:
    check(inputs((2, 28, 14), 24, narrowest(backend)), backend, mean=MEAN, std=STD)


@pytest.mark.parametrize("image", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_half_precision_images_and_every_output(backend: str, image: torch.dtype, out_dtype: torch.dtype) -> None:
    check(inputs((3, 28, 42), 24, torch.bfloat16, image=image), backend, out_dtype=out_dtype)


@pytest.mark.parametrize(("cls", "registers"), [(False, 0), (True, 4), (False, 3)])
def test_class_token_and_registers(backend: str, cls: bool, registers: int) -> None:
    check(inputs((2, 28, 28), 16, narrowest(backend), cls=cls, registers=registers), backend)


def test_class_token_without_position_and_without_bias(backend: str) -> None:
    image, weight, _, pos, cls, registers = inputs((2, 28, 28), 16, narrowest(backend))
    assert pos is not None
    check([image, weight, None, pos[1:], cls, registers], backend)


def test_parameters_of_several_dtypes(backend: str) -> None:
    """As in the model: a rounded weight beside float32 positions, bias and class token."""
    image, weight, *rest = inputs((3, 28, 42), 40, torch.float32, image=torch.uint8, registers=2)
    assert weight is not None
    check([image, weight.bfloat16(), *rest], backend, mean=MEAN, std=STD, out_dtype=torch.float32)


@pytest.mark.parametrize("patch", [1, 3, 8, 16])
def test_other_patch_sizes(backend: str, patch: int) -> None:
    given = inputs((1, 3 * patch, 2 * patch), 16, narrowest(backend), patch=patch)
    if backend == "cuda":
        with pytest.raises(backends.BackendError, match=f"the patch size is {patch}"):
            tokenize(*given, backend=backend)
        return
    check(given, backend)
    assert given[0] is not None
    given[0] = given[0].permute(0, 2, 3, 1).contiguous()
    check(given, backend)


def test_strided_images(backend: str) -> None:
    image, *parameters = inputs((2, 28, 42), 16, narrowest(backend), image=torch.uint8)
    assert image is not None
    wider = torch.zeros(2, 3, 29, 45, dtype=torch.uint8, device=DEVICE)
    even = torch.zeros(2, 3, 30, 46, dtype=torch.uint8, device=DEVICE)
    views = [wider[:, :, 1:, 1:43], wider[:, :, :28, 2:44], even[:, :, 2:, 4:], wider.transpose(2, 3)[:, :, :28, :28]]
    rgba = torch.zeros(2, 28, 42, 4, dtype=torch.uint8, device=DEVICE)[..., :3]
    expected = tokenize(image, *parameters, mean=MEAN, std=STD, backend=backend)
    for view in views[:3]:
        view.copy_(image)
        assert torch.equal(tokenize(view, *parameters, mean=MEAN, std=STD, backend=backend), expected)
    rgba.copy_(image.permute(0, 2, 3, 1))
    found = tokenize(rgba, *parameters, mean=MEAN, std=STD, backend=backend)
    assert torch.equal(found, expected)
    turned = inputs((2, 28, 28), 16, narrowest(backend), image=torch.uint8)
    assert turned[0] is not None
    views[3].copy_(turned[0])
    check([views[3], *turned[1:]], backend, mean=MEAN, std=STD)


def test_empty_batch(backend: str) -> None:
    given = inputs((0, 28, 28), 16, narrowest(backend))
    leaves = [None if t is None else t.requires_grad_() for t in given]
    out = tokenize(*leaves, backend=backend)
    assert out.shape == (0, 5, 16)
    out.sum().backward()
    assert leaves[1] is not None and leaves[1].grad is not None and not leaves[1].grad.any()


def test_frozen_parameters_get_no_gradient(backend: str) -> None:
    given = inputs((1, 28, 28), 16, narrowest(backend))
    assert given[3] is not None and given[1] is not None
    given[3].requires_grad_()
    tokenize(*given, backend=backend).sum().backward()
    assert given[3].grad is not None and given[1].grad is None


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_opcheck(backend: str, kind: torch.dtype) -> None:
    given = inputs((2, 28, 14), 16, narrowest(backend), image=kind, registers=2)
    image, weight, bias, pos, cls, registers = given
    assert image is not None and weight is not None and cls is not None and registers is not None
    scale = [0.02, 0.02, 0.02] if kind == torch.uint8 else []
    arguments = (image, weight, bias, pos, cls[0], registers[0], scale, [-2.0] * len(scale), torch.bfloat16, backend)
    torch.library.opcheck(torch.ops.any4d_fast.tokenize_forward.default, arguments)
    grad = torch.randn(2, 5, 16, device=DEVICE)
    need_image = kind != torch.uint8
    arguments = (grad, image, weight, 3, scale, [-2.0] * len(scale), need_image, True)
    torch.library.opcheck(torch.ops.any4d_fast.tokenize_backward.default, arguments)


def test_compiles_fullgraph_with_dynamic_shapes(backend: str) -> None:
    def step(*given: Tensor | None) -> Tensor:
        return tokenize(*given, mean=MEAN, std=STD, out_dtype=torch.float32, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager", dynamic=True)
    for size in ((2, 28, 42), (3, 14, 28)):
        given = inputs(size, 16, narrowest(backend), image=torch.uint8)
        cotangent = torch.ones(size[0], 1 + size[1] * size[2] // 196, 16, device=DEVICE)
        for actual, expected in zip(
            testing.gradients(compiled, given, [cotangent]), testing.gradients(step, given, [cotangent]), strict=True
        ):
            if actual is not None:
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("views", [2, 41])
class TestRealSizes:
    pytestmark = gpu_only

    def test_parity(self, backend: str, views: int, channels_last: bool, dtype: torch.dtype) -> None:
        given = inputs((views, 518, 336), 1024, narrowest(backend, dtype), image=torch.uint8)
        if channels_last:
            assert given[0] is not None
            given[0] = given[0].permute(0, 2, 3, 1).contiguous()
        check(given, backend, mean=MEAN, std=STD, out_dtype=torch.float32)


@pytest.mark.skipif("cuda" not in KERNEL_BACKENDS, reason="the CUDA extension's own products need a CUDA device")
class TestCudaProducts:
    """Both kernels of the extension: by warpgroups where the device has them, and by `mma.sync`."""

    pytestmark = gpu_only

    @pytest.mark.parametrize("warpgroups", [True, False])
    @pytest.mark.parametrize("image", [torch.uint8, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("size", "channels"), [((1, 518, 336), 1024), ((5, 294, 518), 768), ((7, 98, 70), 136)])
    def test_against_float64(
        self, size: tuple[int, int, int], channels: int, dtype: torch.dtype, image: torch.dtype, warpgroups: bool
    ) -> None:
        from any4d_fast.cuda.tokenize import tokenize_forward

        given = inputs(size, channels, dtype, image=image, registers=1)
        wide = [t.double() if t is not None and t.is_floating_point() else t for t in given]
        norms = {"mean": MEAN, "std": STD} if image == torch.uint8 else {}
        oracle = reference(*wide, **norms)
        plain = reference(*given, **norms, out_dtype=torch.float32)
        scale = [1 / (255 * s) for s in STD] if norms else []
        shift = [-m / s for m, s in zip(MEAN, STD, strict=True)] if norms else []
        pixels, weight, bias, pos, cls, registers = given
        assert pixels is not None and weight is not None and pos is not None
        assert cls is not None and registers is not None
        arguments = (pixels, weight, bias, pos, cls[0], registers[0], scale, shift, torch.float32)
        with testing.poisoned_empty():
            actual = [tokenize_forward(*arguments, warpgroups=warpgroups) for _ in range(3)]
        testing.assert_within_budget(actual[0], oracle, plain)
        assert torch.equal(actual[0], actual[1]) and torch.equal(actual[0], actual[2])


class TestOffsets:
    pytestmark = gpu_only

    def test_beyond_31_bits(self, backend: str) -> None:
        """4,200 views: 2.2e9 bytes of pixels and 3.8e9 elements of output; the last image is compared."""
        one = inputs((1, 518, 336), 1024, torch.bfloat16, image=torch.uint8)
        assert one[0] is not None
        many = torch.zeros(4200, 3, 518, 336, dtype=torch.uint8, device=DEVICE)
        many[-1] = one[0][0]
        expected = tokenize(*one, mean=MEAN, std=STD, backend=backend)
        actual = tokenize(many, *one[1:], mean=MEAN, std=STD, backend=backend)
        assert torch.equal(actual[-1], expected[0])
