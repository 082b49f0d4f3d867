"""Solid textures of synthetic scenes: the arithmetic of `train.textures`, a point a lane."""

from __future__ import annotations

import triton
import triton.language as tl

from ._shapes import triple

# Numbers of `textures.TEXTURES`; what is none of these is stripes.
CHECKER, STRIPES, TILES, SINES, NOISE = (tl.constexpr(number) for number in range(5))


@triton.jit
def _sine(periods):
    """sin(2 pi periods), to 2e-7 times the argument's rounding: a sine of libdevice keeps a slow path in registers."""
    f = periods - tl.floor(periods + 0.5)  # [-1/2, 1/2]
    g = 0.25 - tl.abs(tl.abs(f) - 0.25)  # folded to [0, 1/4]
    a = 6.283185307179586 * g
    s = a * a
    series = s * (s * (s * (s * (2.7557319e-6 - s * 2.5052108e-8) - 1.9841270e-4) + 8.3333333e-3) - 1.6666667e-1)
    wave = a + a * series
    return tl.where(f < 0.0, -wave, wave)


@triton.jit
def _scramble(h):
    """The last rounds of the lattice's hash: [0, 1]. Its products fit 31 x 31 bits, and the last one's upper half is
    not used."""
    a = (h ^ (h >> 13)).to(tl.uint32) & 0x7FFFFFFF
    wide = a.to(tl.int64) * 1274126177
    b = (wide ^ (wide >> 17)).to(tl.uint32) & 0x7FFFFFFF
    return (((b * 1103515245) >> 16) & 0xFFFF).to(tl.int32).to(tl.float32) * (1.0 / 65535)


@triton.jit
def lattice(x, y, z):
    """The hash of a lattice point with integer coordinates in float32."""
    return _scramble((x.to(tl.int64) * 73856093) ^ (y.to(tl.int64) * 19349663) ^ (z.to(tl.int64) * 83492791))


@triton.jit
def mixed(a, b, weight):
    return (1.0 - weight) * a + weight * b


@triton.jit
def _value_noise(x, y, z):
    """Smooth noise in [0, 1] with one random value a unit cell corner."""
    fx = tl.floor(x)
    fy = tl.floor(y)
    fz = tl.floor(z)
    wx = x - fx
    wy = y - fy
    wz = z - fz
    wx = wx * wx * (3.0 - 2.0 * wx)
    wy = wy * wy * (3.0 - 2.0 * wy)
    wz = wz * wz * (3.0 - 2.0 * wz)
    x0 = fx.to(tl.int64) * 73856093
    y0 = fy.to(tl.int64) * 19349663
    z0 = fz.to(tl.int64) * 83492791
    x1 = x0 + 73856093
    y1 = y0 + 19349663
    z1 = z0 + 83492791
    near = mixed(
        mixed(_scramble(x0 ^ y0 ^ z0), _scramble(x0 ^ y0 ^ z1), wz),
        mixed(_scramble(x0 ^ y1 ^ z0), _scramble(x0 ^ y1 ^ z1), wz),
        wy,
    )
    far = mixed(
        mixed(_scramble(x1 ^ y0 ^ z0), _scramble(x1 ^ y0 ^ z1), wz),
        mixed(_scramble(x1 ^ y1 ^ z0), _scramble(x1 ^ y1 ^ z1), wz),
        wy,
    )
    return mixed(near, far, wx)


@triton.jit
def clamped(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _soft_square(periods, sharpness):
    return clamped(_sine(periods) * sharpness, -1.0, 1.0)


@triton.jit
def albedo(texture, x, y, z, footprint):
    """Linear RGB of surface points in the object's frame; `texture` points to each point's row of the table."""
    kind = tl.load(texture).to(tl.int32)
    frequency, frequency_y, frequency_z = triple(texture + 1, x)
    phase_x, phase_y, phase_z = triple(texture + 4, x)
    u = x * frequency + phase_x
    v = y * frequency_y + phase_y
    w = z * frequency_z + phase_z
    blur = frequency * footprint
    sharpness = 1.0 / (3.141592653589793 * tl.maximum(blur, 0.02))
    ax, ay, az = triple(texture + 7, x)
    across = (ax * x + ay * y + az * z) * frequency
    # This loop and the next keep Triton's own passes short; LLVM unrolls this one.
    checker = x * 0.0 + 1.0
    for axis in range(3):
        checker *= _soft_square(tl.where(axis == 0, u, tl.where(axis == 1, v, w)), sharpness)
    stripes = _soft_square(across + phase_x, sharpness)

    # 64 periods of offset give every texture its own part of the noise.
    coarse = x * 0.0
    fine = x * 0.0
    for octave in range(2):
        scale = tl.where(octave == 0, 0.7, 3.1)
        coarse = fine
        fine = _value_noise(scale * u + 64.0 * phase_x, scale * v + 64.0 * phase_y, scale * w + 64.0 * phase_z)
    noise = coarse - 0.5 + (fine - 0.5) * clamped(2.0 - 12.0 * blur, 0.0, 1.0)
    cell_u = tl.floor(u)
    cell_v = tl.floor(v)
    cell_w = tl.floor(w)
    middle = tl.maximum(tl.abs(u - cell_u - 0.5), tl.maximum(tl.abs(v - cell_v - 0.5), tl.abs(w - cell_w - 0.5)))
    tint = lattice(
        tl.floor(cell_u + 64.0 * phase_x), tl.floor(cell_v + 64.0 * phase_y), tl.floor(cell_w + 64.0 * phase_z)
    )
    tiles = tl.where(0.5 - middle < 0.03 + 0.5 * blur, -1.0, 0.2 + 0.8 * tint)
    sines = _sine(across + 2.5 * coarse)

    pattern = tl.where(kind == CHECKER, checker, stripes)
    pattern = tl.where(kind == TILES, tiles, pattern)
    pattern = tl.where(kind == SINES, sines, pattern)
    pattern = tl.where(kind == NOISE, clamped(1.6 * noise, -1.0, 1.0), pattern)
    visible = clamped(2.0 - 4.0 * blur, 0.0, 1.0)
    weight = 0.5 + 0.5 * pattern * visible
    shade = 1.0 + tl.load(texture + 16) * noise * visible
    r0, g0, b0 = triple(texture + 10, x)
    r1, g1, b1 = triple(texture + 13, x)
    return mixed(r0, r1, weight) * shade, mixed(g0, g1, weight) * shade, mixed(b0, b1, weight) * shade
