"""The calls that `make sanitize` watches: every op with a CUDA C++ kernel, forward and backward, over awkward sizes.

Sizes are small (1, primes, one more or less than a tile, empty), layouts those that callers have, dtypes all. Inputs
are made on the CPU and copied, and results are copied back whole: so compute-sanitizer knows what has been written, and
sees when something that was not is read.

`python -m tests.sanitize_cases [OP...]` runs them without it, on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from any4d_fast import ops

DEVICE = "cuda"
BACKEND = "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = FLOATS[1:]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """One call. `build` makes the inputs (None: absent) and the function of them that is called."""

    name: str
    build: Callable[[], tuple[Callable[..., Any], list[Tensor | None]]]
    without: tuple[int, ...] = ()
    """Inputs that need no gradient though they could have one."""

    def run(self) -> int:
        """Forward and backward; returns how many values came out, and raises if one of them is NaN."""
        function, inputs = self.build()
        leaves = [None if t is None else t.to(DEVICE) for t in inputs]
        for i, leaf in enumerate(leaves):
            if leaf is not None and leaf.is_floating_point() and i not in self.without:
                leaf.requires_grad_()
        outputs = _tensors(function(*leaves))
        found = [t for t in outputs if t.numel() > 0]
        with_grad = [t for t in found if t.requires_grad]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        if with_grad and wanted:
            cotangents = [normal(*t.shape, dtype=t.dtype).to(DEVICE) for t in with_grad]
            grads = torch.autograd.grad(with_grad, wanted, cotangents, allow_unused=True)
            found += [grad for grad in grads if grad is not None]
        values = [t.detach().cpu() for t in found]
        bad = [i for i, value in enumerate(values) if value.is_floating_point() and value.isnan().any()]
        if bad:
            raise AssertionError(f"{self.name}: results {bad} hold NaN")
        return sum(value.numel() for value in values)


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unproject() -> Iterator[Case]:
    sizes = [(1, 1, 1), (1, 1, 7), (2, 3, 5), (3, 13, 17), (1, 16, 64), (2, 37, 29), (1, 5, 513), (0, 4, 4), (2, 0, 3)]
    needs: list[tuple[int, ...]] = [(), (0, 3), (1, 2), (0, 1, 2, 3)]
    for (size, dtype), flow in itertools.product(itertools.product(sizes, FLOATS), (False, True)):
        for without in needs if size == (2, 37, 29) else needs[:1]:
            yield Case(
                f"{size} {short(dtype)}{' flow' if flow else ''} without {without}",
                lambda size=size, dtype=dtype, flow=flow: _unproject_inputs(size, dtype, flow),
                without,
            )
    yield Case("one camera for all", lambda: _unproject_inputs((3, 5, 7), torch.float32, True, shared=True))
    yield Case("a crop", lambda: _unproject_inputs((2, 9, 11), torch.bfloat16, True, crop=True))


def _unproject_inputs(
    size: tuple[int, int, int], dtype: torch.dtype, flow: bool, shared: bool = False, crop: bool = False
) -> tuple[Callable[..., Any], list[Tensor | None]]:
    n, height, width = size
    views = 1 if shared else n
    intrinsics = torch.tensor([[50.0, 0, 3], [0, 60, 2], [0, 0, 1]]).expand(views, 3, 3).clone()
    poses = torch.eye(4).expand(views, 4, 4) + 0.1 * normal(views, 4, 4)

    def call(depth: Tensor, k: Tensor, pose: Tensor, motion: Tensor | None) -> Any:
        if crop:
            depth, motion = depth[:, 1:-1, 2:-1], None if motion is None else motion[:, 1:-1, 2:-1]
        return ops.unproject(depth, k, pose, motion, backend=BACKEND)

    depth = normal(n, height, width).abs().add(1).to(dtype)
    return call, [depth, intrinsics, poses, normal(n, height, width, 3, dtype=dtype) if flow else None]


def compose_factors() -> Iterator[Case]:
    sizes = [(1, 1, 1, 1), (2, 1, 1, 7), (3, 2, 5, 3), (1, 3, 13, 17), (2, 2, 16, 32), (1, 1, 5, 513), (0, 1, 3, 3)]
    for size, dtype, planar in itertools.product(sizes, FLOATS, (False, True)):
        layout = "channels first" if planar else "channels last"
        yield Case(
            f"views {size[0]} batch {size[1]} {size[2:]} {short(dtype)} {layout}",
            lambda size=size, dtype=dtype, planar=planar: _compose_inputs(size, dtype, planar),
        )
    for without in ((0,), (1,), (2, 3, 4), (0, 1), (0, 2, 3, 4)):
        yield Case(
            f"without gradients of {without}", lambda: _compose_inputs((2, 2, 9, 11), torch.float32, True), without
        )
    yield Case(
        "small parameters in 16 bit", lambda: _compose_inputs((2, 1, 9, 11), torch.float16, False, torch.float16)
    )


def _compose_inputs(
    size: tuple[int, int, int, int], dtype: torch.dtype, planar: bool, small: torch.dtype = torch.float32
) -> tuple[Callable[..., Any], list[Tensor | None]]:
    views, batch, height, width = size
    rows = views * batch

    def head(channels: int) -> Tensor:
        x = normal(rows, channels, height, width, dtype=dtype)
        return x if planar else x.permute(0, 2, 3, 1).contiguous()

    def call(geometry: Tensor, flow: Tensor, *others: Tensor) -> Any:
        maps = [x.permute(0, 2, 3, 1) if planar else x for x in (geometry, flow)]
        return tuple(ops.compose_factors(*maps, *others, backend=BACKEND))

    vectors = [normal(rows, 4, dtype=small), normal(rows, 3, dtype=small), normal(batch, 1, dtype=small)]
    return call, [head(6), head(3), *vectors]


def fuse_tokens() -> Iterator[Case]:
    sizes = [
        (1, 1, 1, 4),
        (2, 1, 5, 24),
        (1, 3, 7, 132),
        (3, 2, 3, 256),
        (2, 1, 17, 768),
        (1, 1, 37, 1024),
        (0, 1, 4, 8),
    ]
    for size, (dense, vectors) in itertools.product(sizes, [(0, 0), (1, 0), (0, 2), (3, 4)]):
        for dtype, features in itertools.product(FLOATS, FLOATS):
            if dtype == features or size == sizes[1]:
                yield Case(
                    f"{size} dense {dense} vectors {vectors} {short(dtype)} {short(features)}",
                    lambda size=size, d=dense, v=vectors, a=dtype, b=features: _fuse_inputs(size, d, v, a, b),
                )
    for without in ((0,), (1, 2), (0, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6)):
        yield Case(
            f"without gradients of {without}",
            lambda: _fuse_inputs((2, 1, 7, 64), 3, 1, torch.bfloat16, torch.float32),
            without,
        )
    for dtype in HALVES:
        yield Case(
            f"{short(dtype)} rows, no masks, no scale token",
            lambda dtype=dtype: _fuse_inputs((2, 2, 7, 64), 1, 1, dtype, dtype, dtype, plain=True),
        )


def _fuse_inputs(
    size: tuple[int, int, int, int], dense: int, vectors: int, dtype: torch.dtype, features: torch.dtype,
    out_dtype: torch.dtype = torch.float32, plain: bool = False,
) -> tuple[Callable[..., Any], list[Tensor | None]]:  # fmt: skip
    views, batch, tokens, channels = size
    n = views * batch
    masks = [None if plain else (normal(n + i)[i:] > 0).to(DEVICE) for i in range(dense + vectors)]

    def call(image: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, *rest: Tensor) -> Any:
        return ops.fuse_tokens(
            image[:, 1:], rest[:dense], rest[dense:], weight, bias, dense_masks=masks[:dense],
            vector_masks=masks[dense:], scale_token=scale, batch=batch, out_dtype=out_dtype, backend=BACKEND,
        )  # fmt: skip

    parameters = [normal(channels), normal(channels), None if plain else normal(1, channels)]
    maps = [normal(n, tokens, channels, dtype=features) for _ in range(dense)]
    rows = [normal(n, channels, dtype=features) for _ in range(vectors)]
    return call, [normal(n, tokens + 1, channels, dtype=dtype), *parameters, *maps, *rows]


def tokenize() -> Iterator[Case]:
    sizes = [((1, 14, 14), 8), ((2, 28, 42), 40), ((1, 70, 14), 136), ((3, 42, 98), 128), ((0, 14, 14), 8)]
    images = [(torch.uint8, False), (torch.uint8, True), *((dtype, False) for dtype in FLOATS), (torch.float32, True)]
    for (size, channels), weight, (image, last), warpgroups in itertools.product(sizes, HALVES, images, (True, False)):
        yield Case(
            f"{size} {channels} {short(weight)} {short(image)}{' channels last' if last else ''}"
            f"{'' if warpgroups else ' mma.sync'}",
            lambda s=size, c=channels, w=weight, i=image, last=last, g=warpgroups: _tokenize_inputs(
                s, c, w, i, last, g
            ),
        )
    for registers, cls, bias in ((0, False, True), (4, True, False), (3, False, True)):
        yield Case(
            f"registers {registers} class token {cls} bias {bias}",
            lambda r=registers, c=cls, b=bias: _tokenize_inputs(
                (2, 28, 28), 24, torch.bfloat16, torch.float32, False, True, r, c, b
            ),
        )


def _tokenize_inputs(
    size: tuple[int, int, int], channels: int, weight: torch.dtype, image: torch.dtype, last: bool, warpgroups: bool,
    registers: int = 0, cls: bool = True, bias: bool = True,
) -> tuple[Callable[..., Any], list[Tensor | None]]:  # fmt: skip
    n, height, width = size
    pixels = normal(n, 3, height, width)
    pixels = (pixels * 50 + 128).clamp(0, 255).to(torch.uint8) if image == torch.uint8 else pixels.to(image)
    if last:
        pixels = pixels.permute(0, 2, 3, 1).contiguous()
    norm: dict[str, Any] = {"mean": MEAN, "std": STD} if image == torch.uint8 else {}

    def call(x: Tensor, w: Tensor, b: Tensor | None, pos: Tensor, token: Tensor | None, extra: Tensor | None) -> Any:
        if warpgroups:
            return ops.tokenize(x, w, b, pos, token, extra, backend=BACKEND, **norm)
        from any4d_fast.cuda import tokenize as launchers

        # Of the launcher's, for the path of GPUs before Hopper: the op has no argument for it.
        given = [None if t is None else t.detach().reshape(-1, channels) for t in (pos, token, extra)]
        scale, shift = ([0.01] * 3, [-1.0] * 3) if norm else ([], [])
        first = x.permute(0, 3, 1, 2) if last else x
        return launchers.tokenize_forward(
            first.detach(), w.detach(), None if b is None else b.detach(), given[0], given[1], given[2], scale, shift,
            torch.float32, warpgroups=False,
        )  # fmt: skip

    tokens = (height // 14) * (width // 14)
    weights = normal(channels, 3, 14, 14).mul(0.05).to(weight)
    rows = [normal(tokens + cls, channels), normal(1, 1, channels) if cls else None]
    extra = normal(1, registers, channels) if registers else None
    return call, [pixels, weights, normal(channels) if bias else None, *rows, extra]


def _segments() -> dict[str, tuple[ops.Segments, int]]:
    return {
        "1 row": (ops.Segments.global_(3, 1), 3),
        "7 rows": (ops.Segments.batched(3, 7), 21),
        "64 rows": (ops.Segments.frame(2, 1, 64), 130),
        "65 rows": (ops.Segments(length=65, count=2, stride=70, start=1), 150),
        "127 rows": (ops.Segments.global_(1, 127), 127),
        "129 rows": (ops.Segments.global_(1, 129), 129),
        "3 x 200 rows": (ops.Segments.frame(1, 3, 200), 601),
        "523 rows": (ops.Segments.global_(1, 523), 523),
        "groups": (ops.Segments(length=5, count=3, stride=7, groups=2, group_stride=30, start=3), 70),
        "nothing": (ops.Segments(length=0), 0),
    }


def attention() -> Iterator[Case]:
    for (name, (layout, rows)), heads, dtype, exact in itertools.product(
        _segments().items(), (1, 3), HALVES, (False, True)
    ):
        yield Case(
            f"{name} {heads} heads {short(dtype)}{' deterministic' if exact else ''}",
            lambda s=layout, r=rows, h=heads, d=dtype, e=exact: _attention_inputs(s, r, h, d, e),
        )


def _attention_inputs(
    segments: ops.Segments, rows: int, heads: int, dtype: torch.dtype, deterministic: bool
) -> tuple[Callable[..., Any], list[Tensor | None]]:
    def call(qkv: Tensor) -> Any:
        # Wider rows than three times the heads: what lies between them must not be touched.
        packed = qkv[:, : 3 * heads].unflatten(1, (3, heads))
        return ops.attention(
            packed, segments=segments, deterministic=deterministic, return_lse=True, backend=BACKEND
        )  # fmt: skip

    return call, [normal(rows, 3 * heads + 1, 64, dtype=dtype)]


def attention_fp8() -> Iterator[Case]:
    # Two kernels: the first for segments of at most 1,024 rows, of which several blocks of threads share one and one
    # takes several; the second for longer ones.
    more = {
        "40 x 889 rows": (ops.Segments.batched(40, 889), 40 * 889),
        "1024 rows": (ops.Segments.global_(1, 1024), 1024),
        "1100 rows": (ops.Segments(length=1100, start=3), 1107),
    }
    for (name, (layout, rows)), heads, dtype in itertools.product({**_segments(), **more}.items(), (1, 3), HALVES):
        yield Case(
            f"{name} {heads} heads {short(dtype)}",
            lambda s=layout, r=rows, h=heads, d=dtype: _attention_fp8_inputs(s, r, h, d),
            without=(0,),
        )


def _attention_fp8_inputs(
    segments: ops.Segments, rows: int, heads: int, dtype: torch.dtype
) -> tuple[Callable[..., Any], list[Tensor | None]]:
    def call(qkv: Tensor) -> Any:
        packed = qkv[:, : 3 * heads].unflatten(1, (3, heads))
        return ops.attention_fp8(packed, segments=segments, return_lse=True, backend=BACKEND)

    return call, [normal(rows, 3 * heads + 1, 64, dtype=dtype)]


@contextmanager
def outputs_written() -> Iterator[None]:
    """Zeros in every new 16-bit tensor, by an ordinary kernel.

    initcheck does not see what the copy engine writes, which is attention's output and gradient, and takes it for never
    written wherever it is read. Workspaces are of other dtypes and stay as they are; that kernels write all of an
    output is what tests with poisoned memory show.
    """
    empty = torch.empty

    def written(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.zero_() if tensor.dtype in HALVES else tensor

    with mock.patch.object(torch, "empty", written):
        yield


COPY_ENGINE = ("attention", "attention_fp8")
"""Ops whose outputs the copy engine writes."""

SWEEPS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention,
    "attention_fp8": attention_fp8,
    "compose_factors": compose_factors,
    "fuse_tokens": fuse_tokens,
    "tokenize": tokenize,
    "unproject": unproject,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweeps of some ops, all by default; the last line says how many calls that were."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize_cases", description=main.__doc__)
    parser.add_argument("op", nargs="*", default=list(SWEEPS), help=f"some of: {', '.join(SWEEPS)}")
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--every", type=int, default=1, help="run one of so many cases")
    options = parser.parse_args(arguments)
    count = values = 0
    for op in options.op:
        cases = [case for case in SWEEPS[op]() if options.only in case.name]
        for case in cases[:: options.every]:
            try:
                with outputs_written() if op in COPY_ENGINE else nullcontext():
                    values += case.run()
            except Exception as error:
                raise RuntimeError(f"{op}: {case.name}: {error}") from error
            count += 1
    torch.cuda.synchronize()
    print(f"cases {count} values {values}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
