"""`fuse_tokens` on the eager path: row order, absent modalities, gradients, arguments, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from any4d_fast.ops.fuse_tokens import _equal_gradients, fuse_tokens


def modalities(views: int, batch: int, tokens: int, channels: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    n = views * batch
    masks = [torch.rand(n, generator=generator) > 0.5 for _ in range(4)]
    return {
        "image_tokens": normal(n, tokens, channels),
        "dense": [normal(n, tokens, channels) for _ in range(2)],
        "vectors": [normal(n, channels) for _ in range(2)],
        "weight": normal(channels),
        "bias": normal(channels),
        "dense_masks": [masks[0], None],
        "vector_masks": [masks[2], masks[3]],
        "scale_token": normal(1, channels),
        "batch": batch,
        "out_dtype": torch.float64,
    }


def test_row_order_and_values() -> None:
    views, batch, tokens, channels = 3, 2, 4, 5
    given = modalities(views, batch, tokens, channels)
    out = fuse_tokens(**given)
    assert out.shape == (batch, views * tokens + 1, channels)
    for view in range(views):
        for sample in range(batch):
            n = view * batch + sample
            total = given["image_tokens"][n] + given["dense"][1][n]
            total = total + (given["dense"][0][n] if given["dense_masks"][0][n] else 0)
            for vector, mask in zip(given["vectors"], given["vector_masks"], strict=True):
                total = total + (vector[n] if mask[n] else 0)
            expected = F.layer_norm(total, (channels,), given["weight"], given["bias"], 1e-6)
            torch.testing.assert_close(out[sample, view * tokens : (view + 1) * tokens], expected)
    assert torch.equal(out[:, -1], given["scale_token"].expand(batch, -1))


def test_absent_modalities_add_exactly_zero_even_when_nan() -> None:
    given = modalities(2, 2, 3, 5)
    for name in ("dense", "vectors"):
        for values, mask in zip(given[name], given[f"{name[:-1] if name == 'vectors' else name}_masks"], strict=True):
            if mask is not None:
                values[~mask] = float("nan")
    clean = modalities(2, 2, 3, 5)
    assert torch.equal(fuse_tokens(**given), fuse_tokens(**clean))


def test_images_alone_without_scale_token() -> None:
    x = torch.randn(2, 3, 8)
    weight, bias = torch.randn(8), torch.randn(8)
    out = fuse_tokens(x, [], [], weight, bias)
    torch.testing.assert_close(out, F.layer_norm(x, (8,), weight, bias, 1e-6).reshape(1, 6, 8))


def test_gradcheck() -> None:
    given = modalities(2, 2, 2, 3)
    tensors = [given.pop("image_tokens"), *given.pop("dense"), *given.pop("vectors")]
    tensors += [given.pop("weight"), given.pop("bias"), given.pop("scale_token")]

    def call(image: Tensor, d0: Tensor, d1: Tensor, v0: Tensor, v1: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return fuse_tokens(image, [d0, d1], [v0, v1], w, b, scale_token=s, **given)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in tensors])


def test_dense_maps_as_grids_and_strided_tokens() -> None:
    rows = torch.randn(2, 7, 5)
    dense = torch.randn(2, 2, 3, 5)
    weight, bias = torch.ones(5), torch.zeros(5)
    out = fuse_tokens(rows[:, 1:], [dense], [], weight, bias)
    torch.testing.assert_close(out, F.layer_norm(rows[:, 1:] + dense.flatten(1, 2), (5,), eps=1e-6).reshape(1, 12, 5))


def test_compiles_fullgraph() -> None:
    given = modalities(2, 2, 3, 5)
    given["image_tokens"].requires_grad_()
    compiled = torch.compile(fuse_tokens, fullgraph=True, backend="aot_eager")
    out = compiled(**given)
    torch.testing.assert_close(out, fuse_tokens(**given))
    out.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_tokens": torch.zeros(4, 5)}, r"image_tokens: expected \[N, T, C\]"),
        ({"batch": 3}, "batch: expected a divisor of the 4 rows"),
        ({"batch": 0}, "batch: expected a divisor"),
        ({"dense": [torch.zeros(4, 2, 5)] * 2}, r"dense\[0\]: expected \[4, 3, 5\]"),
        ({"dense": [torch.zeros(4, 3, 5)] * 4}, "dense: expected at most 3"),
        ({"vectors": [torch.zeros(4, 4)] * 2}, r"vectors\[0\]: expected \[4, 5\]"),
        ({"vectors": [torch.zeros(4, 5)] * 5}, "vectors: expected at most 4"),
        ({"weight": torch.zeros(4)}, r"weight: expected \[5\]"),
        ({"scale_token": torch.zeros(4)}, "scale_token: expected 5 values"),
        ({"dense_masks": [None]}, "dense_masks: expected 2 masks"),
        ({"vector_masks": [None, torch.zeros(4)]}, r"vector_masks\[1\]: expected \[4\] bool"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_tokens(**(modalities(2, 2, 3, 5) | change))


@pytest.mark.parametrize(
    ("image", "dense", "masked", "found"),
    [
        (torch.float32, [torch.float32] * 3, (), {0: 0, 1: 0, 2: 0}),
        (torch.float32, [torch.float32] * 3, (1,), {0: 0, 2: 0}),
        (torch.bfloat16, [torch.float32] * 3, (), {1: 1, 2: 1}),
        (None, [torch.float32, None, torch.float32], (), {2: 1}),
        (torch.float32, [torch.float16, torch.float32], (0, 1), {}),
    ],
)
def test_gradients_that_are_equal_are_written_once(
    image: torch.dtype | None, dense: list[torch.dtype | None], masked: tuple[int, ...], found: dict[int, int]
) -> None:
    masks = [torch.ones(1, dtype=torch.bool) if i in masked else None for i in range(len(dense))]
    assert _equal_gradients(image, dense, masks) == found
