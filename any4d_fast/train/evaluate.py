"""A model's metrics on clips that it has never seen, with every set of inputs that the paper's table 4 has."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch

from ..backends import BackendError
from ..head_loop import Outputs
from ..io.atomic import atomic_path
from ..model import Any4D
from .batch import Batch
from .metrics import Accumulator, evaluate
from .stream_config import StreamConfig

INPUT_SETS: dict[str, tuple[str, ...]] = {
    "images": (),
    "images + K": ("rays",),
    "images + K + poses": ("rays", "poses"),
    "images + K + depth": ("rays", "depth"),
    "images + K + poses + depth": ("rays", "poses", "depth"),
}
"""Inputs by row of the table. K gives each pixel's ray."""

HELD_OUT_CLIPS = 200


def evaluate_model(model: Any4D, batches: Iterable[Batch], inputs: Sequence[str] = ()) -> dict[str, float]:
    """Means (medians of rotation) of `metrics.evaluate` over all samples.

    Args:
        model: in evaluation mode; under the caller's autocast.
        batches: on the model's device.
        inputs: what the model is given besides images, of rays, depth and poses.
    """
    return evaluate_sets(model, batches, {"": inputs})[""]


@torch.no_grad()
def evaluate_sets(
    model: Any4D, batches: Iterable[Batch], input_sets: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """`evaluate_model` with each of several sets of inputs, by their names; every batch is made once."""
    found = {name: Accumulator() for name in input_sets}
    for batch in batches:
        for name, inputs in input_sets.items():
            outputs: list[Outputs] = model(batch.views(model.encoder.data_norm_type, inputs))
            found[name].add(evaluate(outputs, batch))
    return {name: accumulator.result() for name, accumulator in found.items()}


def held_out_table(
    model: Any4D,
    stream: StreamConfig | None = None,
    *,
    clips: int = HELD_OUT_CLIPS,
    batch_size: int = 8,
    seed: int = 0,
    precision: str = "bf16",
    input_sets: Mapping[str, Sequence[str]] = INPUT_SETS,
) -> list[dict[str, str | float]]:
    """A row of metrics for each set of inputs, on the same held-out synthetic clips.

    Args:
        model: in evaluation mode; the clips are rendered on its device.
        stream: what clips are drawn from; by default what `tiny` was trained on.
        clips, batch_size, seed: which held-out clips (`stream.held_out`), and how many at once.
        precision: "bf16" for autocast, or "fp32".
        input_sets: inputs by name of the row.

    Returns:
        `metrics`' names, and `flow_epe_dynamic_of_zero`: the error on moving pixels as a share of the error of
        predicting that nothing moves.
    """
    from .stream import held_out

    config = stream or StreamConfig()
    device = next(model.parameters()).device
    batches = held_out(config, clips, batch_size, device, seed)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        by_set = evaluate_sets(model, batches, input_sets)
    rows: list[dict[str, str | float]] = []
    for name, found in by_set.items():
        zero = found.get("flow_epe_dynamic_zero", 0.0)
        if zero:
            found["flow_epe_dynamic_of_zero"] = found["flow_epe_dynamic"] / zero
        rows.append({"inputs": name, **found})
    return rows


def write_table(rows: Sequence[Mapping[str, str | float]], path: Path, about: Mapping[str, str | int]) -> None:
    """The rows as CSV, each with what they are of (`about`: weights, clips, seed, ...) and where they came about."""
    context = {**about, **environment()}
    columns = [*dict.fromkeys(name for row in rows for name in row), *context]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow({**numbers, **context})


def environment() -> dict[str, str]:
    """Device, versions, commit and date of a result; ANY4D_FAST_COMMIT names the commit where git cannot."""
    from .. import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": gpu,
        "any4d_fast": __version__,
        "torch": torch.__version__,
        "commit": os.environ.get("ANY4D_FAST_COMMIT") or _commit(),
        "date": date.today().isoformat(),
    }


def _commit() -> str:
    """Of the checkout that this file is part of; nothing where it is installed, be it inside of another project."""
    here = Path(__file__)
    tracked = _git("ls-files", "--error-unmatch", here.name, folder=here.parent)
    return _git("rev-parse", "--short", "HEAD", folder=here.parent) if tracked else ""


def _git(*arguments: str, folder: Path) -> str:
    try:
        done = subprocess.run(("git", *arguments), capture_output=True, text=True, check=False, cwd=folder)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def evaluate_file(
    checkpoint: str | None,
    output: Path,
    *,
    preset: str | None = None,
    config: str = "tiny",
    clips: int = HELD_OUT_CLIPS,
    batch_size: int = 8,
    seed: int = 0,
    device: str | None = None,
    precision: str | None = None,
) -> list[dict[str, str | float]]:
    """Evaluate weights on the held-out clips of a training configuration's stream, and write the table.

    Args:
        checkpoint, preset: as for `pipeline.load_model`; by default `tiny` with the package's weights.
        output: the CSV.
        config: training configuration whose `[data.stream]` the clips are drawn from; its first size is used.
        clips, batch_size, seed: see `held_out_table`.
        device: a GPU where there is one by default.
        precision: "bf16" or "fp32"; by default bf16 on a GPU.

    Raises:
        CheckpointError, ConfigError, ValueError: something cannot be used; the message names it.
    """
    from ..pipeline import load_model
    from .config import TrainConfig

    stream = TrainConfig.load(config).data.stream
    model, trained = load_model(checkpoint, preset or (None if checkpoint else "tiny"), device)
    kind = next(model.parameters()).device.type
    precision = precision or ("bf16" if kind == "cuda" else "fp32")
    rows = held_out_table(model, stream, clips=clips, batch_size=batch_size, seed=seed, precision=precision)
    weights = Path(checkpoint).name if checkpoint else f"{preset or 'tiny'}{'' if trained else ' (random)'}"
    views, (height, width) = stream.num_views, stream.sizes[0]
    about: dict[str, str | int] = {
        "weights": weights,
        "clips": clips,
        "seed": seed,
        "views": views,
        "size": f"{width}x{height}",
    }
    write_table(rows, output, {**about, "precision": precision})
    return rows


SHOWN = (
    "depth_abs_rel", "depth_delta_1_25", "flow_epe_dynamic", "flow_epe_dynamic_of_zero", "track_apd",
    "rotation_degrees", "translation_error", "pose_auc_5", "scale_error",
)  # fmt: skip
"""Columns of the table on the screen; the CSV has all."""


def as_text(rows: Sequence[Mapping[str, str | float]]) -> str:
    """The main columns, aligned."""
    names = ("inputs", *(name for name in SHOWN if any(name in row for row in rows)))
    cells = [names]
    for row in rows:
        values = (row.get(name, "") for name in names)
        cells.append(tuple(f"{value:.4g}" if isinstance(value, float) else value for value in values))
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m any4d_fast.train.evaluate`: as `any4d-fast evaluate`, without the command line's packages."""
    parser = argparse.ArgumentParser(prog="python -m any4d_fast.train.evaluate", description=__doc__)
    parser.add_argument("--checkpoint")
    parser.add_argument("--preset")
    parser.add_argument("--output", type=Path, default=Path("heldout.csv"))
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--clips", type=int, default=HELD_OUT_CLIPS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=("bf16", "fp32"))
    options = vars(parser.parse_args(arguments))
    try:
        rows = evaluate_file(**options)
    except (ValueError, ImportError, OSError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
