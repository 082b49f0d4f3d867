"""README's benchmark tables from recorded rows; nothing in them is typed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .results import Row

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OURS = "any4d_fast"
VENDORS = ("cudnn", "flash2", "flash_attn", "flash4", "cublas")
CEILINGS = ("copy", "matmul")
NOTHING = "No measurement is recorded yet: `make bench`, then `make plots`."

Group = tuple[tuple[str, ...], list[Row]]


def grouped(rows: Iterable[Row], *names: str) -> list[Group]:
    """Rows that agree in some columns, in the order in which they first appear."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(getattr(row, name)) for name in names), []).append(row)
    return list(found.items())


def op_rows(rows: Iterable[Row]) -> list[Row]:
    """Timed rows of operators, without the device's ceilings, sorted by operator."""
    chosen = [row for row in rows if row.suite == "op" and row.case not in CEILINGS and row.ms != ""]
    return sorted(chosen, key=lambda row: row.case)


def model_rows(rows: Iterable[Row]) -> list[Row]:
    """Timed rows of the whole model, by direction and number of views."""
    chosen = [row for row in rows if row.suite == "model" and row.ms != ""]
    return sorted(chosen, key=lambda row: (row.direction, int(row.views)))


def ceiling(rows: Iterable[Row], case: str, column: str) -> float | None:
    """The largest rate that the device reached at copying or at multiplying matrices."""
    rates = [row.number(column) for row in rows if row.case == case and row.suite == "op"]
    return max((rate for rate in rates if rate is not None), default=None)


def fastest(rows: Iterable[Row]) -> Row | None:
    """The fastest of some rows, or None."""
    timed = [row for row in rows if row.number("ms") is not None]
    return min(timed, key=lambda row: row.number("ms") or 0.0, default=None)


def by(rows: Iterable[Row], *providers: str) -> Row | None:
    """The fastest row of some providers."""
    return fastest(row for row in rows if row.provider in providers)


def peers(rows: Iterable[Row]) -> Row | None:
    """The fastest row that is not ours."""
    return fastest(row for row in rows if row.provider != OURS)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, and no exponent; a dash for None."""
    if value is None:
        return "-"
    if value != 0 and abs(value) >= 10**digits:
        return f"{value:,.0f}"
    text = f"{value:#.{digits}g}"
    return text.rstrip(".") if "e" not in text else f"{value:.{digits - 1}e}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def _rate(row: Row, matmul: float | None, copy: float | None) -> str:
    """TFLOP/s where products bound the case, else TB/s."""
    tflops, tbps = row.number("tflops"), row.number("tbps")
    if tflops is not None and (tbps is None or tflops / (matmul or 1e9) >= tbps / (copy or 1e9)):
        return f"{number(tflops)} TFLOP/s"
    return "-" if tbps is None else f"{number(tbps)} TB/s"


def _cell(row: Row | None, column: str = "ms") -> str:
    return "-" if row is None else number(row.number(column))


def _gain(ours: Row | None, peer: Row | None) -> str:
    """How many times faster ours is."""
    mine, theirs = ours and ours.number("ms"), peer and peer.number("ms")
    return f"{number(theirs / mine)}x" if mine and theirs else "-"


def op_table(rows: list[Row]) -> str:
    """One line a case: milliseconds by provider, ours against the ceiling and the fastest peer, memory."""
    matmul, copy = ceiling(rows, "matmul", "tflops"), ceiling(rows, "copy", "tbps")
    lines = []
    for (case, direction, size, views), group in grouped(op_rows(rows), "case", "direction", "size", "views"):
        ours, eager, vendor, peer = by(group, OURS), by(group, "eager"), by(group, *VENDORS), peers(group)
        lines.append(
            [
                f"`{case}` {direction}",
                f"{size}, {views} views",
                _cell(eager),
                _cell(by(group, "compile")),
                f"{_cell(vendor)} ({vendor.provider})" if vendor else "-",
                f"**{_cell(ours)}**",
                _rate(ours, matmul, copy) if ours else "-",
                f"{number(ours.number('percent_of_ceiling'), 2)} %" if ours else "-",
                _gain(ours, peer),
                f"{_cell(ours, 'peak_gb')} / {_cell(eager, 'peak_gb')}",
            ]
        )
    header = [
        *("operator", "size", "eager ms", "torch.compile ms", "vendor ms", "any4d_fast ms", "rate", "of ceiling"),
        *("against the fastest other", "peak GB, ours / eager"),
    ]
    return markdown(header, lines)


def model_table(rows: list[Row]) -> str:
    """One line a number of views: milliseconds and memory by provider."""
    timed = model_rows(rows)
    providers = [name for name in ("eager", "compile", "upstream") if any(r.provider == name for r in timed)]
    own = sorted({(row.precision, row.backend) for row in timed if row.provider == OURS})
    lines = []
    for (direction, views, size), group in grouped(timed, "direction", "views", "size"):
        others = [by(group, name) for name in providers]
        own_rows = [row for row in group if row.provider == OURS]
        ours = [fastest(row for row in own_rows if (row.precision, row.backend) == key) for key in own]
        best = fastest(row for row in own_rows if row.precision == "exact")
        cells = [f"{_cell(row)} / {_cell(row, 'peak_gb')}" if row else "-" for row in (*others, *ours)]
        gain = _gain(best, peers(group))
        share = f"{number(best.number('percent_of_ceiling'), 2)} %" if best and best.percent_of_ceiling != "" else "-"
        lines.append([f"{views} views, {size}, {direction}", *cells, share, gain])
    names = [f"any4d_fast {precision} ({backend})" for precision, backend in own]
    header = ["call", *(f"{name} ms / GB" for name in (*providers, *names)), "of ceiling", "against the fastest other"]
    return markdown(header, lines)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def accuracy_table(rows: list[Row]) -> str:
    """Errors of every output against float32, ours beside plain autocast, by number of views."""
    outputs = [
        r
        for r in rows
        if r.suite == "model" and "." in r.case and r.error != "" and r.direction == "fwd" and "inputs" not in r.size
        if r.provider != OURS or r.backend in ("auto", "")
    ]
    views = sorted({int(row.views) for row in outputs})
    lines = []
    for (case,), group in grouped(outputs, "case"):
        cells = []
        for count in views:
            by_provider = {row.provider: row.number("error") for row in group if int(row.views) == count}
            cells.append(" / ".join(_error(by_provider.get(name)) for name in (OURS, "eager")))
        lines.append([f"`{case.partition('.')[2]}`", *cells])
    return markdown(["output", *(f"{count} views" for count in views)], lines)


def _where(rows: list[Row]) -> str:
    """GPU, versions, commits and dates, as far as ours were measured under one of each."""
    parts = []
    for name in ("gpu", "driver", "torch", "triton", "cuda", "commit", "date"):
        values = sorted({str(getattr(row, name)) for row in rows if getattr(row, name)})
        if values:
            parts.append(", ".join(values) if name == "gpu" else f"{name} {', '.join(values)}")
    return "; ".join(parts)


def section(rows: list[Row], charts: Sequence[Path], readme: Path) -> str:
    """What README says about one GPU."""
    copy, matmul = ceiling(rows, "copy", "tbps"), ceiling(rows, "matmul", "tflops")
    about = f"{_where(rows)}. Ceilings in the same run: copy {number(copy)} TB/s, matmul {number(matmul)} TFLOP/s."
    parts = [about]
    if op_rows(rows):
        parts.append(op_table(rows))
    if model_rows(rows):
        parts.append("The whole model, random weights, batch 1; memory includes weights and inputs:")
        parts.append(model_table(rows))
        parts.append("Relative error per output against the model in float32, ours / plain bfloat16 autocast:")
        parts.append(accuracy_table(rows))
    for chart in charts:
        path = Path(os.path.relpath(chart, readme.parent)).as_posix()
        parts.append(f"![{chart.stem}]({path})")
    return "\n\n".join(parts)


def rewrite(text: str, body: str) -> str:
    """README's text with everything between the markers replaced.

    Raises:
        ValueError: the markers are missing, in the wrong order or there more than once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README: expected one {BEGIN} followed by one {END}; put both where the tables belong")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{body.strip()}\n{END}{rest.split(END)[1]}"
