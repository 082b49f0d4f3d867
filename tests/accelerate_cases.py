"""Models of every family that `accelerate` knows, tiny or as large as they are used, each with a call of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import accelerate
from any4d_fast.integrations import Report
from any4d_fast.testing import assert_within_budget, relative_error
from tests.model_twins import TimmTransformer, VggtAggregator
from tests.oracles import FORWARD_BUDGET, assert_same_gradients, dinov2, needs_oracles, upstream, upstream_encoder


@dataclass(frozen=True)
class Size:
    """Views, patches (rows, columns) of 14 pixels, width and heads of a transformer, width of a dense head."""

    views: int = 2
    grid: tuple[int, int] = (2, 3)
    dim: int = 64
    heads: int = 2
    depth: int = 2
    features: int = 32

    @property
    def image(self) -> tuple[int, int]:
        return 14 * self.grid[0], 14 * self.grid[1]


TINY = Size()
REAL = Size(views=8, grid=(24, 37), dim=768, heads=12, depth=4, features=256)


@dataclass(frozen=True)
class Family:
    """A model, its input [B, ...] of a size, and what comes out of it, as a list of tensors."""

    build: Callable[[Size], nn.Module]
    given: Callable[[Size], tuple[int, ...]]
    call: Callable[[nn.Module, Tensor, Size], list[Tensor]]
    twin: bool = False


def _transformer(size: Size, kind: str = "Alternating", **options: Any) -> nn.Module:
    module = upstream(f"info_sharing.{kind.lower()}_attention_transformer")
    cls = getattr(module, f"MultiView{kind}AttentionTransformerIFR")
    arguments = {"depth": size.depth, "dim": size.dim, "num_heads": size.heads, "indices": [0, size.depth - 1]}
    transformer: nn.Module = cls(name="transformer", input_embed_dim=size.dim, **{**arguments, **options})
    return transformer


def _run_transformer(model: nn.Module, x: Tensor, size: Size) -> list[Tensor]:
    maps = x[:, :-1].unflatten(1, (size.views, *size.grid)).permute(1, 0, 4, 2, 3)
    structure = upstream("info_sharing.base").MultiViewTransformerInput(
        features=list(maps), additional_input_tokens=x[:, -1:].transpose(1, 2)
    )
    final, taps = model(structure)
    return [t for out in (*taps, final) for t in (*out.features, out.additional_token_features)]


def _dense_head(size: Size, **options: Any) -> nn.Module:
    dpt = upstream("prediction_heads.dpt")
    widths, dims = [size.features // 2, size.features // 2, size.features, size.features], [size.dim] * 4
    features = dpt.DPTFeature(
        patch_size=14, hooks=[0, 1, 2, 3], input_feature_dims=dims, layer_dims=widths, feature_dim=size.features,
        **options,
    )  # fmt: skip
    return nn.Sequential(features, dpt.DPTRegressionProcessor(size.features, 4, **options))


def _run_dense_head(model: nn.Module, x: Tensor, size: Size) -> list[Tensor]:
    layered = upstream("prediction_heads.base").PredictionHeadLayeredInput
    maps = list(x.unflatten(0, (4, -1)))
    return [model(layered(list_features=maps, target_output_shape=size.image)).decoded_channels]


def _run_pose_head(model: nn.Module, x: Tensor, size: Size) -> list[Tensor]:
    return [model(upstream("prediction_heads.base").PredictionHeadInput(last_feature=x)).decoded_channels]


def _run_dinov2(model: nn.Module, x: Tensor, size: Size) -> list[Tensor]:
    found = model.forward_features(x)  # type: ignore[operator]
    return [found["x_norm_patchtokens"], found["x_norm_clstoken"], found["x_prenorm"]]


def _run_encoder(model: nn.Module, x: Tensor, size: Size) -> list[Tensor]:
    given = upstream("encoders.base").ViTEncoderInput(image=x, data_norm_type="dinov2")
    return [model(given).features]


def _run_vggt(model: nn.Module, x: Tensor, size: Size) -> list[Tensor]:
    rows, columns = (torch.arange(n, device=x.device) for n in size.grid)
    return [model(x, torch.cartesian_prod(rows, columns).float())]


def _rows(size: Size) -> tuple[int, ...]:
    return (1, size.views * size.grid[0] * size.grid[1] + 1, size.dim)


def _images(size: Size) -> tuple[int, ...]:
    return (size.views, 3, *size.image)


def _tokens(size: Size) -> tuple[int, ...]:
    return (size.views, size.grid[0] * size.grid[1] + 1, size.dim)


def _pose_head(size: Size) -> nn.Module:
    head: nn.Module = upstream("prediction_heads.pose_head").PoseHead(patch_size=4, input_feature_dim=size.dim)
    return head


FAMILIES: dict[str, Family] = {
    "uniception transformer": Family(_transformer, _rows, _run_transformer),
    "uniception global transformer": Family(lambda s: _transformer(s, "Global"), _rows, _run_transformer),
    "uniception transformer, qk-norm, LayerScale, long-sequence scales": Family(
        lambda s: _transformer(
            s, qk_norm=True, init_values=0.5, use_scalable_softmax=True, use_entropy_scaling=True
        ), _rows, _run_transformer,
    ),
    "uniception transformer, recomputed": Family(
        lambda s: _transformer(s, gradient_checkpointing=True), _rows, _run_transformer
    ),
    "uniception dense head": Family(_dense_head, lambda s: (4 * s.views, s.dim, *s.grid), _run_dense_head),
    "uniception dense head, recomputed": Family(
        lambda s: _dense_head(s, checkpoint_gradient=True), lambda s: (4 * s.views, s.dim, *s.grid), _run_dense_head
    ),
    "uniception pose head": Family(_pose_head, lambda s: (s.views, s.dim, *s.grid), _run_pose_head),
    "uniception encoder": Family(lambda s: upstream_encoder(s.depth, size="small"), _images, _run_encoder),
    "dinov2": Family(lambda s: dinov2("dinov2_vits14", s.depth), _images, _run_dinov2),
    "dinov2 with registers": Family(lambda s: dinov2("dinov2_vits14_reg", s.depth), _images, _run_dinov2),
    "timm": Family(lambda s: TimmTransformer(s.depth, s.dim, s.heads), _tokens, lambda m, x, s: [m(x)], True),
    "vggt": Family(
        lambda s: VggtAggregator(s.depth, s.dim, s.heads),
        lambda s: (1, s.views, s.grid[0] * s.grid[1], s.dim), _run_vggt, True,
    ),
}  # fmt: skip


def parameters(*names: str) -> list[Any]:
    """Families for `parametrize`, all by default; those without their package are skipped with the reason."""
    chosen = names or tuple(FAMILIES)
    return [pytest.param(name, marks=() if FAMILIES[name].twin else needs_oracles) for name in chosen]


def lively(model: nn.Module) -> nn.Module:
    """Give every one-dimensional parameter random values, so that none of them could be left out unnoticed."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            offset = 0.0 if name.endswith("bias") else 1.0
            parameter.data = offset + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@dataclass
class Pair:
    """A model and an accelerated copy of it, and the same input for both."""

    family: Family
    size: Size
    theirs: nn.Module
    ours: nn.Module
    report: Report
    x: Tensor

    def outputs(self, which: nn.Module, x: Tensor, seed: int = 3) -> list[Tensor]:
        torch.manual_seed(seed)
        return self.family.call(which, x, self.size)

    def check_float32(self) -> None:
        """Outputs and gradients of parameters and input against the original's, within the project's budgets."""
        mine, other = self.x.clone().requires_grad_(), self.x.clone().requires_grad_()
        results, expected = self.outputs(self.ours, mine), self.outputs(self.theirs, other)
        assert len(results) == len(expected)
        for result, exact in zip(results, expected, strict=True):
            assert result.dtype == exact.dtype and result.shape == exact.shape
            error = relative_error(result, exact)
            assert error <= FORWARD_BUDGET, f"relative error {error:.2e}"
        results, expected = [r.cpu() for r in results], [e.cpu() for e in expected]
        assert_same_gradients(self.ours, self.theirs, results, expected, [(mine, other)])

    def check_autocast(self) -> None:
        """Outputs and gradients under bfloat16 autocast: at most twice the original's error against float32."""
        exact, plain, fast = (self._all(m, rounded) for m, rounded in
                              ((self.theirs, False), (self.theirs, True), (self.ours, True)))  # fmt: skip
        for name, oracle in exact.items():
            assert fast[name].dtype == plain[name].dtype, name
            assert_within_budget(fast[name], oracle, plain[name], name=name, rounding=torch.bfloat16)

    def _all(self, model: nn.Module, rounded: bool) -> dict[str, Tensor]:
        """Outputs by number, and the gradients of all parameters as one vector."""
        model.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, dtype=torch.bfloat16, enabled=rounded):
            outputs = self.outputs(model, self.x)
        torch.stack([o.float().square().mean() for o in outputs]).sum().backward()
        found = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | {"gradients": torch.cat(found)}


def pair(name: str, size: Size = TINY, device: str = "cpu", train: bool = False) -> Pair:
    """A family's model twice, accelerated once."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    theirs = lively(family.build(size)).to(device).train(train)
    ours = copy.deepcopy(theirs)
    x = torch.randn(family.given(size), generator=torch.Generator().manual_seed(2)).to(device)
    return Pair(family, size, theirs, ours, accelerate(ours), x)
