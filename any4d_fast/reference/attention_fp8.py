"""The 8-bit attention of csrc/attention_fp8_sm90.cu step by step in PyTorch: its roundings, not its speed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Segments, merge_segments, split_segments

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
KEYS = 128
"""Keys that share a scale and a step of the running maximum."""
SAMPLES = 64
"""Rows of a segment whose mean key is subtracted from all of its keys."""
TOP = 8.0
"""Largest probability of a row in log2 units: e4m3 goes from 2^-9 to 448."""
LINEAR_RUNS = 8
"""Of every 8 runs of 16 keys, how many take their probabilities from `linear_exp2`; the default of the kernel."""
_EXPONENTS = (-44, 44)
_SHIFT = 0.0562


def round_e4m3(x: Tensor) -> Tensor:
    """`x` rounded to e4m3, saturating, as float32."""
    return x.float().clamp(-LARGEST, LARGEST).to(E4M3).float()


def power_of_two(most: Tensor) -> Tensor:
    """The scale that brings values of at most `most` to at most 448; NaN where none in float32's middle does."""
    _, exponent = torch.frexp(most.float() * (1 / LARGEST))
    exact = torch.frexp(most.float() * (1 / LARGEST))[0] == 0.5
    exponent = torch.where(most > 0, (exponent - exact.int()).clamp_min(_EXPONENTS[0]), 0)
    scale = torch.ldexp(torch.ones_like(most, dtype=torch.float32), exponent)
    return torch.where(most.isfinite() & (exponent <= _EXPONENTS[1]), scale, math.nan)


def linear_exp2(x: Tensor) -> Tensor:
    """2^x rounded to e4m3, mantissa bits taken as if log2(1 + f) were f: 0.962 to 1.021 times 2^x before rounding.

    That is a multiply-add whose result is the byte itself.
    """
    code = torch.round(8 * (x + (7 - _SHIFT)).clamp(0, 16))
    exponent = torch.floor(code / 8)
    mantissa = code - 8 * exponent
    return torch.where(exponent > 0, torch.exp2(exponent - 7) * (1 + mantissa / 8), mantissa * 2.0**-9)


def _blocks(x: Tensor) -> Tensor:
    """[S, H, rows, D] -> [S, H, blocks, 128, D], zeros after the last row."""
    return F.pad(x, [0, 0, 0, -x.shape[2] % KEYS]).unflatten(2, (-1, KEYS))


def _quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [S, H, blocks, 128, D] and scales [S, H, blocks, 1, 1]."""
    blocks = _blocks(x)
    scale = power_of_two(blocks.abs().amax((-1, -2), keepdim=True))
    return round_e4m3(blocks / scale), scale


def mean_key(k: Tensor) -> Tensor:
    """Mean of 64 rows spread over [S, H, rows, D]: [S, H, 1, D]."""
    rows = k.shape[2]
    index = torch.arange(SAMPLES, device=k.device) * rows // SAMPLES
    return k[:, :, index].mean(2, keepdim=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, linear_runs: int) -> tuple[Tensor, Tensor]:
    """[S, H, rows, D] float32 each to out and log-sum-exp [S, H, rows]."""
    rows = q.shape[2]
    mean = mean_key(k)
    offset = scale * (q * mean).sum(-1)
    q_scale = power_of_two(q.abs().amax(-1, keepdim=True))
    q8 = round_e4m3(q / q_scale)
    factor = q_scale * (scale * math.log2(math.e))
    keys, key_scale = _quantize_blocks(k - mean)
    values, value_scale = _quantize_blocks(v)
    column = torch.arange(KEYS, device=q.device)
    is_linear = (column // 16 * linear_runs) % 8 < linear_runs
    reference = torch.full_like(q[..., :1], -math.inf)
    out, total = torch.zeros_like(q), torch.zeros_like(reference)
    for j in range(keys.shape[2]):
        scores = (q8 @ keys[:, :, j].mT) * (factor * key_scale[:, :, j]).clamp_min(1e-37)
        scores = scores.masked_fill(column >= rows - j * KEYS, -math.inf)
        grown = torch.maximum(reference, scores.amax(-1, keepdim=True))
        shrink = torch.exp2(reference - grown)
        reference = grown
        x = scores - reference + TOP
        p = torch.where(is_linear, linear_exp2(x), round_e4m3(torch.exp2(x)))
        out = out * shrink + (p @ values[:, :, j]) * value_scale[:, :, j]
        total = total * shrink + p.sum(-1, keepdim=True)
    lse = (reference - TOP + torch.log2(total))[..., 0] * math.log(2)
    return out / total, lse + offset


def attention_fp8(
    qkv: Tensor, segments: Segments, scale: float, linear_runs: int = LINEAR_RUNS
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v within every segment, with queries, keys, values and probabilities rounded to e4m3.

    Queries have a scale each, keys and values one for every 128 rows of a head; all are powers of two. A mean key is
    subtracted from the keys, which changes no probability. Rows are divided by the sum of the rounded probabilities.

    Args:
        qkv: [rows, 3, heads, head_dim].
        segments: which rows attend to which.
        scale: factor on q k^T.
        linear_runs: of every 8 runs of 16 keys, how many probabilities come from `linear_exp2`.

    Returns:
        out [rows, heads, head_dim] in qkv's dtype, lse [heads, rows] float32; zero in rows of no segment.
    """
    rows, _, heads, head_dim = qkv.shape
    if segments.end == 0:
        return qkv.new_zeros((rows, heads, head_dim)), qkv.new_zeros((heads, rows), dtype=torch.float32)
    windows = split_segments(qkv, segments).flatten(0, 1).float()
    q, k, v = windows.permute(2, 0, 3, 1, 4).unbind(0)
    found, lse = _attend(q, k, v, scale, linear_runs)
    shape = (segments.groups, segments.count)
    out = merge_segments(found.transpose(1, 2).unflatten(0, shape), segments, rows)
    return out.to(qkv.dtype), merge_segments(lse.transpose(1, 2).unflatten(0, shape), segments, rows).t().contiguous()
