"""Pose head and scale head against uniception's."""

from __future__ import annotations

import pytest
import torch

from any4d_fast.modules.heads import PoseHead, ScaleHead
from any4d_fast.testing import relative_error
from tests.golden_cases import golden_weights
from tests.oracles import FORWARD_BUDGET, assert_same_gradients, needs_oracles, same_weights, upstream


@needs_oracles
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_pose_head_agrees_with_upstreams(blocks: int, grid: tuple[int, int]) -> None:
    ours = PoseHead(24, 4, blocks)
    golden_weights(ours)
    theirs = upstream("prediction_heads.pose_head").PoseHead(
        patch_size=4, input_feature_dim=24, num_resconv_block=blocks, rot_representation_dim=4
    )
    same_weights(ours, theirs)
    maps = torch.randn(3, 24, *grid, generator=torch.Generator().manual_seed(0))
    mine, other = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    result = ours(mine.flatten(2).transpose(1, 2))
    given = upstream("prediction_heads.base").PredictionHeadInput(last_feature=other)
    expected = theirs(given).decoded_channels
    assert result.shape == (3, 7)
    assert relative_error(result, expected) <= FORWARD_BUDGET
    assert_same_gradients(ours, theirs, [result], [expected], [(mine, other)])


@needs_oracles
@pytest.mark.parametrize(("hidden", "layers"), [(196, 2), (16, 0), (8, 3)])
def test_scale_head_agrees_with_upstreams(hidden: int, layers: int) -> None:
    ours = ScaleHead(24, hidden, layers)
    golden_weights(ours)
    theirs = upstream("prediction_heads.mlp_head").MLPHead(
        input_feature_dim=24, output_dim=1, num_mlp_layers=layers, hidden_dim=hidden
    )
    same_weights(ours, theirs)
    token = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    mine, other = token.clone().requires_grad_(), token.clone().requires_grad_()
    given = upstream("prediction_heads.base").PredictionHeadTokenInput(last_feature=other[..., None])
    result, expected = ours(mine), theirs(given).decoded_channels[..., 0]
    assert relative_error(result, expected) <= FORWARD_BUDGET
    assert_same_gradients(ours, theirs, [result], [expected], [(mine, other)])
