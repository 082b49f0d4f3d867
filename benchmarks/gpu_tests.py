"""Record what `make test-gpu` ran: `python -m benchmarks.gpu_tests REPORT.xml... ` (pytest's JUnit files).

Writes `benchmarks/results/tests/<gpu>.csv`: one line a test file with counts, GPU, versions, commit and date. A file
that was not run this time keeps the line of its last run.
"""

from __future__ import annotations

import csv
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.results import environment, results_path

OUTCOMES = ("passed", "failed", "skipped")


def count(reports: list[Path]) -> dict[str, Counter[str]]:
    """Outcomes and seconds by test file."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            names = case.get("classname", "").split(".")
            module = next((i for i, n in enumerate(names) if n.startswith("test_")), len(names) - 1)
            line = found["/".join(names[: module + 1]) + ".py"]
            bad = case.find("failure") is not None or case.find("error") is not None
            line["failed" if bad else "skipped" if case.find("skipped") is not None else "passed"] += 1
            line["milliseconds"] += round(1000 * float(case.get("time", 0)))
    return found


def main(arguments: list[str]) -> int:
    """Write the CSV; the exit status is 1 when a test failed or none ran."""
    found = count([Path(a) for a in arguments])
    where = environment()
    path = results_path("tests")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    if path.exists():
        with open(path, newline="") as file:
            lines = {line[0]: line for line in list(csv.reader(file))[1:]}
    for name, line in found.items():
        values = [name, *(line[o] for o in OUTCOMES), line["milliseconds"] / 1000, *where.values()]
        lines[name] = [str(value) for value in values]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", *OUTCOMES, "seconds", *where])
        writer.writerows(line for _, line in sorted(lines.items()))
    total = Counter[str]()
    for line in found.values():
        total.update(line)
    print(f"{path}: {', '.join(f'{total[o]} {o}' for o in OUTCOMES)}")
    return int(total["failed"] > 0 or total["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
