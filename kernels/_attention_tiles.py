"""Launch configurations of the attention kernels, and the tables that choose them.

A choice depends on the class of segment length, the head dim, the dtype and the compute capability: never on the
number of views, so that another clip compiles nothing anew.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .aot import AotCase

LAZY_LIMIT = 8
"""Growth of a row maximum, in log2 units, that may stay in the probabilities: a factor of 256, far from overflow."""

LONG = 16_384
"""Segments from this length on are long: the main loop dominates, and a tile's start and end do not matter."""


@dataclass(frozen=True)
class ForwardTile:
    """One configuration of `forward_kernel`.

    `tma` reads keys and values with the copy engine, `lazy` rescales the output only where a maximum grew by more
    than LAZY_LIMIT, `polynomial` computes a quarter of the exponentials on the multiply-add units.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    lazy: bool = False
    polynomial: bool = False

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernel."""
        return {
            "BM": self.queries,
            "BN": self.keys,
            "TMA": self.tma,
            "LAZY": LAZY_LIMIT if self.lazy else 0,
            "POLYNOMIAL": self.polynomial,
        }

    def options(self) -> dict[str, Any]:
        """Launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class QueryTile:
    """One configuration of `query_kernel`."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernel."""
        return {"BM": self.queries, "BN": self.keys, "TMA": self.tma}

    def options(self) -> dict[str, Any]:
        """Launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class KeyTile:
    """One configuration of `key_kernel`; `single` adds dQ too, and `reduce` lets the copy engine do those additions."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    single: bool = False
    reduce: bool = False

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernel."""
        return {
            "BM": self.queries,
            "BN": self.keys,
            "TMA": self.tma,
            "ADD_DQ": self.single,
            "REDUCE": self.single and self.reduce,
        }

    def options(self) -> dict[str, Any]:
        """Launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class BackwardTiles:
    """How a backward runs: `query` is not used when `key.single`.

    Raises:
        ValueError: `query_kernel` would not write the row statistics of whole blocks of `key_kernel`.
    """

    key: KeyTile
    query: QueryTile

    def __post_init__(self) -> None:
        if not self.key.single and self.query.queries % self.key.queries:
            raise ValueError(
                f"query.queries: expected a multiple of key.queries ({self.key.queries}), got {self.query.queries}"
            )

    @property
    def pad(self) -> int:
        """Segments fill whole blocks of this many rows in the buffers of row statistics and of dQ."""
        return self.key.queries if self.key.single else self.query.queries


@dataclass(frozen=True)
class HopperTile:
    """One configuration of `hopper_kernel`: `groups` warpgroups of `rows` queries each, a ring of `stages` blocks.

    `overlap` issues the next scores before it waits for the current output; `polynomial` as in `ForwardTile`.
    """

    groups: int
    rows: int
    keys: int
    stages: int
    overlap: bool = True
    polynomial: bool = False
    query_stages: int = 2

    def constants(self, head_dim: int) -> dict[str, Any]:
        """Compile-time arguments of the kernel."""
        return {
            "ROWS": self.rows,
            "KEYS": self.keys,
            "WIDTH": padded(head_dim),
            "GROUPS": self.groups,
            "STAGES": self.stages,
            "Q_STAGES": self.query_stages,
            "OVERLAP": self.overlap,
            "POLYNOMIAL": self.polynomial,
            # Of 65,536 registers the copying warpgroup keeps 24 or 32 a thread.
            "REGISTERS": 240 if self.groups == 2 else 160,
        }


def forward_tile(length: int, head_dim: int, dtype: torch.dtype, major: int) -> ForwardTile:
    """Configuration of the forward for a call."""
    if dtype == torch.float32:
        # Without tensor cores (input_precision "ieee") registers bound the tile: at 64 rows or 4 warps it spills more.
        return ForwardTile(32, 32, 8, 2)
    if head_dim > 64:
        # Tiles 128 columns wide: two stages keep within sm_80's 163 KB.
        return ForwardTile(128, 64, 8, 3 if major >= 9 else 2)
    if length >= LONG:
        # 442 TFLOP/s at N=36,409 on an H200; 8 warps are two warpgroups, one's softmax beside the other's products.
        return ForwardTile(128, 64, 8, 3, tma=True) if major >= 9 else ForwardTile(128, 64, 4, 3)
    # 356 TFLOP/s at N=7,105 on an H200 and 284 at 41 x 888; 64 rows waste less of a segment's last tile.
    return ForwardTile(64, 64, 4, 3)


# 466 TFLOP/s at N=36,409 on an H200, but 247 at N=7,105, where plain tiles reach 356: for long segments only.
HOPPER_TILES: dict[bool, HopperTile] = {True: HopperTile(3, 64, 128, 2, overlap=False)}
"""Whether segments are long -> configuration of the warp-specialised forward, where measurement prefers it."""


def hopper_tile(length: int, head_dim: int, dtype: torch.dtype) -> HopperTile | None:
    """Configuration of the warp-specialised forward on compute capability 9; None: `forward_tile` is better."""
    if head_dim != 64 or dtype not in (torch.bfloat16, torch.float16):
        return None
    return HOPPER_TILES.get(length >= LONG)


def backward_tiles(length: int, head_dim: int, dtype: torch.dtype, major: int, deterministic: bool) -> BackwardTiles:
    """Configuration of the backward for a call; a deterministic one has two passes."""
    if dtype == torch.float32:
        # As in the forward; 16 rows where a head is wide.
        rows = 32 if head_dim <= 64 else 16
        return BackwardTiles(KeyTile(rows, 32, 8, 1), QueryTile(32, rows, 8, 1))
    if head_dim > 64:
        # 128 columns: dK and dV alone take 128 registers a thread at 8 warps.
        rows = 64 if major >= 9 else 32
        return BackwardTiles(KeyTile(rows, 128, 8, 2), QueryTile(128, rows, 8, 2))
    if major == 9:
        # 360 TFLOP/s at N=36,409 on an H200; the best or near it at every length (kernels/notes/attention.md).
        return BackwardTiles(KeyTile(64, 64, 4, 2, tma=True), QueryTile(128, 64, 8, 3, tma=True))
    if major > 9:
        return BackwardTiles(KeyTile(64, 128, 8, 2), QueryTile(128, 64, 8, 3))
    return BackwardTiles(KeyTile(64, 64, 4, 2), QueryTile(64, 64, 4, 2))


@functools.cache
def major_capability(device: torch.device) -> int:
    """Major compute capability of a device; in the interpreter, that of the machines that matter most."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


TRITON_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_SCALARS = {"scale": "fp32", "scale_log2": "fp32"}
_STRIDES = ("row_stride", "head_stride", "out_stride", "grad_stride", "grad_head_stride", "dq_stride", "dk_stride")
_FLOAT32 = ("lse_ptr", "grad_lse_ptr", "stats_ptr", "buffer_ptr")


def aot_case(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    head_dim: int,
    constants: dict[str, Any],
    options: dict[str, Any],
    special: dict[str, str],
    target: int,
) -> AotCase:
    """A case as PyTorch's allocations make it: addresses and strides are multiples of 16.

    Args:
        special: signature types of arguments that are not what their name says (descriptors, float32 pointers).
        target: compute capability (80, 90, 100): the tables choose by it.
    """
    element = TRITON_DTYPES[dtype]
    width = padded(head_dim)
    known = {"HEAD_DIM": head_dim, "WIDTH": width, "PRECISION": "ieee", **constants}
    consts = {n: known[n] for n in kernel.arg_names if n in known}
    types: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in consts:
            continue
        if argument.endswith("_ptr"):
            types[argument] = "*fp32" if argument in _FLOAT32 else f"*{element}"
        else:
            types[argument] = _SCALARS.get(argument, "i32")
    types.update(special)
    aligned = tuple(n for n, kind in types.items() if n in _STRIDES or kind.startswith("*"))
    # float32 products without tensor cores unroll into thousands of multiply-adds, which spill at any tile that is not
    # minute; it is the exact path, not a fast one. Elsewhere a few addresses are spilled around a loop.
    max_spills = 1_500 if dtype == torch.float32 else 64
    label = f"{name}-{element}-{head_dim}-sm{target}"
    return AotCase(label, kernel, types, consts, aligned, options, (target,), max_spills)


def padded(head_dim: int) -> int:
    """Power of two that holds a head: the width of the kernels' tiles."""
    return max(16, 1 << (head_dim - 1).bit_length())


def block_type(dtype: torch.dtype, rows: int, head_dim: int) -> str:
    """Signature type of a descriptor of segments (`attention.descriptor`)."""
    return f"tensordesc<{TRITON_DTYPES[dtype]}[1, 1, 1, {rows}, {padded(head_dim)}]>"


def aot_sizes() -> list[tuple[int, torch.dtype, int]]:
    """(length, dtype, head dim) of every production configuration: all of head dim 64, and one each of the others."""
    half = [(length, dtype, 64) for length in (888, 36_409) for dtype in (torch.bfloat16, torch.float16)]
    return [*half, (888, torch.bfloat16, 32), (888, torch.bfloat16, 96), (888, torch.bfloat16, 128),
            (888, torch.float32, 64), (888, torch.float32, 128)]  # fmt: skip
