"""The training step never waits for the device, and torch.compile takes it whole: so a CUDA graph can hold it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from any4d_fast import Any4D, backends
from any4d_fast.train.batch import INPUTS, Batch
from any4d_fast.train.config import InputOptions, OptimizerOptions
from any4d_fast.train.losses import LossConfig
from any4d_fast.train.optimizer import Optimizer
from any4d_fast.train.step import Statistics, TrainingStep
from any4d_fast.train.stream import StreamConfig, held_out
from tests.dispatched import Waits
from tests.small_models import small_config


@pytest.fixture
def step() -> Iterator[TrainingStep]:
    torch.manual_seed(0)
    yield TrainingStep(Any4D.from_config(small_config()), InputOptions(), LossConfig()).train()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return next(iter(held_out(StreamConfig(num_views=2, sizes=((28, 42),), supersampling=1), 2, 2)))


def test_step_waits_for_nothing(step: TrainingStep, batch: Batch) -> None:
    optimizer = Optimizer(list(step.named_parameters()), OptimizerOptions(), sharded=False)
    statistics = Statistics()
    with Waits() as waits:
        with torch.autocast("cpu", torch.bfloat16):
            total, terms = step(batch, INPUTS)
        total.backward()
        optimizer.set_rate(0.5)
        optimizer.step()
        statistics.add(terms, optimizer.norm)
    assert waits.found == []


def test_step_compiles_as_one_graph(step: TrainingStep, batch: Batch) -> None:
    with backends.use_backend("eager"):
        torch.manual_seed(1)
        total, _ = step(batch, INPUTS)
        total.backward()
        gradient = step.model.scale_token.grad
        step.zero_grad()
        torch.manual_seed(1)
        compiled, _ = torch.compile(step, backend="aot_eager", fullgraph=True)(batch, INPUTS)
        compiled.backward()
    assert torch.allclose(total, compiled)
    assert gradient is not None and step.model.scale_token.grad is not None
    assert torch.allclose(gradient, step.model.scale_token.grad, rtol=1e-3, atol=1e-6)


def test_who_gives_what_is_drawn(step: TrainingStep, batch: Batch) -> None:
    """The model draws its inputs although it draws nothing on the host: the loss differs from seed to seed."""
    found = []
    for seed in (0, 1, 2, 0):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(step(batch, INPUTS)[0].item())
    assert found[0] == found[3] and len(set(found)) > 1
    step.train(False)
    with torch.no_grad():
        first, second = (step(batch, INPUTS)[0]["pts3d"] for _ in range(2))
    assert torch.equal(first, second)


def test_modules_are_in_training_mode(step: TrainingStep) -> None:
    assert not step.model.training
    assert all(module.training for module in step.model.children())
    assert not any(module.training for module in step.train(False).modules())
