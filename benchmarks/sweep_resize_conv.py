"""Check and time variants of `resize_conv` on a GPU: `python -m benchmarks.sweep_resize_conv [results.csv]`.

Every variant is compared with the float64 oracle on the first and the last view before it is timed. Besides the tiles
of the production kernels there is the other design: `gather_kernel` interpolates the matmul's left operand tap by tap,
so that nothing but the result is written, for 36 gathered values where the strip has one.
"""

from __future__ import annotations

import csv
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import triton
import triton.language as tl
from any4d_fast.kernels import resize_conv as forward
from any4d_fast.kernels import resize_conv_backward as backward
from any4d_fast.kernels._resize import Canvas, new_strip, resize, scale, source
from any4d_fast.kernels._rows import processors
from any4d_fast.kernels.resize_conv import Tiles
from torch import Tensor

from any4d_fast import testing
from any4d_fast.reference.resize_conv import resize_conv as reference
from benchmarks.timing import copy_tbps, matmul_tflops, time_ms

VIEWS, CHUNK = 41, 8
SMALL, SIZE, CHANNELS, OUTPUTS = (296, 192), (518, 336), 128, 6
FLOPS_A_VIEW = 2 * SIZE[0] * SIZE[1] * (9 * CHANNELS * CHANNELS + CHANNELS * OUTPUTS)

BEST = Tiles(256, 64, 8, 4, tma=True)
TILES = [
    *(BEST._replace(waves=waves) for waves in (1, 2, 3, 6, 12, 48)),
    BEST._replace(stages=3),
    BEST._replace(bk=32, stages=6),
    BEST._replace(bk=128, stages=2),
    BEST._replace(flatten=True, stages=3),
    BEST._replace(pixel_rows=True),
    BEST._replace(tma=False, stages=3),
    Tiles(128, 64, 4, 3, tma=True, per_sm=2, waves=6),
    Tiles(128, 64, 4, 3, tma=True, per_sm=2, waves=6, pixel_rows=True),
    Tiles(128, 64, 8, 3, tma=True, per_sm=2, waves=6),
    Tiles(64, 64, 4, 4, tma=True, per_sm=2, waves=12),
]
GATHERS = [(64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2), (128, 128, 8, 1)]


@triton.jit
def gather_kernel(
    x_ptr,  # [N, h, w, C] contiguous
    weight3_ptr,  # [9 * ROWS, C]
    bias3_ptr,
    weight1_ptr,  # [16, ROWS]
    bias1_ptr,
    out_ptr,
    places,
    small_h,
    small_w,
    height,
    width,
    scale_y,
    scale_x,
    COUT: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """One pass: interpolate the neighbours of a tile of places for every tap."""
    dtype = x_ptr.dtype.element_ty
    place = tl.program_id(0) * BP + tl.arange(0, BP)
    row = place // (width + 1)
    x = place - row * (width + 1)
    view = row // (height + 1)
    y = row - view * (height + 1)
    image = x_ptr + view.to(tl.int64) * small_h * small_w * C
    hidden = tl.arange(0, ROWS)
    acc = tl.zeros([BP, ROWS], tl.float32)
    for step in range(0, 9 * (C // BK)):
        tap = step // (C // BK)
        k = step % (C // BK) * BK + tl.arange(0, BK)[None, :]
        at_y, at_x = y + tap // 3 - 1, x + tap % 3 - 1
        inside = (place < places) & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        y0, y1, below = source(tl.maximum(at_y, 0), scale_y, small_h)
        x0, x1, right = source(tl.maximum(at_x, 0), scale_x, small_w)
        mask, below, right = inside[:, None], below[:, None], right[:, None]
        a = tl.load(image[:, None] + (y0 * small_w + x0)[:, None] * C + k, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(image[:, None] + (y0 * small_w + x1)[:, None] * C + k, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(image[:, None] + (y1 * small_w + x0)[:, None] * C + k, mask=mask, other=0.0).to(tl.float32)
        e = tl.load(image[:, None] + (y1 * small_w + x1)[:, None] * C + k, mask=mask, other=0.0).to(tl.float32)
        value = (1.0 - below) * ((1.0 - right) * a + right * b) + below * ((1.0 - right) * d + right * e)
        weight = tl.load(weight3_ptr + (tap * ROWS + hidden)[None, :] * C + tl.trans(k))
        acc = tl.dot(value.to(dtype), weight, acc)
    channel = tl.arange(0, 16)
    features = tl.maximum(acc + tl.load(bias3_ptr + hidden)[None, :], 0.0).to(dtype)
    result = tl.dot(features, tl.load(weight1_ptr + channel[None, :] * ROWS + hidden[:, None]))
    result += tl.load(bias1_ptr + channel, mask=channel < COUT, other=0.0).to(tl.float32)[None, :]
    inside = (place < places) & (x < width) & (y < height)
    pixel = (row - view).to(tl.int64) * width + x
    out = out_ptr + pixel[:, None] * COUT + channel[None, :]
    tl.store(out, result.to(dtype), mask=inside[:, None] & (channel < COUT)[None, :])


def gather(given: list[Tensor], bp: int, bk: int, warps: int, stages: int) -> Tensor:
    """`resize_conv` in one launch."""
    x, weight3, bias3, weight1, bias1 = given
    out = torch.empty(x.shape[0], *SIZE, OUTPUTS, device=x.device, dtype=x.dtype)
    canvas = Canvas(x.shape[0], *SIZE)
    gather_kernel[(triton.cdiv(canvas.places, bp),)](
        x, forward.pack(weight3, CHANNELS, CHANNELS, x.dtype), bias3.float(),
        forward.pack_rows(weight1, 16, CHANNELS, x.dtype), bias1, out, canvas.places, *SMALL, *SIZE,
        scale(SMALL[0], SIZE[0]), scale(SMALL[1], SIZE[1]),
        COUT=OUTPUTS, ROWS=CHANNELS, C=CHANNELS, BP=bp, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def inputs(views: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight3, bias3, weight1 [Cout, M], bias1."""
    shapes = ((views, *SMALL, CHANNELS), (CHANNELS, CHANNELS, 3, 3), (CHANNELS,), (OUTPUTS, CHANNELS), (OUTPUTS,))
    given = [torch.randn(s, device="cuda") for s in shapes]
    given[1] /= (9 * CHANNELS) ** 0.5
    given[3] /= CHANNELS**0.5
    return [t.to(dtype) for t in given]


class Table:
    """Lines of the result; every variant is checked, then timed."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def add(
        self,
        case: str,
        name: str,
        run: Callable[[], Any],
        flops: float,
        errors: Callable[[Any], list[tuple[float, float]]] | None = None,
    ) -> None:
        """Time `run`; `errors` gives (error, budget) pairs of its result."""
        worst = 0.0
        try:
            found = run()
            torch.cuda.synchronize()
            if errors is not None:
                pairs = errors(found)
                worst = max(e for e, _ in pairs)
                if not all(e <= b for e, b in pairs):
                    print(f"{case} {name}: WRONG {pairs}", flush=True)
                    return
            del found
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e9
            ms, low, high = time_ms(run)
        except Exception as error:  # a tile that does not fit the machine is a result, not a failure
            print(f"{case} {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            return
        line = {"case": case, "variant": name, "ms": round(ms, 3), "p20": round(low, 3), "p80": round(high, 3)}
        line |= {"tflops": round(flops / ms / 1e9), "peak_gb": round(peak, 3), "error": f"{worst:.1e}"}
        self.lines.append(line)
        print(line, flush=True)


def budgets(exact: list[Tensor], plain: list[Tensor]) -> Callable[[list[Tensor]], list[tuple[float, float]]]:
    """Errors of results with their budgets."""

    def relative(a: Tensor, b: Tensor) -> float:
        return ((a.double() - b).norm() / b.norm()).item()

    limits = [2 * relative(p, e) + testing.ROUNDING[plain[0].dtype] for p, e in zip(plain, exact, strict=True)]
    return lambda found: [(relative(f, e), m) for f, e, m in zip(found, exact, limits, strict=True)]


def ends(out: Tensor | list[Tensor]) -> list[Tensor]:
    """First and last view."""
    return [out[0][:1], out[-1][-1:]] if isinstance(out, list) else [out[:1], out[-1:]]


def label(t: Tiles) -> str:
    flags = [name for name in ("tma", "pixel_rows", "flatten") if getattr(t, name)]
    return f"{t.pixels}x{t.bk} w{t.warps} s{t.stages} waves{t.waves} x{t.per_sm} {' '.join(flags)}"


def resizes(x: Tensor, t: Tiles) -> None:
    """The resizes of one forward pass alone."""
    canvas = Canvas(x.shape[0], *SIZE)
    wave = processors(x.device) * t.per_sm
    total = triton.cdiv(canvas.places, t.pixels)
    count = forward.stretches(total, wave * t.waves, wave)
    strip = new_strip(canvas, canvas.most_rows(count * t.pixels), CHANNELS, x.device, x.dtype)
    for first in range(0, total, count):
        resize(x, canvas, strip, *canvas.rows(first * t.pixels, min(count, total - first) * t.pixels), "tf32")


def sweep_forward(table: Table) -> None:
    given = inputs(VIEWS, torch.float16)
    x, *layers = given
    exact = [reference(v.double(), SIZE, *(t.double() for t in layers)) for v in (x[:1], x[-1:])]
    plain = [reference(v, SIZE, *layers) for v in (x[:1], x[-1:])]
    check, flops = budgets(exact, plain), VIEWS * FLOPS_A_VIEW

    def chunked(op: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [op(part, SIZE, *layers) for part in x.split(CHUNK)]

    for t in TILES:
        run = functools.partial(forward.resize_conv_forward, x, SIZE, *layers, config=t)
        table.add("forward", label(t), run, flops, lambda found: check(ends(found)))
    table.add("forward", "production, 8 views a call", chunked(forward.resize_conv_forward), flops)
    for waves in (1, 3, 48):
        table.add("resize only", f"waves{waves}", lambda w=waves: resizes(x, BEST._replace(waves=w)), 0.0)
    for options in GATHERS:
        name = "gather {}x{} w{} s{}".format(*options)
        table.add("forward", name, lambda o=options: gather(given, *o), flops, lambda found: check(ends(found)))
    torch.backends.cudnn.benchmark = True
    table.add("forward", "eager, cuDNN channels-last", chunked(reference), flops, lambda found: check(ends(found)))
    compiled = torch.compile(reference, dynamic=False)
    table.add("forward", "torch.compile", chunked(compiled), flops, lambda found: check(ends(found)))


def sweep_backward(table: Table) -> None:
    given = inputs(CHUNK, torch.float16)
    grad = torch.randn(CHUNK, *SIZE, OUTPUTS, device="cuda", dtype=torch.float16)
    flops = 2 * CHUNK * FLOPS_A_VIEW

    def graph(op: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        return op(leaves[0], SIZE, *leaves[1:]), leaves

    def run_of(op: Callable[..., Tensor], tensors: list[Tensor], cotangent: Tensor) -> Callable[[], list[Tensor]]:
        out, leaves = graph(op, tensors)
        return lambda: list(torch.autograd.grad(out, leaves, cotangent, retain_graph=True))[:4]

    few = [given[0][:1], *given[1:]]
    exact = run_of(reference, [t.double() for t in few], grad[:1].double())()
    check = budgets(exact, run_of(reference, few, grad[:1])())
    best = backward.config(False, CHANNELS, CHANNELS, 0)
    configs = [best]
    configs += [best._replace(hidden=best.hidden._replace(stages=4)), best._replace(hidden=best.hidden._replace(bk=32))]
    configs += [best._replace(hidden=Tiles(64, 64, 4, 3, tma=True, pixel_rows=True, per_sm=2))]
    configs += [best._replace(split=best.split._replace(stages=s, per_sm=p)) for s, p in ((2, 2), (6, 1))]
    configs += [best._replace(split=best.split._replace(bk=128, stages=2, per_sm=1))]
    for c in configs:
        changed = [f"{k} {label(v)}" for k, v in c._asdict().items() if v != getattr(best, k)]

        def run(c: backward.Config = c, tensors: list[Tensor] = given, cotangent: Tensor = grad) -> tuple[Tensor, ...]:
            return backward.resize_conv_backward(cotangent, *tensors[:4], (True,) * 4, c)

        if not all(e <= b for e, b in check(list(run(tensors=few, cotangent=grad[:1])))):
            print(f"backward {changed}: WRONG", flush=True)
            continue
        table.add("backward", ", ".join(changed) or "production", run, flops)
    table.add("backward", "eager, cuDNN channels-last", run_of(reference, given, grad), flops)
    table.add("backward", "torch.compile", run_of(torch.compile(reference, dynamic=False), given, grad), flops)


def sweep_float32(table: Table) -> None:
    """Which backend should take float32, with and without TF32."""
    given = inputs(CHUNK, torch.float32)
    for tf32 in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        case = "float32 " + ("tf32" if tf32 else "exact")
        flops = CHUNK * FLOPS_A_VIEW
        table.add(case, "production", lambda: forward.resize_conv_forward(given[0], SIZE, *given[1:]), flops)
        table.add(case, "eager, cuDNN channels-last", lambda: reference(given[0], SIZE, *given[1:]), flops)


def main() -> None:
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # compiled graphs run backward many times
    print(f"copy {copy_tbps():.3f} TB/s, matmul {matmul_tflops(torch.float16):.0f} TFLOP/s", flush=True)
    table = Table()
    with torch.no_grad():
        sweep_forward(table)
        sweep_float32(table)
    sweep_backward(table)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", newline="") as file:
            writer = csv.DictWriter(file, table.lines[0])
            writer.writeheader()
            writer.writerows(table.lines)
    print("\ncase | variant | ms | TFLOP/s | peak GB | error")
    for line in sorted(table.lines, key=lambda a: (a["case"], a["ms"])):
        print(" | ".join(str(line[key]) for key in ("case", "variant", "ms", "tflops", "peak_gb", "error")))


if __name__ == "__main__":
    main()
