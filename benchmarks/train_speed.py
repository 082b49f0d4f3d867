"""Steps a second and peak memory of one trainer on one batch: ours, PyTorch in eager mode, and torch.compile.

    python -m benchmarks.train_speed                                  # `tiny`, as it is trained
    python -m benchmarks.train_speed --set model.preset=any4d --set data.batch_size=4 \\
        --set "data.stream.sizes=[[336,518]]"

A step is forward, losses, backward, clipping and AdamW under bfloat16 autocast, and the average of the weights. All
providers draw the same inputs from the same seed. torch.compile has the model alone: the backward of the reference's
losses, which it fuses into one kernel, is what the Triton of PyTorch 2.11 fails on. Peak memory is everything that is
allocated, weights and the batch too. Rows are of the suite `train`; `ms` is the median over windows of steps, by the
host's clock.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import torch

from any4d_fast.train import step
from any4d_fast.train.config import TrainConfig
from any4d_fast.train.schedule import ema_decay, learning_rate_factor, step_seed
from any4d_fast.train.sources import Fed
from any4d_fast.train.trainer import Trainer, opened

from .results import Row, record, results_path, short, table

PROVIDERS: dict[str, list[str]] = {
    "eager": ["run.backend=eager"],
    "compile": ["run.backend=eager", "run.compile=true"],
    "compile:reduce-overhead": ["run.backend=eager", "run.compile=reduce-overhead"],
    "any4d_fast:nograph": ["run.backend=auto"],
    "any4d_fast:compile": ["run.backend=auto", "run.compile=true"],
    "any4d_fast:auto": ["run.backend=auto", "run.cuda_graph=true"],
    "any4d_fast:recompute": ["run.backend=auto", "run.cuda_graph=true", 'model.recompute=["mlp", "heads"]'],
}
"""Settings beyond the configuration's, by provider."""

WARM_UP, WINDOWS, WINDOW_SECONDS, LEAST = 8, 7, 0.5, 5


@contextlib.contextmanager
def losses_in_eager_mode(wanted: bool) -> Iterator[None]:
    """A graph break before the losses."""
    original = step.compute_losses
    if wanted:
        step.compute_losses = torch.compiler.disable(original)
    try:
        yield
    finally:
        step.compute_losses = original


def take_step(trainer: Trainer, fed: Fed) -> None:
    """What the trainer does in a step, on a batch that is there."""
    schedule = trainer.config.schedule
    trainer.optimizer.set_rate(learning_rate_factor(trainer.step, schedule))
    trainer.runner.run([fed], step_seed(trainer.config.run.seed, 0, trainer.step))
    trainer.average.update(ema_decay(trainer.step, schedule), trainer.optimizer.norm.isfinite())
    trainer.step += 1


def seconds(trainer: Trainer, fed: Fed, steps: int) -> float:
    """Of one step, over a window of them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        take_step(trainer, fed)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def measure(config: TrainConfig, provider: str) -> Row:
    """One provider's row.

    Raises:
        RuntimeError: a step's gradient was not finite, or a graph was asked for and not captured.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
    torch.cuda.reset_peak_memory_stats()
    with opened(config, progress=False) as trainer:
        fed = trainer.source.make(0)
        for _ in range(WARM_UP):
            take_step(trainer, fed)
        peak = torch.cuda.max_memory_allocated() / 1e9
        steps = max(LEAST, int(WINDOW_SECONDS / seconds(trainer, fed, LEAST)))
        times = sorted(1e3 * seconds(trainer, fed, steps) for _ in range(WINDOWS))
        if int(trainer.optimizer.skipped):
            raise RuntimeError(f"{provider}: {int(trainer.optimizer.skipped)} steps had no finite gradient")
        if config.run.cuda_graph and not trainer.runner.graphs:
            raise RuntimeError(f"{provider}: no CUDA graph was captured; the log says why")
    name, _, backend = provider.partition(":")
    height, width = fed.batch.images.shape[-2:]
    row = Row("train", config.model.preset, "step", name, backend)
    row.views, row.size = fed.batch.num_views, f"{width}x{height} batch {len(fed.batch)}"
    row.ms, row.ms_p20, row.ms_p80 = (short(t) for t in (statistics.median(times), times[1], times[-2]))
    row.peak_gb = short(peak)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="comma-separated")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 2
    rows, failed = [], []
    for provider in options.providers.split(","):
        with tempfile.TemporaryDirectory() as folder:
            plain = ["run.cuda_graph=false", "run.validate_every=0"]
            assignments = [*plain, *options.set, *PROVIDERS[provider]]
            try:
                with losses_in_eager_mode(provider.startswith("compile")):
                    row = measure(TrainConfig.load(options.config, assignments, output=folder), provider)
            except Exception as error:  # one provider must not take the others with it
                print(f"FAILED: {provider}: {error}", file=sys.stderr)
                failed.append(provider)
                continue
        print(f"{provider}: {1e3 / float(row.ms):.2f} steps/s, {row.peak_gb} GB", flush=True)
        rows.append(row)
        record([row])
    print(f"recorded in {results_path()}\n\n{table(rows)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
