"""README's benchmark tables from recorded rows; nothing in them is typed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .results import Row

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OURS = "any4d_fast"
VENDORS = ("cudnn", "flash2", "flash_attn", "flash4", "cublas")
SIXTEEN_BITS = "16 bit"  # ends the backend of our 16-bit kernel where an 8-bit operator is compared with it
CEILINGS = ("copy", "matmul")
FIRST_BACKENDS = ("auto", "packed")  # what a user chooses from comes first
NOTHING = "No measurement is recorded yet: `make bench`, then `make plots`."

_FP8 = re.compile(r"[ _]fp8(?=$|[ .])")

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


def _in_eight_bits(row: Row) -> Row:
    """The row with 8 bits in its precision alone, so that it stands beside the exact rows of the same size."""
    case, size = (_FP8.sub("", text) for text in (row.case, row.size))
    if (case, size) == (row.case, row.size):
        return row
    return replace(row, case=case, size=size, precision="fp8" if row.provider == OURS else row.precision)


def model_rows(rows: Iterable[Row]) -> list[Row]:
    """Timed rows of the whole model, by direction and number of views."""
    chosen = [_in_eight_bits(row) for row in rows if row.suite == "model" and row.ms != ""]
    return sorted(chosen, key=lambda row: (row.direction, int(row.views)))


def is_plain(row: Row) -> bool:
    """Whether the model was given images alone, on the GPU: its size says nothing but the size."""
    return " " not in row.size


def is_ours(row: Row) -> bool:
    """Whether it ran our kernels in the precision that the case is about, not what they are compared with."""
    return row.provider == OURS and row.backend not in VENDORS and not row.backend.endswith(SIXTEEN_BITS)


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
    return fastest(row for row in rows if not is_ours(row))


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


def cell(row: Row | None, column: str = "ms") -> str:
    return "-" if row is None else number(row.number(column))


def gain(ours: Row | None, peer: Row | None) -> str:
    """How many times faster ours is."""
    mine, theirs = ours and ours.number("ms"), peer and peer.number("ms")
    return f"{number(theirs / mine)}x" if mine and theirs else "-"


def vendor_name(row: Row) -> str:
    """Whose kernel a row timed beside PyTorch's own and ours; empty for those. Ours in 16 bits counts beside 8."""
    if row.provider in VENDORS:
        return row.provider
    if row.provider != OURS or is_ours(row):
        return ""
    return "ours in 16 bits" if row.backend.endswith(SIXTEEN_BITS) else row.backend


def op_table(rows: list[Row]) -> str:
    """One line a case: milliseconds by provider, ours against the ceiling and the fastest peer, memory."""
    matmul, copy = ceiling(rows, "matmul", "tflops"), ceiling(rows, "copy", "tbps")
    lines = []
    for (case, direction, size, views), group in grouped(op_rows(rows), "case", "direction", "size", "views"):
        ours, eager, peer = fastest(filter(is_ours, group)), by(group, "eager"), peers(group)
        vendor = fastest(row for row in group if vendor_name(row))
        lines.append(
            [
                f"`{case}` {direction}",
                f"{size}, {views} views",
                cell(eager),
                cell(by(group, "compile")),
                f"{cell(vendor)} ({vendor_name(vendor)})" if vendor else "-",
                f"**{cell(ours)}**",
                _rate(ours, matmul, copy) if ours else "-",
                f"{number(ours.number('percent_of_ceiling'), 2)} %" if ours else "-",
                gain(ours, peer),
                f"{cell(ours, 'peak_gb')} / {cell(eager, 'peak_gb')}",
            ]
        )
    header = [
        *("operator", "size", "eager ms", "torch.compile ms", "vendor ms", "any4d_fast ms", "rate", "of ceiling"),
        *("against the fastest other", "peak GB, ours / eager"),
    ]
    return markdown(header, lines)


def model_table(rows: list[Row]) -> str:
    """One line a call: milliseconds and memory by provider. What is compared is ours as it chooses by itself."""
    timed = model_rows(rows)
    providers = [name for name in ("eager", "compile", "upstream") if any(r.provider == name for r in timed)]
    own = sorted({(row.precision, row.backend) for row in timed if row.provider == OURS}, key=_order)
    lines = []
    for (direction, views, size), group in grouped(timed, "direction", "views", "size"):
        own_rows = [row for row in group if row.provider == OURS]
        ours = [fastest(row for row in own_rows if (row.precision, row.backend) == key) for key in own]
        exact = [row for row in own_rows if row.precision == "exact"]
        best = fastest(row for row in exact if row.backend == "auto") or fastest(exact)
        cells = [
            f"{cell(row)} / {cell(row, 'peak_gb')}" if row else "-"
            for row in (*(by(group, name) for name in providers), *ours)
        ]
        share = f"{number(best.number('percent_of_ceiling'), 2)} %" if best and best.percent_of_ceiling != "" else "-"
        pixels, _, what = size.partition(" ")
        call = ", ".join(filter(None, (f"{int(views):,} views", pixels, what, direction)))
        lines.append([call, *cells, share, gain(best, peers(group))])
    names = [f"any4d_fast {precision} ({backend})" for precision, backend in own]
    header = ["call", *(f"{name} ms / GB" for name in (*providers, *names)), "of ceiling", "against the fastest other"]
    return markdown(header, lines)


def _order(key: tuple[str, str]) -> tuple[str, int, str]:
    precision, backend = key
    return precision, FIRST_BACKENDS.index(backend) if backend in FIRST_BACKENDS else len(FIRST_BACKENDS), backend


def exponential(value: float | None) -> str:
    """An error: two digits and an exponent."""
    return "-" if value is None else f"{value:.1e}"


def _output_rows(rows: Iterable[Row]) -> list[Row]:
    """Errors of the outputs of a forward pass on images, ours as it chooses by itself."""
    return [
        _in_eight_bits(row)
        for row in rows
        if row.suite == "model" and "." in row.case and row.error != "" and row.direction == "fwd"
        if is_plain(_in_eight_bits(row)) and (row.provider != OURS or row.backend in ("auto", ""))
    ]


def accuracy_columns(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """What stands in a cell of the table of errors, in order: (provider, precision) to its name."""
    names = {(OURS, "exact"): "ours", ("eager", "exact"): "plain bfloat16 autocast"}
    if any(row.precision == "fp8" for row in _output_rows(rows)):
        names = {(OURS, "exact"): "ours exact", (OURS, "fp8"): "ours fp8", ("eager", "exact"): names["eager", "exact"]}
    return names


def accuracy_table(rows: list[Row]) -> str:
    """Errors of every output against float32, ours beside plain autocast, by number of views."""
    outputs, columns = _output_rows(rows), accuracy_columns(rows)
    views = sorted({int(row.views) for row in outputs})
    lines = []
    for (case,), group in grouped(outputs, "case"):
        cells = []
        for count in views:
            found = {(r.provider, r.precision): r.number("error") for r in group if int(r.views) == count}
            cells.append(" / ".join(exponential(found.get(key)) for key in columns))
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


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def op_notes(rows: Iterable[Row]) -> list[str]:
    """What must be known to read some lines of the operators' table."""
    names = sorted({row.case for row in op_rows(rows) if "fp8" in row.case})
    if not names:
        return []
    halved = sorted({row.case for row in op_rows(rows) if row.precision == "fp8"})
    text = f"Eager {code(names)}: plain PyTorch that emulates the roundings to 8 bits. Ceilings are those of 16 bits"
    return [text + (f"; {code(halved)} counts a product in 8 bits as half of one." if halved else ".")]


def model_notes(rows: Iterable[Row]) -> str:
    """What the model's table is of."""
    found = model_rows(rows)
    parts = ["The whole model, random weights, batch 1; memory includes weights and inputs"]
    if any(row.backend == "packed" for row in found):
        parts.append("packed: float32 weights in host memory")
    if any(row.backend == "recompute" for row in found):
        parts.append("recompute: MLPs and heads computed again for the backward pass")
    if any("host to host" in row.size for row in found):
        parts.append("host to host: from images in host memory to outputs there, by the host's clock")
    return "; ".join(parts) + ":"


def section(rows: list[Row], charts: Sequence[Path], readme: Path, more: Sequence[str] = ()) -> str:
    """What README says about one GPU: the model, `more`, the operators, the charts."""
    copy, matmul = ceiling(rows, "copy", "tbps"), ceiling(rows, "matmul", "tflops")
    about = f"{_where(rows)}. Ceilings in the same run: copy {number(copy)} TB/s, matmul {number(matmul)} TFLOP/s."
    parts = [about]
    if model_rows(rows):
        parts += [model_notes(rows), model_table(rows)]
    if _output_rows(rows):
        names = " / ".join(accuracy_columns(rows).values())
        parts.append(f"Relative error per output against the model in float32, {names}:")
        parts.append(accuracy_table(rows))
    parts += more
    if op_rows(rows):
        parts += ["The operators, one by one:", op_table(rows), *op_notes(rows)]
    parts += [picture(chart, readme) for chart in charts]
    return "\n\n".join(parts)


def picture(path: Path, readme: Path) -> str:
    """A picture in README, by its place relative to it."""
    return f"![{path.stem}]({Path(os.path.relpath(path, readme.parent)).as_posix()})"


def rewrite(text: str, body: str) -> str:
    """README's text with everything between the markers replaced.

    Raises:
        ValueError: the markers are missing, in the wrong order or there more than once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README: expected one {BEGIN} followed by one {END}; put both where the tables belong")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{body.strip()}\n{END}{rest.split(END)[1]}"
