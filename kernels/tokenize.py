"""Patch embedding as one matmul whose left operand is gathered from the image, pixel normalisation included.

Row r of the output is row `r % (EXTRA + T)` of image `r // (EXTRA + T)`: class token, registers, then patches. Rows
that are no patches go through the matmul with the first patch's pixels and are replaced in the epilogue: one grid
writes every row, and they are one in 889.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from any4d_fast.switches import matmul_allows_tf32

from .aot import AotCase


class Tiles(NamedTuple):
    """Tile of the output (rows x channels), depth of one matmul step, warps, pipeline stages, registers a thread."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Compiler options of a launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


TILES = {
    # The gather takes more issue slots (200 instructions a step of 32) than the matmul takes clocks (256), so two
    # blocks must share a multiprocessor, one gathering while the other multiplies: 8 warps of 128 registers each. What
    # spills at 128 is the epilogue's addresses, once a tile; the loop holds no spill.
    (9, 2): Tiles(128, 128, 32, 8, 4, 128),
    (9, 4): Tiles(128, 128, 32, 8, 3),
    # Accumulators live in tensor memory: no register limit is needed for two blocks.
    (10, 2): Tiles(128, 128, 32, 8, 4),
    (10, 4): Tiles(128, 128, 32, 8, 3),
    (8, 2): Tiles(128, 128, 32, 8, 4),
    (8, 4): Tiles(128, 64, 32, 4, 3),
}
"""Keyed by (compute capability major, bytes of the weight's dtype); newer devices than the table use its newest."""

EXACT_TILES = Tiles(64, 64, 32, 4, 2)
"""float32 without TF32 runs on the FMA units: operands live in registers, so that larger tiles spill."""


@functools.cache
def major(index: int | None) -> int:
    """Compute capability major of a CUDA device; that of Hopper in the interpreter."""
    return 9 if index is None else torch.cuda.get_device_capability(index)[0]


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats float32 operands, as PyTorch's matmul would; it ignores 16-bit ones."""
    return "ieee" if dtype == torch.float32 and not matmul_allows_tf32() else "tf32"


def tiles(dtype: torch.dtype, index: int | None) -> Tiles:
    """Tile sizes for a weight's dtype on a device."""
    if dtype == torch.float32 and precision(dtype) == "ieee":
        return EXACT_TILES
    return TILES[min(max(major(index), 8), 10), dtype.itemsize]


def extent(x: Tensor) -> int:
    """Elements of memory that a tensor spans, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


@triton.jit
def quotient(k, LIMIT: tl.constexpr, DIVISOR: tl.constexpr):
    """k // DIVISOR for 0 <= k < LIMIT, in one multiplication and one shift where that is exact.

    The reciprocal is at most DIVISOR / 65536 too large in units of 1 / DIVISOR: exact while LIMIT * DIVISOR <= 65536.
    """
    if LIMIT * DIVISOR <= 65536:
        return (k * ((65536 + DIVISOR - 1) // DIVISOR)) >> 16
    return k // DIVISOR


@triton.jit
def _columns(k, stride_c, stride_h, stride_w, PATCH: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr):
    """Offsets of a patch's pixels from its corner: k counts (channel, row, column), or (row, column, channel) if LAST.

    k runs up to one step past the patch, where the loads are masked.
    """
    if LAST:
        row = quotient(k, 3 * PATCH * PATCH + 128, 3 * PATCH)
        offset = row * stride_h + (k - row * (3 * PATCH))
    else:
        AREA: tl.constexpr = PATCH * PATCH
        channel = (k >= AREA).to(tl.int32) + (k >= 2 * AREA).to(tl.int32)
        within = k - channel * AREA
        row = quotient(within, AREA + 128, PATCH)
        offset = channel * stride_c + row * stride_h + (within - row * PATCH) * stride_w
    return tl.multiple_of(tl.max_contiguous(offset, VEC), VEC)


@triton.jit
def _by_channel(k, first, second, third, PATCH: tl.constexpr, LAST: tl.constexpr):
    """The value that belongs to the channel of each k."""
    if LAST:
        channel = k - 3 * quotient(k, 3 * PATCH * PATCH + 128, 3)
    else:
        channel = (k >= PATCH * PATCH).to(tl.int32) + (k >= 2 * PATCH * PATCH).to(tl.int32)
    return tl.where(channel == 0, first, tl.where(channel == 1, second, third))


@triton.jit
def _normalized(
    raw, k, scale_0, scale_1, scale_2, shift_0, shift_1, shift_2, PATCH: tl.constexpr, NORMALIZE: tl.constexpr,
    LAST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    if NORMALIZE:
        scale = _by_channel(k, scale_0, scale_1, scale_2, PATCH, LAST)
        shift = _by_channel(k, shift_0, shift_1, shift_2, PATCH, LAST)
        raw = raw.to(tl.float32) * scale[None, :] + shift[None, :]
    return raw.to(dtype)


@triton.jit
def _extra_rows(acc, slot, col, pos_ptr, cls_ptr, register_ptr, channels, EXTRA: tl.constexpr, POS_CLS: tl.constexpr):
    """Replace the rows of the class token (slot 0, if there is one) and of the registers behind it."""
    inside = (col < channels)[None, :]
    if cls_ptr is not None:
        is_cls = (slot == 0)[:, None]
        source = slot[:, None] * 0 + col[None, :]
        value = tl.load(cls_ptr + source, mask=is_cls & inside, other=0.0).to(tl.float32)
        if POS_CLS:
            value += tl.load(pos_ptr + source, mask=is_cls & inside, other=0.0).to(tl.float32)
        acc = tl.where(is_cls, value, acc)
    if register_ptr is not None:
        before: tl.constexpr = 0 if cls_ptr is None else 1
        is_register = ((slot >= before) & (slot < EXTRA))[:, None]
        source = (slot - before)[:, None] * channels + col[None, :]
        value = tl.load(register_ptr + source, mask=is_register & inside, other=0.0).to(tl.float32)
        acc = tl.where(is_register, value, acc)
    return acc


@triton.jit(do_not_specialize=["rows"])
def tokenize_kernel(
    image_ptr,  # [N, 3, H, W] by strides
    weight_ptr,  # [C, 3 * PATCH * PATCH], depth in the order of _columns
    bias_ptr,  # [C] or None
    pos_ptr,  # [POS_CLS + T, C]
    cls_ptr,  # [C] or None
    register_ptr,  # [R, C] or None
    out_ptr,  # [N, EXTRA + T, C]
    rows,
    tokens,
    grid_w,
    channels,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    PATCH: tl.constexpr,
    EXTRA: tl.constexpr,
    POS_CLS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
):
    DEPTH: tl.constexpr = 3 * PATCH * PATCH
    FULL: tl.constexpr = DEPTH // BK * BK
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    across = tl.cdiv(channels, BN)
    first = tl.program_id(0) // across * BM
    row = first + tl.arange(0, BM)
    col = tl.program_id(0) % across * BN + tl.arange(0, BN)
    # Rows and columns past the end read the last one's data: an unmasked gather, and a masked store.
    safe_row = tl.minimum(row, rows - 1)
    safe_col = tl.minimum(col, channels - 1)
    slot = safe_row % (EXTRA + tokens)
    token = tl.maximum(slot - EXTRA, 0)
    corner = token // grid_w * PATCH * stride_h + token % grid_w * PATCH * stride_w
    image = safe_row // (EXTRA + tokens)
    # A row's offset is kept for the whole loop: 32 bits where they reach take half the registers.
    corner += image.to(tl.int64) * stride_n if WIDE else image * stride_n
    corner = tl.multiple_of(corner, VEC)[:, None]
    weights = weight_ptr + safe_col[None, :] * DEPTH

    acc = tl.zeros([BM, BN], tl.float32)
    lane = tl.arange(0, BK)
    if FULL > 0:
        # Bytes cannot be copied asynchronously into shared memory: the next step's pixels are fetched by hand.
        raw = tl.load(image_ptr + (corner + _columns(lane, stride_c, stride_h, stride_w, PATCH, VEC, LAST)[None, :]))
        for start in range(0, FULL, BK):
            w = tl.load(weights + (start + lane)[:, None])
            following = tl.minimum(start + BK, FULL - BK) + lane
            offset = _columns(following, stride_c, stride_h, stride_w, PATCH, VEC, LAST)
            ahead = tl.load(image_ptr + (corner + offset[None, :]))
            a = _normalized(
                raw, start + lane, scale_0, scale_1, scale_2, shift_0, shift_1, shift_2, PATCH, NORMALIZE, LAST, dtype
            )
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
            raw = ahead
    if TAIL > 0:
        k = FULL + tl.arange(0, TAIL)
        offset = _columns(k, stride_c, stride_h, stride_w, PATCH, VEC, LAST)
        raw = tl.load(image_ptr + (corner + offset[None, :]), mask=(k < DEPTH)[None, :], other=0)
        w = tl.load(weights + k[:, None], mask=(k < DEPTH)[:, None], other=0.0)
        a = _normalized(raw, k, scale_0, scale_1, scale_2, shift_0, shift_1, shift_2, PATCH, NORMALIZE, LAST, dtype)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)

    live = (row < rows)[:, None] & (col < channels)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + safe_col).to(tl.float32)[None, :]
    place = pos_ptr + (token + POS_CLS)[:, None] * channels + col[None, :]
    acc += tl.load(place, mask=live, other=0.0).to(tl.float32)
    if EXTRA > 0:
        start = first % (EXTRA + tokens)
        if (start < EXTRA) | (start + BM > EXTRA + tokens):
            acc = _extra_rows(acc, slot, col, pos_ptr, cls_ptr, register_ptr, channels, EXTRA, POS_CLS)
    out = out_ptr + row.to(tl.int64)[:, None] * channels + col[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live)


def _alignment(image: Tensor, patch: int, last: bool) -> int:
    """Elements that one load may take: 2 where every row of every patch starts on an even, contiguous pair, else 1."""
    n, c, h, w = image.stride()
    even = patch % 2 == 0 and h % 2 == 0 and (n % 2 == 0 or image.shape[0] == 1) and (last or (w == 1 and c % 2 == 0))
    return 2 if even and image.data_ptr() % (2 * image.element_size()) == 0 else 1


def tokenize_forward(
    image: Tensor,  # [N, 3, H, W] any strides, uint8 or float
    weight: Tensor,  # [C, 3, P, P]
    bias: Tensor | None,  # [C]
    pos_embed: Tensor,  # [T, C], or [1 + T, C] with a class token
    cls_token: Tensor | None,  # [1, C]
    register_tokens: Tensor | None,  # [R, C]
    scale: Sequence[float],
    shift: Sequence[float],
    out_dtype: torch.dtype,
    config: Tiles | None = None,
) -> Tensor:
    """Rows [N, extra + T, C]; pixels become `pixel * scale + shift` (as they are where scale is empty)."""
    batch, _, height, width = image.shape
    channels, patch = weight.shape[0], weight.shape[-1]
    tokens = (height // patch) * (width // patch)
    registers = 0 if register_tokens is None else register_tokens.shape[0]
    extra = registers + (cls_token is not None)
    out = torch.empty(batch, extra + tokens, channels, device=image.device, dtype=out_dtype)
    rows = batch * (extra + tokens)
    if rows == 0 or channels == 0:
        return out
    t = config or tiles(weight.dtype, image.device.index)
    left = 3 * patch * patch % t.bk
    grid = (triton.cdiv(rows, t.bm) * triton.cdiv(channels, t.bn),)
    factors = [*scale, *shift] or [0.0] * 6
    # A channels-last image is read in its memory order, runs of 3 * patch bytes, against a reordered weight (1 MB).
    last = image.stride(1) == 1 and image.stride(3) == 3
    ordered = weight.permute(0, 2, 3, 1).contiguous() if last else weight.contiguous()
    with torch.cuda.device_of(image):
        tokenize_kernel[grid](
            image, ordered, None if bias is None else bias.contiguous(), pos_embed.contiguous(),
            None if cls_token is None else cls_token.contiguous(),
            None if register_tokens is None else register_tokens.contiguous(),
            out, rows, tokens, width // patch, channels, *image.stride(), *factors,
            PATCH=patch, EXTRA=extra, POS_CLS=pos_embed.shape[0] - tokens, NORMALIZE=bool(scale), LAST=last,
            VEC=_alignment(image, patch, last), WIDE=extent(image) > 2**31 - 1, PRECISION=precision(weight.dtype),
            BM=t.bm, BN=t.bn, BK=t.bk, TAIL=max(16, triton.next_power_of_2(left)) if left else 0, **t.options(),
        )  # fmt: skip
    return out


_TYPES = {
    "rows": "i32", "tokens": "i32", "grid_w": "i32", "channels": "i32",
    "stride_n": "i32", "stride_c": "i32", "stride_h": "i32", "stride_w": "i32",
    **{f"{kind}_{c}": "fp32" for kind in ("scale", "shift") for c in range(3)},
}  # fmt: skip


def _case(
    name: str, image: str, weight: str, out: str, channels_last: bool, registers: bool, t: Tiles, **options: object
) -> AotCase:
    pointers = {"image_ptr": image, "weight_ptr": weight, "bias_ptr": weight, "pos_ptr": weight, "cls_ptr": weight}
    pointers |= {"register_ptr": weight, "out_ptr": out}
    constants = {
        "PATCH": 14, "EXTRA": 5 if registers else 1, "POS_CLS": 1, "NORMALIZE": image == "u8",
        "LAST": channels_last, "VEC": 2, "WIDE": False, "PRECISION": options.get("precision", "tf32"),
        "BM": t.bm, "BN": t.bn, "BK": t.bk, "TAIL": 16, "stride_c" if channels_last else "stride_w": 1,
    }  # fmt: skip
    if not registers:
        constants["register_ptr"] = None
    return AotCase(
        name=name,
        kernel=tokenize_kernel,
        types={k: f"*{v}" for k, v in pointers.items()} | _TYPES,
        constants=constants,
        aligned=tuple(k for k in (*pointers, "channels") if k not in constants),
        options=t.options(),
        targets=options.get("targets", (80, 90, 100)),  # type: ignore[arg-type]
        # A register limit spills the epilogue's addresses, outside the loop (see TILES).
        max_spills=200 if t.registers else 0,
    )


def aot_cases() -> list[AotCase]:
    """Every production configuration: uint8 and float images, 16-bit and float32 weights, both image layouts."""
    cases = []
    for generation in (8, 9, 10):
        targets = (generation * 10,)
        half, full = TILES[generation, 2], TILES[generation, 4]
        for image, weight, out, last in (
            ("u8", "bf16", "fp32", False), ("u8", "bf16", "fp32", True), ("u8", "fp16", "bf16", True),
            ("fp32", "bf16", "fp32", False), ("bf16", "bf16", "bf16", False),
        ):  # fmt: skip
            layout = "nhwc" if last else "nchw"
            name = f"tokenize_{image}_{weight}_{out}_{layout}_{generation}"
            cases.append(_case(name, image, weight, out, last, False, half, targets=targets))
        cases.append(
            _case(f"tokenize_fp32_tf32_{generation}", "fp32", "fp32", "fp32", False, False, full, targets=targets)
        )
        cases.append(_case(f"tokenize_registers_{generation}", "u8", "bf16", "fp32", True, True, half, targets=targets))
    cases.append(_case("tokenize_fp32_ieee", "fp32", "fp32", "fp32", False, False, EXACT_TILES, precision="ieee"))
    return cases
