"""Checks and times variants of `tokenize`, `unshuffle_conv`, `normalize_depth` and `fuse_tokens` on one GPU.

    python benchmarks/sweep_tokenize.py out.csv [--views 41] [--seconds 140]

Every variant is checked against the float64 oracle within the project's budget before it is timed. Device events,
inputs rotated through more memory than the L2 cache holds, medians; ceilings are measured in the same run. The table
comes last; a variant that fails its check is listed with its error and no time.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from any4d_fast.kernels import fuse_tokens as fuse_kernels
from any4d_fast.kernels.normalize_depth import normalize_depth_forward
from any4d_fast.kernels.tokenize import Tiles, tokenize_forward
from any4d_fast.kernels.unshuffle_conv import unshuffle_conv_forward
from torch import Tensor

from any4d_fast import testing
from any4d_fast.reference.fuse_tokens import fuse_tokens as fuse_reference
from any4d_fast.reference.normalize_depth import normalize_depth as depth_reference
from any4d_fast.reference.tokenize import tokenize as tokenize_reference
from any4d_fast.reference.unshuffle_conv import unshuffle_conv as conv_reference

HEIGHT, WIDTH, WIDE = 518, 336, 1024
TOKENS = (HEIGHT // 14) * (WIDTH // 14)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE = [1 / (255 * s) for s in STD]
SHIFT = [-m / s for m, s in zip(MEAN, STD, strict=True)]
STEPS = 40

TOKENIZE_TILES = (
    Tiles(128, 128, 32, 8, 4, 128), Tiles(128, 128, 32, 8, 4), Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 32, 4, 4),
    Tiles(64, 256, 32, 8, 4, 128), Tiles(128, 256, 32, 8, 4), Tiles(128, 256, 64, 8, 3),
    Tiles(128, 256, 32, 16, 4, 128), Tiles(128, 256, 64, 16, 3, 128), Tiles(256, 128, 32, 16, 4, 128),
)  # fmt: skip
CONV_TILES = (
    Tiles(128, 128, 32, 8, 3, 128), Tiles(128, 128, 32, 8, 3), Tiles(128, 128, 32, 8, 4), Tiles(64, 128, 32, 4, 3),
    Tiles(128, 64, 32, 4, 3), Tiles(128, 128, 32, 4, 3),
)  # fmt: skip


@dataclass
class Row:
    """One measurement; times in milliseconds, rates per second."""

    case: str
    direction: str
    variant: str
    views: int
    ms: float
    ms_p20: float
    ms_p80: float
    tflops: float
    tbps: float
    percent_of_ceiling: float
    error: float
    error_budget: float
    note: str = ""


class Sweep:
    """Measures, and knows the ceilings and the time that is left."""

    def __init__(self, views: int, seconds: float) -> None:
        self.views = views
        self.stop = time.monotonic() + seconds
        self.rows: list[Row] = []
        big = torch.empty(2**28, device="cuda")
        target = torch.empty_like(big)
        self.copy = 2 * big.nbytes / self.time([lambda: target.copy_(big)])[0] / 1e9
        self.matmul = {}
        for name, dtype in (("16", torch.bfloat16), ("tf32", torch.float32)):
            a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
            torch.backends.cuda.matmul.allow_tf32 = True
            self.matmul[name] = 2 * 8192**3 / self.time([lambda a=a: a @ a], 20)[0] / 1e9
        torch.backends.cuda.matmul.allow_tf32 = False

    @staticmethod
    def time(functions: Sequence[Callable[[], Any]], steps: int = STEPS) -> tuple[float, float, float]:
        """(median, 20th, 80th percentile) of the functions called in turn, in milliseconds."""
        for function in functions:
            function()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
        # The host runs ahead behind this, so that launches of small kernels are not what is measured.
        torch.cuda._sleep(20_000_000)
        for i, (start, end) in enumerate(events):
            start.record()
            functions[i % len(functions)]()
            end.record()
        torch.cuda.synchronize()
        spent = sorted(start.elapsed_time(end) for start, end in events)
        return statistics.median(spent), spent[steps // 5], spent[-steps // 5]

    def add(
        self,
        case: str,
        direction: str,
        variant: str,
        functions: Sequence[Callable[[], Any]],
        flops: float,
        moved: float,
        check: tuple[float, float] | None = None,
        unit: str = "16",
    ) -> None:
        """Time a variant whose (error, budget) is within bounds, unless time is up."""
        if time.monotonic() > self.stop:
            return
        error, budget = check or (0.0, 0.0)
        nan = float("nan")
        if check and not error <= budget:
            self.rows.append(Row(case, direction, variant, self.views, nan, nan, nan, 0, 0, 0, error, budget, "WRONG"))
            return
        try:
            ms, low, high = self.time(functions)
        except Exception as problem:
            note = f"{type(problem).__name__}: {str(problem)[:60]}"
            self.rows.append(Row(case, direction, variant, self.views, nan, nan, nan, 0, 0, 0, error, budget, note))
            return
        floor = max(flops / self.matmul[unit], moved / self.copy) / 1e9
        rates = flops / ms / 1e9, moved / ms / 1e9
        self.rows.append(
            Row(case, direction, variant, self.views, ms, low, high, *rates, 100 * floor / ms, error, budget)
        )


def judged(run: Callable[[], Tensor], oracle: Tensor, plain: Tensor) -> tuple[float, float]:
    """(error, budget) of a result; an exception counts as infinitely wrong."""
    try:
        error = testing.relative_error(run(), oracle)
    except Exception as problem:
        print(f"  {type(problem).__name__}: {str(problem)[:200]}")
        return float("inf"), 0.0
    return error, 2 * testing.relative_error(plain, oracle) + testing.ROUNDING[plain.dtype]


def sweep_tokenize(sweep: Sweep) -> None:
    """uint8 images, both layouts, bfloat16 weights, float32 rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    half = {"device": "cuda", "dtype": torch.bfloat16}
    weight = torch.randn(WIDE, 3, 14, 14, generator=generator, **half) / 24
    bias, cls = (torch.randn(n, WIDE, generator=generator, **half) for n in (1, 1))
    bias, pos = bias[0], torch.randn(1 + TOKENS, WIDE, generator=generator, **half)
    rows = sweep.views * (1 + TOKENS)
    flops, moved = 2.0 * rows * WIDE * 588, sweep.views * 3 * HEIGHT * WIDTH + rows * WIDE * 4
    shape = (sweep.views, 3, HEIGHT, WIDTH)
    for layout in ("nchw", "nhwc"):
        sets = [torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8) for _ in range(8)]
        if layout == "nhwc":
            sets = [s.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for s in sets]

        def peer(image: Tensor) -> Tensor:
            options = {"mean": MEAN, "std": STD, "out_dtype": torch.float32}
            return tokenize_reference(image, weight, bias, pos, cls, **options)

        compiled = torch.compile(peer, dynamic=False)
        sweep.add(f"tokenize {layout}", "fwd", "eager", [lambda s=s: peer(s) for s in sets], flops, moved)
        sweep.add(f"tokenize {layout}", "fwd", "compile", [lambda s=s, f=compiled: f(s) for s in sets], flops, moved)
        few = sets[0][:3]
        wide = [t.double() for t in (weight, bias, pos, cls)]
        oracle, plain = tokenize_reference(few, *wide, mean=MEAN, std=STD), peer(few)
        for t in TOKENIZE_TILES if layout == "nchw" else TOKENIZE_TILES[:3]:

            def run(image: Tensor, t: Tiles = t) -> Tensor:
                return tokenize_forward(image, weight, bias, pos, cls, None, SCALE, SHIFT, torch.float32, t)

            check = judged(lambda run=run, few=few: run(few), oracle, plain)
            functions = [lambda s=s, run=run: run(s) for s in sets]
            sweep.add(f"tokenize {layout}", "fwd", f"ours {tuple(t)}", functions, flops, moved, check)


def sweep_conv(sweep: Sweep) -> None:
    """Rays (3 channels) in TF32 and float16, depth (1 channel) in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for cin, dtype in ((3, torch.float32), (3, torch.float16), (1, torch.float32)):
        depth = cin * 196
        weight = torch.randn(588, depth, 3, 3, device="cuda").div((9 * depth) ** 0.5).to(dtype)
        bias = torch.randn(588, device="cuda").to(dtype)
        sets = [torch.randn(sweep.views, HEIGHT, WIDTH, cin, device="cuda") for _ in range(3)]
        rows = sweep.views * TOKENS
        flops, moved = 2.0 * rows * 588 * 9 * depth, sets[0].nbytes + rows * 588 * weight.element_size()
        case = f"unshuffle_conv cin={cin} {'tf32' if dtype == torch.float32 else 'fp16'}"
        unit = "tf32" if dtype == torch.float32 else "16"

        def peer(x: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return conv_reference(x, weight, bias, 14)

        compiled = torch.compile(peer, dynamic=False)
        sweep.add(case, "fwd", "eager", [lambda s=s, f=peer: f(s) for s in sets], flops, moved, unit=unit)
        sweep.add(case, "fwd", "compile", [lambda s=s, f=compiled: f(s) for s in sets], flops, moved, unit=unit)
        few = sets[0][:2]
        oracle, plain = conv_reference(few.double(), weight.double(), bias.double(), 14), peer(few)
        for t in CONV_TILES:

            def run(x: Tensor, t: Tiles = t, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
                return unshuffle_conv_forward(x, weight, bias, 14, weight.dtype, t)

            check = judged(lambda run=run, few=few: run(few), oracle, plain)
            functions = [lambda s=s, run=run: run(s) for s in sets]
            sweep.add(case, "fwd", f"ours {tuple(t)}", functions, flops, moved, check, unit)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def sweep_depth(sweep: Sweep) -> None:
    """float32 maps; the floor reads depth once and writes once."""
    sets = [torch.rand(sweep.views, HEIGHT, WIDTH, 1, device="cuda") * 5 - 1 for _ in range(6)]
    moved = 2 * sets[0].nbytes
    compiled = torch.compile(depth_reference, dynamic=False)
    for name, function in (("eager", depth_reference), ("compile", compiled)):
        sweep.add("normalize_depth", "fwd", name, [lambda s=s, f=function: f(s) for s in sets], 0, moved)
    few = sets[0][:3]
    check = judged(lambda: normalize_depth_forward(few)[0], depth_reference(few.double())[0], depth_reference(few)[0])
    functions = [lambda s=s: normalize_depth_forward(s) for s in sets]
    sweep.add("normalize_depth", "fwd", "ours", functions, 0, moved, check)


def sweep_fuse(sweep: Sweep, maps: int) -> None:
    """float32 tokens; images alone (as in inference), or three maps and four vectors with the sum saved (training)."""
    views = sweep.views
    sets = [[torch.randn(views, TOKENS, WIDE, device="cuda") for _ in range(1 + maps)] for _ in range(3 - maps // 2)]
    weight, bias, scale = (torch.randn(WIDE, device="cuda") for _ in range(3))
    vectors = [torch.randn(views, WIDE, device="cuda") for _ in range(4 if maps else 0)]
    masks = [torch.arange(views, device="cuda") % 5 != i for i in range(maps + len(vectors))]
    dense_masks, vector_masks = masks[:maps], masks[maps:]
    size = sets[0][0].nbytes
    case = f"fuse_tokens {maps} maps"

    def peer(image: Tensor, dense: list[Tensor], *parameters: Tensor) -> Tensor:
        w, b, s = parameters or (weight, bias, scale)
        more = [v.to(image.dtype) for v in vectors]
        masked = {"dense_masks": dense_masks, "vector_masks": vector_masks, "out_dtype": image.dtype}
        return fuse_reference(image, dense, more, w, b, scale_token=s, batch=1, **masked)

    def forward(given: list[Tensor], chunk: int | None = None, warps: int = fuse_kernels.WARPS) -> tuple[Tensor, ...]:
        return fuse_kernels.fuse_tokens_forward(
            given[0], given[1:], dense_masks, vectors, vector_masks, weight, bias, scale, 1, 1e-6, torch.float32,
            maps > 0, chunk, warps,
        )  # fmt: skip

    compiled = torch.compile(peer, dynamic=False)
    moved = size * (maps + 2 + (maps > 0))
    for name, function in (("eager", peer), ("compile", compiled)):
        sweep.add(case, "fwd", name, [lambda s=s, f=function: f(s[0], s[1:]) for s in sets], 0, moved)
    wide = [t.double() for t in sets[0]]
    oracle, plain = (
        peer(wide[0], wide[1:], weight.double(), bias.double(), scale.double()),
        peer(sets[0][0], sets[0][1:]),
    )
    for config in ((8, 4), (1, 4), (2, 4), (4, 4), (16, 4), (4, 2), (8, 2), (8, 8)):
        check = judged(lambda c=config: forward(sets[0], *c)[0], oracle, plain)
        functions = [lambda s=s, c=config: forward(s, *c) for s in sets]
        sweep.add(case, "fwd", f"ours chunk, warps {config}", functions, 0, moved, check)
    sweep_fuse_backward(sweep, case, sets, forward, peer, (weight, bias, scale), vectors, masks)


def sweep_fuse_backward(
    sweep: Sweep, case: str, sets: list[list[Tensor]], forward: Any, peer: Any, parameters: tuple[Tensor, ...],
    vectors: list[Tensor], masks: list[Tensor],
) -> None:  # fmt: skip
    """Gradients to every map and parameter."""
    maps = len(sets[0]) - 1
    grad = torch.randn(1, sweep.views * TOKENS + 1, WIDE, device="cuda")
    moved = sets[0][0].nbytes * (3 + maps)

    def graph(given: list[Tensor], dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (*given, *parameters)]
        out = peer(leaves[0], leaves[1 : 1 + maps], *leaves[1 + maps :])
        return lambda: torch.autograd.grad(out, leaves, grad.to(dtype), retain_graph=True)

    eager = [graph(given, torch.float32) for given in sets]
    plain, oracle = eager[0](), graph(sets[0], torch.float64)()
    sweep.add(case, "bwd", "eager", eager, 0, moved)
    del eager
    saved = [forward(given) for given in sets]
    for chunk in (4, 8, 16, 32):
        for warps in (4, 8):

            def run(i: int, chunk: int = chunk, warps: int = warps) -> tuple[Any, ...]:
                x = saved[i][3] if maps else sets[i][0]
                return fuse_kernels.fuse_tokens_backward(
                    grad, x, [], [], saved[i][1], saved[i][2], parameters[0], masks[:maps], torch.float32,
                    [torch.float32] * maps, bool(vectors), 1, chunk, warps,
                )  # fmt: skip

            checks = [judged(lambda run=run: run(0)[0], oracle[0], plain[0])]
            checks.append(judged(lambda run=run: run(0)[2][0], oracle[1 + maps], plain[1 + maps]))
            if maps:
                checks.append(judged(lambda run=run: run(0)[1][0], oracle[1], plain[1]))
            worst = max(checks, key=lambda c: c[0] / max(c[1], 1e-30))
            functions = [lambda i=i, run=run: run(i) for i in range(len(sets))]
            sweep.add(case, "bwd", f"ours chunk {chunk}, warps {warps}", functions, 0, moved, worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv")
    parser.add_argument("--views", type=int, default=41)
    parser.add_argument("--seconds", type=float, default=140.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    sweep = Sweep(options.views, options.seconds)
    with torch.no_grad():
        sweep_tokenize(sweep)
    for maps in (0, 3):
        sweep_fuse(sweep, maps)
        torch.cuda.empty_cache()
    with torch.no_grad():
        sweep_conv(sweep)
        sweep_depth(sweep)
    with open(options.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(sweep.rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in sweep.rows)
    rates = ", ".join(f"matmul {name} {rate:.0f} TFLOP/s" for name, rate in sweep.matmul.items())
    print(f"{torch.cuda.get_device_name()}, {options.views} views: copy {sweep.copy:.2f} TB/s, {rates}")
    for row in sweep.rows:
        print(
            f"{row.case:28s} {row.direction} {row.variant:36s} {row.ms:8.4f} ms {row.tflops:6.0f} TF "
            f"{row.tbps:5.2f} TB/s {row.percent_of_ceiling:5.1f} % {row.error:.1e}/{row.error_budget:.1e} {row.note}"
        )
    if time.monotonic() > sweep.stop:
        print("time was up: later variants were left out")


if __name__ == "__main__":
    main()
