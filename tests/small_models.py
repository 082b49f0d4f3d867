"""Models of every kind, small enough to run in milliseconds, with weights by name (tests/golden_cases.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

from any4d_fast import Any4D
from any4d_fast.config import (
    DENSE_PARTS,
    PART_CHANNELS,
    Any4DConfig,
    DenseHeadConfig,
    EncoderConfig,
    ModalityConfig,
    SceneConfig,
    TokenizerConfig,
    TransformerConfig,
)
from tests.golden_cases import golden_weights

REPRESENTATIONS = tuple(DENSE_PARTS)


def small_scene(
    representation: str = "raydirs+depth+pose", confidence: bool = True, mask: bool = True, **options: Any
) -> SceneConfig:
    channels = sum(PART_CHANNELS[part] for part in DENSE_PARTS[representation]) + confidence + mask
    head = DenseHeadConfig(output_dim=channels, feature_dim=8, layer_dims=(8, 8, 8, 8))
    return SceneConfig(
        representation=representation,
        confidence=confidence,
        mask=mask,
        geometry_head=head,
        flow_head=dataclasses.replace(head, output_dim=3),
        num_resconv_block=1,
        scale_hidden_dim=8,
        **options,
    )


def small_config(
    scene: SceneConfig | None = None, modalities: dict[str, float] | None = None, **transformer: Any
) -> Any4DConfig:
    return Any4DConfig(
        name="small",
        encoder=EncoderConfig(size="small", keep_first_n_layers=1),
        transformer=TransformerConfig(**{"depth": 3, "dim": 48, "num_heads": 3, "indices": (0, 1), **transformer}),
        tokenizers=TokenizerConfig(dense_dims=(16, 24), global_dims=(8, 16)),
        scene=scene or small_scene(),
        modalities=ModalityConfig(**(modalities or {})),
    )


def small_model(config: Any4DConfig | None = None) -> Any4D:
    model = Any4D.from_config(config or small_config())
    golden_weights(model)
    return model.eval()
