"""The tokenizers of geometric inputs against uniception's encoders."""

from __future__ import annotations

import pytest
import torch

from any4d_fast.modules import dense_inference
from any4d_fast.modules.tokenizers import DenseTokenizer, VectorTokenizer
from any4d_fast.ops.dense_maps import new_flag
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


def tokenizer(channels: int, widths: tuple[int, ...]) -> DenseTokenizer:
    made = DenseTokenizer(channels, 20, 6, widths).eval()
    golden_weights(made)
    return made


# Half a step of rounding is made at each of the dozen passes, with independent signs: a few steps in the end.
ROUNDING_STEPS = 8
STEP = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("widths", [(12, 16, 20), (16, 16), (10,)])  # not all are whole 16-byte loads
@torch.no_grad()
def test_a_dense_tokenizer_in_16_bits_is_the_same_function(
    widths: tuple[int, ...], channels: int, dtype: torch.dtype
) -> None:
    module = tokenizer(channels, widths)
    x = torch.randn(2, 18, 30, channels, generator=torch.Generator().manual_seed(0))
    flag = new_flag(x.device)
    expected, found = module(x), module(x, dtype, flag)
    assert found.dtype == torch.float32 and found.shape == expected.shape == (2, 15, 20)
    assert not flag.item()
    assert relative_error(found, expected) <= ROUNDING_STEPS * STEP[dtype]
    module.encoder[-1].weight.mul_(-1.5)  # what is kept of the weights follows them
    assert relative_error(module(x, dtype, flag), module(x)) <= ROUNDING_STEPS * STEP[dtype]


@torch.no_grad()
def test_many_images_go_through_a_tokenizer_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module, sizes = tokenizer(3, (12, 16)), []
    x = torch.randn(5, 18, 30, 3, generator=torch.Generator().manual_seed(0))
    whole, patches = module(x, torch.float16, new_flag(x.device)), dense_inference.dense_maps.patches
    monkeypatch.setattr(dense_inference, "PATCHES_AT_ONCE", 2 * 15 + 14)
    monkeypatch.setattr(dense_inference.dense_maps, "patches", lambda x, *o: (sizes.append(len(x)), patches(x, *o))[1])
    assert relative_error(module(x, torch.float16, new_flag(x.device)), whole) <= STEP[torch.float16]
    assert sizes == [3, 2]
    sizes.clear()
    monkeypatch.setattr(dense_inference, "PATCHES_AT_ONCE", 1)  # less than an image
    module(x, torch.float16, new_flag(x.device))
    assert sizes == [1] * 5


@pytest.mark.parametrize(
    "name",
    ["conv_in.weight", "encoder.0.conv1.weight", "encoder.0.conv2.bias", "encoder.0.shortcut.weight",
     "encoder.2.weight", "encoder.2.bias"],
)  # fmt: skip
@torch.no_grad()
def test_a_value_beyond_float16_in_a_tokenizer_is_seen(name: str) -> None:
    x = torch.randn(1, 12, 12, 3, generator=torch.Generator().manual_seed(0))
    for size in (1e1, 1e3, 6e4, 1e6):
        module = tokenizer(3, (12, 16, 20))
        parameter = module.get_parameter(name)
        parameter.mul_(size / parameter.abs().max())
        flag = new_flag(x.device)
        found, expected = module(x, torch.float16, flag), module(x)
        assert flag.item() or relative_error(found, expected) <= 20 * STEP[torch.float16]
    assert flag.item()


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
