"""Differentiable operators, importable one by one into any training code.

Each takes and returns plain tensors, works under autograd and `torch.compile`, and chooses its backend by itself
(`backend=` names one). Importing this package imports neither Triton nor a CUDA extension.
"""

from __future__ import annotations

# Imported at once, not on first use: modules and functions share their names, and importing a submodule
# would otherwise put the module in the function's place.
from .attention import Segments, attention, attention_scale
from .attention_fp8 import attention_fp8
from .compose_factors import Factors, compose_factors
from .fuse_tokens import fuse_tokens
from .layer_norm import layer_norm
from .linear import linear
from .linear_fp8 import Rows8, correct_bias, linear_fp8, quantize_rows
from .linear_gelu import linear_gelu, linear_residual
from .map_losses import MapLosses, PredictedMaps, TargetMaps, map_losses
from .norm_fp8 import layer_norm_fp8, residual_norm_fp8
from .normalize_depth import normalize_depth
from .recover_intrinsics import recover_intrinsics
from .residual_norm import residual_norm
from .resize_bilinear import resize_bilinear
from .resize_conv import resize_conv
from .tokenize import tokenize
from .unproject import unproject
from .unshuffle_conv import unshuffle_conv

__all__ = [
    "Factors",
    "MapLosses",
    "PredictedMaps",
    "Rows8",
    "Segments",
    "TargetMaps",
    "attention",
    "attention_fp8",
    "attention_scale",
    "compose_factors",
    "correct_bias",
    "fuse_tokens",
    "layer_norm",
    "layer_norm_fp8",
    "linear",
    "linear_fp8",
    "linear_gelu",
    "linear_residual",
    "map_losses",
    "normalize_depth",
    "quantize_rows",
    "recover_intrinsics",
    "residual_norm",
    "residual_norm_fp8",
    "resize_bilinear",
    "resize_conv",
    "tokenize",
    "unproject",
    "unshuffle_conv",
]
