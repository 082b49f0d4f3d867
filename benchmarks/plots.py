"""Charts and README's tables from the recorded results: `python benchmarks/plots.py` (`make plots`).

Every CSV in `benchmarks/results/` gives a section with tables between README's markers and three charts beside the CSV;
those in `benchmarks/results/train/` are of training, and give the last section.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # `python benchmarks/plots.py` finds only the script's own folder

from benchmarks import tables, train_tables  # noqa: E402
from benchmarks.results import Row, read, results_folder  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "eager": "#9aa5b1",
    "compile": "#c58f2c",
    "cudnn": "#5b8c3e",
    "flash2": "#2f8f83",
    "flash_attn": "#5fb0a6",
    "flash4": "#1d6a60",
    "upstream": "#7a5aa8",
    "any4d_fast": "#c0392b",
}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit('plots need matplotlib: pip install "any4d-fast[viz]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def _colour(row: Row) -> str:
    return COLOURS.get(row.provider, "#444444")


def _label(row: Row) -> str:
    backend = f" {row.backend}" if row.backend and row.provider == tables.OURS else ""
    return f"{row.provider}{backend}" + ("" if row.precision == "exact" else f" {row.precision}")


def _legend(axes: Axes, columns: int = 8) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(
            list(unique.values()),
            list(unique),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=min(columns, len(unique)),
            fontsize=7,
            frameon=False,
            columnspacing=1.2,
            borderaxespad=0.2,
        )


def _bars(axes: Axes, groups: list[tables.Group], column: str) -> None:
    """Horizontal bars, one a provider, in groups of one a case."""
    ticks, names, position = [], [], 0.0
    for key, group in groups:
        known = [(row, value) for row in group if (value := row.number(column)) is not None]
        for i, (row, value) in enumerate(known):
            axes.barh(position + i, value, 0.9, color=_colour(row), label=_label(row))
            axes.annotate(f" {tables.number(value)}", (value, position + i), va="center", fontsize=6)
        ticks.append(position + max(len(known) - 1, 0) / 2)
        names.append(" ".join(key))
        position += len(known) + 0.7
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set_ylim(position, -1)
    axes.spines[["top", "right"]].set_visible(False)


def draw_ops(rows: list[Row], path: Path) -> None:
    """Milliseconds of every operator by provider."""
    pyplot = _pyplot()
    groups = tables.grouped(tables.op_rows(rows), "case", "direction", "size")
    bars = sum(len(group) for _, group in groups)
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.19 * bars), layout="constrained")
    _bars(axes, groups, "ms")
    axes.set_xscale("log")
    axes.set_xlabel(f"ms on {rows[0].gpu} (shorter is faster)")
    _legend(axes)
    _save(figure, path)


def _is_compute(row: Row, matmul: float, copy: float) -> bool:
    tflops, tbps = row.number("tflops"), row.number("tbps")
    return tflops is not None and tbps is not None and tflops / matmul >= tbps / copy


def draw_roofline(rows: list[Row], path: Path) -> None:
    """Rates against what the device reached in the same run: products over intensity, and bandwidth."""
    pyplot = _pyplot()
    copy = tables.ceiling(rows, "copy", "tbps") or 1.0
    matmul = tables.ceiling(rows, "matmul", "tflops") or 1.0
    ops = tables.op_rows(rows)
    products = [row for row in ops if _is_compute(row, matmul, copy)]
    moving = [row for row in ops if row not in products and row.tbps != ""]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.17 * max(len(moving), 20)), layout="constrained")
    for row in products:
        tflops, tbps = row.number("tflops") or 0.0, row.number("tbps") or 1.0
        ours = row.provider == tables.OURS
        left.scatter(tflops / tbps, tflops, s=28 if ours else 14, color=_colour(row), label=_label(row), zorder=3)
        if ours:
            text = f"{row.case} {row.direction} {row.size.split(' ')[0]}"
            left.annotate(text, (tflops / tbps, tflops), fontsize=6, xytext=(4, 3), textcoords="offset points")
    intensities = [(row.number("tflops") or 0.0) / (row.number("tbps") or 1.0) for row in products] or [1.0]
    ends = [min(*intensities, matmul / copy) / 2, max(*intensities, matmul / copy) * 3]
    roof = [ends[0] * (ends[1] / ends[0]) ** (i / 200) for i in range(201)]
    left.plot(roof, [min(x * copy, matmul) for x in roof], color="black", linewidth=1)
    left.set(xscale="log", ylim=(0, 1.05 * matmul), ylabel="TFLOP/s")
    left.set_xlabel(f"FLOP per byte that must move (line: matmul {tables.number(matmul)} TFLOP/s, copy)")
    left.spines[["top", "right"]].set_visible(False)
    _legend(left)
    _bars(right, tables.grouped(moving, "case", "direction", "size"), "tbps")
    right.axvline(copy, color="black", linewidth=1)
    right.set_xlabel(f"TB/s of bytes that must move (line: copy {tables.number(copy)} TB/s)")
    _legend(right)
    _save(figure, path)


def charted(rows: list[Row]) -> list[Row]:
    """The model's forward passes on images alone, ours as users choose; the tables have the rest."""
    return [
        row
        for row in tables.model_rows(rows)
        if row.direction == "fwd" and tables.is_plain(row)
        if row.provider != tables.OURS or row.backend in tables.FIRST_BACKENDS
    ]


def draw_model(rows: list[Row], path: Path) -> None:
    """Time and memory of the whole model over the number of views."""
    pyplot = _pyplot()
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    inference = charted(rows)
    counts = sorted({int(row.views) for row in inference})
    for axes, column, name in zip(both, ("ms", "peak_gb"), ("ms", "GB, weights and inputs included"), strict=True):
        for _, group in tables.grouped(inference, "provider", "backend", "precision"):
            points = [(int(r.views), r.number(column)) for r in group if r.number(column) is not None]
            first = group[0]
            style = "--" if first.precision != "exact" else "-" if first.backend in ("", "auto") else ":"
            axes.plot(*zip(*points, strict=True), style, marker="o", color=_colour(first), label=_label(first))
        axes.set(xscale="log", yscale="log", xlabel="views", ylabel=name)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        _legend(axes, columns=3)
    figure.supxlabel(f"{inference[0].size} on {inference[0].gpu}", fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    # Without the version of matplotlib in it, a chart of the same numbers is the same file.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    _pyplot().close(figure)


def draw(csv: Path) -> tuple[list[Row], list[Path]]:
    """All charts of one results file; (its rows, the charts)."""
    rows = read(csv)
    charts: list[Path] = []
    wanted = [("ops", draw_ops, tables.op_rows(rows)), ("roofline", draw_roofline, tables.op_rows(rows))]
    wanted.append(("model", draw_model, charted(rows)))
    for name, function, needed in wanted:
        if needed:
            charts.append(csv.with_name(f"{csv.stem}-{name}.png"))
            function(rows, charts[-1])
    return rows, charts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file whose tables are rewritten")
    options = parser.parse_args(arguments)
    sections = []
    for csv in sorted(results_folder().glob("*.csv")):
        rows, charts = draw(csv)
        if rows:
            sections.append(tables.section(rows, charts, options.readme, train_tables.parts(rows)))
            print(*charts, sep="\n")
    sections += train_tables.training(results_folder() / "train", options.readme)
    text = options.readme.read_text()
    try:
        changed = tables.rewrite(text, "\n\n".join(sections) or tables.NOTHING)
    except ValueError as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 1
    options.readme.write_text(changed)
    print(f"{options.readme}: {'rewritten' if changed != text else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
