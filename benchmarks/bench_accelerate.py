"""`any4d_fast.accelerate` on other people's models: the same model before and after, under their precision policy.

Transformers run under bfloat16 autocast; UniCeption's dense head in float32 with TF32 allowed, as Any4D's original code
runs it. A family whose package is missing is left out, and `missing` says why; for timm and VGGT the tests' twins of
their classes stand in (their names say so). The oracle is the original model in float32.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import accelerate
from any4d_fast.train.settings import tensor_float

from .harness import FULL, Case, Function, Maker, Sizes, compiled, op_budgets, random

WIDTHS = (96, 192, 384, 768)  # of the dense head's four maps
FEATURES, OUTPUTS = 256, 4
FLOAT32_BUDGET = 1e-5


@dataclass(frozen=True)
class Family:
    """A model to accelerate.

    Attributes:
        package: what must be importable; empty: nothing beside the tests.
        build: the model for some sizes.
        given: shape of its input, from sizes and a number of views.
        call: the model's outputs.
        flops: of a forward pass.
        autocast: whether it runs under bfloat16 autocast.
    """

    package: str
    build: Callable[[Sizes], nn.Module]
    given: Callable[[Sizes, int], tuple[int, ...]]
    call: Callable[[nn.Module, Tensor, Sizes, int], list[Tensor]]
    flops: Callable[[Sizes, int], float]
    autocast: bool = True


def grid(sizes: Sizes) -> tuple[int, int]:
    return sizes.height // 14, sizes.width // 14


def base(sizes: Sizes) -> tuple[int, int, int]:
    """Blocks, channels and heads of Any4D's transformer; few without a GPU, where only the code is tested."""
    return (12, 768, 12) if sizes.device != "cpu" else (2, 64, 2)


def large(sizes: Sizes) -> tuple[int, int, int]:
    """The same of a ViT-L."""
    return (24, 1024, 16) if sizes.device != "cpu" else (2, 64, 2)


def block_flops(rows: int, length: int, dim: int) -> float:
    """A block on `rows` tokens in segments of `length`: 12 C^2 weights, and two products of attention."""
    return 24.0 * rows * dim**2 + 4.0 * rows * length * dim


def uniception(name: str) -> Any:
    return importlib.import_module(f"uniception.models.{name}")


def transformer(sizes: Sizes) -> nn.Module:
    depth, dim, heads = base(sizes)
    cls = uniception("info_sharing.alternating_attention_transformer").MultiViewAlternatingAttentionTransformerIFR
    arguments = {"depth": depth, "dim": dim, "num_heads": heads, "indices": [depth // 2, depth - 1]}
    found: nn.Module = cls(name="transformer", input_embed_dim=dim, **arguments)
    return found


def run_transformer(model: nn.Module, x: Tensor, sizes: Sizes, views: int) -> list[Tensor]:
    maps = x[:, :-1].unflatten(1, (views, *grid(sizes))).permute(1, 0, 4, 2, 3)
    structure = uniception("info_sharing.base").MultiViewTransformerInput(
        features=list(maps), additional_input_tokens=x[:, -1:].transpose(1, 2)
    )
    final, taps = model(structure)
    return [torch.stack(out.features) for out in (*taps, final)]


def transformer_flops(sizes: Sizes, views: int) -> float:
    depth, dim, _ = base(sizes)
    rows = sizes.rows(views)
    return depth / 2 * (block_flops(rows, rows, dim) + block_flops(rows, sizes.tokens, dim))


def dense_head(sizes: Sizes) -> nn.Module:
    dpt = uniception("prediction_heads.dpt")
    features = dpt.DPTFeature(
        patch_size=14, hooks=[0, 1, 2, 3], input_feature_dims=[base(sizes)[1]] * 4, layer_dims=list(WIDTHS),
        feature_dim=FEATURES,
    )  # fmt: skip
    return nn.Sequential(features, dpt.DPTRegressionProcessor(FEATURES, OUTPUTS))


def run_dense_head(model: nn.Module, x: Tensor, sizes: Sizes, views: int) -> list[Tensor]:
    layered = uniception("prediction_heads.base").PredictionHeadLayeredInput
    shape = (sizes.height, sizes.width)
    return [model(layered(list_features=list(x), target_output_shape=shape)).decoded_channels]


def dense_head_flops(sizes: Sizes, views: int) -> float:
    """By layer, as the original computes it: 1x1 convolutions after the resize."""
    tokens, dim = sizes.tokens, base(sizes)[1]
    areas = (16 * tokens, 4 * tokens, tokens, tokens / 4)
    weights = float(sum(dim * width * tokens for width in WIDTHS))
    weights += 16 * WIDTHS[0] ** 2 * tokens + 4 * WIDTHS[1] ** 2 * tokens + 9 * WIDTHS[3] ** 2 * tokens / 4
    weights += sum(9 * width * FEATURES * area for width, area in zip(WIDTHS, areas, strict=True))
    units = sum(area * (2 if area >= tokens else 1) for area in areas)
    weights += 2 * 9 * FEATURES**2 * units + 4 * FEATURES**2 * sum(areas)
    half = FEATURES // 2
    weights += 9 * FEATURES * half * 64 * tokens + (9 * half**2 + half * OUTPUTS) * sizes.pixels
    return 2.0 * views * weights


def dinov2(sizes: Sizes) -> nn.Module:
    """DINOv2 from the checkout that --dinov2 names, or Depth Anything's copy of it."""
    checkout = os.environ.get("ANY4D_FAST_DINOV2")
    if checkout and checkout not in sys.path:
        sys.path.insert(0, checkout)
    place = "dinov2.models.vision_transformer" if checkout else "depth_anything_v2.dinov2"
    module = importlib.import_module(place)
    depth, dim, heads = large(sizes)
    found: nn.Module = module.DinoVisionTransformer(
        img_size=518, patch_size=14, embed_dim=dim, depth=depth, num_heads=heads, init_values=1.0, block_chunks=0,
        block_fn=functools.partial(module.Block, attn_class=module.MemEffAttention),
    )  # fmt: skip
    return found


def timm(sizes: Sizes) -> nn.Module:
    depth, dim, heads = large(sizes)
    options = {"depth": depth, "embed_dim": dim, "num_heads": heads, "img_size": (sizes.height, sizes.width)}
    module = importlib.import_module("timm")
    found: nn.Module = module.create_model("vit_large_patch14_dinov2", pretrained=False, init_values=1.0, **options)
    return found


def twin(name: str) -> Callable[[Sizes], nn.Module]:
    """A twin of the tests', as large as the original."""

    def build(sizes: Sizes) -> nn.Module:
        found: nn.Module = getattr(importlib.import_module("tests.model_twins"), name)(*large(sizes))
        return found

    return build


def images(sizes: Sizes, views: int) -> tuple[int, ...]:
    return (views, 3, sizes.height, sizes.width)


def encoder_flops(sizes: Sizes, views: int) -> float:
    depth, dim, _ = large(sizes)
    length = sizes.tokens + 1
    return depth * block_flops(views * length, length, dim) + 2.0 * views * sizes.tokens * 3 * 14**2 * dim


def tokens_flops(sizes: Sizes, views: int) -> float:
    depth, dim, _ = large(sizes)
    return depth * block_flops(views * sizes.tokens, sizes.tokens, dim)


def vggt_flops(sizes: Sizes, views: int) -> float:
    depth, dim, _ = large(sizes)
    rows = views * sizes.tokens
    return depth * (block_flops(rows, sizes.tokens, dim) + block_flops(rows, rows, dim))


def run_vggt(model: nn.Module, x: Tensor, sizes: Sizes, views: int) -> list[Tensor]:
    rows, columns = (torch.arange(n, device=x.device) for n in grid(sizes))
    return [model(x, torch.cartesian_prod(rows, columns).float())]


FAMILIES = {
    "uniception transformer": Family(
        "uniception", transformer, lambda s, v: (1, s.rows(v), base(s)[1]), run_transformer, transformer_flops
    ),
    "uniception dense head": Family(
        "uniception", dense_head, lambda s, v: (4, v, base(s)[1], *grid(s)), run_dense_head, dense_head_flops, False
    ),
    "dinov2 large": Family(
        "depth_anything_v2", dinov2, images, lambda m, x, s, v: [m.forward_features(x)["x_prenorm"]], encoder_flops  # type: ignore[operator]
    ),
    "timm dinov2 large": Family(
        "timm", timm, images, lambda m, x, s, v: [m.forward_features(x)], encoder_flops  # type: ignore[operator]
    ),
    "timm large (twin)": Family(
        "", twin("TimmTransformer"), lambda s, v: (v, s.tokens, large(s)[1]), lambda m, x, s, v: [m(x)], tokens_flops
    ),
    "vggt aggregator (twin)": Family(
        "", twin("VggtAggregator"), lambda s, v: (1, v, s.tokens, large(s)[1]), run_vggt, vggt_flops
    ),
}  # fmt: skip


def missing(name: str) -> str:
    """Why a family cannot be measured here; empty when it can."""
    package = FAMILIES[name].package
    if package == "depth_anything_v2" and os.environ.get("ANY4D_FAST_DINOV2"):
        return ""
    for needed in (package, "torchvision") if package == "timm" else (package,):
        if needed and importlib.util.find_spec(needed) is None:
            return f"{name}: the package {needed} is not installed"
    return ""


@functools.lru_cache(maxsize=1)
def models(name: str, sizes: Sizes) -> tuple[nn.Module, nn.Module]:
    """A family's model, and an accelerated copy of it with the same parameters."""
    torch.manual_seed(0)
    model = FAMILIES[name].build(sizes).to(sizes.device)
    shared: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    ours = copy.deepcopy(model, shared)
    report = accelerate(ours)
    if not report.swapped:
        raise AssertionError(f"{name}: accelerate swapped nothing:\n{report}")
    return model, ours


def runner(name: str, sizes: Sizes, views: int, direction: str, ours: bool, autocast: bool, compile_: bool) -> Maker:
    """Provider of a forward pass, or of a step: forward and backward; then it returns all gradients as one vector."""
    family = FAMILIES[name]
    device = torch.device(sizes.device).type

    def make(x: Tensor) -> Function:
        model = models(name, sizes)[ours]
        call: Callable[..., list[Tensor]] = functools.partial(family.call, model)
        call = compiled(call) if compile_ else call

        def forward() -> list[Tensor]:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
                return call(x, sizes, views)

        def infer() -> list[Tensor]:
            model.eval()
            with torch.no_grad():
                return forward()

        def step() -> Tensor:
            model.train()
            model.zero_grad(set_to_none=True)
            torch.stack([out.float().square().mean() for out in forward()]).sum().backward()
            found = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
            model.zero_grad(set_to_none=True)
            return torch.cat(found)

        return infer if direction == "fwd" else step

    return make


def case(name: str, sizes: Sizes, views: int, direction: str) -> Case:
    family = FAMILIES[name]
    arguments = (name, sizes, views, direction)
    providers = {"eager": runner(*arguments, False, family.autocast, False)}
    if direction == "fwd" and views == sizes.views[1]:
        providers["compile"] = runner(*arguments, False, family.autocast, True)
    providers["any4d_fast:auto"] = runner(*arguments, True, family.autocast, False)

    def inputs() -> Tensor:
        return random(*family.given(sizes, views), device=sizes.device)

    def oracle(x: Tensor) -> list[Tensor]:
        with tensor_float(False):
            found = runner(*arguments, False, False, False)(x)()
        return [found] if isinstance(found, Tensor) else list(found)

    precision = "bf16" if family.autocast else "tf32"
    elements = functools.reduce(lambda a, b: a * b, family.given(sizes, views))
    return Case(
        "accelerate",
        direction,
        f"{name} {precision}, {views * sizes.tokens} patches",
        inputs,
        providers,
        oracle,
        flops=family.flops(sizes, views) * (1 if direction == "fwd" else 3),
        bytes=4.0 * elements,  # nothing can be faster than reading the input
        matmul_dtype=torch.bfloat16 if family.autocast else torch.float32,
        views=views,
        suite="accelerate",
        compare=lambda found: [found] if isinstance(found, Tensor) else list(found),
        budgets=budgets,
        peer_slack=2.0,  # a compiler rounds at other places again; its error stands beside its time
    )


def budgets(errors: Sequence[float], outputs: Sequence[Tensor]) -> list[float]:
    """Twice the original's error and a rounding step, and at least the whole model's budget in float32 (DESIGN 4)."""
    return [max(budget, FLOAT32_BUDGET) for budget in op_budgets(errors, outputs)]


def cases(sizes: Sizes = FULL) -> list[Case]:
    largest, some, few = sizes.views
    found = []
    for name in FAMILIES:
        if missing(name):
            print(f"left out: {missing(name)}", file=sys.stderr)
            continue
        numbers = (few, some, largest) if name == "uniception transformer" else (some,)
        found += [case(name, sizes, views, "fwd") for views in numbers]
        found.append(case(name, sizes, some, "step"))
    return found


def test_accelerate(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_there(name: str) -> None:
    """A line in the log for a family that could not be measured."""
    if missing(name):
        pytest.skip(missing(name))
