"""Fused against reference training: `tiny` for 200 steps on the same seed and clips, and how far two references drift.

    python -m benchmarks.train_parity              # writes train_parity.csv and .png into benchmarks/results/train

Runs: the fused operators; the eager reference; the reference with every batch's clips in the opposite order, and in a
third one. Permuting a batch changes nothing but the order in which sums over clips are taken, so the distance between
the references is what rounding alone does to a training run. Inputs are given to every clip or to none (by the step's
parity), since draws would follow a clip's place in the batch. The curves are averages over `SMOOTH` steps.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from any4d_fast.train.batch import INPUTS, Batch
from any4d_fast.train.config import TrainConfig
from any4d_fast.train.evaluate import environment
from any4d_fast.train.schedule import ema_decay, learning_rate_factor, step_seed
from any4d_fast.train.sources import Fed
from any4d_fast.train.trainer import opened

from .results import results_folder

SMOOTH = 10
Curve = npt.NDArray[np.float64]

# Settings, and what is done to the order of the clips, by run.
RUNS = {
    "fused": ("auto", "given"),
    "fused, opposite order": ("auto", "opposite"),
    "reference": ("eager", "given"),
    "reference, opposite order": ("eager", "opposite"),
    "reference, rotated order": ("eager", "rotated"),
}
DECIDED = {"overall_prob": 1.0, "dropout_prob": 0.0, "ray_dirs_prob": 1.0, "depth_prob": 1.0, "cam_prob": 1.0,
           "sparse_depth_prob": 0.0, "metric_scale_hidden_prob": 0.0}  # fmt: skip


def ordered(batch: Batch, order: str) -> Batch:
    """The batch with its clips in another order."""
    index = torch.arange(len(batch), device=batch.images.device)
    index = {"given": index, "opposite": index.flip(0), "rotated": index.roll(max(1, len(batch) // 3))}[order]
    return Batch(**{name: tensor[index] for name, tensor in batch._tensors().items()})


def losses(config: TrainConfig, order: str) -> Curve:
    """The loss of every step."""
    found = []
    with opened(config, progress=False) as trainer:
        for step in range(config.schedule.steps):
            batch, _ = trainer.source.make(step)
            given = INPUTS if step % 2 else ()
            trainer.optimizer.set_rate(learning_rate_factor(step, config.schedule))
            trainer.runner.run([Fed(ordered(batch, order), given)], step_seed(config.run.seed, 0, step))
            trainer.average.update(ema_decay(step, config.schedule), trainer.optimizer.norm.isfinite())
            found.append(trainer.runner.statistics.take(trainer.world)["loss"])
    return np.array(found)


def smooth(curve: Curve) -> Curve:
    """Means over windows of `SMOOTH` steps."""
    width = min(SMOOTH, len(curve))
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def distances(curves: dict[str, Curve]) -> dict[str, Curve]:
    """By run, how far its smoothed curve is from the reference's, as a share of that."""
    base = smooth(curves["reference"])
    return {name: np.abs(smooth(curve) - base) / base for name, curve in curves.items() if name != "reference"}


def mean_distances(curves: dict[str, Curve]) -> tuple[list[float], list[float]]:
    """The means of `distances`: of the fused runs, and of the references that add in other orders."""
    means = {name: float(distance.mean()) for name, distance in distances(curves).items()}
    fused = [mean for name, mean in means.items() if name.startswith("fused")]
    return fused, [mean for name, mean in means.items() if not name.startswith("fused")]


def write(curves: dict[str, Curve], folder: Path) -> None:
    """train_parity.csv: a row a step."""
    folder.mkdir(parents=True, exist_ok=True)
    context = environment()
    with open(folder / "train_parity.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *curves, *context])
        for step, row in enumerate(zip(*curves.values(), strict=True)):
            writer.writerow([step, *(f"{value:.6g}" for value in row), *context.values()])


def read(path: Path) -> dict[str, Curve]:
    """The curves of a train_parity.csv.

    Raises:
        ValueError: a run is missing.
    """
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    missing = [name for name in RUNS if not lines or name not in lines[0]]
    if missing:
        raise ValueError(f"{path}: expected a column for each of {', '.join(RUNS)}; {', '.join(missing)} missing")
    return {name: np.array([float(line[name]) for line in lines]) for name in RUNS}


def plot(curves: dict[str, Curve], folder: Path) -> None:
    """train_parity.png: the curves, and below their distances from the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    base = smooth(curves["reference"])
    steps = np.arange(len(base)) + len(curves["reference"]) - len(base)
    for name, curve in curves.items():
        ours = name.startswith("fused")
        style = {"color": "tab:orange" if ours else "tab:gray", "linewidth": 1.6 if ours else 1.0}
        line = "--" if "order" in name else "-"
        top.plot(steps, smooth(curve), line, label=name, **style)
        if name != "reference":
            bottom.plot(steps, 100 * (smooth(curve) / base - 1), line, label=name, **style)
    top.set_ylabel(f"loss, mean of {SMOOTH} steps")
    top.legend()
    bottom.set_ylabel("from the reference, %")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(folder / "train_parity.png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=None, help="folder; benchmarks/results/train by default")
    options = parser.parse_args(arguments)
    folder = options.output or results_folder() / "train"
    curves: dict[str, Curve] = {}
    for name, (backend, order) in RUNS.items():
        with tempfile.TemporaryDirectory() as output:
            decided = [f"inputs.{key}={value}" for key, value in DECIDED.items()]
            own = [f"schedule.steps={options.steps}", f"schedule.warmup={options.steps // 10}"]
            assignments = [*decided, *own, "run.cuda_graph=false", *options.set, f"run.backend={backend}"]
            curves[name] = losses(TrainConfig.load(options.config, assignments, output=output), order)
        print(f"{name}: {curves[name][-min(SMOOTH, options.steps) :].mean():.4f} at the end", flush=True)
    write(curves, folder)
    plot(curves, folder)
    for name, distance in distances(curves).items():
        print(f"{name}: {100 * distance.mean():.3f} % from the reference, {100 * distance.max():.3f} % at most")
    fused, references = mean_distances(curves)
    within = max(fused) <= max(references)
    print("fused lies within the references' spread" if within else "fused lies OUTSIDE the references' spread")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
