"""The multi-view transformer against uniception's alternating and global attention transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from any4d_fast.config import TransformerConfig
from any4d_fast.modules.multiview import MultiViewTransformer, sinusoid_table
from any4d_fast.testing import relative_error
from tests.golden_cases import golden_weights
from tests.oracles import FORWARD_BUDGET, assert_same_gradients, needs_oracles, same_weights, upstream

B, GRID, INPUT_DIM, DIM = 2, (2, 3), 40, 48
T = GRID[0] * GRID[1]


def config(**options: Any) -> TransformerConfig:
    return TransformerConfig(**{"depth": 4, "dim": DIM, "num_heads": 3, "indices": (1, 2), **options})


def ours(options: TransformerConfig, input_dim: int = INPUT_DIM) -> MultiViewTransformer:
    model = MultiViewTransformer(options, input_dim)
    golden_weights(model)
    return model


def upstreams(options: TransformerConfig, input_dim: int = INPUT_DIM) -> nn.Module:
    """uniception's transformer of the same configuration."""
    kind = "Alternating" if options.kind == "alternating_attention" else "Global"
    module = upstream(f"info_sharing.{options.kind}_transformer")
    arguments = dict(vars(options), name="transformer", input_embed_dim=input_dim)
    for key in ("kind", "indices", "norm_intermediate"):
        arguments.pop(key)
    returner = "" if options.indices is None else "IFR"
    if options.indices is not None:
        arguments |= {"indices": list(options.indices), "norm_intermediate": options.norm_intermediate}
    transformer: nn.Module = getattr(module, f"MultiView{kind}AttentionTransformer{returner}")(**arguments)
    return transformer


def tokens_of(output: Any) -> Tensor:
    """Upstream's features per view and scale token, as the rows of one buffer [B, V*T + 1, C]."""
    views = [view.flatten(2).transpose(1, 2) for view in output.features]
    return torch.cat([*views, output.additional_token_features.transpose(1, 2)], dim=1)


@dataclass
class Comparison:
    """Both transformers' results for the same tokens and the same random state."""

    ours: MultiViewTransformer
    theirs: nn.Module
    input: Tensor
    their_input: Tensor
    outputs: list[Tensor]
    their_outputs: list[Tensor]

    def check(self) -> None:
        assert len(self.outputs) == len(self.their_outputs)
        for result, expected in zip(self.outputs, self.their_outputs, strict=True):
            assert relative_error(result, expected) <= FORWARD_BUDGET
        assert_same_gradients(
            self.ours, self.theirs, self.outputs, self.their_outputs, [(self.input, self.their_input)]
        )


def compare(
    options: TransformerConfig, views: int = 3, input_dim: int = INPUT_DIM, train: bool = False, batch: int = B
) -> Comparison:
    model, theirs = ours(options, input_dim).train(train), upstreams(options, input_dim).train(train)
    same_weights(model, theirs)
    given = torch.randn(batch, views * T + 1, input_dim, generator=torch.Generator().manual_seed(0))
    mine, other = given.clone().requires_grad_(), given.clone().requires_grad_()
    maps = other[:, : views * T].unflatten(1, (views, *GRID)).permute(1, 0, 4, 2, 3)  # [V, B, C, h, w]
    structure = upstream("info_sharing.base").MultiViewTransformerInput(
        features=list(maps), additional_input_tokens=other[:, -1:].transpose(1, 2)
    )
    torch.manual_seed(5)
    taps, final = model(mine, views)
    torch.manual_seed(5)
    expected = theirs(structure)
    expected_taps = [] if options.indices is None else [tokens_of(tap) for tap in expected[1]]
    expected_final = tokens_of(expected if options.indices is None else expected[0])
    return Comparison(model, theirs, mine, other, [*taps, final], [*expected_taps, expected_final])


KINDS = ("alternating_attention", "global_attention")
OPTIONS: dict[str, dict[str, Any]] = {
    "as released": {},
    "no intermediate features": {"indices": None},
    "three indices": {"indices": (0, 1, 2)},
    "last block tapped": {"indices": (1, 3)},
    "taps before the norm": {"norm_intermediate": False},
    "taps before the norm, last block": {"indices": (0, 3), "norm_intermediate": False},
    "odd depth": {"depth": 5, "indices": (2, 4)},
    "one block": {"depth": 1, "indices": None},
    "reference view not marked": {"distinguish_ref_and_non_ref_views": False},
    "sequential view positions": {"use_pe_for_non_reference_views": True,
                                  "use_rand_idx_pe_for_non_reference_views": False},
    "random view positions": {"use_pe_for_non_reference_views": True, "max_num_views_for_pe": 20},
    "qk norm": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "layer scale": {"init_values": 0.1},
    "scalable softmax": {"use_scalable_softmax": True},
    "entropy scaling": {"use_entropy_scaling": True},
    "both corrections": {"use_scalable_softmax": True, "use_entropy_scaling": True,
                         "base_token_count_for_entropy_scaling": 10, "entropy_scaling_growth_factor": 2.0},
    "narrow mlp": {"mlp_ratio": 1.5},
}  # fmt: skip


@needs_oracles
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_transformer_agrees_with_upstreams(kind: str, name: str) -> None:
    compare(config(kind=kind, **OPTIONS[name])).check()


@needs_oracles
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("views", [1, 2, 5])
def test_any_number_of_views_agrees_with_upstreams(kind: str, views: int) -> None:
    compare(config(kind=kind), views=views, batch=1).check()


@needs_oracles
@pytest.mark.parametrize("kind", KINDS)
def test_equal_dims_need_no_projection(kind: str) -> None:
    found = compare(config(kind=kind), input_dim=DIM)
    assert isinstance(found.ours.proj_embed, nn.Identity)
    found.check()


@needs_oracles
@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_depth_drops_what_upstream_drops_under_the_same_seed(kind: str) -> None:
    found = compare(config(kind=kind, drop_path=0.5), train=True)
    undropped = compare(config(kind=kind), train=True)
    assert relative_error(found.outputs[-1], undropped.outputs[-1]) > 1e-2
    found.check()


@needs_oracles
def test_dropout_of_projections_is_where_upstream_has_it() -> None:
    # Global attention only: frame blocks draw for the scale token's row too, which upstream cuts off before.
    found = compare(config(kind="global_attention", proj_drop=0.3), train=True)
    undropped = compare(config(kind="global_attention"), train=True)
    assert relative_error(found.outputs[-1], undropped.outputs[-1]) > 1e-2
    found.check()


def test_dropout_is_off_outside_training() -> None:
    plain, dropping = ours(config()), ours(config(drop_path=0.5, proj_drop=0.5)).eval()
    tokens = torch.randn(1, 2 * T + 1, INPUT_DIM)
    state = torch.get_rng_state()
    assert torch.equal(dropping(tokens, 2)[1], plain.eval()(tokens, 2)[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_input_is_not_changed() -> None:
    # Without a projection the transformer's stream starts as the fused map that the dense heads read later.
    tokens = torch.randn(1, 2 * T + 1, DIM)
    before = tokens.clone()
    ours(config(), DIM)(tokens, 2)
    assert torch.equal(tokens, before)


def test_frame_blocks_leave_the_scale_token_as_it_is() -> None:
    rows: list[Tensor] = []
    model = ours(config(indices=None))
    for block in model.self_attention_blocks:
        block.register_forward_hook(lambda module, args, out: rows.append(out[0].detach()))
    model(torch.randn(B, 3 * T + 1, INPUT_DIM), 3)
    tokens = [row.view(B, 3 * T + 1, -1)[:, -1] for row in rows]
    assert torch.equal(tokens[1], tokens[0]) and torch.equal(tokens[3], tokens[2])
    assert not torch.equal(tokens[2], tokens[1])


def test_frame_blocks_do_not_mix_views() -> None:
    model = ours(config(depth=2, indices=None, distinguish_ref_and_non_ref_views=False))
    block = model.self_attention_blocks[0]
    with torch.no_grad():  # the global block adds nothing
        for parameter in (block.attn.proj.weight, block.attn.proj.bias):
            parameter.zero_()
    tokens = torch.randn(1, 2 * T + 1, INPUT_DIM)
    changed = tokens.clone()
    changed[:, T:] += 1
    first, second = model(tokens, 2)[1], model(changed, 2)[1]
    assert torch.equal(first[:, :T], second[:, :T])
    assert not torch.allclose(first[:, T : 2 * T], second[:, T : 2 * T])


def test_more_views_than_position_rows_is_an_error() -> None:
    model = ours(config(use_pe_for_non_reference_views=True, max_num_views_for_pe=2))
    with pytest.raises(ValueError, match="views: expected at most max_num_views_for_pe = 2, got 3"):
        model(torch.randn(1, 3 * T + 1, INPUT_DIM), 3)


def test_sinusoid_table_is_the_one_of_the_paper() -> None:
    table = sinusoid_table(4, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    angle = 3 / 10000 ** (4 / 6)
    torch.testing.assert_close(table[3, 4:].double(), torch.tensor([math.sin(angle), math.cos(angle)]).double())


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_gradient_checkpointing_gives_the_same_gradients(drop_path: float) -> None:
    found = []
    for checkpointing in (False, True):
        model = ours(config(gradient_checkpointing=checkpointing, drop_path=drop_path)).train()
        tokens = torch.randn(B, 2 * T + 1, INPUT_DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(3)
        taps, final = model(tokens, 2)
        (final.square().sum() + taps[0].sum()).backward()
        found.append([p.grad for p in model.parameters()] + [tokens.grad])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
