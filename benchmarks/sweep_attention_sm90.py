"""Sweep the CUDA attention's configurations on one Hopper GPU: numbers first, then time, beside Triton and cuDNN.

    python benchmarks/sweep_attention_sm90.py sweep.csv [--direction fwd|bwd|fp8] [--variants 0,3]

Every configuration is checked against the float64 oracle in a process of its own (one that deadlocks is reported as
such); those that pass are timed in one process, inputs rotated, medians. The best go into the launchers by hand.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if str(Path(__file__).resolve().parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from any4d_fast import _ext, ops  # noqa: E402
from any4d_fast.cuda import attention, attention_backward, attention_fp8  # noqa: E402
from any4d_fast.reference.attention import Segments  # noqa: E402
from any4d_fast.reference.attention import attention as reference  # noqa: E402
from any4d_fast.reference.attention_fp8 import attention_fp8 as emulation  # noqa: E402
from any4d_fast.testing import relative_error  # noqa: E402
from benchmarks.timing import matmul_tflops, time_ms  # noqa: E402

SCALE = 64**-0.5
CASES = {
    "global 36409x12": (Segments.global_(1, 36_409), 36_409, 12),
    "global 88801x12": (Segments.global_(1, 88_801), 88_801, 12),
    "global 7105x12": (Segments.global_(1, 7_105), 7_105, 12),
    "global 1777x12": (Segments.global_(1, 1_777), 1_777, 12),
    "frame 41x888x12": (Segments.frame(1, 41, 888), 36_409, 12),
    "encoder 41x889x16": (Segments.batched(41, 889), 36_449, 16),
}
CHECKS = [
    *((Segments.global_(1, n), n) for n in (1, 63, 64, 65, 127, 129, 192, 257, 1_777, 4_099, 7_105)),
    (Segments.frame(2, 3, 887), 5_324),
    (Segments.batched(4, 889), 3_556),
    (Segments(length=100, count=3, stride=150, groups=2, group_stride=500, start=7), 1_100),
]
BUDGET = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Rounding of the output, of the probabilities and of their gradients: two to three units of each dtype."""
FP8_BUDGET = 3e-2
"""Of the 8-bit forward against its emulation: ties that fall otherwise, the units' exponentials, and tiles split along
the keys, whose parts round their probabilities by maxima of their own."""
SECONDS_A_CHECK = 120


def random_qkv(rows: int, heads: int, dtype: torch.dtype, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(rows, 3, heads, 64, device="cuda", generator=generator) * spread).to(dtype)


def worst_errors(direction: str, variant: int) -> dict[str, float]:
    """Relative errors against the oracle, over lengths, dtypes, seeds and sharp softmaxes."""
    found: dict[str, float] = {}
    for seed, (segments, rows) in enumerate(CHECKS):
        for dtype, spread in ((torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.bfloat16, 8.0), (torch.float16, 4.0)):
            qkv = random_qkv(rows, 3, dtype, seed, spread)
            exact = qkv.double().requires_grad_()
            exact_out, exact_lse = reference(exact, segments, SCALE, return_lse=True)
            name = f"{segments.length} {str(dtype).removeprefix('torch.')} x{spread:g}"
            out, lse = attention.forward(qkv, segments.as_list(), SCALE, variant if direction == "fwd" else None)
            if direction == "fwd":
                errors = {"out": (out, exact_out), "lse": (lse, exact_lse)}
            else:
                grad = torch.randn(out.shape, device="cuda").to(dtype)
                exact_out.backward(grad.double())
                args = (grad, None, qkv, out, lse, segments.as_list(), SCALE)
                errors = {}
                for mode in (False, True):
                    grads = attention_backward.backward(*args, mode, variant=variant)
                    for i, part in enumerate("qkv"):
                        errors[f"d{part}{' det' if mode else ''}"] = (grads[:, i], exact.grad[:, i])
            for part, (value, wanted) in errors.items():
                bound = BUDGET[dtype] * (1 if part in ("out", "lse") else 2)
                error = relative_error(value, wanted)
                if not error <= bound and wanted.double().norm() > 1e-9:
                    found[f"{name} {part}"] = error
    return found


def worst_errors_fp8(variant: int) -> dict[str, float]:
    """Relative errors of the 8-bit forward against its emulation, and beside them (not judged) against the oracle."""
    found: dict[str, float] = {}
    for seed, (segments, rows) in enumerate(CHECKS):
        for dtype in (torch.bfloat16, torch.float16):
            qkv = random_qkv(rows, 3, dtype, seed)
            out, lse = attention_fp8.forward(qkv, segments.as_list(), SCALE, variant)
            wanted = emulation(qkv.float(), segments, SCALE, attention_fp8.LINEAR_RUNS[variant])
            exact = reference(qkv.double(), segments, SCALE, return_lse=True)[0]
            name = f"{segments.length} {str(dtype).removeprefix('torch.')}"
            print(f"{name}: {relative_error(out, exact):.4f} of the exact output", file=sys.stderr)
            for part, value, expected in (("out", out, wanted[0]), ("lse", lse, wanted[1])):
                error = relative_error(value, expected)
                if not error <= FP8_BUDGET:
                    found[f"{name} {part}"] = error
    return found


def check_all(direction: str, variants: list[int]) -> list[int]:
    """Variants whose numbers are right."""
    command = [sys.executable, __file__, "-", "--direction", direction, "--check"]
    running = {
        v: subprocess.Popen([*command, str(v)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for v in variants
    }
    good = []
    for variant, process in running.items():
        try:
            text, _ = process.communicate(timeout=SECONDS_A_CHECK)
        except subprocess.TimeoutExpired:
            process.kill()
            text = "deadlock"
        if process.returncode == 0:
            good.append(variant)
        else:
            print(f"{direction} variant {variant}: WRONG: {text.strip()[-700:]}", flush=True)
    return good


def functions(direction: str, variants: list[int], qkv: Tensor, segments: Segments) -> dict[str, Callable[[], object]]:
    if direction == "fp8":
        own = {
            f"cuda {v}": lambda v=v: attention_fp8.forward(qkv, segments.as_list(), SCALE, v)  # type: ignore[misc]
            for v in variants
        }
        return {**own, "16 bit": lambda: attention.forward(qkv, segments.as_list(), SCALE)}
    if direction == "fwd":
        own = {
            f"cuda {v}": lambda v=v: attention.forward(qkv, segments.as_list(), SCALE, v)  # type: ignore[misc]
            for v in variants
        }
        peers = {name: lambda n=name: ops.attention(qkv, segments=segments, backend=n) for name in ("triton", "cudnn")}
        return {**own, **peers}
    out, lse = attention.forward(qkv, segments.as_list(), SCALE)
    grad = torch.randn_like(out)
    args = (grad, None, qkv, out, lse, segments.as_list(), SCALE)
    found: dict[str, Callable[[], object]] = {
        f"cuda {v}{' det' if mode else ''}": lambda v=v, mode=mode: attention_backward.backward(*args, mode, variant=v)
        for v in variants
        for mode in (False, True)
    }
    leaf = qkv.clone().requires_grad_()
    for name in ("triton", "cudnn"):
        result = ops.attention(leaf, segments=segments, backend=name)
        found[name] = lambda r=result: torch.autograd.grad(r, leaf, grad, retain_graph=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("csv")
    parser.add_argument("--direction", choices=("fwd", "bwd", "fp8"), default="fwd")
    parser.add_argument("--variants", default="")
    parser.add_argument("--only", default="", help="sizes whose name contains this text")
    parser.add_argument("--check", type=int)
    options = parser.parse_args()
    if options.check is not None:
        fp8 = options.direction == "fp8"
        wrong = worst_errors_fp8(options.check) if fp8 else worst_errors(options.direction, options.check)
        print("; ".join(f"{name} {error:.1e}" for name, error in list(wrong.items())[:12]))
        return 1 if wrong else 0
    extension = _ext.module()
    name = {"fwd": "attention_forward", "bwd": "attention_backward", "fp8": "attention_fp8"}[options.direction]
    variants = [int(v) for v in options.variants.split(",") if v] or list(
        range(getattr(extension, f"{name}_variants")())
    )
    good = check_all(options.direction, variants)
    rows = []
    for size, (segments, count, heads) in CASES.items():
        if options.only not in size:
            continue
        qkv = random_qkv(count, heads, torch.bfloat16, 0)
        flops = (10 if options.direction == "bwd" else 4) * segments.total * segments.length**2 * heads * 64
        line = []
        for provider, function in functions(options.direction, good, qkv, segments).items():
            try:
                ms = time_ms(function)[0]
            except (RuntimeError, ValueError) as error:
                print(f"{size} {provider}: {error}", flush=True)
                ms = math.nan
            rows.append({"direction": options.direction, "size": size, "provider": provider, "ms": ms})
            rows[-1]["tflops"] = flops / ms / 1e9
            line.append(f"{provider} {flops / ms / 1e9:.0f}")
        print(f"{options.direction} {size}: {', '.join(line)}", flush=True)
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    print(f"matmul {matmul_tflops():.0f} TFLOP/s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
