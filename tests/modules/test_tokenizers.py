"""The tokenizers of geometric inputs against uniception's encoders."""

from __future__ import annotations

import pytest
import torch

from any4d_fast.modules.tokenizers import DenseTokenizer, VectorTokenizer
from any4d_fast.testing import relative_error
from tests.golden_cases import golden_weights
from tests.oracles import FORWARD_BUDGET, assert_same_gradients, needs_oracles, same_weights, upstream


@needs_oracles
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("widths", [(24, 32, 48), (32, 32), (40,)])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_a_dense_map_becomes_upstreams_tokens(channels: int, widths: tuple[int, ...], grid: tuple[int, int]) -> None:
    ours = DenseTokenizer(channels, 48, 14, widths)
    golden_weights(ours)
    theirs = upstream("encoders.dense_rep_encoder").DenseRepresentationEncoder(
        name="dense", in_chans=channels, enc_embed_dim=48, apply_pe=False, intermediate_dims=list(widths)
    )
    same_weights(ours, theirs)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 14 * grid[0], 14 * grid[1], channels, generator=generator)
    mine, other = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    given = upstream("encoders.base").ViTEncoderNonImageInput(data=other.permute(0, 3, 1, 2))
    result, expected = ours(mine), theirs(given).features.flatten(2).transpose(1, 2)
    assert relative_error(result, expected) <= FORWARD_BUDGET
    assert_same_gradients(ours, theirs, [result], [expected], [(mine, other)])


@needs_oracles
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("widths", [(16, 24, 32), (16,)])
def test_a_vector_becomes_upstreams_token(channels: int, widths: tuple[int, ...]) -> None:
    ours = VectorTokenizer(channels, 48, widths)
    golden_weights(ours)
    theirs = upstream("encoders.global_rep_encoder").GlobalRepresentationEncoder(
        name="global", in_chans=channels, enc_embed_dim=48, intermediate_dims=list(widths)
    )
    same_weights(ours, theirs)
    values = torch.randn(5, channels, generator=torch.Generator().manual_seed(0))
    mine, other = values.clone().requires_grad_(), values.clone().requires_grad_()
    result = ours(mine)
    expected = theirs(upstream("encoders.base").EncoderGlobalRepInput(data=other)).features
    assert relative_error(result, expected) <= FORWARD_BUDGET
    assert_same_gradients(ours, theirs, [result], [expected], [(mine, other)])
