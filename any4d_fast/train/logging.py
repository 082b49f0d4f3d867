"""What a run writes down as it goes: a CSV of scalars, TensorBoard where it is installed, and a progress bar."""

from __future__ import annotations

import csv
import io
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..io.atomic import atomic_path

logger = logging.getLogger("any4d_fast.train")

Picture = npt.NDArray[np.uint8]


class CsvLog:
    """Rows of numbers by step. A row is written at once or not at all, so that a reader never sees half of one."""

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        """Go on with a file, without the rows beyond step `resumed_at`: they will be written again."""
        self.path = path
        self.columns: list[str] = []
        kept = [row for row in self._read() if int(row["step"]) <= resumed_at]
        if path.exists():
            self._rewrite(kept)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or ())
            # A machine that failed may leave a cut row at the end; a disk that was full, one that goes on in the next.
            whole = (row for row in reader if None not in row and None not in row.values())
            return [row for row in whole if row.get("step", "").isdigit()]

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One row; new names become new columns."""
        row = {"step": str(step), **{name: f"{value:.6g}" for name, value in values.items()}}
        if not set(row) <= set(self.columns):
            before = self._read()
            self.columns = [*self.columns, *(name for name in row if name not in self.columns)]
            self._rewrite([*before, row])
            return
        line = io.StringIO()
        csv.DictWriter(line, self.columns, restval="", lineterminator="\n").writerow(row)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, line.getvalue().encode())
        finally:
            os.close(descriptor)


class Board:
    """TensorBoard, if it is installed (`pip install "any4d-fast[train]"`); else it says so once and does nothing."""

    def __init__(self, folder: Path, resumed_at: int = 0) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info('TensorBoard is not installed (pip install "any4d-fast[train]"); scalars go to metrics.csv')
            return
        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else None)

    def scalars(self, step: int, values: Mapping[str, float], group: str) -> None:
        """Numbers under `group/name`."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def picture(self, step: int, name: str, image: Picture) -> None:
        """An [H, W, 3] picture."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is waiting."""
        if self._writer is not None:
            self._writer.close()


class Bar:
    """Progress on standard error: a bar on a terminal, else a line at every log; nothing in other processes."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._total, self._first, self._shown = total, done, shown
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        if shown and sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            except ImportError:
                return
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def step(self, done: int) -> None:
        """So many steps are launched."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def log(self, done: int, values: Mapping[str, float]) -> None:
        """The newest numbers."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        elif self._shown:
            elapsed = time.monotonic() - self._start
            print(f"step {done}/{self._total}  {text}  {elapsed:.0f} s", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
