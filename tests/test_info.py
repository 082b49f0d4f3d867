"""The report of `python -m any4d_fast.info`, on this machine and on machines that lack something."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import any4d_fast
from any4d_fast import backends, info


def test_runs_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "any4d_fast.info", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["any4d_fast"] == any4d_fast.__version__
    assert report["cuda"]["available"] is False
    assert report["gpus"] == []
    assert report["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert report["packages"]["torch"] == importlib.metadata.version("torch")


def test_backends_are_those_described() -> None:
    reported = [(entry["name"], entry["available"], entry["reason"]) for entry in info.collect()["backends"]]
    assert reported == backends.describe()
    assert ("eager", True) in [entry[:2] for entry in reported]
    assert all(reason for _, available, reason in reported if not available)


def test_text_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    text = capsys.readouterr().out
    for expected in (any4d_fast.__version__, *info.PACKAGES, "python", "CUDA", "backends", "eager"):
        assert expected in text


def test_absent_package() -> None:
    assert info._version("a-package-that-nobody-wrote") == info.NOT_INSTALLED


def test_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=150 * 2**30, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    report = info.collect()
    assert report["gpus"] == [{"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 150.0, "multiprocessors": 132}]
    assert "NVIDIA H200, compute capability 9.0, 150.0 GiB, 132 multiprocessors" in info.render(report)


def test_broken_torch_is_part_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "any4d_fast.backends", None)
    report = info.collect()
    assert "torch cannot be imported" in report["cuda"]["error"]
    assert [entry["available"] for entry in report["backends"]] == [False]
    assert "torch cannot be imported" in info.render(report)


@pytest.mark.parametrize(
    ("output", "release"), [("Cuda compilation tools, release 13.0, V13.0.88", "13.0.88"), ("something else", None)]
)
def test_nvcc_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, release: str | None) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '{output}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert info._nvcc_release() == release


def test_no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert info._nvcc_release() is None
