"""`tokenize` on the eager path: values, gradients, arguments, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast import backends
from any4d_fast.ops.tokenize import tokenize
from any4d_fast.reference.tokenize import tokenize as reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parameters(channels: int = 6, patch: int = 2, tokens: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """weight, bias, pos_embed (with the class token's row), cls_token, register_tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((channels, 3, patch, patch), (channels,), (tokens + 1, channels), (1, 1, channels), (1, 2, channels))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def test_row_order_and_values() -> None:
    weight, bias, pos, cls, registers = parameters()
    image = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    out = tokenize(image, weight, bias, pos, cls, registers)
    assert out.shape == (2, 1 + 2 + 6, 6)
    torch.testing.assert_close(out[:, 0], (cls[0] + pos[:1]).expand(2, -1))
    torch.testing.assert_close(out[:, 1:3], registers.expand(2, -1, -1))
    patch = image[1, :, 2:4, 2:4].flatten()
    torch.testing.assert_close(out[1, 3 + 4], weight.flatten(1) @ patch + bias + pos[1 + 4])


def test_uint8_equals_the_normalised_image_in_both_layouts() -> None:
    weight, bias, pos, *_ = parameters()
    image = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    normalized = (image.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = tokenize(normalized, weight, bias, pos[1:])
    actual = tokenize(image, weight, bias, pos[1:], mean=MEAN, std=STD)
    # The means above were rounded to float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    channels_last = image.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(tokenize(channels_last, weight, bias, pos[1:], mean=MEAN, std=STD), actual)


def test_gradcheck() -> None:
    leaves = [torch.randn(1, 3, 4, 6, dtype=torch.float64), *parameters(channels=3)]
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *a: tokenize(*a, mean=MEAN, std=STD), leaves)


def test_empty_and_out_dtype() -> None:
    weight, bias, pos, cls, _ = parameters(dtype=torch.bfloat16)
    out = tokenize(torch.randn(0, 3, 4, 6), weight, bias, pos, cls, out_dtype=torch.float32)
    assert out.shape == (0, 7, 6) and out.dtype == torch.float32
    assert tokenize(torch.randn(1, 3, 4, 6), weight, None, pos[1:]).dtype == torch.bfloat16


def test_compiles_fullgraph_with_dynamic_shapes() -> None:
    weight, bias, pos, cls, registers = parameters(dtype=torch.float32)
    weight.requires_grad_()
    compiled = torch.compile(tokenize, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (2, 3):
        image = torch.randn(count, 3, 4, 6)
        out = compiled(image, weight, bias, pos, cls, registers)
        torch.testing.assert_close(out, reference(image, weight, bias, pos, cls, registers))
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(2, 4, 4, 6)}, r"image: expected \[N, 3, H, W\]"),
        ({"image": torch.zeros(2, 3, 4, 6, dtype=torch.int64)}, "int64; convert it"),
        ({"image": torch.zeros(2, 3, 5, 6)}, "divisible by the patch size 2"),
        ({"image": torch.zeros(2, 3, 4, 6, dtype=torch.uint8)}, "pass mean= and std="),
        ({"weight": torch.zeros(6, 4, 2, 2)}, r"weight: expected \[C, 3, patch, patch\]"),
        ({"mean": MEAN}, "expected both or neither"),
        ({"mean": (0.5,), "std": (0.5,)}, "three numbers each"),
        ({"pos_embed": torch.zeros(9, 6)}, r"pos_embed: expected \[6, 6\] or \[7, 6\]"),
        ({"bias": torch.zeros(5)}, r"bias: expected \[6\]"),
        ({"cls_token": torch.zeros(5)}, "cls_token: expected 6 values"),
        ({"register_tokens": torch.zeros(2, 5)}, r"register_tokens: expected \[..., R, 6\]"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    weight, bias, pos, cls, registers = parameters(dtype=torch.float32)
    given: dict[str, object] = {"image": torch.zeros(2, 3, 4, 6), "weight": weight, "bias": bias, "pos_embed": pos}
    given |= {"cls_token": cls, "register_tokens": registers} | change
    with pytest.raises(ValueError, match=message):
        tokenize(**given)  # type: ignore[arg-type]


@pytest.mark.skipif(backends.interpreting(), reason="the interpreter takes CPU tensors")
def test_triton_on_the_cpu_says_why_not() -> None:
    weight, bias, pos, *_ = parameters(dtype=torch.float32)
    with pytest.raises(backends.BackendError, match="triton"):
        tokenize(torch.zeros(2, 3, 4, 6), weight, bias, pos[1:], backend="triton")
