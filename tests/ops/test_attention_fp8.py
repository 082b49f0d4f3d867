"""attention_fp8 without a GPU: the emulation's errors, the public function, and where the kernel's bytes lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from any4d_fast import backends
from any4d_fast.ops.attention import Segments
from any4d_fast.ops.attention_fp8 import attention_fp8
from any4d_fast.reference.attention import attention as reference_attention
from any4d_fast.reference.attention_fp8 import attention_fp8 as reference_attention_fp8
from any4d_fast.reference.attention_fp8 import linear_exp2, power_of_two, round_e4m3
from any4d_fast.testing import relative_error

Array = NDArray[np.float64]
SCALE = 0.125
E4M3 = 0.0265
"""Root mean square of the relative error of rounding to e4m3; at most it is 2^-4."""

LAYOUTS = {
    "one row": (Segments.batched(3, 1), 3),
    "global": (Segments.global_(2, 150), 300),
    "frame": (Segments.frame(2, 3, 40), 242),
    "odd": (Segments(length=5, count=3, stride=7, groups=2, group_stride=30, start=3), 70),
}


def sample(rows: int, spread: float = 1.0, bias: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    qkv = torch.randn(rows, 3, 2, 64, generator=generator)
    qkv[:, 0] *= spread
    qkv[:, 1] += bias * torch.randn(2, 64, generator=generator)
    return qkv.to(dtype)


def exact(qkv: Tensor, segments: Segments, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    found = reference_attention(qkv.double(), segments, scale, return_lse=True)
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("linear_runs", [0, 4, 8])
@pytest.mark.parametrize(("spread", "bias"), [(1.0, 0.0), (1.0, 3.0), (3.0, 0.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errs_as_e4m3_does(layout: str, spread: float, bias: float, linear_runs: int) -> None:
    """Scores err by 0.0265 sqrt(2) of their deviation, values by 0.0265, probabilities by up to 0.03."""
    segments, rows = LAYOUTS[layout]
    qkv = sample(rows, spread, bias)
    out, lse = reference_attention_fp8(qkv, segments, SCALE, linear_runs)
    expected, expected_lse = exact(qkv, segments)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert relative_error(out, expected) < 1.25 * E4M3 * (2 * spread**2 + 2.3) ** 0.5
    assert (lse - expected_lse).abs().max() < 8 * E4M3 * spread
    uncovered = expected_lse.eq(0).all(0)
    assert not out[uncovered].any() and not lse[:, uncovered].any()


def test_what_all_keys_have_in_common_does_no_harm() -> None:
    rows = 1_000
    plain, biased = sample(rows), sample(rows, bias=3.0)
    errors = [
        relative_error(reference_attention_fp8(x, Segments(rows), SCALE)[0], exact(x, Segments(rows))[0])
        for x in (plain, biased)
    ]
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_function(layout: str) -> None:
    segments, rows = LAYOUTS[layout]
    qkv = sample(rows)
    expected, expected_lse = reference_attention_fp8(qkv, segments, SCALE)
    out, lse = attention_fp8(qkv, segments=segments, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    only = attention_fp8(qkv, segments=segments, scale=SCALE, backend="eager")
    assert isinstance(only, Tensor) and torch.equal(only, expected)


@pytest.mark.parametrize("segments", [Segments.global_(0, 5), Segments.batched(3, 0)])
def test_no_segments(segments: Segments) -> None:
    out, lse = attention_fp8(torch.full((2, 3, 2, 64), float("nan")), segments=segments, return_lse=True)
    assert out.shape == (2, 2, 64) and not out.any() and not lse.any()


def test_has_no_backward() -> None:
    qkv = sample(8).requires_grad_()
    with pytest.raises(RuntimeError, match="attention_fp8: expected a call without gradients.*torch.no_grad"):
        attention_fp8(qkv, segments=Segments(8))
    with torch.no_grad():
        out = attention_fp8(qkv, segments=Segments(8))
    assert isinstance(out, Tensor) and not out.requires_grad


def test_errors_are_those_of_attention() -> None:
    with pytest.raises(ValueError, match=r"qkv: expected \[rows, 3, heads, head_dim\]"):
        attention_fp8(torch.zeros(4, 2, 1, 64), segments=Segments(4))
    with pytest.raises(ValueError, match="segments: expected to end within"):
        attention_fp8(torch.zeros(4, 3, 1, 64), segments=Segments(5))
    with pytest.raises(backends.BackendError, match="attention_fp8: backend='cuda' cannot run this call"):
        attention_fp8(torch.zeros(4, 3, 1, 64), segments=Segments(4), backend="cuda")


def test_operator() -> None:
    qkv, segments = sample(70), LAYOUTS["odd"][0]
    torch.library.opcheck(torch.ops.any4d_fast.attention_fp8_forward.default, (qkv, segments.as_list(), SCALE, "eager"))


def test_compiles_with_dynamic_length() -> None:
    def call(x: Tensor) -> Tensor:
        found = attention_fp8(x, segments=Segments.global_(1, x.shape[0]), backend="eager")
        assert isinstance(found, Tensor)
        return found

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 140):
        torch.testing.assert_close(compiled(sample(rows)), call(sample(rows)))


def test_scales_are_powers_of_two() -> None:
    most = torch.tensor([0.0, 1e-30, 1.0, 3.5, 448.0, 449.0, 1e5, 1e17, float("inf")])
    scale = power_of_two(most)
    assert scale.isnan().tolist() == [False] * 7 + [True] * 2
    assert scale[:7].log2().tolist() == [0, -44, -8, -7, 0, 1, 8]


def test_linear_exp2_is_unbiased_and_within_its_bounds() -> None:
    x = torch.linspace(-6, 8, 100_001)
    ratio = linear_exp2(x) / torch.exp2(x)
    assert (ratio.mean() - 1).abs() < 2e-3
    # Its own 0.962 to 1.021, and half a step of 1/8 at mantissa 0.
    assert 0.90 < ratio.min() and ratio.max() < 1.09
    rounded = round_e4m3(torch.exp2(x)) / torch.exp2(x)
    assert (rounded - 1).square().mean().sqrt() <= E4M3 + 1e-4 < (ratio - 1).square().mean().sqrt() < 0.033
    assert linear_exp2(torch.tensor([8.0, -100.0, -float("inf")])).tolist() == [256, 0, 0]


def rows_of(slot: int) -> list[int]:
    """The four rows of a thread of the first pass."""
    return [16 * (slot // 4) + 2 * (slot % 4) + i % 2 + 8 * (i // 2) for i in range(4)]


def key_block(k: Array, v: Array) -> Array:
    """Bytes of 128 keys and values [128, 64] as attention_fp8_sm90_quantize.cu writes them."""
    k_words, v_words = np.zeros((128 * 16, 4)), np.zeros((64, 32, 4))
    for thread in range(256):
        chunk, slot = thread % 8, thread // 8
        rows = rows_of(slot)
        for row in rows:
            for half in range(2):
                place = (2 * (chunk % 2) + half) ^ (row // 2 % 4)
                first = 8 * chunk + 4 * half
                k_words[row * 16 + 4 * place + chunk // 2] = k[row, first : first + 4]
        for c in range(8):
            v_words[8 * chunk + c, slot] = v[rows, 8 * chunk + c]
    v_bytes = np.zeros((64, 8, 16))
    for piece in range(512):
        channel = piece // 8
        source = 4 * ((piece % 8) ^ (channel % 8))
        v_bytes[channel, piece % 8] = v_words[channel, source : source + 4].reshape(16)
    return np.concatenate([k_words.reshape(-1), v_bytes.reshape(-1), np.ones(128), np.full(7 * 128, np.nan)])


def query_registers(q: Array) -> Array:
    """A's registers [2 steps, 128 threads, 4, 4 bytes] of 64 queries [64, 64], as the same kernel writes them."""
    a = np.full((2, 128, 4, 4), np.nan)
    for thread in range(128):
        chunk, slot = thread % 8, thread // 8
        rows = rows_of(slot)
        for i in range(2):
            to = slot // 4 * 32 + (2 * (slot % 4) + i) * 4 + chunk // 2
            low, high = q[rows[i]], q[rows[i + 2]]
            first = [slice(8 * chunk, 8 * chunk + 4), slice(8 * chunk + 4, 8 * chunk + 8)]
            a[chunk % 2, to] = [low[first[0]], high[first[0]], low[first[1]], high[first[1]]]
    return a


def swizzled(rows: Array) -> Array:
    """128 rows of 64 elements as the copy engine writes them: chunk c of 8 elements of row r at c ^ (r % 8)."""
    found = np.empty((128, 8, 8))
    for row in range(128):
        for chunk in range(8):
            found[row, chunk ^ row % 8] = rows[row, 8 * chunk : 8 * chunk + 8]
    return found.reshape(-1)


def short_key_block(k: Array, v: Array) -> tuple[Array, Array, list[list[int]]]:
    """Bytes of keys and of values as attention_fp8_sm90_short_round.cuh writes them, and the words of every store."""
    k_raw, v_raw = swizzled(k), swizzled(v)
    k_bytes, v_bytes = np.full(128 * 64, np.nan), np.full(64 * 128, np.nan)
    stores: dict[tuple[str, int, int, int], list[int]] = {}
    for thread in range(128):
        warp, lane = thread // 32, thread % 32
        r, t = lane // 4, lane % 4
        for n in range(4):
            place = (warp * 32 + r) * 128 + 16 * (2 * t ^ r)
            first = [((place ^ 16 * s) + 1024 * n) // 2 for s in range(2)]
            key = np.concatenate([k_raw[i : i + 8] for i in first])
            place = (warp * 32 + r) * 64 + 4 * t + 16 * (lane // 8)
            for word in range(4):
                to = (place ^ 16 * word) + 512 * n
                k_bytes[to : to + 4] = key[4 * word : 4 * word + 4]
                stores.setdefault(("k", warp, n, word), []).append(to // 4)
        for half in range(2):
            place = (16 * r + 2 * t) * 128 + 16 * (warp * 2 ^ 2 * t)
            first = [((place ^ 16 * (half ^ i % 2)) + i % 2 * 128 + i // 2 * 1024) // 2 for i in range(4)]
            values = np.stack([v_raw[i : i + 8] for i in first])
            place = warp * 16 * 128 + 4 * lane
            for c in range(8):
                to = (place ^ 16 * c) + (8 * half + c) * 128
                v_bytes[to : to + 4] = values[:, c]
                stores.setdefault(("v", warp, half, c), []).append(to // 4)
    return k_bytes, v_bytes, list(stores.values())


def short_query_registers(q: Array) -> Array:
    """A's registers [2 steps, 128 threads, 4, 4 bytes] of 64 queries as attention_fp8_sm90_short.cu rounds them."""
    a = np.empty((2, 128, 4, 4))
    for thread in range(128):
        row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for half in range(2):
            for word in range(4):
                first = 16 * t + 4 * word
                a[word // 2, thread, 2 * (word % 2) + half] = q[row + 8 * half, first : first + 4]
    return a


def transposed_quads(words: NDArray[np.int64]) -> NDArray[np.int64]:
    """`transpose_quad` of the same file on [4 lanes, 4 words]: what two exchanges between lanes make of them."""
    words = words.copy()
    for a, b, bit in ((0, 2, 2), (1, 3, 2), (0, 1, 1), (2, 3, 1)):
        swapped = [bool(lane & bit) for lane in range(4)]
        sent = [words[lane, a] if swapped[lane] else words[lane, b] for lane in range(4)]
        for lane in range(4):
            words[lane, a if swapped[lane] else b] = sent[lane ^ bit]
    return words


def operand_a(registers: Array) -> Array:
    """[64, 32] of wgmma's A from the registers [128 threads, 4, 4 bytes] (PTX ISA, wgmma.m64nNk32)."""
    a = np.full((64, 32), np.nan)
    for thread in range(128):
        row, column = 16 * (thread // 32) + thread % 32 // 4, 4 * (thread % 4)
        for register in range(4):
            first = column + 16 * (register // 2)
            a[row + 8 * (register % 2), first : first + 4] = registers[thread, register]
    return a


def operand_b(memory: Array, start: int, columns: int, row_bytes: int) -> Array:
    """[32, columns] of wgmma's B by a descriptor: 8 rows an atom, in the swizzle of as many bytes as a row."""
    n, byte = np.meshgrid(np.arange(columns), np.arange(32))
    address = start + n // 8 * (8 * row_bytes) + n % 8 * row_bytes + byte
    return memory[address ^ ((address >> 7 & row_bytes // 16 - 1) << 4)]


def accumulators(d: Array) -> Array:
    """[128 threads, columns / 2] of wgmma's D."""
    columns = d.shape[1]
    found = np.empty((128, columns // 2))
    for thread in range(128):
        row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
        for i in range(columns // 2):
            found[thread, i] = d[row + 8 * (i // 2 % 2), i // 4 * 8 + column + i % 2]
    return found


def test_bytes_lie_as_the_products_read_them() -> None:
    """Scores, probabilities and output of 64 queries and 128 keys by the kernel's maps, against dense products."""
    generator = np.random.default_rng(0)
    q, k, v = (generator.integers(-8, 8, (rows, 64)).astype(float) for rows in (64, 128, 128))
    memory = key_block(k, v)
    q_registers = query_registers(q)
    scores = np.sum([operand_a(q_registers[s]) @ operand_b(memory, 32 * s, 128, 64) for s in range(2)], axis=0)
    np.testing.assert_array_equal(scores, q @ k.T)
    own = np.abs(accumulators(scores))  # in the place of probabilities
    p = np.empty((128, 16, 4))
    for run in range(8):
        for half in range(2):
            first = 8 * run + 2 * half
            p[:, 2 * run + half] = own[:, [first, first + 1, first + 4, first + 5]]
    parts = [operand_a(p[:, 4 * s : 4 * s + 4]) @ operand_b(memory, 8192 + 32 * s, 72, 128) for s in range(4)]
    out = np.sum(parts, axis=0)
    expected = np.abs(scores)
    np.testing.assert_array_equal(out[:, :64], expected @ v)
    np.testing.assert_array_equal(out[:, 64], expected.sum(1))
    totals = accumulators(out)
    assert (totals[::4, 32] == expected.sum(1)[[16 * (t // 32) + t % 32 // 4 for t in range(0, 128, 4)]]).all()


def test_short_segments_bytes_are_those_of_long_ones() -> None:
    generator = np.random.default_rng(0)
    q, k, v = (generator.integers(-8, 8, (rows, 64)).astype(float) for rows in (64, 128, 128))
    k_bytes, v_bytes, stores = short_key_block(k, v)
    np.testing.assert_array_equal(np.concatenate([k_bytes, v_bytes]), key_block(k, v)[: 2 * 8192])
    np.testing.assert_array_equal(short_query_registers(q), query_registers(q))
    for words in stores:  # of a warp at once: no two in one bank
        assert len({word % 32 for word in words}) == len(words) == 32
    quad = np.arange(16).reshape(4, 4)
    np.testing.assert_array_equal(transposed_quads(quad), quad.T)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 12, 14, 16, 41, 1000, 2**20 + 1, 2**31 - 1])
def test_quotients_by_multiplication(divisor: int) -> None:
    """`Divisor` of attention_fp8_sm90_short.cuh."""
    shift = 31
    while 1 << (shift - 31) < divisor:
        shift += 1
    multiplier = (1 << shift) // divisor + 1
    assert multiplier < 2**32
    generator = np.random.default_rng(divisor)
    numbers = [0, 1, divisor - 1, divisor, 2**31 - 1, *generator.integers(0, 2**31, 1000).tolist()]
    numbers += [n // divisor * divisor + i for n in numbers for i in (-1, 0) if n >= divisor]
    assert all(n * multiplier >> shift == n // divisor for n in numbers)


def test_probabilities_by_multiply_adds_are_bytes_of_e4m3() -> None:
    """The kernel's multiply-add and its way through float16 against the reference's formula."""
    scores = torch.cat([torch.linspace(-40, 8, 4801), torch.tensor([-1e30, -float("inf")])])
    whole = (scores * 8 + ((7 - 0.0562) * 8 + 1024)).half()
    code = torch.maximum(whole, torch.full_like(whole, 1024)).view(torch.int16).bitwise_and(0xFF).to(torch.uint8)
    assert code.max() == 120
    # float32 may round a tie the other way.
    same = code.view(torch.float8_e4m3fn).float() == linear_exp2(scores)
    assert same.double().mean() > 0.999 and same[-2:].all()
