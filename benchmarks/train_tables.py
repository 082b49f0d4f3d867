"""README's tables of training steps, of accelerated models, and of what `tiny` learnt; nothing in them is typed."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .results import Row
from .tables import OURS, by, cell, exponential, gain, grouped, markdown, number, picture

ABOUT_STEPS = {
    "auto": "; auto replays a step as one CUDA graph",
    "recompute": "; recompute too, and computes MLPs and heads again for the backward pass",
    "compile": "; compile: of the model, with the losses in eager mode",
}
"""What the table's caption says of a provider, or of a backend of ours."""

HELD_OUT, PARITY = "tiny_heldout.csv", "train_parity.csv"

# The heading, the metrics that share a cell, and how each is written.
METRICS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("depth AbsRel", ("depth_abs_rel",), "number"),
    ("delta < 1.25", ("depth_delta_1_25",), "share"),
    ("flow EPE on moving pixels, m", ("flow_epe_dynamic",), "number"),
    ("of the zero-flow baseline", ("flow_epe_dynamic_of_zero",), "share"),
    ("rotation, median degrees", ("rotation_degrees",), "number"),
    ("translation, m", ("translation_error",), "number"),
    ("pose AUC at 5 / 15 / 30 degrees", ("pose_auc_5", "pose_auc_15", "pose_auc_30"), "share"),
    ("scale error", ("scale_error",), "share"),
)


def timed(rows: Iterable[Row], suite: str) -> list[Row]:
    """Rows of a suite that have a time."""
    return [row for row in rows if row.suite == suite and row.ms != ""]


def _ratio(row: Row, other: Row | None, column: str) -> str:
    """A row's quantity as a share of another's."""
    mine, theirs = row.number(column), other and other.number(column)
    return _share(mine / theirs) if mine is not None and theirs else "-"


def _share(value: float) -> str:
    """Three digits at most: 9.87 %, 98.7 %, 100 %."""
    return f"{number(100 * value)} %"


def train_table(rows: Iterable[Row]) -> str:
    """One line a trainer and provider of `train_speed`: rates, memory, and both against PyTorch."""
    lines = []
    for (case, views, size), group in grouped(timed(rows, "train"), "case", "views", "size"):
        eager, compiled = by(group, "eager"), by(group, "compile")
        for row in group:
            name = f"{row.provider} ({row.backend})" if row.backend else row.provider
            ms = row.number("ms")
            lines.append(
                [
                    f"`{case}`, {size}, {views} views",
                    f"**{name}**" if row.provider == OURS else name,
                    number(1e3 / ms if ms else None),
                    cell(row),
                    cell(row, "peak_gb"),
                    gain(row, eager),
                    gain(row, compiled),
                    _ratio(row, eager, "peak_gb"),
                ]
            )
    header = ["trainer, batch", "provider", "steps/s", "ms a step", "peak GB"]
    return markdown([*header, "against eager", "against the faster compile", "memory, of eager's"], lines)


def accelerate_table(rows: Iterable[Row]) -> str:
    """One line a model or module and direction: times before and after, and errors of both."""
    found = sorted(timed(rows, "accelerate"), key=lambda row: row.size.partition(",")[0])
    compiles = any(row.provider == "compile" for row in found)
    lines = []
    for (size, direction), group in grouped(found, "size", "direction"):
        original, ours = by(group, "eager"), by(group, OURS)
        errors = [exponential(row and row.number("error")) for row in (ours, original)]
        others = [cell(by(group, "compile"))] * compiles
        views = group[0].views
        line = [f"{size}, {views} views", direction, cell(original), *others, f"**{cell(ours)}**", gain(ours, original)]
        lines.append([*line, " / ".join(errors)])
    header = ["model or module", "direction", "original ms", *["torch.compile ms"] * compiles, "accelerated ms"]
    return markdown([*header, "speed-up", "error, accelerated / original"], lines)


def parts(rows: list[Row]) -> list[str]:
    """What a GPU's section says of training steps and of accelerated models, as far as they were measured."""
    found = []
    steps = timed(rows, "train")
    if steps:
        names = {row.backend if row.provider == OURS else row.provider for row in steps}
        about = "".join(text for name, text in ABOUT_STEPS.items() if name in names)
        found.append(
            "Training: forward, losses, backward, clipping, AdamW and the average of the weights under bfloat16 "
            f"autocast; memory is all that is allocated{about}:"
        )
        found.append(train_table(rows))
    if timed(rows, "accelerate"):
        found.append(
            "Other people's models before and after `accelerate`, weights random, fwd without gradients, step forward "
            "and backward; errors against the original in float32:"
        )
        found.append(accelerate_table(rows))
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """Lines of a CSV by the names of its columns; none when there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _metric(line: Mapping[str, str], name: str, kind: str) -> str:
    """A metric of a line; a dash where it was not measured."""
    value = float(line.get(name) or math.nan)
    if math.isnan(value):
        return "-"
    return _share(value) if kind == "share" else number(value)


def _values(lines: Iterable[Mapping[str, str]], *names: str) -> list[str]:
    """What each of some columns holds, named by the column, where it holds anything."""
    pairs = [(name, ", ".join(sorted({line[name] for line in lines if line.get(name)}))) for name in names]
    return [f"{name} {values}" for name, values in pairs if values]


def held_out_table(lines: Sequence[Mapping[str, str]]) -> str:
    """One line a set of inputs."""
    known = [metric for metric in METRICS if any(line.get(name) for line in lines for name in metric[1])]
    cells = [
        [line["inputs"], *(" / ".join(_metric(line, name, kind) for name in names) for _, names, kind in known)]
        for line in lines
    ]
    return markdown(["inputs", *(heading for heading, _, _ in known)], cells)


def parity_sentence(path: Path) -> str:
    """How far fused and reference training lie apart.

    Raises:
        ValueError: the file lacks a run.
    """
    # The trainer's modules are of no use to the other tables.
    from .train_parity import SMOOTH, mean_distances, read

    curves = read(path)
    fused, others = (" and ".join(f"{100 * mean:.2g} %" for mean in sorted(means)) for means in mean_distances(curves))
    context = "; ".join(_values(read_table(path), "device", "torch", "commit", "date"))
    return (
        f"Over {len(curves['reference'])} training steps on the same seed and clips the losses with the fused "
        f"operators (means of {SMOOTH} steps) lie {fused} from those of plain PyTorch on average (clips of a batch in "
        f"two orders); runs of plain PyTorch that only add the clips of a batch in other orders lie {others} from them "
        f"({context})."
    )


def training(folder: Path, readme: Path) -> list[str]:
    """README's section of `tiny` on held-out clips and of training's parity: one, or none when neither is there."""
    found = []
    lines = read_table(folder / HELD_OUT)
    if lines:
        about = _values(lines, "weights", "clips", "seed", "views", "size", "precision", "device", "commit", "date")
        found.append(f"`tiny` on clips of the synthetic stream that no training saw ({'; '.join(about)}):")
        found.append(held_out_table(lines))
    if (folder / PARITY).exists():
        found.append(parity_sentence(folder / PARITY))
        chart = (folder / PARITY).with_suffix(".png")
        found += [picture(chart, readme)] if chart.exists() else []
    return ["\n\n".join(found)] if found else []
