"""What a model starts from that has no weights yet."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from any4d_fast import Any4D
from any4d_fast.config import ModalityConfig, preset
from any4d_fast.modules.encoder import TRAINED_GRID
from any4d_fast.train.fresh import prepare, sinusoidal_grid
from any4d_fast.train.stream import Stream, StreamConfig


@pytest.fixture(scope="module")
def model() -> Any4D:
    torch.manual_seed(0)
    made = Any4D.from_preset("tiny")
    prepare(made, ("scene_flow_encoder.",))
    return made.eval()


def test_rows_and_columns_have_half_of_the_channels_each() -> None:
    grid = sinusoidal_grid(384).view(TRAINED_GRID, TRAINED_GRID, 384)
    assert torch.equal(grid[:, 0, :192], grid[:, 20, :192]) and torch.equal(grid[0, :, 192:], grid[20, :, 192:])
    assert torch.equal(grid[..., :192], grid[..., 192:].transpose(0, 1))


@pytest.mark.parametrize(("rows", "columns"), [(9, 12), (16, 16), (37, 37)])
def test_every_place_of_a_picture_is_nearest_to_itself(model: Any4D, rows: int, columns: int) -> None:
    """A resized table still tells all patches apart, and neighbours resemble each other more than what is far."""
    table = model.encoder.model.position_embedding(rows, columns)[1:].detach()
    distance = torch.cdist(table, table) + 1e3 * torch.eye(len(table))
    assert distance.min() > 0.5
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    nearest = (place - place[distance.argmin(1)]).abs().amax(1)
    assert (nearest == 1).float().mean() > 0.95


def test_a_width_that_four_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="dim: expected a multiple of 4.*got 6"):
        sinusoidal_grid(6)


def test_keys_start_as_queries(model: Any4D) -> None:
    for block in model.info_sharing.self_attention_blocks:
        queries, keys, values = block.attn.qkv.weight.chunk(3)
        assert torch.equal(queries, keys) and not torch.equal(queries, values)


def test_first_outputs_are_usual_values(model: Any4D) -> None:
    config = StreamConfig(num_views=2, sizes=((70, 98),), supersampling=1, shadows=False)
    batch = Stream(config, 2, seed=0).batch(0)
    with torch.no_grad():
        outputs = model.run(batch.views(model.encoder.data_norm_type, ()), ModalityConfig(), None)
    scale = outputs[0]["metric_scaling_factor"]
    assert ((scale > 1.5) & (scale < 5)).all()
    for view in outputs:
        assert (view["ray_directions"][..., 2] > math.cos(math.radians(45))).all()
        depth = view["depth_along_ray"] / scale.view(-1, 1, 1, 1)
        assert ((depth > 0.3) & (depth < 3)).all()
        assert (view["scene_flow"].norm(dim=-1) / scale.view(-1, 1, 1)).mean() < 0.5
        assert (view["cam_quats"][:, 3] > 0.95).all()
        assert (view["non_ambiguous_mask_logits"] > 0).float().mean() > 0.9


def test_hidden_units_of_the_last_layers_are_alive(model: Any4D) -> None:
    """About half of them are above zero, on both sides of a threshold that no common shift of all pixels crosses."""
    for head in (model.dpt_regressor_head, model.scene_flow_dpt_regressor_head):
        features = torch.randn(1, head.conv1.in_channels, 24, 24, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            hidden = head.conv2[0](head.conv1(features))
        alive = (hidden > 0).float().mean((0, 2, 3))
        assert ((alive > 0.25) & (alive < 0.75)).all() and hidden.std() > 0.5


def test_unused_tokenizers_add_nothing(model: Any4D) -> None:
    unused = [p for n, p in model.named_parameters() if n.startswith("scene_flow_encoder.")]
    assert unused and not any(p.any() for p in unused)
    assert all(p.any() for n, p in model.named_parameters() if n.startswith("depth_encoder.") and p.ndim > 1)


def test_other_representations_start_at_usual_values_too() -> None:
    """Points straight ahead at depth 1, without a pose head."""
    tiny = preset("tiny")
    head = dataclasses.replace(tiny.scene.geometry_head, output_dim=5)
    scene = dataclasses.replace(tiny.scene, representation="pointmap", pose_head=False, geometry_head=head)
    model = Any4D.from_config(dataclasses.replace(tiny, scene=scene))
    prepare(model, ())
    bias = model.dpt_regressor_head.conv2[2].bias
    assert bias.tolist() == [0.0, 0.0, 1.0, 0.0, 2.0]
