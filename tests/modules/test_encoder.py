"""The image encoder against DINOv2 as upstream runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from any4d_fast.config import ENCODER_SIZES, EncoderConfig
from any4d_fast.modules.encoder import ImageEncoder, VisionTransformer, grid_of
from any4d_fast.testing import relative_error
from tests.golden_cases import golden_weights
from tests.oracles import (
    DINOV2_SIZES,
    FORWARD_BUDGET,
    assert_same_gradients,
    needs_oracles,
    same_weights,
    upstream,
    upstream_encoder,
)


def pair(size: str, depth: int, **options: Any) -> tuple[ImageEncoder, nn.Module]:
    """Our encoder and upstream's with the same weights."""
    ours = ImageEncoder(EncoderConfig(size=size, keep_first_n_layers=depth, **options))
    golden_weights(ours)
    theirs = upstream_encoder(depth, size=size, **options)
    same_weights(ours, theirs)
    return ours, theirs


def tokens_of(theirs: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """[N, T, C] of upstream's [N, C, h, w]."""
    given = upstream("encoders.base").ViTEncoderInput(image=image, data_norm_type="dinov2")
    return theirs(given).features.flatten(2).transpose(1, 2)


@needs_oracles
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize(("size", "depth"), [("small", 12), ("base", 3), ("large", 2), ("giant", 2)])
def test_every_size_agrees_with_dinov2(size: str, depth: int, registers: bool) -> None:
    ours, theirs = pair(size, depth, with_registers=registers)
    image = torch.randn(2, 3, 42, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(ours(image), tokens_of(theirs, image)) <= FORWARD_BUDGET


@needs_oracles
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("height, width", [(14, 14), (14, 98), (154, 28), (182, 196), (518, 518), (518, 336)])
def test_every_image_size_agrees_with_dinov2(height: int, width: int, registers: bool) -> None:
    # Position embeddings are resized to each grid; 518 x 518 is the trained size, whose table is used as it is.
    ours, theirs = pair("small", 1, with_registers=registers)
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_error(ours(image), tokens_of(theirs, image)) <= FORWARD_BUDGET


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("grid", [(24, 37), (37, 24), (1, 1), (1, 7), (50, 61)])
def test_positions_are_resized_as_pytorch_does(grid: tuple[int, int], registers: bool) -> None:
    model = VisionTransformer(EncoderConfig(size="small", keep_first_n_layers=1, with_registers=registers))
    table = model.pos_embed
    source = table[0, 1:].unflatten(0, (37, 37)).permute(2, 0, 1)[None]
    if registers:
        resized = F.interpolate(source, size=grid, mode="bicubic", antialias=True)
    else:
        scale = ((grid[0] + 0.1) / 37, (grid[1] + 0.1) / 37)
        resized = F.interpolate(source, scale_factor=scale, mode="bicubic")
    expected = torch.cat([table[0, :1], resized[0].flatten(1).T])
    found = model.train().position_embedding(*grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    gradients = [torch.autograd.grad(out, table, cotangent)[0] for out in (found, expected)]
    assert relative_error(*gradients) < 1e-6


@needs_oracles
@pytest.mark.parametrize("size", ["small", "giant"])
def test_gradients_agree_with_dinov2(size: str) -> None:
    ours, theirs = pair(size, 2, with_registers=size == "small")
    image = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(2))
    mine, other = image.clone().requires_grad_(), image.clone().requires_grad_()
    assert_same_gradients(ours, theirs, [ours(mine)], [tokens_of(theirs, other)], [(mine, other)])


@needs_oracles
def test_without_the_final_norm_the_encoder_agrees_with_upstreams() -> None:
    ours, theirs = pair("small", 2, norm_returned_features=False)
    assert not any(key.startswith("model.norm.") for key in ours.state_dict())
    image = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(3))
    mine, other = image.clone().requires_grad_(), image.clone().requires_grad_()
    result, expected = ours(mine), tokens_of(theirs, other)
    assert relative_error(result, expected) <= FORWARD_BUDGET
    assert_same_gradients(ours, theirs, [result], [expected], [(mine, other)])


@needs_oracles
def test_the_oracles_sizes_are_the_configs() -> None:
    assert {name: sizes for name, *sizes in DINOV2_SIZES.values()} == {k: list(v) for k, v in ENCODER_SIZES.items()}


def test_registers_change_how_position_embeddings_are_resized() -> None:
    """Expected values from the definition in facebookresearch/dinov2, vision_transformer.py."""
    for registers in (False, True):
        model = ImageEncoder(EncoderConfig(size="small", keep_first_n_layers=1, with_registers=registers)).model
        table = model.pos_embed[0, 1:].detach().reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        if registers:
            resized = F.interpolate(table, size=(3, 50), mode="bicubic", antialias=True)
        else:
            resized = F.interpolate(table, scale_factor=(3.1 / 37, 50.1 / 37), mode="bicubic")
        embedding = model.position_embedding(3, 50)
        torch.testing.assert_close(embedding[1:], resized[0].permute(1, 2, 0).reshape(150, -1))
        torch.testing.assert_close(embedding[0], model.pos_embed[0, 0])


def test_every_grid_up_to_twice_the_trained_one_has_a_position_embedding() -> None:
    model = ImageEncoder(EncoderConfig(size="small", keep_first_n_layers=1)).model
    with torch.no_grad():
        model.pos_embed = nn.Parameter(model.pos_embed[..., :2])  # two channels are enough to see the grid
        for side in range(1, 75):
            assert model.position_embedding(side, 75 - side).shape == (1 + side * (75 - side), 2)


def test_class_token_and_registers_are_not_returned() -> None:
    for registers in (False, True):
        encoder = ImageEncoder(EncoderConfig(size="small", keep_first_n_layers=1, with_registers=registers))
        assert encoder(torch.zeros(3, 3, 28, 42)).shape == (3, 6, 384)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = ImageEncoder(
            EncoderConfig(size="small", keep_first_n_layers=2, gradient_checkpointing=checkpointing)
        ).train()
        golden_weights(encoder)
        image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(4))
        encoder(image).square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("height", "width"), [(28, 43), (0, 28), (27, 28)])
def test_an_image_that_is_no_multiple_of_the_patch_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"img: .*multiples of 14, got {height} x {width}; resize to"):
        grid_of(height, width, 14)
