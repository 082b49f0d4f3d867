"""Inference weights: numerics against the plain modules, and when they are renewed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import Any4D, use_backend
from any4d_fast.config import EncoderConfig, TransformerConfig
from any4d_fast.modules.block import NORM_EPS, Block
from any4d_fast.modules.derived import Derived
from any4d_fast.modules.encoder import ImageEncoder, VisionTransformer
from any4d_fast.modules.multiview import MultiViewTransformer
from any4d_fast.modules.packing import packed_blocks, packed_dtype
from any4d_fast.ops.attention import Segments
from any4d_fast.testing import relative_error
from tests.golden_cases import golden_views, golden_weights
from tests.small_models import small_model

BF16 = torch.bfloat16


def blocks_of(count: int = 3, **options: Any) -> tuple[list[Block], nn.LayerNorm]:
    torch.manual_seed(0)
    blocks = [Block(48, 3, **{"init_values": 1.0, **options}) for _ in range(count)]
    norm = nn.LayerNorm(48, eps=NORM_EPS)
    golden_weights(nn.ModuleList([*blocks, norm]))
    return [block.eval() for block in blocks], norm


def run(blocks: list[Block], norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype, packed: bool) -> tuple[Tensor, Tensor]:
    segments = Segments.batched(2, x.shape[0] // 2)
    weights = packed_blocks(Derived(), blocks, norm, dtype) if packed else None
    x = x.clone()
    first = blocks[0].norm1(x.float()).to(dtype) if weights is None else weights.first_input(x, dtype)
    y = first
    for i, block in enumerate(blocks):
        last = i + 1 == len(blocks)
        following = norm if last else blocks[i + 1].norm1
        kind = x.dtype if last else dtype
        chosen = None if weights is None else weights.blocks[i]
        x, y = block(x, y, segments, 48**-0.5, following, (None, None), kind, chosen)
    return x, y


@pytest.mark.parametrize(
    "options", [{}, {"init_values": None}, {"gated": True}, {"qkv_bias": False}, {"qk_norm": True}]
)
@torch.no_grad()
def test_packed_blocks_compute_what_the_modules_do(options: dict[str, Any]) -> None:
    blocks, norm = blocks_of(**options)
    x = torch.randn(14, 48)
    exact = run(blocks, norm, x, torch.float32, packed=False)
    # `linear_gelu` takes its bias unrounded: the errors are those of plain autocast, up to chance.
    with torch.autocast("cpu", dtype=BF16):
        plain = run(blocks, norm, x, BF16, packed=False)
        packed = run(blocks, norm, x, BF16, packed=True)
    for a, b, c in zip(packed, plain, exact, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert relative_error(a, c) <= 1.5 * relative_error(b, c)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@torch.no_grad()
def test_nothing_is_folded(dtype: torch.dtype) -> None:
    """Weights round as autocast rounds them, each by itself; a LayerScale of 1e-6 would be lost in float16."""
    blocks, norm = blocks_of(1)
    blocks[0].ls1.gamma.fill_(1e-6)
    packed = packed_blocks(Derived(), blocks, norm, dtype)
    assert packed is not None
    assert packed.blocks[0].after_attention == (blocks[0].ls1.gamma, blocks[0].norm2.weight, blocks[0].norm2.bias)
    assert packed.blocks[0].after_mlp == (blocks[0].ls2.gamma, norm.weight, norm.bias)
    assert packed.first_norm == (blocks[0].norm1.weight, blocks[0].norm1.bias)
    assert torch.equal(packed.blocks[0].proj_weight, blocks[0].attn.proj.weight.to(dtype))


def test_only_known_modules_without_hooks_are_packed() -> None:
    blocks, norm = blocks_of(2)
    assert packed_blocks(Derived(), blocks, norm, BF16) is not None
    handle = blocks[1].attn.qkv.register_forward_hook(lambda *_: None)
    assert packed_blocks(Derived(), blocks, norm, BF16) is None
    handle.remove()

    class Adapter(nn.Linear):
        pass

    blocks[1].mlp.fc1 = Adapter(48, 192)
    assert packed_blocks(Derived(), blocks, norm, BF16) is None


def test_when_weights_are_packed() -> None:
    cpu = torch.device("cpu")
    assert packed_dtype(cpu) is None
    with torch.autocast("cpu", dtype=BF16):
        assert packed_dtype(cpu) is None  # gradients
        with torch.no_grad():
            assert packed_dtype(cpu) == BF16
            with use_backend("eager"):
                assert packed_dtype(cpu) is None
    with torch.no_grad():
        assert packed_dtype(cpu) is None  # float32


def encode(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        out: Tensor = model(x)
    return out


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))


def small_encoder() -> ImageEncoder:
    model = ImageEncoder(EncoderConfig(size="small", keep_first_n_layers=2)).eval()
    golden_weights(model)
    return model


def assert_follows(model: ImageEncoder, x: Tensor) -> None:
    """What is kept is what a copy of the model, which starts without, derives anew."""
    assert torch.equal(encode(model, x), encode(copy.deepcopy(model), x))


def test_changes_of_weights_are_seen(images: Tensor) -> None:
    model = small_encoder()
    assert_follows(model, images)
    addresses = [t.data_ptr() for t in encode_and_get(model, images)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    before = encode(model, images)
    optimizer.step()
    assert relative_error(encode(model, images), before) > 0.1
    assert_follows(model, images)
    model.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()})
    assert_follows(model, images)
    assert [t.data_ptr() for t in encode_and_get(model, images)] == addresses, "renewed in place"
    state = {k: v.clone() * 0.5 for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert_follows(model, images)
    with torch.no_grad():
        model.model.blocks[1].ls2.gamma.mul_(-3)
        model.model.pos_embed.mul_(2)
        model.model.patch_embed.proj.weight.mul_(2)
    assert_follows(model, images)


def encode_and_get(model: ImageEncoder, x: Tensor) -> list[Tensor]:
    encode(model, x)
    return [t for kept in model.model.derived._kept.values() for t in kept.tensors]


def test_copies_moves_and_pickles(images: Tensor) -> None:
    model = small_encoder()
    encode(model, images)
    assert len(model.model.derived) == 3  # blocks, patch weight, positions
    assert not any("derived" in key for key in model.state_dict())
    twin = copy.deepcopy(model)
    assert len(twin.model.derived) == 0
    with torch.no_grad():
        twin.model.blocks[0].attn.proj.weight.zero_()
    assert_follows(twin, images)
    assert_follows(model, images)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert len(torch.load(buffer, weights_only=False).model.derived) == 0
    model.to("cpu")
    assert len(model.model.derived) == 3
    model.to(torch.float64).to(torch.float32)
    assert len(model.model.derived) == 0
    assert_follows(model, images)


def test_positions_are_resized_once_a_grid(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_encoder()
    count: list[tuple[int, int]] = []
    original = VisionTransformer._resized

    def resized(self: VisionTransformer, rows: int, columns: int) -> Tensor:
        count.append((rows, columns))
        return original(self, rows, columns)

    monkeypatch.setattr(VisionTransformer, "_resized", resized)
    for _ in range(3):
        encode(model, images)
        encode(model, images.transpose(2, 3))
    assert sorted(count) == [(2, 3), (3, 2)]
    model(images)  # with gradients nothing is kept
    assert len(count) == 3
    for size in range(1, 30):
        model.model.position_embedding(size, 1)
    with torch.no_grad():
        for size in range(1, 30):
            model.model.position_embedding(size, 1)
    assert len(model.model.derived) <= 16


def test_positions_of_the_trained_grid_do_not_alias_the_parameter() -> None:
    model = small_encoder().model
    with torch.no_grad():
        table = model.position_embedding(37, 37)
        assert table.data_ptr() != model.pos_embed.data_ptr()
        before = table.clone()
        model.pos_embed.add_(1)
        assert torch.equal(table, before)
        assert torch.equal(model.position_embedding(37, 37), model.pos_embed[0])


@pytest.mark.parametrize("options", [{}, {"norm_intermediate": False}, {"indices": (0, 1, 3)}, {"dim": 64}])
def test_transformer_with_packed_weights(options: dict[str, Any]) -> None:
    config = TransformerConfig(**{"depth": 4, "dim": 48, "num_heads": 4, "indices": (1, 2), **options})
    model = MultiViewTransformer(config, 64).eval()
    golden_weights(model)
    tokens = torch.randn(2, 3 * 6 + 1, 64)
    kept = tokens.clone()
    with torch.no_grad():
        exact, last = model(tokens, 3)
        with torch.autocast("cpu", dtype=BF16):
            packed, packed_last = model(tokens, 3)
            with use_backend("eager"):
                plain, plain_last = model(tokens, 3)
    assert torch.equal(tokens, kept)
    for a, b, c in zip([*packed, packed_last], [*plain, plain_last], [*exact, last], strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, c) <= 1.5 * relative_error(b, c)


def test_inference_mode_and_no_grad_share_what_is_kept(images: Tensor) -> None:
    model = small_encoder()
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        first = model(images).clone()
    assert torch.equal(encode(model, images), first)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        changed = model(images).clone()
    assert torch.equal(encode(model, images), changed)


def test_weights_made_in_inference_mode_are_not_kept(images: Tensor) -> None:
    with torch.inference_mode():
        model = small_encoder()
    encode(model, images)
    assert len(model.model.derived) == 0


def test_writes_through_data_need_refresh_or_train() -> None:
    model = small_model()
    views = golden_views(1, 1, 28, 28, 0, [[]])

    def call(kind: Any = model) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
            return kind(views)[0]["pts3d"]

    for renew in (Any4D.refresh, lambda m: m.train().eval()):
        before = call()
        model.encoder.model.blocks[0].mlp.fc2.weight.data.mul_(-5)
        renew(model)
        assert not torch.equal(call(), before)
