"""Options of `pytest benchmarks`, cases as parameters, and the fixture that checks, times and records."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness import Case, Session, Unavailable, ceilings, record


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("any4d_fast benchmarks")
    group.addoption("--providers", default="", help="comma-separated providers to time, e.g. eager,any4d_fast")
    group.addoption("--quick", action="store_true", help="leave out what is compiled by torch.compile, and the model")
    group.addoption(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        help="begin no case after this long; what is left is skipped",
    )
    group.addoption("--upstream", default="", metavar="PATH", help="checkout of the original code to time beside ours")
    group.addoption("--dinov2", default="", metavar="PATH", help="checkout of DINOv2 for --upstream")


def pytest_configure(config: pytest.Config) -> None:
    for name in ("upstream", "dinov2"):
        if config.getoption(name):
            os.environ[f"ANY4D_FAST_{name.upper()}"] = str(config.getoption(name))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of a file with every provider; the providers of a case run next to each other and share its inputs."""
    if "case" in metafunc.fixturenames:
        pairs = [(case, provider) for case in metafunc.module.cases() for provider in case.providers]
        ids = [f"{case}-{provider}".replace(" ", "_") for case, provider in pairs]
        metafunc.parametrize(("case", "provider"), pairs, ids=ids)


class _Current:
    """The session of the case at hand; the one before is let go first, so that its memory is free."""

    def __init__(self, budget_seconds: float) -> None:
        self.session: Session | None = None
        self.begun, self.budget_seconds = time.monotonic(), budget_seconds

    def begins_too_late(self, case: Case) -> bool:
        """Whether the time is over; a case that has begun is finished, so that its providers stay comparable."""
        begun = self.session is not None and self.session.case is case
        return not begun and time.monotonic() - self.begun > self.budget_seconds

    def of(self, case: Case) -> Session:
        if self.session is None or self.session.case is not case:
            if self.session is not None:
                self.session.close()
            self.session = None
            self.session = Session(case)
        return self.session


@pytest.fixture(scope="session")
def current(request: pytest.FixtureRequest) -> _Current:
    if torch.cuda.is_available():
        record(ceilings())
    return _Current(request.config.getoption("budget_seconds"))


@pytest.fixture
def bench(benchmark: Any, current: _Current, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Check, time and record one provider of a case.

    The recorded times are medians of device events (`harness.time_ms`); pytest-benchmark's own table shows wall times
    of the same run with a synchronisation, launch overhead included.
    """
    if not torch.cuda.is_available():
        pytest.skip("benchmarks need a CUDA device")
    config = request.config
    chosen = [name for name in str(config.getoption("providers")).split(",") if name]

    def run(case: Case, provider: str) -> None:
        name = provider.partition(":")[0]
        if chosen and name not in chosen and provider not in chosen:
            pytest.skip(f"--providers names {', '.join(chosen)}")
        if config.getoption("quick") and (name == "compile" or case.suite == "model"):
            pytest.skip("left out by --quick")
        if current.begins_too_late(case):
            pytest.skip(f"--budget-seconds: {current.budget_seconds:g} s have passed")
        try:
            rows, function = current.of(case).measure(provider)
        except Unavailable as reason:
            pytest.skip(str(reason))
        record(rows)
        if function is None:
            pytest.skip(f"{case} {provider}: error {rows[0].error} exceeds {rows[0].error_budget}; not timed")
        for column in ("ms", "tflops", "tbps", "percent_of_ceiling", "peak_gb", "error", "error_budget"):
            benchmark.extra_info[column] = getattr(rows[0], column)

        timed = function

        def once() -> None:
            timed()
            torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=5, warmup_rounds=1)

    return run
