"""What the loss kernels compute at a pixel: logarithms, the log-space map, penalties of residuals and their gradients.

In plain arithmetic, accurate to a few ulps: the hardware's logarithm has an absolute error of 2^-22 near 1, which is
where most flow and small depths lie. Nothing branches: an IEEE division or root is a branch to its slow path, between
which the compiler moves no load, and thirty of them made these kernels wait for memory five times a pixel. Roots and
reciprocals are the hardware's reciprocal root and a Newton step (an ulp or two, to either side).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._points import exp

_LN2_BIT = tl.constexpr(8.262958294867817e-08)  # ln(2) / 2^23: of an exponent where it stands in a float
_THREE_QUARTERS = tl.constexpr(0x3F400000)
_ONE = tl.constexpr(0x3F800000)
_EXPONENT = tl.constexpr(-(1 << 23))
_TINY = tl.constexpr(2.0**-120)  # keeps the reciprocal root of zero finite
_SHORT = tl.constexpr(1e-15)  # shorter vectors are mapped as vectors of zero


@triton.jit
def _log_reduced(m, exponent):
    """log(2^k (1 + m)), m in [-1/4, 1/2), exponent = k << 23. Minimax, 0.9 ulps; not finite where m is not."""
    square = m * m
    even = square * -4.54559326e-2 - 1.32279396e-1
    odd = square * 1.05529785e-1 + 1.44911408e-1
    even = even * square - 1.66416913e-1
    odd = odd * square + 1.99886635e-1
    series = odd * m + (even * square - 2.50001878e-1)
    series = series * m + 3.33335280e-1
    series = series * m - 0.5
    return exponent.to(tl.float32) * _LN2_BIT + (series * square + m)


@triton.jit
def log1p(x):
    """log(1 + x), x > -1; not finite where x is not. The rounding of 1 + x only chooses k: no digit of x is lost."""
    exponent = ((1.0 + x).to(tl.int32, bitcast=True) - _THREE_QUARTERS) & _EXPONENT
    power = (-exponent + _ONE).to(tl.float32, bitcast=True)
    return _log_reduced(x * power + (power - 1.0), exponent)


@triton.jit
def log(x):
    """log x, x > 0 and not denormal; not finite where x is not."""
    exponent = (x.to(tl.int32, bitcast=True) - _THREE_QUARTERS) & _EXPONENT
    return _log_reduced(x * (-exponent + _ONE).to(tl.float32, bitcast=True) - 1.0, exponent)


@triton.jit
def reciprocal(x):
    """1 / x of normal x > 0, within an ulp or two."""
    root = tl.rsqrt(x)
    first = root * root
    return tl.fma(first, tl.fma(-first, x, 1.0), first)


@triton.jit
def reciprocal_pair(x):
    """1 / x as a sum of two floats, rounded and rest: as exact a divisor of every pixel as x itself.

    A mean's rounded reciprocal alone would push every pixel the same way.
    """
    rounded = tl.div_rn(1.0, x)
    return rounded, tl.fma(-rounded, x, 1.0) * rounded


@triton.jit
def _times(x, rounded, rest):
    return tl.fma(x, rounded, x * rest)


@triton.jit
def root(squares):
    """Square root and its reciprocal: 0 and something large, but finite, of 0."""
    inverse = tl.rsqrt(squares + _TINY)
    length = squares * inverse
    half = 0.5 * tl.fma(-length, inverse, 1.0)
    return tl.fma(length, half, length), tl.fma(inverse, half, inverse)


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
    length, inverse = root(x * x + y * y + z * z)
    return length


@triton.jit
def squash1(x, unit, unit_rest):
    """f(x / u) of scalars, f(x) = x / |x| log(1 + |x|), for 1 / u as a `reciprocal_pair`."""
    value = log1p(_times(tl.abs(x), unit, unit_rest))
    return tl.where(x < 0, -value, value)


@triton.jit
def _squash3(x, y, z, unit, unit_rest):
    """|v|, 1 / |v| and what v is multiplied by in f(v / u); where v is nearly zero, any small number."""
    length, inverse = root(x * x + y * y + z * z)
    return length, inverse, log1p(_times(length, unit, unit_rest)) * inverse


@triton.jit
def _robust_penalty(squares, alpha, scale):
    """Barron's loss of a residual with these squares, and what the residual is multiplied by in its gradient."""
    factor = 1.0 / (scale * scale)
    spread = 2.0 - alpha
    logarithm = log1p(squares * (factor / spread))
    return spread / alpha * _expm1(0.5 * alpha * logarithm), factor * exp((0.5 * alpha - 1.0) * logarithm)


@triton.jit
def _penalty3(x, y, z, alpha, scale, ROBUST: tl.constexpr):
    """Penalty of residual vectors, and what the residual is multiplied by in its gradient."""
    squares = x * x + y * y + z * z
    if ROBUST:
        value, factor = _robust_penalty(squares, alpha, scale)
    else:
        value, factor = root(squares)
    return value, factor


@triton.jit
def compare3(x, y, z, gx, gy, gz, unit, unit_rest, gt_unit, gt_rest, alpha, scale, ROBUST: tl.constexpr):
    """Penalty of f(v / u) - f(w / t), its gradient with respect to the former, and |v|, 1 / |v| and v's factor in f.

    1 / u and 1 / t are given, as `reciprocal_pair`s.
    """
    length, inverse, factor = _squash3(x, y, z, unit, unit_rest)
    gt_length, gt_inverse, gt_factor = _squash3(gx, gy, gz, gt_unit, gt_rest)
    a, b, c = factor * x - gt_factor * gx, factor * y - gt_factor * gy, factor * z - gt_factor * gz
    value, g = _penalty3(a, b, c, alpha, scale, ROBUST)
    return value, g * a, g * b, g * c, length, inverse, factor


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
def pull_back3(x, y, z, gx, gy, gz, length, inverse, factor, unit, mean):
    """Gradient of f(v / mean) with respect to v for the cotangent g; `unit` is 1 / mean."""
    # f stretches by 1 / (mean + length) along v and by `factor` across it; both are 1 / mean at 0.
    factor = tl.where(length < _SHORT, unit, factor)
    ux, uy, uz = x * inverse, y * inverse, z * inverse
    radial = (reciprocal(mean + length) - factor) * (ux * gx + uy * gy + uz * gz)
    return factor * gx + radial * ux, factor * gy + radial * uy, factor * gz + radial * uz


@triton.jit
def binary_cross_entropy(logit, seen):
    """Loss and its gradient with respect to the logit; `seen` is 0 or 1."""
    small = exp(-tl.abs(logit))
    value = tl.maximum(logit, 0.0) - logit * seen + log1p(small)
    probability = tl.where(logit >= 0, 1.0, small) * reciprocal(1.0 + small)
    return value + (logit - logit), probability - seen + (logit - logit)
