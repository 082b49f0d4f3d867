"""The second oracle: upstream's modules from the packages `uniception` and `depth-anything-v2` (its DINOv2).

Both import packages that nothing here needs (timm, torchvision). Stand-ins take their place while they are imported,
and are taken out of `sys.modules` afterwards, as is the global TF32 switch that uniception turns on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from any4d_fast.testing import relative_error

FORWARD_BUDGET = 1e-5
"""The project's budget of a float32 output against the original (DESIGN section 4)."""

GRADIENT_BUDGET = 1e-4
"""Ten times the forward's: a parameter's gradient sums over all rows in an order that differs between the two, and
goes through the whole forward and backward once more. Measured errors are 1e-7 to 2e-6."""

ORACLE_PACKAGES = ("uniception", "depth_anything_v2", "einops", "jaxtyping")
MISSING = [name for name in ORACLE_PACKAGES if importlib.util.find_spec(name) is None]

needs_oracles = pytest.mark.skipif(
    bool(MISSING), reason=f"the second oracle needs {', '.join(MISSING)}; `make test` installs it"
)
"""Mark of a test that compares with upstream's modules."""


class _Unavailable(nn.Module):
    """What a stand-in package offers: something that can be imported and never works."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this part of the oracle needs a package that is not installed")


def _stand_ins() -> dict[str, types.ModuleType]:
    """Modules for the imports of uniception's that are not installed."""
    found: dict[str, types.ModuleType] = {}
    for name, attribute in (("timm.layers", "DropPath"), ("torchvision.transforms", "Compose")):
        root = name.split(".")[0]
        if root in sys.modules or importlib.util.find_spec(root) is not None:
            continue
        package, module = types.ModuleType(root), types.ModuleType(name)
        setattr(module, attribute, _Unavailable)
        setattr(package, name.split(".")[1], module)
        found |= {root: package, name: module}
    return found


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    tf32 = torch.backends.cuda.matmul.allow_tf32
    stand_ins = _stand_ins()
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
        torch.backends.cuda.matmul.allow_tf32 = tf32


@functools.cache
def upstream(module: str) -> types.ModuleType:
    """A module of uniception's models, such as `prediction_heads.dpt`."""
    with _importable():
        return importlib.import_module(f"uniception.models.{module}")


@functools.cache
def _dinov2_module() -> types.ModuleType:
    with _importable():
        return importlib.import_module("depth_anything_v2.dinov2")


DINOV2_SIZES = {"s": ("small", 384, 12, 6), "b": ("base", 768, 12, 12), "l": ("large", 1024, 24, 16),
                "g": ("giant", 1536, 40, 24)}  # fmt: skip


def dinov2(name: str, depth: int | None = None) -> nn.Module:
    """DINOv2 under its torch.hub name (`dinov2_vits14`, `dinov2_vitb14_reg`, ...), randomly initialised.

    Registers come with antialiased position embeddings and no offset, the other models with neither, as DINOv2's own
    hub entries have it.
    """
    module = _dinov2_module()
    letter, registers = name.removeprefix("dinov2_vit")[0], name.endswith("_reg")
    _, dim, full_depth, heads = DINOV2_SIZES[letter]
    block = functools.partial(module.Block, attn_class=module.MemEffAttention)
    return module.DinoVisionTransformer(
        img_size=518,
        patch_size=14,
        embed_dim=dim,
        depth=depth or full_depth,
        num_heads=heads,
        mlp_ratio=4,
        block_fn=block,
        init_values=1.0,
        ffn_layer="swiglufused" if letter == "g" else "mlp",
        block_chunks=0,
        num_register_tokens=4 if registers else 0,
        interpolate_antialias=registers,
        interpolate_offset=0.0 if registers else 0.1,
    )


def upstream_encoder(depth: int, **options: Any) -> nn.Module:
    """uniception's image encoder around `dinov2`, without a download.

    Args:
        depth: blocks to build; options may keep fewer.
        options: arguments of uniception's DINOv2Encoder.
    """
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(torch.hub, "load", lambda repository, name, **_: dinov2(name, depth))
        encoder: nn.Module = upstream("encoders.dinov2").DINOv2Encoder(name="dinov2", **options)
    return encoder


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Put our weights into theirs under equal names; both must have exactly the same keys and shapes."""
    theirs.load_state_dict(ours.state_dict(), strict=True)


def assert_same_gradients(
    ours: nn.Module,
    theirs: nn.Module,
    outputs: list[torch.Tensor],
    their_outputs: list[torch.Tensor],
    inputs: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    *,
    budget: float = GRADIENT_BUDGET,
) -> None:
    """Back-propagate one random cotangent through both and compare every parameter's and input's gradient.

    A gradient that is zero but for rounding (that of a key's bias, to which softmax is blind) is measured against a
    thousandth of all gradients together.
    """
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(o.shape, generator=generator) for o in outputs]
    torch.autograd.backward(outputs, cotangents)
    torch.autograd.backward(their_outputs, cotangents)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    total = sum(g.double().square().sum().item() for g in expected.values() if g is not None) ** 0.5
    for name, p in ours.named_parameters():
        other = expected[name]
        assert (p.grad is None) == (other is None), f"{name}: only one of both has a gradient"
        if p.grad is not None and other is not None:
            difference = (p.grad - other).double().norm().item()
            error = difference / max(other.double().norm().item(), 1e-3 * total)
            assert error <= budget, f"gradient of {name}: relative error {error:.2e}"
    for mine, other_input in inputs or []:
        assert mine.grad is not None and other_input.grad is not None
        error = relative_error(mine.grad, other_input.grad)
        assert error <= budget, f"gradient of an input: relative error {error:.2e}"
