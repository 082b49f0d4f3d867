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
from .linear_gelu import linear_gelu, linear_residual
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
    "Segments",
    "attention",
    "attention_fp8",
    "attention_scale",
    "compose_factors",
    "fuse_tokens",
    "layer_norm",
    "linear_gelu",
    "linear_residual",
    "normalize_depth",
    "recover_intrinsics",
    "residual_norm",
    "resize_bilinear",
    "resize_conv",
    "tokenize",
    "unproject",
    "unshuffle_conv",
]
