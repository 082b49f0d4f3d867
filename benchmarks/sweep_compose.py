"""Sweep launch configurations of compose_factors and unproject on one GPU: numbers first, then time.

    python benchmarks/sweep_compose.py sweep.csv [--views 41] [--only compose_factors]

Every configuration is checked against the float64 oracle at full image size (three views), then timed at `--views`
views of 518x336 beside eager PyTorch and torch.compile: device events, rotating inputs, medians. Copy bandwidth is
measured in the same run. The CSV has one line a configuration; a table of the best ones is printed last. A winner goes
into FORWARD and BACKWARD of `kernels/compose_factors.py` and `kernels/unproject.py` by hand.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch._functorch.config
from any4d_fast.kernels import compose_factors as compose_kernels
from any4d_fast.kernels import unproject as unproject_kernels
from torch import Tensor

from any4d_fast.geometry import quats_trans_to_pose
from any4d_fast.reference.compose_factors import compose_factors as compose_reference
from any4d_fast.reference.unproject import unproject as unproject_reference
from any4d_fast.testing import ROUNDING, relative_error

DEVICE = "cuda"
HEIGHT, WIDTH, CHECKED_VIEWS = 336, 518, 3
RUNS, ROUNDS = 15, 3
Function = Callable[[], Any]


@dataclass
class Line:
    """One line of the CSV."""

    op: str
    direction: str
    dtype: str
    provider: str
    config: str = ""
    ms: float = float("nan")
    ms_p20: float = float("nan")
    ms_p80: float = float("nan")
    tbps: float = float("nan")
    percent_of_copy: float = float("nan")
    error: float = float("nan")
    error_budget: float = float("nan")
    note: str = ""


@dataclass
class Problem:
    """One op in one direction: inputs by seed and number of views, and functions of such inputs."""

    op: str
    direction: str
    dtype: torch.dtype
    bytes_per_pixel: int
    make: Callable[[int, int], list[Tensor]]
    ours: Callable[[list[Tensor], Any], Iterable[Tensor]]
    prepare_eager: Callable[[list[Tensor], bool], Callable[[], Iterable[Tensor]]]
    configs: list[Any]


def time_ms(functions: list[Function]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of device time, the functions taking turns so that no input stays in L2."""
    turn = itertools.cycle(functions)
    next(turn)()
    times: list[float] = []
    for _ in range(ROUNDS):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)]
        # The device sleeps (about 5 ms) while the host enqueues: launch overhead must not count as device time.
        torch.cuda._sleep(10_000_000)
        for start, end in events:
            start.record()
            next(turn)()
            end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) for start, end in events]
    times.sort()
    median, p20, p80 = (times[int(q * (len(times) - 1))] for q in (0.5, 0.2, 0.8))
    return median, p20, p80


def copy_tbps() -> float:
    """Device-to-device copy bandwidth, bytes read plus bytes written."""
    pairs = [(torch.ones(1 << 28, device=DEVICE), torch.empty(1 << 28, device=DEVICE)) for _ in range(2)]
    functions: list[Function] = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]
    return 2 * 4 * 2**28 / time_ms(functions)[0] / 1e9


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def compose_inputs(dtype: torch.dtype) -> Callable[[int, int], list[Tensor]]:
    def make(views: int, seed: int) -> list[Tensor]:
        geometry = normal(views, HEIGHT, WIDTH, 6, seed=seed)
        geometry[..., 2] += 2
        flow = normal(views, HEIGHT, WIDTH, 3, seed=seed + 1)
        pose = normal(views, 7, seed=seed + 2)
        return [geometry.to(dtype), flow.to(dtype), pose[:, 3:], pose[:, :3], normal(1, 1, seed=seed + 3)]

    return make


def unproject_inputs(dtype: torch.dtype) -> Callable[[int, int], list[Tensor]]:
    def make(views: int, seed: int) -> list[Tensor]:
        depth = normal(views, HEIGHT, WIDTH, seed=seed).abs() + 0.5
        row = [[0.9 * WIDTH, 0, WIDTH / 2], [0, 0.95 * WIDTH, HEIGHT / 2], [0, 0, 1]]
        intrinsics = torch.tensor(row, device=DEVICE).expand(views, 3, 3).contiguous()
        poses = quats_trans_to_pose(normal(views, 4, seed=seed + 1), normal(views, 3, seed=seed + 2))
        return [depth.to(dtype), intrinsics, poses, normal(views, HEIGHT, WIDTH, 3, seed=seed + 3).to(dtype)]

    return make


def cotangents(outputs: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Cotangents that lean the same way in every pixel: sums over pixels do not cancel to nothing."""
    lean = torch.randn(4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return [lean[: o.shape[-1]] if o.shape[-1] <= 4 else lean[0] for o in outputs]


def with_cotangents(make: Callable[[int, int], list[Tensor]], reference: Callable[..., Any]) -> Any:
    """Inputs followed by contiguous float32 cotangents of every differentiable output."""

    def both(views: int, seed: int) -> list[Tensor]:
        inputs = make(views, seed)
        with torch.no_grad():
            outputs = [o for o in reference(*inputs) if o.is_floating_point()]
        leans = cotangents(outputs, seed)
        noisy = [lean + 0.5 * torch.randn_like(o) for lean, o in zip(leans, outputs, strict=True)]
        return inputs + [g.contiguous() for g in noisy]

    return both


def forward_problem(op: str, dtype: torch.dtype, make: Any, reference: Any, module: Any, size: int) -> Problem:
    def prepare(inputs: list[Tensor], compiled: bool) -> Callable[[], Iterable[Tensor]]:
        function = torch.compile(reference, fullgraph=True) if compiled else reference

        def run() -> Iterable[Tensor]:
            with torch.no_grad():
                return [o for o in function(*inputs) if o.is_floating_point()]

        return run

    def ours(inputs: list[Tensor], config: Any) -> Iterable[Tensor]:
        return [o for o in module.forward(*inputs, config=config) if o.is_floating_point()]

    blocks = [(128, 4), (256, 4), (512, 4), (512, 8)]
    tiles = [(False, False), (False, True), (True, True)]
    configs = [module.Config(block, warps, 1, *tile) for (block, warps), tile in itertools.product(blocks, tiles)]
    return Problem(op, "fwd", dtype, size, make, ours, prepare, configs)


def backward_problem(
    op: str, dtype: torch.dtype, make: Any, reference: Any, module: Any, size: int, count: int, split: Any
) -> Problem:
    def prepare(inputs: list[Tensor], compiled: bool) -> Callable[[], Iterable[Tensor]]:
        function = torch.compile(reference, fullgraph=True) if compiled else reference
        leaves = [t.detach().requires_grad_() for t in inputs[:count]]
        outputs = [o for o in function(*leaves) if o.is_floating_point()]
        grads = [g.to(o.dtype) for g, o in zip(inputs[count:], outputs, strict=True)]
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    def ours(inputs: list[Tensor], config: Any) -> Iterable[Tensor]:
        return split(module.backward, inputs, config)

    blocks = [(128, 4), (256, 4), (256, 8)]
    tiles = (
        [(False, False), (False, True), (True, True)] if op == "compose_factors" else [(False, False), (True, False)]
    )
    configs = [
        module.Config(block, warps, iterations, *tile)
        for (block, warps), tile, iterations in itertools.product(blocks, tiles, (4, 16))
    ]
    return Problem(op, "bwd", dtype, size, with_cotangents(make, reference), ours, prepare, configs)


def problems(only: str | None) -> list[Problem]:
    """Both ops in both directions: heads in float16 and, last, float32; depth and flow in float32."""
    found = []

    def compose_backward(backward: Any, inputs: list[Tensor], config: Any) -> Iterable[Tensor]:
        return backward(*inputs[:5], tuple(inputs[5:]), config=config)

    def unproject_backward(backward: Any, inputs: list[Tensor], config: Any) -> Iterable[Tensor]:
        return (*backward(*inputs[:3], *inputs[4:], config=config), inputs[5])

    def compose(dtype: torch.dtype) -> None:
        width, make = dtype.itemsize, compose_inputs(dtype)
        outputs = 4 * 12 + 3 * 4  # four vectors, three scalars; the mask's byte is the forward's alone
        common = ("compose_factors", dtype, make, compose_reference, compose_kernels)
        found.append(forward_problem(*common, 9 * width + outputs + 1))
        found.append(backward_problem(*common, 2 * 9 * width + outputs, 5, compose_backward))

    compose(torch.float16)
    common = ("unproject", torch.float32, unproject_inputs(torch.float32), unproject_reference, unproject_kernels)
    found.append(forward_problem(*common, 4 + 12 + 24))
    found.append(backward_problem(*common, 4 + 24 + 4, 4, unproject_backward))
    compose(torch.float32)
    return [p for p in found if only is None or p.op == only]


def budgets(problem: Problem) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Inputs for the check, the oracle's results, and the budget of each."""
    inputs = problem.make(CHECKED_VIEWS, 100)
    oracle = list(problem.prepare_eager([t.double() for t in inputs], False)())
    plain = list(problem.prepare_eager(inputs, False)())
    bounds = [2 * relative_error(p, o) + ROUNDING[p.dtype] for p, o in zip(plain, oracle, strict=True)]
    return inputs, oracle, bounds


def sweep(problem: Problem, views: int, copy: float, configs: list[Any], peers: dict[str, bool]) -> list[Line]:
    """One line for every peer (name, whether compiled) and configuration."""
    dtype = str(problem.dtype).removeprefix("torch.")
    inputs, oracle, bounds = budgets(problem)
    rotating = [problem.make(views, seed) for seed in (0, 10)]
    moved = problem.bytes_per_pixel * views * HEIGHT * WIDTH
    lines = []

    def measure(provider: str, config: str, functions: Callable[[], list[Function]], check: Function | None) -> None:
        line = Line(problem.op, problem.direction, dtype, provider, config)
        lines.append(line)
        try:
            if check is not None:
                errors = [relative_error(a, o) for a, o in zip(check(), oracle, strict=True)]
                line.error, line.error_budget = max(
                    zip(errors, bounds, strict=True), key=lambda pair: pair[0] / pair[1]
                )
                if any(not e <= b for e, b in zip(errors, bounds, strict=True)):
                    line.note = "outside its budget: not timed"
                    return
            line.ms, line.ms_p20, line.ms_p80 = time_ms(functions())
            line.tbps = moved / line.ms / 1e9
            line.percent_of_copy = 100 * line.tbps / copy
        except Exception as error:
            line.note = f"{type(error).__name__}: {str(error)[:200]}"

    for provider, compiled in peers.items():
        measure(provider, "", lambda c=compiled: [problem.prepare_eager(r, c) for r in rotating], None)
        torch.compiler.reset()
    for config in configs:
        described = " ".join(f"{k}={int(v)}" for k, v in config._asdict().items())
        measure(
            "any4d_fast",
            described,
            lambda c=config: [lambda r=r: problem.ours(r, c) for r in rotating],
            lambda c=config: problem.ours(inputs, c),
        )
    return lines


def report(lines: list[Line], copy: float) -> None:
    """The peers and the three best configurations of every problem."""
    print(f"copy {copy:.2f} TB/s; {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for key, group in itertools.groupby(lines, key=lambda line: (line.op, line.direction, line.dtype)):
        chosen = list(group)
        peers = [line for line in chosen if line.provider != "any4d_fast"]
        best = sorted((line for line in chosen if line.provider == "any4d_fast" and line.ms > 0), key=lambda x: x.ms)
        refused = [line for line in chosen if line.note]
        print(f"{' '.join(key)}: {len(best)} configurations timed, {len(refused)} refused")
        for line in [*peers, *best[:3]]:
            print(
                f"  {line.provider:10s} {line.ms:8.4f} ms {line.tbps:5.2f} TB/s {line.percent_of_copy:5.1f} % "
                f"error {line.error:.1e} of {line.error_budget:.1e}  {line.config or line.note}"
            )
        for line in refused[:3]:
            print(f"  refused: {line.provider} {line.config} {line.note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv")
    parser.add_argument("--views", type=int, default=41)
    parser.add_argument("--only", choices=["compose_factors", "unproject"])
    parser.add_argument("--seconds", type=float, default=110, help="stop starting new problems after this long")
    arguments = parser.parse_args()
    # Gradients are taken again and again from one graph, which donated buffers forbid.
    torch._functorch.config.donated_buffer = False
    started, copy = time.time(), copy_tbps()
    lines: list[Line] = []
    for problem in problems(arguments.only):
        if time.time() - started > arguments.seconds:
            print(f"out of time before {problem.op} {problem.direction} {problem.dtype}")
            continue
        configs, peers = problem.configs, {"eager": False, "compile": True}
        same = [x for x in lines if (x.op, x.direction) == (problem.op, problem.direction) and x.ms > 0 and x.config]
        if same:  # the other dtype was swept in full: its four best are enough here
            names = [x.config for x in sorted(same, key=lambda x: x.ms)[:4]]
            described = {" ".join(f"{k}={int(v)}" for k, v in c._asdict().items()): c for c in configs}
            configs, peers = [described[name] for name in names], {"eager": False}
        lines += sweep(problem, arguments.views, copy, configs, peers)
        torch.cuda.empty_cache()
        print(f"{problem.op} {problem.direction} {problem.dtype} done at {time.time() - started:.0f} s", flush=True)
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Line)])
            writer.writeheader()
            writer.writerows(asdict(line) for line in lines)
    report(lines, copy)


if __name__ == "__main__":
    main()
