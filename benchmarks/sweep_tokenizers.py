"""Where the time of geometric inputs goes: `python -m benchmarks.sweep_tokenizers [views ...]` (41 and 2 by default).

Reading the inputs (device time, and the host's to launch it), every convolution of a dense tokenizer in float16 with
cuDNN's heuristic choice, with its measured choice, and as a matrix product over unfolded patches; then the whole call
with the inputs beside the call without. The table comes last.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from any4d_fast import Any4D
from any4d_fast.geometry_tokens import tokenize_geometry
from any4d_fast.head_precision import Flags
from any4d_fast.modules.modalities import ModalityReader
from any4d_fast.ops.dense_maps import padded
from any4d_fast.profile import make_views
from any4d_fast.work import MODALITIES
from benchmarks.timing import matmul_tflops, time_ms

GRID = (24, 37)
WIDTHS = ((588, 588), (588, 768), (768, 768), (768, 1024), (1024, 1024))
Line = tuple[str, float, str]


def unfolded(x: Tensor, matrix: Tensor) -> Tensor:
    """A 3x3 convolution of [N, h, w, C] as one product with [Cout, 9 C]."""
    n, rows, columns, channels = x.shape
    wide = F.pad(x, (0, 0, 1, 1, 1, 1))
    sizes, strides = (n, rows, columns, 3, 3, channels), wide.stride()
    windows = wide.as_strided(sizes, (*strides[:3], strides[1], strides[2], 1))
    return F.linear(windows.reshape(n * rows * columns, 9 * channels), matrix)


def convolutions(views: int) -> list[Line]:
    found: list[Line] = []
    for cin, cout in WIDTHS:
        c, k = padded(cin), padded(cout)
        x = torch.randn(views, *GRID, c, device="cuda", dtype=torch.float16)
        weight = torch.randn(k, c, 3, 3, device="cuda", dtype=torch.float16) * (9 * c) ** -0.5
        last, matrix = weight.contiguous(memory_format=torch.channels_last), weight.permute(0, 2, 3, 1).flatten(1)
        matrix = matrix.contiguous()
        library = functools.partial(F.conv2d, x.permute(0, 3, 1, 2), last, padding=1)
        kinds: dict[str, tuple[bool, Callable[[], Any]]] = {
            "cuDNN, as the model runs it": (False, library),
            "cuDNN, benchmark on": (True, library),
            "unfold and cuBLAS": (False, functools.partial(unfolded, x, matrix)),
        }
        flops = 2.0 * views * GRID[0] * GRID[1] * cin * cout * 9
        for name, (benchmark, run) in kinds.items():
            torch.backends.cudnn.benchmark = benchmark
            ms = time_ms(run)[0]
            found.append((f"{cin}-{cout} {name}", ms, f"{flops / ms / 1e9:.0f} TFLOP/s"))
        torch.backends.cudnn.benchmark = False
    return found


def parts(model: Any4D, views: int) -> list[Line]:
    given = make_views(1, views, 336, 518, MODALITIES, torch.device("cuda"))
    alone = [{key: view[key] for key in ("img", "data_norm_type")} for view in given]

    def read() -> Any:
        return ModalityReader(model.config.modalities, given, False).read()

    inputs, flags = read(), Flags(torch.device("cuda"))

    def tokens() -> Any:
        return tokenize_geometry(model, inputs, views, torch.float16, flags)

    found: list[Line] = []
    for name, run in (("reading", read), ("tokenizers", tokens)):
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        host = 1e3 * (time.perf_counter() - start)
        found.append((name, time_ms(run)[0], f"{host:.2f} ms of the host"))
    times = {}
    for name, chosen in (("images", alone), ("all inputs", given)):

        def whole(chosen: Any = chosen) -> Any:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return model(chosen)

        for _ in range(3):
            whole()
        times[name] = time_ms(whole, head_start=False)[0]
        found.append((f"whole call, {name}", times[name], ""))
    more = times["all inputs"] - times["images"]
    found.append(("inputs cost", more, f"{more / times['images']:.1%}"))
    return found


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with torch.device("cuda"):
        model = Any4D.from_preset("any4d").eval()
    lines: list[tuple[int, Line]] = []
    with torch.no_grad():
        for views in [int(a) for a in sys.argv[1:]] or [41, 2]:
            lines += [(views, line) for line in (*convolutions(views), *parts(model, views))]
    print(f"matmul {matmul_tflops(torch.float16):.0f} TFLOP/s")
    for views, (name, ms, more) in lines:
        print(f"{views:>4} views  {name:<44}{ms:>9.3f} ms  {more}")


if __name__ == "__main__":
    main()
