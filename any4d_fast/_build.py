"""The one definition of how csrc/ becomes `any4d_fast._C`, for setup.py (ahead of time) and `_ext.py` (just in time).

Every object's name holds a hash of what it is made from: its source with all that it includes, flags, compiler and
architectures. So a folder of objects can be kept through edits, branches and upgrades and never yields a stale one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from any4d_fast._toolkit import BuildError, Toolkit, Tools, find_toolkit, find_tools, output_of

__all__ = [
    "ARCHITECTURES",
    "BuildError",
    "Plan",
    "architecture_for",
    "build",
    "build_mode",
    "make_plan",
    "source_folder",
    "sources_key",
]

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
"""Every architecture that the extension is built for, as nvcc's `sm_` numbers."""

ONLY = {"*_sm90*.cu": ("90a",)}
"""Sources whose instructions exist on some architectures only; all others are compiled for every one."""

NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
"""Whose flags nvcc takes beside its own."""

NVCC_FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas=-v")
HOST_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
LINK_FLAGS = ("-shared", "-s", "-Wl,--exclude-libs,ALL", "-Wl,--no-undefined-version")
LIBRARIES = ("-ldl", "-lrt", "-lpthread")

_INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def build_mode() -> str:
    """ANY4D_FAST_BUILD_CUDA: "auto" (the default), "0" or "1".

    Raises:
        BuildError: it is something else.
    """
    mode = os.environ.get("ANY4D_FAST_BUILD_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        raise BuildError(f"ANY4D_FAST_BUILD_CUDA: expected auto, 0 or 1, got {mode!r}")
    return mode


def source_folder() -> Path:
    """The folder csrc/: inside the package when pip installed it, beside the package in a checkout.

    Raises:
        BuildError: there is none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise BuildError(f"the CUDA sources are neither in {package / 'csrc'} nor in {package.parent / 'csrc'}; reinstall")


def sources_key(folder: Path) -> str:
    """Hash of everything in csrc/ that is compiled; an extension built from other contents is stale."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
    return _hash(part for path in files for part in (path.name.encode(), path.read_bytes()))


def _hash(parts: Iterable[bytes | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def closure(source: Path) -> list[Path]:
    """A source and the files of its folder that it includes, directly or through others."""
    found, queue = [source], [source]
    while queue:
        for name in _INCLUDE.findall(queue.pop().read_bytes()):
            path = source.parent / name.decode()
            if path.is_file() and path not in found:
                found.append(path)
                queue.append(path)
    return [found[0], *sorted(found[1:])]


def known_architectures(toolkit: Toolkit) -> tuple[str, ...]:
    """Those of ARCHITECTURES that this nvcc can compile for."""
    codes = set(re.findall(r"sm_(\d+)", output_of(str(toolkit.nvcc), "--list-gpu-code")))
    return tuple(name for name in ARCHITECTURES if name.rstrip("af") in codes)


def requested_architectures(toolkit: Toolkit) -> tuple[str, ...]:
    """ANY4D_FAST_CUDA_ARCHS ("80;90a", "8.0 9.0a"), or everything that this nvcc knows.

    Raises:
        BuildError: the variable names an architecture that is not one of ARCHITECTURES, or that this nvcc lacks.
    """
    known = known_architectures(toolkit)
    names = re.split(r"[\s,;]+", os.environ.get("ANY4D_FAST_CUDA_ARCHS", "").strip())
    wanted = [name.removeprefix("sm_").replace(".", "") for name in names if name]
    wanted = ["90a" if name == "90" else name for name in wanted]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise BuildError(
            f"ANY4D_FAST_CUDA_ARCHS: expected some of {' '.join(known)} (with CUDA {toolkit.version}), got {unknown}"
        )
    return tuple(name for name in known if name in wanted) if wanted else known


def architecture_for(capability: tuple[int, int], among: Sequence[str] = ARCHITECTURES) -> str | None:
    """The architecture whose code a GPU runs: the newest of its own generation that is not newer than the GPU."""
    best: tuple[int, str] | None = None
    for name in among:
        number = int(name.rstrip("af"))
        major, minor = divmod(number, 10)
        # Code for sm_90a runs on 9.0 only; plain code on every later GPU of its generation.
        fits = minor == capability[1] if name.endswith("a") else minor <= capability[1]
        if major == capability[0] and fits and (best is None or minor > best[0]):
            best = (minor, name)
    return best[1] if best else None


@dataclass(frozen=True)
class Step:
    """One object: compiled from `source` by the rule `rule` with `flags`."""

    rule: str
    source: Path
    flags: tuple[str, ...]
    key: str

    @property
    def object(self) -> str:
        return f"{self.source.stem}-{self.key}.o"


@dataclass(frozen=True)
class Plan:
    """Everything that a build is made from."""

    toolkit: Toolkit
    tools: Tools
    architectures: tuple[str, ...]
    folder: Path
    steps: tuple[Step, ...]
    key: str
    """Hash of all of it: toolkit, flags, the sources' contents, Python's ABI."""

    @property
    def library(self) -> str:
        """The extension's name in the folder of objects."""
        return f"_C-{self.key}.so"

    @property
    def info(self) -> str:
        """The source of csrc/build_info.h's functions."""
        return (
            '#include "build_info.h"\n\nnamespace any4d {\n'
            f'const char* build_architectures() {{ return "{",".join(self.architectures)}"; }}\n'
            f'const char* build_sources_key() {{ return "{sources_key(self.folder)}"; }}\n}}\n'
        )


def make_plan(architectures: Sequence[str] | None = None, toolkit: Toolkit | None = None) -> Plan:
    """Find the tools and say what will be built.

    Args:
        architectures: some of ARCHITECTURES; by default what ANY4D_FAST_CUDA_ARCHS asks for, or all of them.
        toolkit: the CUDA toolkit; by default the one that `find_toolkit` finds.

    Raises:
        BuildError: something that the build needs is absent.
    """
    folder = source_folder()
    toolkit = toolkit or find_toolkit()
    tools = find_tools()
    names = tuple(architectures) if architectures is not None else requested_architectures(toolkit)
    steps = [step for path in sorted(folder.glob("*.cu")) if (step := _cuda_step(path, names, toolkit, tools))]
    steps += [_bindings_step(path, names, toolkit, tools) for path in sorted(folder.glob("*.cpp"))]
    key = _hash([*(step.key for step in steps), *LINK_FLAGS, *LIBRARIES, sources_key(folder), *names])
    return Plan(toolkit, tools, names, folder, tuple(steps), key)


def _cuda_step(source: Path, names: tuple[str, ...], toolkit: Toolkit, tools: Tools) -> Step | None:
    own = names
    for pattern, only in ONLY.items():
        if fnmatch.fnmatch(source.name, pattern):
            own = tuple(name for name in own if name in only)
    if not own:
        return None
    codes = tuple(f"-gencode=arch=compute_{name},code=sm_{name}" for name in own)
    flags = (*NVCC_FLAGS, f"-ccbin={tools.cxx}", "-Xcompiler=-fPIC,-fvisibility=hidden", *_defines(names), *codes)
    about = (toolkit.version, tools.cxx_version, *(os.environ.get(name, "") for name in NVCC_VARIABLES))
    return Step("nvcc", source, flags, _step_key(source, flags, *about))


def _bindings_step(source: Path, names: tuple[str, ...], toolkit: Toolkit, tools: Tools) -> Step:
    includes = [toolkit.include, tools.python_include, tools.pybind11_include]
    flags = (*HOST_FLAGS, *(f"-isystem{path}" for path in includes), *_defines(names))
    about = (tools.cxx_version, tools.pybind11_version, toolkit.version, str(sysconfig.get_config_var("SOABI")))
    return Step("cxx", source, flags, _step_key(source, flags, *about))


def _defines(names: Sequence[str]) -> tuple[str, ...]:
    """ANY4D_SM90A says that the sources for 90a are part of the build: without it, nothing may refer to them."""
    return ("-DANY4D_SM90A",) if "90a" in names else ()


def _step_key(source: Path, flags: Sequence[str], *about: str) -> str:
    return _hash([*about, *flags, *(part for path in closure(source) for part in (path.name, path.read_bytes()))])


_RULES = """\
ninja_required_version = 1.5
nvcc = {nvcc}
cxx = {cxx}

rule nvcc
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1; status=$$?; cat $out.log; exit $$status
  depfile = $out.d
  deps = gcc
  description = nvcc $out

rule cxx
  command = $cxx $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = cxx $out

rule link
  command = rm -f $out && $cxx {link} $in {cudart} {libraries} -o $out
  description = link $out

"""


def ninja_file(plan: Plan) -> str:
    """The build of `plan` in ninja's language."""
    text = _RULES.format(
        nvcc=_shell(plan.toolkit.nvcc),
        cxx=_shell(plan.tools.cxx),
        link=_shell(*LINK_FLAGS),
        cudart=_shell(plan.toolkit.cudart),
        libraries=" ".join(LIBRARIES),
    )
    for step in plan.steps:
        text += f"build {step.object}: {step.rule} {_path(step.source)}\n  flags = {_shell(*step.flags)}\n"
    text += f"build build_info.o: cxx build_info.cpp\n  flags = {_shell(*HOST_FLAGS, f'-I{plan.folder}')}\n"
    objects = " ".join([step.object for step in plan.steps] + ["build_info.o"])
    return text + f"build {plan.library}: link {objects}\n"


def _path(path: Path) -> str:
    """A path as ninja reads it; ninja quotes it for the shell."""
    return re.sub(r"([$ :\n])", r"$\1", str(path))


def _shell(*words: str | Path) -> str:
    """Words of a command as ninja reads them and the shell then does."""
    return " ".join(shlex.quote(str(word)) for word in words).replace("$", "$$")


def build(plan: Plan, output: Path, folder: Path, log: Path, lock: int | None = None) -> None:
    """Build the extension.

    Args:
        plan: what to build.
        output: the extension's file; replaced at once when everything is done, and deleted before, so that a build
            that fails leaves no older one in its place.
        folder: where objects are kept from one build to the next.
        log: what the compilers print.
        lock: descriptor of the file whose lock keeps others out of `folder`: compilers may outlive this process.

    Raises:
        BuildError: a compiler failed; the message holds its first error and the log's name.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    linked = folder / plan.library
    linked.unlink(missing_ok=True)
    run_ninja(plan, folder, log, plan.library, lock=lock)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        shutil.copyfile(linked, temporary)
        os.chmod(temporary, 0o755)
        os.replace(temporary, output)
    finally:  # a disk that is full keeps no part
        temporary.unlink(missing_ok=True)
    linked.unlink()


def run_ninja(plan: Plan, folder: Path, log: Path, *targets: str, lock: int | None = None) -> None:
    """Make some of a plan's files in `folder`: objects, or the library. `lock` is as of `build`.

    Raises:
        BuildError: as of `build`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    _write_if_changed(folder / "build_info.cpp", plan.info)
    _write_if_changed(folder / "build.ninja", ninja_file(plan))
    command = [plan.tools.ninja, "-v", *_jobs(), *targets]
    held = () if lock is None else (lock,)
    with log.open("wb") as stream:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, pass_fds=held
        )
    if done.returncode != 0:
        raise BuildError(f"compiling failed: {_first_error(log)} (everything is in {log})")


def _jobs() -> list[str]:
    return ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS", "").isdigit() else []


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _first_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\berror\b|\bfatal\b", line) and not line.startswith("[")]
    return (errors or lines[-1:] or ["ninja printed nothing"])[0].strip()
