"""Finds the compiled extension `any4d_fast._C`, or builds it just in time, or says why there is none.

In this order: the one that was built ahead of time, if it is made from the csrc/ that is here; one from the cache;
a new one, for the GPUs of this machine. The outcome, a failure too, holds for the life of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.machinery
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from any4d_fast import _build
from any4d_fast._toolkit import BuildError, find_toolkit, find_tools

__all__ = ["ExtensionMissing", "cache_folder", "missing", "module", "status"]

_NAME = "any4d_fast._C"
_KEEP_SECONDS = 30 * 24 * 3600
_LOCK = threading.RLock()
_OUTCOME: list[ModuleType | str] = []


class ExtensionMissing(RuntimeError):
    """The extension is neither built nor can it be built; the message is the reason."""


def module() -> ModuleType:
    """The extension. The first call on a machine with a GPU may build it, which takes a minute or so.

    Raises:
        ExtensionMissing: with the reason that `missing` returns.
    """
    outcome = _outcome()
    if isinstance(outcome, str):
        raise ExtensionMissing(f"the CUDA extension is missing: {outcome}")
    return outcome


def missing() -> str | None:
    """Why there is no extension, or None. The first call on a machine with a GPU may build it."""
    outcome = _outcome()
    return outcome if isinstance(outcome, str) else None


def _outcome() -> ModuleType | str:
    if not _OUTCOME:
        with _LOCK:
            if not _OUTCOME:
                _OUTCOME.append(_find_or_build())
    return _OUTCOME[0]


def _find_or_build() -> ModuleType | str:
    extension, why_not = _prebuilt()
    if extension is None:
        try:
            extension = _load(build_cached(_plan()))
        except (BuildError, ImportError) as error:
            return f"{why_not}; {error}" if why_not else str(error)
    sys.modules[_NAME] = extension
    return extension


def _prebuilt_file() -> Path | None:
    folder = Path(__file__).resolve().parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (folder / f"_C{suffix}").is_file():
            return folder / f"_C{suffix}"
    return None


def _prebuilt() -> tuple[ModuleType | None, str | None]:
    """The extension that was built with the package, or why it cannot be used."""
    path = _prebuilt_file()
    if path is None:
        return None, None
    try:
        extension = _load(path)
    except ImportError as error:
        return None, f"{path} cannot be imported: {error}"
    why_not = (
        _stale(extension)
        or _driver_too_old(extension.runtime_version(), extension.driver_version())
        or _for_other_gpus(extension)
    )
    if why_not is None:
        return extension, None
    return None, f"{path} is not used: {why_not}"


def _stale(extension: ModuleType) -> str | None:
    try:
        folder = _build.source_folder()
    except BuildError:
        return None
    if extension.sources_key() == _build.sources_key(folder):
        return None
    return f"{folder} has changed since it was built; install the package again"


def _for_other_gpus(extension: ModuleType) -> str | None:
    capabilities, _ = _visible_gpus()
    built = extension.architectures().split(",")
    if not capabilities or any(_build.architecture_for(capability, built) for capability in capabilities):
        return None
    return f"it was built for {_architectures(built)}; this machine's GPUs are of {_capabilities(capabilities)}"


def _architectures(names: Iterable[str]) -> str:
    return ", ".join(f"sm_{name}" for name in names)


def _capabilities(capabilities: Iterable[tuple[int, int]]) -> str:
    return "compute capability " + ", ".join(f"{major}.{minor}" for major, minor in sorted(set(capabilities)))


def _driver_too_old(runtime: int, driver: int) -> str | None:
    """Within a major release any driver runs any runtime; a driver of 0 means that there is none, or none is known."""
    if driver == 0 or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"it needs a driver for CUDA {runtime // 1000}, and this machine's is for CUDA {_release(driver)}; "
        "update the driver, or set CUDA_HOME to an older toolkit"
    )


def _release(version: int) -> str:
    """Such as "13.0", which CUDA calls 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _load(path: Path) -> ModuleType:
    # pybind11 keeps modules by their names: under the same name another file would be the first one's module, which may
    # be one that was found stale. The last part of the name says which initialiser Python looks for.
    spec = importlib.util.spec_from_file_location(f"{path}: {_NAME}", path)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def _visible_gpus() -> tuple[list[tuple[int, int]], int]:
    """Compute capabilities of the visible GPUs, and the newest CUDA that their driver runs (13000 is 13.0)."""
    import torch

    if not torch.cuda.is_available():
        return [], 0
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return capabilities, _driver_version()


def _driver_version() -> int:
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _plan() -> _build.Plan:
    """What would be built here, just in time: code for the visible GPUs.

    Raises:
        BuildError: something is absent, or there is no GPU to build for.
    """
    if _build.build_mode() == "0":
        raise BuildError("it was not built with the package, and ANY4D_FAST_BUILD_CUDA=0 forbids building it now")
    toolkit = find_toolkit()
    find_tools()
    capabilities, driver = _visible_gpus()
    if not capabilities:
        raise BuildError("no CUDA device is visible to PyTorch")
    too_old = _driver_too_old(toolkit.release[0] * 1000, driver)
    if too_old:
        raise BuildError(f"{toolkit.nvcc} is CUDA {toolkit.version}: {too_old}")
    known = _build.known_architectures(toolkit)
    names = {_build.architecture_for(capability, known) for capability in capabilities}
    found = tuple(name for name in known if name in names)
    if not found:
        raise BuildError(
            f"this machine's GPUs are of {_capabilities(capabilities)}, and with CUDA {toolkit.version} the kernels "
            f"are built for {_architectures(known)}"
        )
    return _build.make_plan(found, toolkit)


def cache_folder() -> Path:
    """Where extensions are kept: ANY4D_FAST_CACHE, or any4d_fast in XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        BuildError: none of them is set, and this user has no home.
    """
    if os.environ.get("ANY4D_FAST_CACHE"):
        return Path(os.environ["ANY4D_FAST_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "any4d_fast"
    try:
        return Path.home() / ".cache" / "any4d_fast"
    except RuntimeError as error:
        raise BuildError("this user has no home to keep the extension in; set ANY4D_FAST_CACHE to a folder") from error


def build_cached(plan: _build.Plan) -> Path:
    """The extension of `plan` in the cache, built if it is not there; processes that want it at once build it once.

    Raises:
        BuildError: the compiler failed, or the cache cannot be written.
    """
    root = cache_folder() / "cuda"
    output = root / plan.key / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    try:
        if output.is_file():
            return output
        output.parent.mkdir(parents=True, exist_ok=True)
        with _file_lock(root / "lock") as lock:
            if not output.is_file():
                _build_with_progress(plan, output, root, lock)
    except OSError as error:
        raise BuildError(f"the cache folder {root} cannot be used: {error}; set ANY4D_FAST_CACHE") from error
    return output


def _build_with_progress(plan: _build.Plan, output: Path, root: Path, lock: int) -> None:
    print(
        f"any4d_fast: compiling CUDA kernels for {_architectures(plan.architectures)} "
        f"with CUDA {plan.toolkit.version}, once, into {root} ...",
        end="",
        file=sys.stderr,
        flush=True,
    )
    start = time.monotonic()
    result = "failed"
    try:
        _build.build(plan, output, root / "objects", output.with_name("build.log"), lock)
        _prune(root / "objects", {step.object for step in plan.steps})
        result = "done"
    finally:
        print(f" {result} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _prune(objects: Path, keep: set[str]) -> None:
    """Delete objects that this build did not need and that are old."""
    oldest = time.time() - _KEEP_SECONDS
    for path in objects.glob("*.o*"):
        if path.name.split(".o")[0] + ".o" not in keep and path.stat().st_mtime < oldest:
            path.unlink()


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[int]:
    """Held by one process at a time, and given up when it and those that it gave the descriptor have ended, however."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("any4d_fast: waiting for another process that compiles CUDA kernels ...", file=sys.stderr, flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()


def status() -> tuple[bool, str]:
    """(available, what there is or why there is nothing), without building anything."""
    if _OUTCOME and not isinstance(_OUTCOME[0], str):
        return True, f"{_describe(_OUTCOME[0])} ({_OUTCOME[0].__file__})"
    if _OUTCOME:
        return False, str(_OUTCOME[0])
    prebuilt, why_not = _prebuilt()
    if prebuilt is not None:
        return True, f"built ahead of time, {_describe(prebuilt)}"
    try:
        plan = _plan()
    except BuildError as error:
        return False, f"{why_not}; {error}" if why_not else str(error)
    return True, f"compiled at first use with CUDA {plan.toolkit.version} ({plan.toolkit.nvcc})"


def _describe(extension: ModuleType) -> str:
    return f"CUDA {_release(extension.runtime_version())}, {_architectures(extension.architectures().split(','))}"
