"""What the kernels over point maps share: channel loads and stores, exp, quaternions, ordered sums."""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)
# Cody-Waite split of ln 2: n * LN2_HIGH is exact for |n| < 2^15.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x in float32 to within an ulp, 0 where the result would be denormal.

    tl.exp rounds x * log2(e) first and loses |x| / 2 ulps. Here e^x = 2^n e^r, |r| <= ln(2) / 2, and e^r is its Taylor
    polynomial of degree 7 (relative error 5e-9). In the last 1/2 of exponent before infinity r grows to ln 2: 1e-6.
    """
    n = tl.minimum(tl.maximum(tl.floor(x * _LOG2_E + 0.5), -126.0), 127.0)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = r * (1.0 / 5040) + 1.0 / 720
    series = series * r + 1.0 / 120
    series = series * r + 1.0 / 24
    series = series * r + 1.0 / 6
    series = series * r + 0.5
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.3, 0.0, (1.0 + (r + r * r * series)) * power)


@triton.jit
def load3(pointer, lane, stride, channel_stride, inside, TILE: tl.constexpr):
    """Three channels of the pixels `lane` as float32.

    With TILE the channels must be contiguous: they are read as one [BLOCK, 4] tile, neighbouring lanes holding
    neighbouring channels, and split in registers. Without it, three strided loads find each other's sectors in L1.
    """
    if TILE:
        channel = tl.arange(0, 4)
        address = pointer + (lane * stride)[:, None] + channel[None, :]
        tile = tl.load(address, mask=inside[:, None] & (channel < 3)[None, :], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(tile, [lane.shape[0], 2, 2]))
        x, z = tl.split(even)
        y, unused = tl.split(odd)
    else:
        # Added one after the other: a multiple of the channel stride may pass 2^31.
        address = pointer + lane * stride
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        address += channel_stride
        y = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        address += channel_stride
        z = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    return x, y, z


@triton.jit
def store3(pointer, lane, stride, channel_stride, x, y, z, inside, TILE: tl.constexpr):
    """Write three channels of the pixels `lane`; TILE as in `load3`: whole sectors leave in one store."""
    kind: tl.constexpr = pointer.dtype.element_ty
    x = x.to(kind)
    y = y.to(kind)
    z = z.to(kind)
    if TILE:
        channel = tl.arange(0, 4)
        tile = tl.reshape(tl.join(tl.join(x, z), tl.join(y, y)), [lane.shape[0], 4])
        address = pointer + (lane * stride)[:, None] + channel[None, :]
        tl.store(address, tile, mask=inside[:, None] & (channel < 3)[None, :])
    else:
        address = pointer + lane * stride
        tl.store(address, x, mask=inside)
        address += channel_stride
        tl.store(address, y, mask=inside)
        address += channel_stride
        tl.store(address, z, mask=inside)


@triton.jit
def _pair(low, high, kind: tl.constexpr):
    """Two 16-bit floats as one word, the first in the lower half: neighbours in memory."""
    low = low.to(kind).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = high.to(kind).to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (high << 16)


@triton.jit
def store6(pointer, lane, stride, channel_stride, a, b, c, d, e, f, inside, TILE: tl.constexpr):
    """Write six channels of the pixels `lane`; TILE as in `store3`, and then the pixels must be contiguous too."""
    kind: tl.constexpr = pointer.dtype.element_ty
    if TILE and kind.primitive_bitwidth == 16:
        words = pointer.to(tl.pointer_type(tl.uint32), bitcast=True)
        store3(words, lane, 3, 1, _pair(a, b, kind), _pair(c, d, kind), _pair(e, f, kind), inside, True)
    elif TILE:
        channel = tl.arange(0, 8)
        even = tl.join(tl.join(a, e), tl.join(c, e))
        odd = tl.join(tl.join(b, f), tl.join(d, f))
        tile = tl.reshape(tl.join(even, odd), [lane.shape[0], 8])
        address = pointer + (lane * 6)[:, None] + channel[None, :]
        tl.store(address, tile, mask=inside[:, None] & (channel < 6)[None, :])
    else:
        second = pointer + channel_stride
        second += channel_stride
        second += channel_stride
        store3(pointer, lane, stride, channel_stride, a, b, c, inside, False)
        store3(second, lane, stride, channel_stride, d, e, f, inside, False)


@triton.jit
def sum_column(partials, count, BLOCK: tl.constexpr):
    """Sum in float64 of `count` contiguous float32 values, in an order that depends on `count` alone."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(partials + start + lane, mask=start + lane < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def sum_columns(partials, count, NUMBER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`sum_column` of NUMBER columns one behind the other, in one loop: a [WIDTH] vector, a power of two."""
    column = tl.arange(0, WIDTH)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([WIDTH, BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        mask = (start + lane < count) & (column < NUMBER)
        total += tl.load(partials + column * count + start + lane, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(total, axis=1)


@triton.jit
def store_sums3(partials, count, a, b, c):
    """Write the sums of three blocks into three neighbouring columns of `count` partial sums."""
    tl.store(partials, tl.sum(a))
    tl.store(partials + count, tl.sum(b))
    tl.store(partials + 2 * count, tl.sum(c))


@triton.jit
def load_unit_quaternion(quats):
    """Components of the unit quaternion, and the norm before clamping."""
    x = tl.load(quats).to(tl.float32)
    y = tl.load(quats + 1).to(tl.float32)
    z = tl.load(quats + 2).to(tl.float32)
    w = tl.load(quats + 3).to(tl.float32)
    norm = tl.sqrt_rn(x * x + y * y + z * z + w * w)
    length = tl.maximum(norm, EPS)
    return tl.div_rn(x, length), tl.div_rn(y, length), tl.div_rn(z, length), tl.div_rn(w, length), norm


@triton.jit
def rotation(x, y, z, w):
    """Entries of the rotation matrix, row by row."""
    return (
        1 - 2 * (y * y + z * z),
        2 * (x * y - z * w),
        2 * (x * z + y * w),
        2 * (x * y + z * w),
        1 - 2 * (x * x + z * z),
        2 * (y * z - x * w),
        2 * (x * z - y * w),
        2 * (y * z + x * w),
        1 - 2 * (x * x + y * y),
    )
