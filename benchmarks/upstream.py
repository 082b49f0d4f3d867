"""The original code as a provider, from a checkout that the user names."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .harness import Unavailable


def requested() -> str:
    """The checkout given with --upstream or ANY4D_FAST_UPSTREAM; empty when there is none."""
    return os.environ.get("ANY4D_FAST_UPSTREAM", "")


def _module(checkout: Path) -> Any:
    """Upstream's model module.

    Its package's __init__ imports a configuration library that the model itself does without, so an empty package
    takes its place.
    """
    if not (checkout / "any4d" / "models" / "any4d" / "model.py").is_file():
        raise Unavailable(f"{checkout} holds no any4d/models/any4d/model.py; pass a checkout of Any-4D/Any4D")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    if "any4d.models" not in sys.modules:
        package = types.ModuleType("any4d.models")
        package.__path__ = [str(checkout / "any4d" / "models")]
        sys.modules["any4d.models"] = package
    try:
        return importlib.import_module("any4d.models.any4d.model")
    except ImportError as error:
        raise Unavailable(f"the original code in {checkout} cannot be imported: {error}") from error


def _hub(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch.hub.load without weights (they are replaced anyway), from a DINOv2 checkout where one is given."""
    checkout = os.environ.get("ANY4D_FAST_DINOV2")

    def load(repository: str, name: str, *arguments: Any, **options: Any) -> Any:
        if checkout:
            return original(checkout, name, source="local", pretrained=False)
        return original(repository, name, pretrained=False, trust_repo=True)

    return load


def arguments(ours: dict[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments with what upstream wants besides, and without the keys of other representations."""
    found = copy.deepcopy(ours)
    found["encoder_config"] |= {"name": "dinov2", "uses_torch_hub": True}
    found["info_sharing_config"]["module_args"] |= {"name": "transformer"}
    for key, part in found["geometric_input_config"].items():
        if key.endswith("_encoder_config"):
            part["name"] = key.removesuffix("_config")
    # Images only: upstream looks for Doppler's inputs in the views as soon as their probability is above 0.
    modalities = ("overall", "ray_dirs", "depth", "cam", "doppler", "event_imgs")
    found["geometric_input_config"] |= {f"{name}_prob": 0 for name in modalities} | {"dropout_prob": 1}
    for head in (found["pred_head_config"], found["scene_flow_pred_head_config"]):
        head.setdefault("gradient_checkpointing", False)
        for key in ("dpt_adaptor", "pose_adaptor", "scale_adaptor"):
            if key in head:
                unused = ("pointmap_", "ray_origins_")
                head[key] = {k: v for k, v in head[key].items() if not k.startswith(unused)} | {"name": key}
    return found


@functools.lru_cache(maxsize=1)
def _build(checkout: str, ours: Any, device: str) -> nn.Module:
    module = _module(Path(checkout))
    original = torch.hub.load
    torch.hub.load = _hub(original)
    try:
        model: nn.Module = module.Any4D(**arguments(ours.class_init_args))
    except Exception as error:  # downloads, missing packages, other versions: whatever keeps the peer from running
        raise Unavailable(f"the original model cannot be built: {type(error).__name__}: {error}") from error
    finally:
        torch.hub.load = original
    return model.to(device)


def same_model(ours: Any, device: str) -> nn.Module:
    """The original model with the configuration and the weights of ours.

    Raises:
        Unavailable: the checkout, a package or DINOv2 is missing; or its state dict differs.
    """
    theirs = _build(requested(), ours, device)
    try:
        theirs.load_state_dict(ours.state_dict(), strict=True)
    except RuntimeError as error:
        raise Unavailable(f"the original model's state dict differs: {error}") from error
    return theirs.eval()
