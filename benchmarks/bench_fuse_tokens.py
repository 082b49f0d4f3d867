"""Sum of modalities and LayerNorm into the transformer's buffer: images alone, and with every modality given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.fuse_tokens import fuse_tokens as reference

from .harness import FULL, Case, Sizes, compiled, op_case, random

CHANNELS = 1024
DENSE, VECTORS = 3, 4  # rays, depth, Doppler; rotation, translation, depth scale, pose scale


def traffic(direction: str, dense: int) -> int:
    """Bytes per element; everything is float32.

    Forward: image tokens and maps read, rows written. Backward: incoming gradient and the sum (or the image tokens
    that it is taken from again) read, one gradient written: without masks it is that of the image tokens and of every
    map. Vectors are a thousandth.
    """
    return 4 * (1 + dense + 1) if direction == "fwd" else 4 * (2 + 1)


def call(function: Callable[..., Any], dense: int, **options: Any) -> Callable[..., Any]:
    """The op on a flat list of arguments: image tokens, weight, bias, scale token, maps, vectors."""

    def run(image: Tensor, weight: Tensor, bias: Tensor, scale_token: Tensor, *given: Tensor) -> Tensor:
        maps, vectors = list(given[:dense]), list(given[dense:])
        fused: Tensor = function(image, maps, vectors, weight, bias, scale_token=scale_token, **options)
        return fused

    return run


def exact(dense: int) -> Callable[..., Any]:
    def run(image: Tensor, *rest: Tensor) -> Any:
        return call(reference, dense, out_dtype=image.dtype)(image, *rest)

    return run


def case(sizes: Sizes, direction: str, dense: int, vectors: int) -> Case:
    views = sizes.views[0]
    rows = sizes.rows(views)

    def inputs() -> list[Tensor]:
        tokens = [random(views, sizes.tokens, CHANNELS, device=sizes.device, seed=i) for i in range(1 + dense)]
        weight, bias, scale = (random(CHANNELS, device=sizes.device, seed=10 + i) for i in range(3))
        given = [random(views, CHANNELS, device=sizes.device, seed=20 + i) for i in range(vectors)]
        return [tokens[0], 1 + 0.1 * weight, bias, scale, *tokens[1:], *given]

    return op_case(
        "fuse_tokens",
        direction,
        f"{rows}x{CHANNELS} {'all inputs' if dense else 'images'}",
        inputs=inputs,
        functions={
            "eager": call(ops.fuse_tokens, dense, backend="eager"),
            "compile": compiled(call(reference, dense)),
            "any4d_fast:triton": call(ops.fuse_tokens, dense, backend="triton"),
            "any4d_fast:cuda": call(ops.fuse_tokens, dense, backend="cuda"),
        },
        exact=exact(dense),
        bytes=rows * CHANNELS * traffic(direction, dense),
        views=views,
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    return [
        case(sizes, direction, dense, vectors)
        for dense, vectors in ((0, 0), (DENSE, VECTORS))
        for direction in ("fwd", "bwd")
    ]


def test_fuse_tokens(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
