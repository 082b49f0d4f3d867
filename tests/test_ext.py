"""The extension ahead of time, from the cache, just in time, or absent with the reason; with a made-up toolkit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from any4d_fast import _build, _ext, _toolkit, backends
from tests import fake_cuda

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from pathlib import Path
from tests import fake_cuda
from any4d_fast import _ext
fake_cuda.pretend(Path(sys.argv[1]))
print(_ext.missing() or _ext.module().answer())
"""


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    return fake_cuda.make_toolkit(tmp_path / "cuda")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return fake_cuda.make_sources(tmp_path / "csrc")


@pytest.fixture
def gpu(toolkit: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU, a compiler and an empty cache; returns the cache."""
    for name in ("CUDA_PATH", "ANY4D_FAST_BUILD_CUDA", "ANY4D_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("ANY4D_FAST_CACHE", str(tmp_path / "cache"))
    fake_cuda.pretend(sources, patch=monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def process(toolkit: Path, sources: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a process that wants the extension."""

    def start(**environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", BUILD, str(sources)],
            cwd=ROOT,
            env=fake_cuda.environment(toolkit, tmp_path / "cache", **environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(_ext, "_OUTCOME", [])


def test_just_in_time(gpu: Path, toolkit: Path, capfd: pytest.CaptureFixture[str]) -> None:
    available, what = _ext.status()
    assert available and what.startswith("compiled at first use with CUDA 13.0.88")
    assert fake_cuda.calls(toolkit) == []
    extension = _ext.module()
    assert (extension.answer(), extension.architectures()) == (42, "90a")
    assert _ext.missing() is None
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("any4d_fast: compiling CUDA kernels for sm_90a with CUDA 13.0.88, once, into ")
    assert line.endswith(" s") and "... done in " in line
    assert _ext.status()[1].startswith("CUDA 13.0, sm_90a (")


def test_second_build_is_a_cache_hit(
    gpu: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = _ext.module().__file__
    before = fake_cuda.calls(toolkit)
    capfd.readouterr()
    forget(monkeypatch)
    assert _ext.module().__file__ == first
    assert fake_cuda.calls(toolkit) == before
    assert capfd.readouterr().err == ""


def test_edited_source_is_built_anew(gpu: Path, toolkit: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ext.module()
    for value in (43, 42):
        (sources / "answer.cuh").write_text(f"constexpr int kAnswer = {value};\n")
        forget(monkeypatch)
        assert _ext.module().answer() == value
    # The last one came from the cache, and only what includes the header was compiled again for the one before.
    assert fake_cuda.calls(toolkit) == ["attention_sm90.cu", "other.cu", "tiny.cu", "tiny.cu"]


def test_two_processes_build_once(process: Callable[..., subprocess.Popen[str]], toolkit: Path) -> None:
    running = [process(FAKE_NVCC_SECONDS="1.5") for _ in range(2)]
    answers = [one.communicate(timeout=100) for one in running]
    assert [out for out, _ in answers] == ["42\n", "42\n"], answers
    assert fake_cuda.calls(toolkit) == ["attention_sm90.cu", "other.cu", "tiny.cu"]
    errors = "".join(err for _, err in answers)
    assert errors.count("compiling CUDA kernels") == 1


def test_killed_build_leaves_nothing_half_made(
    process: Callable[..., subprocess.Popen[str]], toolkit: Path, tmp_path: Path
) -> None:
    victim = process(FAKE_NVCC_SECONDS="5")
    wait_for_compilers(toolkit)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate(timeout=60)
    assert not list((tmp_path / "cache").rglob("*.so"))
    out, errors = process().communicate(timeout=100)
    assert out == "42\n", errors


def wait_for_compilers(toolkit: Path) -> None:
    deadline = time.monotonic() + 60
    while not fake_cuda.calls(toolkit) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_compilers_that_outlive_their_process_are_waited_for(
    process: Callable[..., subprocess.Popen[str]], toolkit: Path
) -> None:
    """A scheduler ends the process that builds, not its compilers: the next one must not write over what they write."""
    victim = process(FAKE_NVCC_SECONDS="3")
    wait_for_compilers(toolkit)
    victim.terminate()
    victim.communicate(timeout=60)
    out, errors = process().communicate(timeout=100)
    assert out == "42\n" and "waiting for another process that compiles" in errors, errors
    assert fake_cuda.calls(toolkit) == ["attention_sm90.cu", "other.cu", "tiny.cu"]


def test_failure_is_remembered_and_logged(
    gpu: Path, toolkit: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (sources / "tiny.cu").write_text("int tiny() { return nobody_declared_this; }\n")
    reason = _ext.missing()
    assert reason is not None and "compiling failed: " in reason and "nobody_declared_this" in reason
    log = Path(reason.split("everything is in ")[1].rstrip(")"))
    assert "nobody_declared_this" in log.read_text()
    assert "... failed in " in capfd.readouterr().err
    tries = fake_cuda.calls(toolkit)
    assert _ext.missing() == reason
    with pytest.raises(_ext.ExtensionMissing, match="the CUDA extension is missing: compiling failed"):
        _ext.module()
    assert _ext.status() == (False, reason)
    assert fake_cuda.calls(toolkit) == tries


def test_extension_that_cannot_be_imported(gpu: Path, sources: Path) -> None:
    (sources / "tiny.cu").write_text("int another_name() { return 1; }\n")
    reason = _ext.missing()
    assert reason is not None and "undefined symbol" in reason


def test_cache_that_cannot_be_written(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("ANY4D_FAST_CACHE", str(tmp_path / "a file"))
    reason = _ext.missing()
    assert reason is not None and "cannot be used" in reason and "set ANY4D_FAST_CACHE" in reason


def test_cache_that_cannot_even_be_looked_into(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's folder, which `is_file` raises on: here a name that no file system takes."""
    monkeypatch.setenv("ANY4D_FAST_CACHE", "/" + "a" * 300)
    reason = _ext.missing()
    assert reason is not None and "cannot be used" in reason and "set ANY4D_FAST_CACHE" in reason


def test_no_home(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANY4D_FAST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 2)  # a container's user, in no list
    assert _ext.missing() == "this user has no home to keep the extension in; set ANY4D_FAST_CACHE to a folder"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANY4D_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert _ext.cache_folder() == Path("/xdg/any4d_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _ext.cache_folder() == Path.home() / ".cache" / "any4d_fast"
    monkeypatch.setenv("ANY4D_FAST_CACHE", "/own")
    assert _ext.cache_folder() == Path("/own")


def test_old_objects_are_deleted(gpu: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ext.module()
    objects = gpu / "cuda" / "objects"
    (old,) = objects.glob("tiny-*.o")
    kept = set(objects.glob("other-*.o"))
    long_ago = time.time() - 40 * 24 * 3600
    for path in objects.glob("*.o*"):
        os.utime(path, (long_ago, long_ago))
    (sources / "answer.cuh").write_text("constexpr int kAnswer = 43;\n")
    forget(monkeypatch)
    assert _ext.module().answer() == 43
    assert not old.exists()
    assert len(list(objects.glob("tiny-*.o"))) == 1
    assert kept <= set(objects.glob("*.o"))


@pytest.mark.parametrize(
    ("capabilities", "driver", "message"),
    [
        ([], 0, "no CUDA device is visible to PyTorch"),
        (
            [(7, 5)],
            13000,
            "GPUs are of compute capability 7.5, and with CUDA 13.0.88 the kernels are built for sm_80, sm_86",
        ),
        ([(9, 0)], 12080, "needs a driver for CUDA 13, and this machine's is for CUDA 12.8; update the driver"),
    ],
)
def test_reasons_of_the_machine(
    gpu: Path,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: list[tuple[int, int]],
    driver: int,
    message: str,
) -> None:
    monkeypatch.setattr(_ext, "_visible_gpus", lambda: (capabilities, driver))
    available, reason = _ext.status()
    assert not available and message in reason
    assert _ext.missing() == reason


def test_several_gpus(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "_visible_gpus", lambda: ([(12, 0), (8, 0), (8, 0)], 13000))
    assert _ext.module().architectures() == "80,120"


def test_building_can_be_forbidden(gpu: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANY4D_FAST_BUILD_CUDA", "0")
    assert _ext.missing() == "it was not built with the package, and ANY4D_FAST_BUILD_CUDA=0 forbids building it now"
    assert fake_cuda.calls(toolkit) == []


def test_unknown_mode_is_a_reason(gpu: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANY4D_FAST_BUILD_CUDA", "off")
    assert _ext.missing() == "ANY4D_FAST_BUILD_CUDA: expected auto, 0 or 1, got 'off'"
    assert fake_cuda.calls(toolkit) == []


@pytest.fixture
def ahead_of_time(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extension beside the package, as setup.py builds it."""
    path = tmp_path / "package" / "_C.so"
    _build.build(_build.make_plan(["80", "90a"]), path, tmp_path / "objects", tmp_path / "log")
    monkeypatch.setattr(_ext, "_prebuilt_file", lambda: path)
    return path


def test_ahead_of_time_comes_first(ahead_of_time: Path, gpu: Path) -> None:
    assert _ext.status() == (True, "built ahead of time, CUDA 13.0, sm_80, sm_90a")
    assert _ext.module().__file__ == str(ahead_of_time)
    assert not gpu.exists()


def test_stale_extension_is_not_used(
    ahead_of_time: Path, gpu: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sources / "answer.cuh").write_text("constexpr int kAnswer = 43;\n")
    assert _ext.module().answer() == 43
    forget(monkeypatch)
    monkeypatch.setenv("ANY4D_FAST_BUILD_CUDA", "0")
    reason = _ext.missing()
    assert reason is not None
    assert f"{ahead_of_time} is not used: {sources} has changed since it was built; install the package again" in reason
    assert "ANY4D_FAST_BUILD_CUDA=0 forbids building" in reason


def test_every_file_is_a_module_of_its_own(tmp_path: Path) -> None:
    """As pybind11 makes modules: what is built just in time must not be the stale one that was looked at before."""
    source, built, other = tmp_path / "bindings.cpp", tmp_path / "_C.so", tmp_path / "cache" / "_C.so"
    source.write_text('#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) { m.attr("answer") = 42; }\n')
    tools = _toolkit.find_tools()
    includes = [f"-I{path}" for path in (tools.python_include, tools.pybind11_include)]
    subprocess.run([tools.cxx, "-std=c++17", "-shared", "-fPIC", *includes, source, "-o", built], check=True)
    other.parent.mkdir()
    shutil.copy(built, other)
    modules = [_ext._load(path) for path in (built, other)]
    assert [(module.__file__, module.answer) for module in modules] == [(str(built), 42), (str(other), 42)]


def test_extension_for_other_gpus_is_not_used(ahead_of_time: Path, gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "_visible_gpus", lambda: ([(12, 0)], 13000))
    assert _ext.module().architectures() == "120"
    forget(monkeypatch)
    monkeypatch.setenv("ANY4D_FAST_BUILD_CUDA", "0")
    reason = _ext.missing()
    assert reason is not None
    assert "it was built for sm_80, sm_90a; this machine's GPUs are of compute capability 12.0" in reason


def test_broken_extension_is_not_used(ahead_of_time: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead_of_time.write_text("not a library")
    monkeypatch.setenv("ANY4D_FAST_BUILD_CUDA", "0")
    reason = _ext.missing()
    assert reason is not None and f"{ahead_of_time} cannot be imported" in reason


INFO = """
import sys
from any4d_fast import _ext, _toolkit, info
_ext._prebuilt_file = lambda: None
if "nothing" in sys.argv:
    _toolkit._installed = lambda: iter(())
info.main([])
"""


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["nothing"], {"PATH": "/nowhere"}, "no CUDA compiler: CUDA_HOME is not set, and nvcc is not on PATH"),
        ([], {"CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere has no bin/nvcc"),
        ([], {"ANY4D_FAST_BUILD_CUDA": "0"}, "ANY4D_FAST_BUILD_CUDA=0 forbids building it now"),
        ([], {"CUDA_HOME": "broken"}, "broken/bin/nvcc --version fails with exit code 1: nvcc is broken"),
        ([], {"CUDA_HOME": "cuda"}, "no CUDA device is visible to PyTorch"),
    ],
    ids=["no compiler", "wrong home", "forbidden", "broken compiler", "no GPU"],
)
def test_info_prints_the_reason(
    tmp_path: Path, toolkit: Path, arguments: list[str], variables: dict[str, str], expected: str
) -> None:
    broken = fake_cuda.make_toolkit(tmp_path / "broken")
    (broken / "bin" / "nvcc").write_text("#!/bin/sh\necho 'nvcc is broken' >&2\nexit 1\n")
    dropped = ("CUDA_HOME", "CUDA_PATH", "ANY4D_FAST_BUILD_CUDA")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(
        [sys.executable, "-c", INFO, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  cuda "))
    assert line.split()[1] == "no" and expected in line


def test_driver_version_is_a_number() -> None:
    assert isinstance(_ext._driver_version(), int)


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`backends` on a machine with a GPU of compute capability 9.0 and an extension for sm_80 and sm_90a."""
    extension = SimpleNamespace(architectures=lambda: "80,90a")
    monkeypatch.setattr(_ext, "_OUTCOME", [extension])
    monkeypatch.setattr(backends, "capability", lambda index: (9, 0))
    monkeypatch.setattr(backends, "not_on_cuda", lambda runner, *tensors: [])
    backends._look_up_code_for.cache_clear()
    yield backends
    backends._look_up_code_for.cache_clear()


def test_cuda_reasons(reasons: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2)
    assert reasons.cuda_reasons(x, None) == []
    assert reasons.cuda_reasons() == []
    assert reasons.cuda_reasons(x, architecture="90a") == []
    assert reasons.cuda_reasons(x, architecture="100") == [
        "the kernel is for sm_100 only, and this GPU's compute capability is 9.0"
    ]
    assert reasons.cuda_reasons(x, minimum=(10, 0)) == ["compute capability 9.0 is older than 10.0"]
    assert reasons.cuda_reasons(x, torch.ones(2, device="meta")) == ["tensors are on several devices"]


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (
            SimpleNamespace(architectures=lambda: "80,100"),
            "was built for sm_80, sm_100, and this GPU's compute capability",
        ),
        ("no CUDA compiler", "the CUDA extension is missing: no CUDA compiler"),
    ],
)
def test_cuda_reasons_of_the_extension(
    reasons: ModuleType, monkeypatch: pytest.MonkeyPatch, outcome: object, expected: str
) -> None:
    monkeypatch.setattr(_ext, "_OUTCOME", [outcome])
    (reason,) = reasons.cuda_reasons(torch.ones(2))
    assert expected in reason


def test_cuda_reasons_off_the_gpu() -> None:
    # Nothing is looked for, so nothing is built, where it could not run.
    assert backends.cuda_reasons(torch.ones(2)) == ["tensors are on cpu; CUDA kernels run on CUDA devices"]


@pytest.mark.parametrize("outcome", [SimpleNamespace(architectures=lambda: "90a"), "no CUDA compiler"])
def test_cuda_reasons_under_compile(reasons: ModuleType, monkeypatch: pytest.MonkeyPatch, outcome: object) -> None:
    monkeypatch.setattr(_ext, "_OUTCOME", [outcome])
    monkeypatch.setitem(backends._REGISTRY, "probe", {"cuda": lambda *tensors: backends.cuda_reasons(*tensors)})

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 + y if backends.select("probe", None, x, y) == "cuda" else x - y

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 5):
        x, y = torch.ones(size), torch.full((size,), 2.0)
        expected = x - y if isinstance(outcome, str) else x * 2 + y
        torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)


def test_first_look_up_may_be_inside_compile(gpu: Path, reasons: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension is built, with its locks and subprocesses, while Dynamo traces."""
    monkeypatch.setattr(_ext, "_OUTCOME", [])

    def function(x: torch.Tensor) -> torch.Tensor:
        return x * len(backends.cuda_reasons(x, architecture="90a"))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.ones(2)), torch.zeros(2), rtol=0, atol=0)
    assert _ext.module().answer() == 42


def test_only_the_standard_library_is_needed_to_build() -> None:
    code = (
        "import sys; import any4d_fast._build, any4d_fast._toolkit; "
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert _toolkit.MINIMUM_CUDA <= (12, 8)
