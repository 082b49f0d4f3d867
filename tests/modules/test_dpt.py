"""The dense heads against uniception's DPT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from any4d_fast.config import DenseHeadConfig
from any4d_fast.modules.dpt import DPTFeatures, DPTRegressor, recomputed, to_head_dtype, token_maps
from any4d_fast.testing import relative_error
from tests import tf32
from tests.golden_cases import golden_weights
from tests.oracles import FORWARD_BUDGET, assert_same_gradients, needs_oracles, same_weights, upstream


def head(config: DenseHeadConfig, dims: tuple[int, ...]) -> nn.Sequential:
    ours = nn.Sequential(DPTFeatures(config, dims), DPTRegressor(config))
    golden_weights(ours)
    return ours


def upstream_head(config: DenseHeadConfig, dims: tuple[int, ...]) -> nn.Sequential:
    dpt = upstream("prediction_heads.dpt")
    feature = dpt.DPTFeature(
        patch_size=14, hooks=list(config.hooks), input_feature_dims=list(dims), layer_dims=list(config.layer_dims),
        feature_dim=config.feature_dim,
    )  # fmt: skip
    hidden = None if config.hidden_dims is None else list(config.hidden_dims)
    regressor = dpt.DPTRegressionProcessor(
        input_feature_dim=config.feature_dim, output_dim=config.output_dim, hidden_dims=hidden
    )
    return nn.Sequential(feature, regressor)


def run(ours: nn.Sequential, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    result: Tensor = ours[1](ours[0](maps), size)
    return result


def run_upstream(theirs: nn.Sequential, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """[N, H, W, C]"""
    given = upstream("prediction_heads.base").PredictionHeadLayeredInput(list_features=maps, target_output_shape=size)
    return theirs(given).decoded_channels.permute(0, 2, 3, 1)


SMALL = DenseHeadConfig(output_dim=6, feature_dim=16, layer_dims=(8, 12, 16, 20))
CASES = {
    "encoder map first": (SMALL, (20, 12, 12, 12), (2, 4)),
    "odd grid": (SMALL, (20, 12, 12, 12), (3, 5)),
    "one row": (SMALL, (12, 12, 12, 12), (1, 7)),
    "one patch": (SMALL, (12, 12, 12, 12), (1, 1)),
    "hooks permuted": (DenseHeadConfig(output_dim=3, feature_dim=16, hooks=(3, 1, 0, 2), layer_dims=(8, 12, 16, 20)),
                       (12, 12, 12, 12), (3, 2)),
    "hidden dims": (DenseHeadConfig(output_dim=1, feature_dim=16, layer_dims=(8, 8, 8, 8), hidden_dims=(10, 6)),
                    (12, 12, 12, 12), (5, 4)),
    "released dims": (DenseHeadConfig(output_dim=6), (40, 24, 24, 24), (3, 2)),
}  # fmt: skip


@needs_oracles
@pytest.mark.parametrize("name", CASES)
def test_dense_head_agrees_with_upstreams(name: str) -> None:
    config, dims, grid = CASES[name]
    ours, theirs = head(config, dims), upstream_head(config, dims)
    same_weights(ours, theirs)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, dim, *grid, generator=generator) for dim in dims]
    mine, other = ([m.clone().requires_grad_() for m in maps] for _ in range(2))
    size = (14 * grid[0], 14 * grid[1])
    result, expected = run(ours, mine, size), run_upstream(theirs, other, size)
    assert result.shape == (2, *size, config.output_dim)
    assert relative_error(result, expected) <= FORWARD_BUDGET
    assert_same_gradients(ours, theirs, [result], [expected], list(zip(mine, other, strict=True)))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        config = DenseHeadConfig(
            output_dim=6, feature_dim=16, layer_dims=(8, 12, 16, 20), checkpoint_gradient=checkpointing
        )
        ours = head(config, (12, 12, 12, 12)).train()
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randn(1, 12, 3, 3, generator=generator, requires_grad=True) for _ in range(4)]
        run(ours, maps, (42, 42)).square().sum().backward()
        found.append([p.grad for p in ours.parameters()] + [m.grad for m in maps])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


def test_recomputing_keeps_tf32s_setting() -> None:
    """A backend is chosen by it, and what is computed again must be what was computed first."""
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    with tf32.settings(matmul=True, cudnn=True):
        out = recomputed(function, x)
    with tf32.settings(matmul=False, cudnn=True):
        out.sum().backward()
        assert not torch.backends.cuda.matmul.allow_tf32
    assert seen == [True, True]


def test_token_maps_are_the_buffers_rows_view_major() -> None:
    batch, views, rows, columns, dim = 2, 3, 2, 4, 5
    tokens = torch.arange(batch * (views * rows * columns + 1) * dim, dtype=torch.float32)
    tokens = tokens.view(batch, -1, dim)
    maps = token_maps(tokens, slice(1, 3), (rows, columns), views)
    assert maps.shape == (2 * batch, dim, rows, columns)
    for v in range(2):
        for b in range(batch):
            first = (v + 1) * rows * columns
            expected = tokens[b, first : first + rows * columns].view(rows, columns, dim)
            assert torch.equal(maps[v * batch + b].permute(1, 2, 0), expected)


def test_token_maps_of_one_sample_are_not_copied() -> None:
    tokens = torch.randn(1, 2 * 6 + 1, 8)
    maps = token_maps(tokens, slice(1, 2), (2, 3), 2)
    assert maps.data_ptr() == tokens[0, 6].data_ptr()
    assert maps.is_contiguous(memory_format=torch.channels_last)


def test_heads_run_in_float32_after_a_half_precision_transformer() -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert [m.dtype for m in to_head_dtype([torch.zeros(1, dtype=d) for d in dtypes])] == [
        torch.float32, torch.float32, torch.float32, torch.float64,
    ]  # fmt: skip
