"""Cases, and the correctness gate before every time.

A case is one op at one size in one direction with the providers to compare. Everything in it is lazy: listing cases
touches no device, and tensors exist only while a case is measured.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from any4d_fast.testing import ROUNDING

from .results import COLUMNS, Row, environment, read, record, results_path, short, table
from .timing import copy_tbps, matmul_tflops, peak_gb, reserved_gb, time_ms

__all__ = [
    "COLUMNS", "FULL", "Case", "Function", "Maker", "Row", "Session", "Sizes", "Unavailable", "backward", "ceilings",
    "compiled", "copy_tbps", "environment", "flat", "forward", "matmul_tflops", "measure", "op_case", "peak_gb",
    "providers", "random", "read", "record", "relative_error", "reserved_gb", "results_path", "table", "time_ms",
]  # fmt: skip

BUDGET_FACTOR = 2.0  # error at most twice plain PyTorch's, plus one rounding step
FEW_NUMBERS = 16
COMPILER = "inductor"
OURS = "any4d_fast"

Function = Callable[[], Any]
Maker = Callable[[Any], Function]


class Unavailable(RuntimeError):
    """A provider cannot run here (a package or a checkout is missing); the message is the reason."""


@dataclass(frozen=True)
class Sizes:
    """How large cases are: the model's real sizes, or tiny ones that a CPU runs in a test."""

    views: tuple[int, int, int] = (41, 8, 2)
    height: int = 336
    width: int = 518
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """Patches of 14 x 14 pixels in one view."""
        return (self.height // 14) * (self.width // 14)

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def image(self) -> str:
        return f"{self.width}x{self.height}"

    def rows(self, views: int) -> int:
        """Rows of the transformer's buffer: every patch of every view and the scale token."""
        return views * self.tokens + 1


FULL = Sizes()
"""41 views of 518 x 336, the clip length that the model was released for, and 8 and 2."""


def op_budgets(errors: Sequence[float], outputs: Sequence[Tensor]) -> list[float]:
    """DESIGN section 4: twice the error of plain PyTorch in the tested dtype, plus one rounding step.

    In an output of a few numbers (the gradient of one scale) plain PyTorch may be right by luck; there it counts as no
    better than its median over the outputs.
    """
    typical = sorted(errors)[len(errors) // 2]
    bases = [max(e, typical) if o.numel() < FEW_NUMBERS else e for e, o in zip(errors, outputs, strict=True)]
    return [BUDGET_FACTOR * base + ROUNDING[o.dtype] for base, o in zip(bases, outputs, strict=True)]


def flat(result: Any) -> list[Tensor]:
    """Floating-point tensors of a result, in order, whatever tuples they are nested in."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    return [] if result is None else [t for item in result for t in flat(item)]


@dataclass
class Case:
    """One op at one size in one direction.

    Attributes:
        op, direction, size, views, precision, suite: columns of the results.
        inputs: makes what the providers share.
        providers: "provider" or "provider:backend" to a function that turns the inputs into one run without arguments.
        oracle: the exact result from the same inputs, as a list; None when there is nothing to check.
        flops, bytes: what the op must compute, and the fewest bytes that must move; where both are given the slower
            one is the ceiling.
        matmul_dtype: whose matmul rate is the ceiling (float32 stands for TF32).
        baseline: the provider whose error sets the budget.
        compare: turns a provider's result into the list that is compared with the oracle's.
        budgets: errors allowed, one an output, from (the baseline's errors, its outputs).
        pooled: the outputs are draws of one thing, whose errors scatter; their geometric mean is judged.
        peer_slack: how many times the budget a provider that is not ours may err and still be timed.
        outputs: names of the compared outputs, when each is to have its own line in the results.
        gate: a smaller case with the same providers that is checked instead, where this size has no oracle.
        resident_gb: memory that a run of a provider, by name, needs and that `inputs` or a cache already hold; counted
            into the peak.
        reset: called before a provider is measured, to drop what another one left behind.
    """

    op: str
    direction: str
    size: str
    inputs: Callable[[], Any]
    providers: Mapping[str, Maker]
    oracle: Callable[[Any], list[Tensor]] | None = None
    flops: float = 0.0
    bytes: float = 0.0
    matmul_dtype: torch.dtype = torch.bfloat16
    views: int | str = ""
    baseline: str = "eager"
    precision: str = "exact"
    suite: str = "op"
    compare: Callable[[Any], list[Tensor]] = flat
    budgets: Callable[[Sequence[float], Sequence[Tensor]], list[float]] = op_budgets
    pooled: bool = False
    peer_slack: float = 1.0
    outputs: Sequence[str] = ()
    gate: Case | None = None
    resident_gb: Callable[[Any, str], float] = field(default=lambda inputs, name: 0.0)
    reset: Callable[[], None] = field(default=lambda: None)

    def __str__(self) -> str:
        precision = "" if self.precision == "exact" else f" {self.precision}"
        name = f"{self.op} {self.direction} {self.size}{precision}"
        return f"{name}, {self.views} views" if self.suite == "model" else name


def random(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values; the same for the same shape and seed."""
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def forward(function: Callable[..., Any]) -> Maker:
    """Provider of a forward pass: the inputs are the arguments."""
    return lambda inputs: lambda: function(*inputs)


def backward(function: Callable[..., Any]) -> Maker:
    """Provider of a backward pass alone, from (arguments, cotangents); gradients of every floating-point argument."""

    def make(inputs: tuple[Sequence[Any], Sequence[Tensor]]) -> Function:
        arguments, cotangents = inputs
        leaves = [a.detach().requires_grad_() if _floating(a) else a for a in arguments]
        wanted = [leaf for leaf in leaves if _floating(leaf)]
        outputs = flat(function(*leaves))
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
        roots, grads = [o for o, _ in pairs], [g for _, g in pairs]
        return lambda: torch.autograd.grad(roots, wanted, grads, retain_graph=True, allow_unused=True)

    return make


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def double(inputs: Sequence[Any]) -> list[Any]:
    """The same values in float64: the oracle sees inputs that are rounded to the tested dtype already."""
    return [value.double() if _floating(value) else value for value in inputs]


def cotangents(outputs: Sequence[Tensor], lean: bool = True) -> list[Tensor]:
    """Random cotangents of a backward pass.

    With `lean` they lean the same way at every position, so that sums over rows or pixels do not cancel to rounding.
    """
    found = []
    for i, output in enumerate(outputs):
        noise = random(*output.shape, device=str(output.device), seed=100 + i)
        lift = random(output.shape[-1] if output.shape[-1] <= 4096 else 1, device=str(output.device), seed=200 + i)
        found.append((lift + 0.5 * noise if lean else noise).to(output.dtype))
    return found


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a function, once, for static shapes; the backward pass can be run again and again."""

    @functools.cache
    def compile_once() -> Callable[..., Any]:
        import torch._functorch.config as config

        config.donated_buffer = False  # donated buffers forbid retain_graph
        return torch.compile(function, dynamic=False, backend=COMPILER)

    return lambda *arguments: compile_once()(*arguments)


def providers(op: Callable[..., Any], reference: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """An op eagerly, its reference through torch.compile, and its Triton kernels."""
    return {
        "eager": functools.partial(op, backend="eager"),
        "compile": compiled(reference),
        "any4d_fast:triton": functools.partial(op, backend="triton"),
    }


def op_case(
    op: str,
    direction: str,
    size: str,
    *,
    inputs: Callable[[], Sequence[Any]],
    functions: Mapping[str, Callable[..., Any]],
    exact: Callable[..., Any] | None = None,
    lean: bool = True,
    **options: Any,
) -> Case:
    """A case from plain functions of the same arguments, `exact` in float64 among them, in either direction.

    Raises:
        ValueError: unknown direction.
    """
    if direction not in ("fwd", "bwd"):
        raise ValueError(f"direction: expected 'fwd' or 'bwd', got {direction!r}")
    wrap = forward if direction == "fwd" else backward
    baseline = functions[options.get("baseline", "eager")]

    def make_inputs() -> Any:
        arguments = inputs()
        if direction == "fwd":
            return arguments
        with torch.no_grad():
            return arguments, cotangents(flat(baseline(*arguments)), lean)

    def oracle(given: Any) -> list[Tensor]:
        assert exact is not None
        wide = double(given) if direction == "fwd" else (double(given[0]), given[1])
        return flat(wrap(exact)(wide)())

    if exact is not None:
        options.setdefault("oracle", oracle)
    return Case(op, direction, size, make_inputs, {name: wrap(f) for name, f in functions.items()}, **options)


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """||actual - oracle|| / ||oracle|| in float64, where the tensors are; NaN anywhere gives NaN."""
    if actual.shape != oracle.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} differs from the oracle's {tuple(oracle.shape)}")
    chunk, square, scale = 1 << 26, 0.0, 0.0
    a, b = actual.detach().reshape(-1), oracle.detach().reshape(-1)
    for first in range(0, a.numel(), chunk):
        exact = b[first : first + chunk].double()
        square += (a[first : first + chunk].double() - exact).square().sum().item()
        scale += exact.square().sum().item()
    return (square / scale) ** 0.5 if scale > 0 else square**0.5


class Session:
    """One case while it is measured: inputs, exact results and budgets are made once, on first use."""

    def __init__(self, case: Case) -> None:
        self.case = case
        # A float32 product that the model leaves in its tokenizers and heads may use TF32, as upstream allows.
        # Without a GPU plain PyTorch would not round to TF32, and a kernel's rounding would look like an error.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.cuda.is_available()
        # A peer's convolution gets cuDNN's best algorithm; a model runs as PyTorch does by default.
        torch.backends.cudnn.benchmark = case.suite != "model"

    @functools.cached_property
    def inputs(self) -> Any:
        return self.case.inputs()

    @functools.cached_property
    def _exact(self) -> list[Tensor]:
        assert self.case.oracle is not None
        return self.case.oracle(self.inputs)

    @functools.cached_property
    def _baseline(self) -> tuple[list[float], list[float]]:
        """Errors of the baseline, and the budgets that follow."""
        outputs = self.case.compare(self.case.providers[self.case.baseline](self.inputs)())
        errors = self._compare(outputs)
        return errors, self.case.budgets(errors, outputs)

    def _compare(self, outputs: list[Tensor]) -> list[float]:
        errors = [relative_error(a, b) for a, b in zip(outputs, self._exact, strict=True)]
        return [math.exp(statistics.fmean(map(math.log, errors)))] if self.case.pooled and min(errors) > 0 else errors

    @functools.cached_property
    def _gate(self) -> Session | None:
        return None if self.case.gate is None else Session(self.case.gate)

    def close(self) -> None:
        """Let go of everything, compiled code included."""
        for name in ("inputs", "_exact", "_baseline", "_gate"):
            self.__dict__.pop(name, None)
        if any(name.startswith("compile") for name in self.case.providers):
            torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def check(self, name: str) -> list[tuple[float, float]]:
        """(error, budget) of every output of a provider; nothing when the case has no oracle."""
        if self._gate is not None:
            return self._gate.check(name)
        if self.case.oracle is None:
            return []
        baseline, budgets = self._baseline
        if name == self.case.baseline:
            return list(zip(baseline, budgets, strict=True))
        errors = self._compare(self.case.compare(self.case.providers[name](self.inputs)()))
        return list(zip(errors, budgets, strict=True))

    def _reserved_gb(self) -> float:
        """Memory that stays reserved between the runs of a model, beside the tensors of this session.

        A captured graph's pool is no allocation while the graph is replayed, and would be missing in the peak. Ops
        and modules capture nothing, and workspaces of libraries are none of theirs.
        """
        if self.case.suite != "model":
            return 0.0
        session = self._gate or self
        if session.case.oracle is not None:
            _ = session._baseline
        return reserved_gb()

    def measure(self, name: str) -> tuple[list[Row], Function | None]:
        """Check and time one provider.

        Returns:
            The row of the times, then one for each named output; and the timed run. A peer outside its budget is listed
            without a time, and its run is None.

        Raises:
            AssertionError: a provider of ours is outside its budget.
            Unavailable: the provider cannot run here.
        """
        case = self.case
        provider, _, backend = name.partition(":")
        precision = case.precision if provider == OURS else "exact"  # peers know no other
        row = functools.partial(Row, case.suite, provider=provider, backend=backend, precision=precision,
                                views=case.views, size=case.size, direction=case.direction)  # fmt: skip
        first = row(case.op)
        case.reset()
        reserved = self._reserved_gb()
        rows, checks = [first], self.check(name)
        for output, (error, budget) in zip(case.outputs, checks, strict=False):
            rows.append(row(f"{case.op}.{output}", error=short(error), error_budget=short(budget)))
        if checks:
            # NaN is worse than everything, and no comparison says so.
            error, budget = max(checks, key=lambda c: c[0] / c[1] if c[0] == c[0] else float("inf"))
            first.error, first.error_budget = short(error), short(budget)
            if provider == OURS and not error <= budget:
                raise AssertionError(f"{case} {name}: error {error:.2e} exceeds {budget:.2e}")
            if not error <= case.peer_slack * budget:
                return rows, None
        make = functools.partial(case.providers[name], self.inputs)
        make()()  # compiles, tunes and allocates workspaces that stay
        held = max(self._reserved_gb() - reserved, 0.0)
        function, peak = peak_gb(make)
        first.peak_gb = short(peak + held + case.resident_gb(self.inputs, name))
        first.ms, first.ms_p20, first.ms_p80 = (short(t) for t in time_ms(function, case.suite != "model"))
        _rate(first, case)
        return rows, function


def measure(case: Case, names: Sequence[str] | None = None) -> list[Row]:
    """Check and time the providers of a case, all or those named; see `Session.measure`."""
    session = Session(case)
    return [row for name in names or case.providers for row in session.measure(name)[0]]


def _rate(row: Row, case: Case) -> None:
    assert isinstance(row.ms, float)
    floors = []
    if case.flops:
        row.tflops = short(case.flops / row.ms / 1e9)
        floors.append(case.flops / matmul_tflops(case.matmul_dtype) / 1e9)
    if case.bytes:
        row.tbps = short(case.bytes / row.ms / 1e9)
        floors.append(case.bytes / copy_tbps() / 1e9)
    if floors:
        row.percent_of_ceiling = short(100 * max(floors) / row.ms)


def ceilings() -> list[Row]:
    """What the device reaches in this run: copy bandwidth and matmul rates."""
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "tf32")):
        rate = matmul_tflops(dtype)
        found.append(Row("op", "matmul", "fwd", "eager", "cublas", size=f"8192 {name}", tflops=short(rate)))
    found.append(Row("op", "copy", "fwd", "eager", size="1 GiB", tbps=short(copy_tbps())))
    return found
