"""`precision="fp8"` of the model: what it computes, emulated on a CPU, and where it refuses to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import Any4D, graphs, ops, use_backend
from any4d_fast.config import ModalityConfig
from any4d_fast.modules import packing_fp8
from any4d_fast.modules.derived import Derived
from any4d_fast.modules.packing import _Parts, packed_blocks
from any4d_fast.modules.packing_fp8 import Layers, hidden_bound, packed_blocks_fp8
from any4d_fast.ops.attention import Segments
from any4d_fast.precision import PrecisionError
from any4d_fast.testing import relative_error
from tests.golden_cases import golden_views
from tests.small_models import small_config, small_model
from tests.test_packing import blocks_of

ALL = Layers()
EACH = [ALL, Layers(qkv=False), Layers(mlp=False), Layers(attention=False), Layers(False, False, False)]


@pytest.fixture(autouse=True)
def every_segment_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in 8 bits at the sizes of a test."""
    monkeypatch.setattr(packing_fp8, "LONG", 1)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer that can be is in 8 bits."""
    monkeypatch.setattr(packing_fp8, "ENCODER", ALL)
    monkeypatch.setattr(packing_fp8, "TRANSFORMER", ALL)


@pytest.fixture
def emulated() -> Iterator[None]:
    with torch.no_grad(), use_backend("eager"):
        yield


def views_of(count: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    return golden_views(count, 1, 28, 42, seed, [[]] * count)


def run_blocks(layers: Layers | None, options: dict[str, Any]) -> Tensor:
    blocks, norm = blocks_of(**options)
    x = torch.randn(14, 48, generator=torch.Generator().manual_seed(1))
    segments = Segments.batched(2, 7)
    packed = None if layers is None else packed_blocks_fp8(Derived(), "it", blocks, norm, torch.float32, layers)
    y: Any = blocks[0].norm1(x) if packed is None else packed.first_input(x, torch.float32)
    for i, block in enumerate(blocks):
        following = norm if i + 1 == len(blocks) else blocks[i + 1].norm1
        weights = None if packed is None else packed.blocks[i]
        x, y = block(x, y, segments, 0.25, following, (None, None), torch.float32, weights)
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize("options", [{}, {"init_values": None}, {"qkv_bias": False}, {"qk_norm": True}])
@pytest.mark.parametrize("layers", EACH)
@pytest.mark.usefixtures("emulated")
def test_blocks_err_as_their_roundings_do(layers: Layers, options: dict[str, Any]) -> None:
    error = relative_error(run_blocks(layers, options), run_blocks(None, options))
    # Six products and three attentions of 4 to 5 % each, on branches about as large as the stream.
    assert error > 1e-3 if any(layers) else error < 1e-5, error
    assert error < 0.15


@pytest.mark.usefixtures("emulated")
def test_short_segments_attend_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    only_attention = Layers(qkv=False, mlp=False)
    monkeypatch.setattr(packing_fp8, "LONG", 8)
    assert relative_error(run_blocks(only_attention, {}), run_blocks(None, {})) < 1e-5
    monkeypatch.setattr(packing_fp8, "LONG", 7)
    assert relative_error(run_blocks(only_attention, {}), run_blocks(None, {})) > 1e-3


@torch.no_grad()
def test_hidden_values_stay_within_their_bound() -> None:
    blocks, _ = blocks_of(1)
    mlp, norm = blocks[0].mlp, blocks[0].norm2
    bound = hidden_bound(_Parts(blocks[0]))
    direction = mlp.fc1.weight * norm.weight  # the input that drives each channel as far as it goes
    pushed = norm(100 * torch.cat([direction, -direction, torch.randn(100, 48)]))
    hidden = mlp.fc1(pushed).abs()
    assert (hidden <= 448 * bound).all()
    assert hidden.max(0).values.div(448 * bound).min() > 0.25, "and no bound is far too wide"


@pytest.mark.usefixtures("everything", "emulated")
def test_the_model_errs_in_a_sane_range() -> None:
    model, views = small_model(), views_of()
    exact, found = model(views), model(views, precision="fp8")
    for name in ("pts3d", "ray_directions", "depth_along_ray", "scene_flow", "cam_trans"):
        error = relative_error(torch.cat([v[name] for v in found]), torch.cat([v[name] for v in exact]))
        assert 1e-4 < error < 0.3, (name, error)
    assert torch.equal(model(views)[0]["pts3d"], exact[0]["pts3d"]), "exact calls are as they were"


@pytest.mark.usefixtures("emulated")
def test_default_layers_run_as_well() -> None:
    model, views = small_model(), views_of()
    assert not torch.equal(model(views)[1]["pts3d"], model(views, precision="fp8")[1]["pts3d"])


@pytest.mark.usefixtures("everything")
def test_infer_takes_it_and_leaves_the_mode() -> None:
    model = small_model()
    images = [{"img": torch.randint(0, 256, (28, 42, 3), dtype=torch.uint8)} for _ in range(2)]
    with use_backend("eager"):
        exact, found = (model.infer(images, precision=p, size=(28, 42)) for p in ("exact", "fp8"))
        host = model.infer(images, precision="fp8", size=(28, 42), outputs_to="cpu")
    assert not torch.equal(exact[0]["depth_z"], found[0]["depth_z"])
    assert torch.equal(host[1]["depth_z"], found[1]["depth_z"])
    with pytest.raises(ValueError, match="precision: expected one of"):
        model.infer(images, precision="int4")


@pytest.mark.usefixtures("everything", "emulated")
def test_changes_of_weights_are_seen() -> None:
    model, views = small_model(), views_of()

    def follow() -> Tensor:
        found: Tensor = model(views, precision="fp8")[0]["pts3d"]
        fresh = Any4D.from_config(small_config()).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(found, fresh(views, precision="fp8")[0]["pts3d"])
        return found

    def addresses() -> list[int]:
        kept = [*model.encoder.model.derived._kept.values(), *model.info_sharing.derived._kept.values()]
        return [t.data_ptr() for k in kept for t in k.tensors]

    before, places = follow(), addresses()
    changes: list[Callable[[], Any]] = [
        lambda: model.encoder.model.blocks[0].attn.qkv.weight.mul_(-2),
        lambda: model.info_sharing.self_attention_blocks[1].mlp.fc1.bias.add_(3),
        lambda: model.info_sharing.self_attention_blocks[0].norm2.weight.mul_(3),
    ]
    for change in changes:
        change()
        after = follow()
        assert not torch.equal(after, before)
        before = after
    assert addresses() == places, "renewed in place, so that graphs go on reading them"


def test_weights_take_a_byte_and_their_losses_another() -> None:
    blocks, norm = blocks_of(2)
    store = Derived()
    packed_blocks_fp8(store, "it", blocks, norm, torch.bfloat16, ALL)
    count = sum(t.numel() for t in (blocks[0].attn.qkv.weight, blocks[0].mlp.fc1.weight, blocks[0].mlp.fc2.weight))
    (kept,) = store._kept.values()
    assert sum(t.numel() for t in kept.tensors if t.dtype == torch.float8_e4m3fn) == 2 * 2 * count


def test_16_bit_weights_are_those_of_exact_calls() -> None:
    """A model that is called in both precisions keeps one copy of what they share."""
    blocks, norm = blocks_of(2)
    store = Derived()
    exact = packed_blocks(store, blocks, norm, torch.bfloat16)
    wide = packed_blocks_fp8(store, "it", blocks, norm, torch.bfloat16, Layers(qkv=False, mlp=False))
    assert exact is not None and len(store._kept) == 1
    for ours, theirs in zip(wide.blocks, exact.blocks, strict=True):
        first, second = ours.mlp
        shared = [t for layer in (ours.qkv, ours.proj, first, second) for t in layer]
        assert all(a is b for a, b in zip(shared, theirs[:8], strict=True))


def test_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, views = small_model(), views_of()
    with torch.no_grad(), pytest.raises(PrecisionError, match="images are on cpu, and 8-bit layers run on CUDA"):
        model(views, precision="fp8")
    with pytest.raises(ValueError, match="precision: expected one of .*got 'int4'"):
        model(views, precision="int4")
    with use_backend("eager"):
        with pytest.raises(PrecisionError, match="gradients are enabled"):
            model(views, precision="fp8")
        with torch.no_grad():
            with pytest.raises(PrecisionError, match="training mode"):
                model.train()(views, precision="fp8")
            model.eval()
            handle = model.encoder.model.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
            with pytest.raises(PrecisionError, match="the encoder has a block with hooks"):
                model(views, precision="fp8")
            handle.remove()
            model.info_sharing.self_attention_blocks[0].mlp.fc1 = type("Adapter", (nn.Linear,), {})(48, 192)
            with pytest.raises(PrecisionError, match="the multi-view transformer has a block"):
                model(views, precision="fp8")
            giant = dataclasses.replace(model.config.encoder, size="giant")
            monkeypatch.setattr(model, "config", dataclasses.replace(model.config, encoder=giant))
            with pytest.raises(PrecisionError, match="gated"):
                model(views, precision="fp8")


def test_graphs_tell_precisions_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []
    model, views = small_model(), views_of()
    monkeypatch.setattr(graphs, "reasons", lambda *_: [])

    def run(module: Any, key: Any, given: Any, body: Callable[[Any], Any], at_once: bool = False) -> Any:
        keys.append(key)
        return body(given)

    monkeypatch.setattr(model._graphs, "run", run)
    with torch.no_grad(), use_backend("eager"):
        for precision in ("exact", "fp8", "exact"):
            model.run(views, ModalityConfig(), None, precision=precision)
    assert keys[0] == keys[2] != keys[1]


def test_rows8_are_exported() -> None:
    rounded = ops.quantize_rows(torch.randn(3, 16))
    assert isinstance(rounded, ops.Rows8) and rounded.wide().shape == (3, 16)
