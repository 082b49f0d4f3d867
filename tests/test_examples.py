"""The examples run as they are, and what they train gets better."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_a_loop_on_the_operators_alone_trains() -> None:
    command = [sys.executable, EXAMPLES / "train_with_ops.py", "--steps", "101", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 5 and losses[-1] < losses[0] / 2, done.stdout


def test_it_imports_the_operators_alone() -> None:
    tree = ast.parse((EXAMPLES / "train_with_ops.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "any4d" in (node.module or "")]
    assert [(node.module, [a.name for a in node.names]) for node in imported] == [("any4d_fast", ["ops"])]
    assert not any("any4d" in a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names)
