"""Residual stream + LayerScale x branch, and the LayerNorm of the sum, in one pass; and its backward pass."""

# Kernels grow tuples of blocks, which mypy takes for tuples of fixed length.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import RowTile, as_rows, column_sums, load_channels, programs, row_statistics, store_normed
from .aot import AotCase

MAX_CHANNELS = 4096
"""A row lives in registers: beyond this the backward pass would spill."""


def forward_tile(channels: int) -> RowTile:
    """Layout of the forward pass: four warps share two rows up to 1,024 channels, one row beyond.

    Measured on an H200 (kernels/notes/norms.md): one warp a row, best for LayerNorm alone, is 7 to 30 % slower here.
    """
    if channels <= 256:
        return RowTile(rows=8, chunk=triton.next_power_of_2(channels), warps=4)
    if channels <= 1024:
        return RowTile(rows=2, chunk=1024, warps=4)
    return RowTile(rows=1, chunk=1024, warps=4)


def backward_tile(channels: int) -> RowTile:
    """Layout of the backward pass: three sums over rows stay in the registers of several warps.

    Measured on an H200 (kernels/notes/norms.md). `programs` is within what is resident at once on sm_90.
    """
    if channels <= 256:
        return RowTile(rows=8, chunk=triton.next_power_of_2(channels), warps=4, stages=2, programs=4)
    if channels <= 768:
        return RowTile(rows=4, chunk=256, warps=8, stages=2, programs=2)
    if channels <= 1024:
        return RowTile(rows=2, chunk=512, warps=4, stages=2, programs=3)
    return RowTile(rows=1, chunk=1024, warps=8, stages=1, programs=2)


@triton.jit(do_not_specialize=["rows", "rows_per_scale"])
def residual_norm_forward_kernel(
    residual,  # [rows, C]
    branch,  # [rows, C]
    gamma,  # [C] or unused
    weight,  # [C] or unused
    bias,  # [C] or unused
    row_scale,  # [rows / rows_per_scale] or unused
    new,  # [rows, C]; may be `residual` itself
    normed,  # [rows, C], contiguous, or unused
    mean,  # [rows] float32 or unused
    rstd,  # [rows] float32 or unused
    rows,
    rows_per_scale,
    residual_stride,
    branch_stride,
    new_stride,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """new = residual + row_scale gamma branch; normed = LayerNorm(new as it is stored).

    With QUANTIZE `normed` is e4m3, and `rstd` takes the rows' scales.
    """
    factors = ()
    gains = ()
    shifts = ()
    if HAS_GAMMA:
        factors = load_channels(gamma, C, CHUNK, CHUNKS)
    if HAS_WEIGHT:
        gains = load_channels(weight, C, CHUNK, CHUNKS)
    if HAS_BIAS:
        shifts = load_channels(bias, C, CHUNK, CHUNKS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < rows
        kept = valid
        if HAS_SCALE:
            keep = tl.load(row_scale + row // rows_per_scale, mask=valid, other=0.0).to(tl.float32)
            # A dropped row's branch is never read: it may hold anything, and costs no bandwidth.
            kept = valid & (keep != 0.0)
        blocks = ()
        for chunk in tl.static_range(CHUNKS):
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            inside = (column < C)[None, :]
            mask = valid[:, None] & inside
            kept_mask = kept[:, None] & inside
            total = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0)
            update = tl.load(branch + row[:, None] * branch_stride + column[None, :], mask=kept_mask, other=0.0)
            update = update.to(tl.float32)
            if HAS_GAMMA:
                update = update * factors[chunk][None, :]
            if HAS_SCALE:
                update = update * keep[:, None]
            stored = (total.to(tl.float32) + update).to(new.dtype.element_ty)
            tl.store(new + row[:, None] * new_stride + column[None, :], stored, mask=mask)
            blocks = blocks + (stored.to(tl.float32),)
        if NORMALIZE:
            centre, scale = row_statistics(blocks, eps, C, CHUNK, CHUNKS)
            store_normed(
                blocks, centre, scale, gains, shifts, normed, mean, rstd, row, valid, C, ROWS, CHUNK, CHUNKS,
                HAS_WEIGHT, HAS_BIAS, QUANTIZE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "rows_per_scale"])
def residual_norm_backward_kernel(
    grad_new,  # [rows, C] or unused
    grad_normed,  # [rows, C] or unused
    new,  # [rows, C] or unused
    branch,  # [rows, C] or unused
    gamma,  # [C] or unused
    weight,  # [C] or unused
    row_scale,  # [rows / rows_per_scale] or unused
    mean,  # [rows] float32 or unused
    rstd,  # [rows] float32 or unused
    grad_residual,  # [rows, C], contiguous, or unused
    grad_branch,  # [rows, C], contiguous, or unused
    partial_gamma,  # [programs, C] float32 or unused
    partial_weight,  # [programs, C] float32 or unused
    partial_bias,  # [programs, C] float32 or unused
    rows,
    rows_per_scale,
    grad_new_stride,
    grad_normed_stride,
    new_stride,
    branch_stride,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_NORMED: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    NEED_BRANCH: tl.constexpr,
    NEED_GAMMA: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
):
    """The stream's gradient is grad_new plus LayerNorm's; residual takes it whole, the branch scaled."""
    factors = ()
    gains = ()
    if HAS_GAMMA:
        factors = load_channels(gamma, C, CHUNK, CHUNKS)
    if HAS_WEIGHT:
        gains = load_channels(weight, C, CHUNK, CHUNKS)
    gamma_sums = ()
    weight_sums = ()
    bias_sums = ()
    for _ in tl.static_range(CHUNKS):
        gamma_sums = gamma_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
        weight_sums = weight_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
        bias_sums = bias_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < rows
        kept = valid
        if HAS_SCALE:
            keep = tl.load(row_scale + row // rows_per_scale, mask=valid, other=0.0).to(tl.float32)
            kept = valid & (keep != 0.0)
        hats = ()
        grads = ()
        if HAS_NORMED:
            centre = tl.load(mean + row, mask=valid, other=0.0)
            scale = tl.load(rstd + row, mask=valid, other=0.0)
            new_weight_sums = ()
            new_bias_sums = ()
            along_hat = tl.zeros([ROWS, CHUNK], tl.float32)
            along_one = tl.zeros([ROWS, CHUNK], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                column = chunk * CHUNK + tl.arange(0, CHUNK)
                mask = valid[:, None] & (column < C)[None, :]
                # Beyond C the gradient is zero, which keeps every sum exact whatever the normalised value is.
                g = tl.load(grad_normed + row[:, None] * grad_normed_stride + column[None, :], mask=mask, other=0.0)
                value = tl.load(new + row[:, None] * new_stride + column[None, :], mask=mask, other=0.0)
                g = g.to(tl.float32)
                hat = (value.to(tl.float32) - centre[:, None]) * scale[:, None]
                if NEED_WEIGHT:
                    new_weight_sums = new_weight_sums + (weight_sums[chunk] + g * hat,)
                if NEED_BIAS:
                    new_bias_sums = new_bias_sums + (bias_sums[chunk] + g,)
                if HAS_WEIGHT:
                    g = g * gains[chunk][None, :]
                along_hat += g * hat
                along_one += g
                hats = hats + (hat,)
                grads = grads + (g,)
            if NEED_WEIGHT:
                weight_sums = new_weight_sums
            if NEED_BIAS:
                bias_sums = new_bias_sums
            hat_mean = tl.sum(along_hat, axis=1) / C
            one_mean = tl.sum(along_one, axis=1) / C
        new_gamma_sums = ()
        for chunk in tl.static_range(CHUNKS):
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            inside = (column < C)[None, :]
            mask = valid[:, None] & inside
            total = tl.zeros([ROWS, CHUNK], tl.float32)
            if HAS_NORMED:
                total = scale[:, None] * (grads[chunk] - one_mean[:, None] - hats[chunk] * hat_mean[:, None])
            if HAS_NEW:
                direct = tl.load(grad_new + row[:, None] * grad_new_stride + column[None, :], mask=mask, other=0.0)
                total += direct.to(tl.float32)
            if NEED_RESIDUAL:
                target = grad_residual + row[:, None] * C + column[None, :]
                tl.store(target, total.to(grad_residual.dtype.element_ty), mask=mask)
            if HAS_SCALE:
                total = total * keep[:, None]
            if NEED_GAMMA:
                pointer = branch + row[:, None] * branch_stride + column[None, :]
                value = tl.load(pointer, mask=kept[:, None] & inside, other=0.0).to(tl.float32)
                new_gamma_sums = new_gamma_sums + (gamma_sums[chunk] + total * value,)
            if NEED_BRANCH:
                if HAS_GAMMA:
                    total = total * factors[chunk][None, :]
                target = grad_branch + row[:, None] * C + column[None, :]
                tl.store(target, total.to(grad_branch.dtype.element_ty), mask=mask)
        if NEED_GAMMA:
            gamma_sums = new_gamma_sums
    slot = tl.program_id(0).to(tl.int64) * C
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        if NEED_GAMMA:
            tl.store(partial_gamma + slot + column, tl.sum(gamma_sums[chunk], axis=0), mask=column < C)
        if NEED_WEIGHT:
            tl.store(partial_weight + slot + column, tl.sum(weight_sums[chunk], axis=0), mask=column < C)
        if NEED_BIAS:
            tl.store(partial_bias + slot + column, tl.sum(bias_sums[chunk], axis=0), mask=column < C)


def residual_norm_forward(
    residual: Tensor,  # [..., C]
    branch: Tensor,  # [..., C]
    gamma: Tensor | None,  # [C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    row_scale: Tensor | None,  # [rows / rows_per_scale]
    rows_per_scale: int,
    normalize: bool,
    out_dtype: torch.dtype,
    inplace: bool = False,
    tile: RowTile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New residual, normed (both [..., C]), mean and rstd ([rows] float32).

    Without `normalize` the last three are empty; in e4m3 the rows' scales come in rstd's place. With `inplace` the new
    residual is `residual`, overwritten; its strides must then allow a [rows, C] view.
    """
    channels = residual.shape[-1]
    new = residual if inplace else torch.empty(residual.shape, device=residual.device, dtype=residual.dtype)
    rows = residual.numel() // channels
    normed = torch.empty(residual.shape if normalize else (0,), device=residual.device, dtype=out_dtype)
    mean = torch.empty(rows if normalize else 0, device=residual.device, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return new, normed, mean, rstd
    flat_branch, flat_new = as_rows(branch), new.view(rows, channels)
    flat_residual = flat_new if inplace else as_rows(residual)
    tile = tile or forward_tile(channels)
    with torch.cuda.device_of(residual):
        residual_norm_forward_kernel[(programs(rows, tile, residual.device),)](
            flat_residual,
            flat_branch,
            mean if gamma is None else gamma.contiguous(),
            mean if weight is None else weight.contiguous(),
            mean if bias is None else bias.contiguous(),
            mean if row_scale is None else row_scale.contiguous(),
            flat_new,
            normed,
            mean,
            rstd,
            rows,
            rows_per_scale,
            flat_residual.stride(0),
            flat_branch.stride(0),
            flat_new.stride(0),
            eps,
            **tile.constants(channels),
            HAS_GAMMA=gamma is not None,
            HAS_SCALE=row_scale is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            NORMALIZE=normalize,
            QUANTIZE=normalize and out_dtype == torch.float8_e4m3fn,
            num_warps=tile.warps,
        )
    return new, normed, mean, rstd


def residual_norm_backward(
    grad_new: Tensor | None,  # [..., C]
    grad_normed: Tensor | None,  # [..., C]
    new: Tensor | None,  # [..., C]; needed with grad_normed
    branch: Tensor | None,  # [..., C]; needed for gamma's gradient
    gamma: Tensor | None,  # [C]
    weight: Tensor | None,  # [C]
    row_scale: Tensor | None,  # [rows / rows_per_scale]
    rows_per_scale: int,
    mean: Tensor,  # [rows] float32, or empty without grad_normed
    rstd: Tensor,  # [rows] float32, or empty without grad_normed
    dtypes: list[torch.dtype | None],
    tile: RowTile | None = None,
) -> list[Tensor]:
    """Gradients of residual, branch, gamma, weight and bias in the dtypes given.

    A dtype of None means not wanted: an empty tensor comes back in that place. At least one of `grad_new` and
    `grad_normed` is given. Deterministic: sums over rows are taken in a fixed order.
    """
    some = grad_new if grad_new is not None else grad_normed
    if some is None:
        raise ValueError("grad_new, grad_normed: expected at least one of the two, got None for both")
    device, channels = some.device, some.shape[-1]
    rows = some.numel() // channels
    like = [torch.empty(some.shape, device=device, dtype=d) if d else None for d in dtypes[:2]]
    wanted = [d for d in dtypes[2:] if d is not None]
    if rows == 0:
        sums = [torch.zeros(channels, device=device, dtype=d) for d in wanted]
    else:
        tile = tile or backward_tile(channels)
        count = programs(rows, tile, device)
        partials = torch.empty(len(wanted), count, channels, device=device, dtype=torch.float32)
        sections = iter(partials)
        unused = mean if mean.numel() else some
        streams = [None if t is None else as_rows(t) for t in (grad_new, grad_normed, new, branch)]
        with torch.cuda.device_of(some):
            residual_norm_backward_kernel[(count,)](
                *(unused if t is None else t for t in streams),
                *(unused if t is None else t.contiguous() for t in (gamma, weight, row_scale)),
                mean if mean.numel() else unused,
                rstd if rstd.numel() else unused,
                *(unused if t is None else t for t in like),
                *(unused if d is None else next(sections) for d in dtypes[2:]),
                rows,
                rows_per_scale,
                *(0 if t is None else t.stride(0) for t in streams),
                **tile.constants(channels),
                HAS_NEW=grad_new is not None,
                HAS_NORMED=grad_normed is not None,
                HAS_GAMMA=gamma is not None,
                HAS_SCALE=row_scale is not None,
                HAS_WEIGHT=weight is not None,
                NEED_RESIDUAL=dtypes[0] is not None,
                NEED_BRANCH=dtypes[1] is not None,
                NEED_GAMMA=dtypes[2] is not None,
                NEED_WEIGHT=dtypes[3] is not None,
                NEED_BIAS=dtypes[4] is not None,
                num_warps=tile.warps,
            )
            sums = column_sums(partials, wanted) if wanted else []
    found = iter(sums)
    results = [*like, *(None if d is None else next(found) for d in dtypes[2:])]
    return [torch.empty(0, device=device) if t is None else t for t in results]


def _forward_case(residual: str, branch: str, channels: int, normalize: bool, normed: str | None = None) -> AotCase:
    tile = forward_tile(channels)
    quantize = normed == "fp8e4nv"
    vectors = dict.fromkeys(("gamma", "weight", "bias", "row_scale", "mean", "rstd"), "*fp32")
    pointers = {"residual": f"*{residual}", "branch": f"*{branch}", "new": f"*{residual}"}
    pointers["normed"] = f"*{normed or branch}"
    strides = ("residual_stride", "branch_stride", "new_stride")
    flags = ("HAS_GAMMA", "HAS_SCALE", "HAS_WEIGHT", "HAS_BIAS")
    return AotCase(
        name=f"residual_norm_forward_{channels}_{residual}_{branch}{'' if normalize else '_add'}"
        f"{'_e4m3' if quantize else ''}",
        kernel=residual_norm_forward_kernel,
        types={**pointers, **vectors, **dict.fromkeys(("rows", "rows_per_scale", *strides), "i32"), "eps": "fp32"},
        constants={
            **tile.constants(channels),
            **dict.fromkeys(flags, True),
            "NORMALIZE": normalize,
            "QUANTIZE": quantize,
        },
        aligned=(*pointers, *vectors, *strides),
        options={"num_warps": tile.warps},
        targets=(90, 100) if quantize else (80, 90, 100),
    )


def _backward_case(residual: str, branch: str, channels: int) -> AotCase:
    tile = backward_tile(channels)
    sums = ("partial_gamma", "partial_weight", "partial_bias")
    vectors = dict.fromkeys(("gamma", "weight", "row_scale", "mean", "rstd", *sums), "*fp32")
    pointers = {
        **dict.fromkeys(("grad_new", "new", "grad_residual"), f"*{residual}"),
        **dict.fromkeys(("grad_normed", "branch", "grad_branch"), f"*{branch}"),
    }
    strides = ("grad_new_stride", "grad_normed_stride", "new_stride", "branch_stride")
    has = ("HAS_NEW", "HAS_NORMED", "HAS_GAMMA", "HAS_SCALE", "HAS_WEIGHT")
    need = ("NEED_RESIDUAL", "NEED_BRANCH", "NEED_GAMMA", "NEED_WEIGHT", "NEED_BIAS")
    return AotCase(
        name=f"residual_norm_backward_{channels}_{residual}_{branch}",
        kernel=residual_norm_backward_kernel,
        types={**pointers, **vectors, **dict.fromkeys(("rows", "rows_per_scale", *strides), "i32")},
        constants={**tile.constants(channels), **dict.fromkeys((*has, *need), True)},
        aligned=(*pointers, *vectors, *strides),
        options={"num_warps": tile.warps},
    )


def aot_cases() -> list[AotCase]:
    """Every production configuration: float32 stream with 16-bit or float32 branches, the model's widths."""
    cases = [_forward_case("fp32", "bf16", 1024, False)]
    cases += [_forward_case("fp32", "bf16", channels, True, "fp8e4nv") for channels in (768, 1024)]
    for channels in (48, 768, 1024, 4096):
        for branch in ("bf16", "fp32"):
            cases += [_forward_case("fp32", branch, channels, True), _backward_case("fp32", branch, channels)]
    return cases
