"""What the loss kernels compute at a pixel: logarithms, the log-space map, penalties of residuals and their gradients.

In plain arithmetic, accurate to a few ulps: the hardware's logarithm has an absolute error of 2^-22 near 1, which is
where most flow and small depths lie.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._points import exp

_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_TWO_THIRDS = tl.constexpr(0x3F2AAAAB)


@triton.jit
def log1p(x):
    """log(1 + x), x > -1; NaN where x is not finite.

    1 + x = 2^k m with m in [2/3, 4/3), and log m = 2 artanh((m - 1) / (m + 1)), whose series to t^9 errs by less than
    1e-8 relative. Where k is 0 the series takes x itself; elsewhere what rounding 1 + x lost is added back.
    """
    w = 1.0 + x
    bits = w.to(tl.int32, bitcast=True)
    k = (bits - _TWO_THIRDS) >> 23
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)
    f = tl.where(k == 0, x, m - 1.0)
    lost = tl.where(k == 0, 0.0, (x - (w - 1.0)) / w)
    t = tl.div_rn(f, 2.0 + f)
    t2 = t * t
    series = t2 * (1.0 / 9) + 1.0 / 7
    series = series * t2 + 1.0 / 5
    series = series * t2 + 1.0 / 3
    power = k.to(tl.float32)
    low = power * _LN2_LOW + lost + 2.0 * t * t2 * series
    return power * _LN2_HIGH + (2.0 * t + low) + (x - x)


@triton.jit
def _expm1(x):
    """e^x - 1 for x >= 0."""
    series = x * (1.0 / 5040) + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return tl.where(x < 0.35, x + x * x * series, exp(x) - 1.0)


@triton.jit
def length3(x, y, z):
    """Norm of vectors."""
    return tl.sqrt_rn(x * x + y * y + z * z)


@triton.jit
def squash_factor(length, unit):
    """What a vector of this length is multiplied by in f(x / unit), f(x) = x / |x| log(1 + |x|)."""
    known = length > 0
    safe = tl.where(known, length, 1.0)
    return tl.where(known, tl.div_rn(log1p(tl.div_rn(length, unit)), safe), tl.div_rn(1.0, unit) + 0.0 * length)


@triton.jit
def _robust_penalty(squares, alpha, scale):
    """Barron's loss of a residual with these squares, and what the residual is multiplied by in its gradient."""
    factor = 1.0 / (scale * scale)
    spread = 2.0 - alpha
    logarithm = log1p(squares * factor / spread)
    return spread / alpha * _expm1(0.5 * alpha * logarithm), factor * exp((0.5 * alpha - 1.0) * logarithm)


@triton.jit
def _penalty3(x, y, z, alpha, scale, ROBUST: tl.constexpr):
    """Penalty of residual vectors, and what the residual is multiplied by in its gradient."""
    squares = x * x + y * y + z * z
    if ROBUST:
        value, factor = _robust_penalty(squares, alpha, scale)
    else:
        value = tl.sqrt_rn(squares)
        factor = tl.where(value > 0, tl.div_rn(1.0, tl.where(value > 0, value, 1.0)), 0.0)
    return value, factor


@triton.jit
def compare3(x, y, z, gx, gy, gz, unit, gt_unit, alpha, scale, ROBUST: tl.constexpr):
    """Penalty of f(v / unit) - f(w / gt_unit), its gradient with respect to the former, and |v| and v's factor in f."""
    length = length3(x, y, z)
    factor = squash_factor(length, unit)
    gt_factor = squash_factor(length3(gx, gy, gz), gt_unit)
    a, b, c = factor * x - gt_factor * gx, factor * y - gt_factor * gy, factor * z - gt_factor * gz
    value, g = _penalty3(a, b, c, alpha, scale, ROBUST)
    return value, g * a, g * b, g * c, length, factor


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def penalty1(x, alpha, scale, ROBUST: tl.constexpr):
    """Penalty of scalar residuals and its gradient."""
    if ROBUST:
        value, factor = _robust_penalty(x * x, alpha, scale)
        grad = factor * x
    else:
        value = tl.abs(x)
        grad = sign(x)
    return value, grad


@triton.jit
def penalty_l1(x, y, z, alpha, scale, ROBUST: tl.constexpr):
    """Sum of absolute values, or the robust penalty of the length; and its gradient."""
    if ROBUST:
        value, factor = _robust_penalty(x * x + y * y + z * z, alpha, scale)
        gx, gy, gz = factor * x, factor * y, factor * z
    else:
        value = tl.abs(x) + tl.abs(y) + tl.abs(z)
        gx, gy, gz = sign(x), sign(y), sign(z)
    return value, gx, gy, gz


@triton.jit
def pull_back3(x, y, z, gx, gy, gz, length, factor, unit):
    """Gradient of f(v / unit) with respect to the vectors v, and with respect to the unit, for the cotangent g."""
    along = x * gx + y * gy + z * gz
    inverse = tl.div_rn(1.0, unit + length)
    square = length * length
    # f stretches by 1 / (unit + length) along v and by `factor` across it; both are 1 / unit at 0.
    known = square > 1e-30
    radial = tl.where(known, (inverse - factor) * along / tl.where(known, square, 1.0), 0.0)
    slope = -along * inverse / unit
    return factor * gx + radial * x, factor * gy + radial * y, factor * gz + radial * z, slope


@triton.jit
def binary_cross_entropy(logit, seen):
    """Loss and its gradient with respect to the logit; `seen` is 0 or 1."""
    small = exp(-tl.abs(logit))
    value = tl.maximum(logit, 0.0) - logit * seen + log1p(small)
    probability = tl.div_rn(tl.where(logit >= 0, 1.0, small), 1.0 + small)
    return value + (logit - logit), probability - seen + (logit - logit)
