"""Reading, checking and writing weights. Nothing is unpickled but tensors, and nothing is loaded by halves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import PRESETS, Any4DConfig, preset
from .config_upstream import from_upstream, to_upstream
from .io.atomic import atomic_path

logger = logging.getLogger("any4d_fast")

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
CONFIG_KEY = "any4d_fast.config"
STEPS_KEY = "any4d_fast.steps"
"""How many steps the weights were trained for, in the header of what the trainer exports."""

PACKAGED = Path(__file__).parent / "weights"
"""Trained weights that come with the package: `<preset>.safetensors`."""


class CheckpointError(ValueError):
    """Weights cannot be read or do not fit the model; the message names the file and the key."""


@dataclass(frozen=True)
class Mismatch:
    """What does not fit between a file's keys and a model's."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        parts = []
        for title, keys in (("missing", self.missing), ("unexpected", self.unexpected), ("mis-shaped", self.shapes)):
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                parts.append(f"{len(keys)} {title}: {', '.join(keys[:3])}{more}")
        return "; ".join(parts)


def find_checkpoint(source: str | os.PathLike[str]) -> Path:
    """The weights file of a path, a folder, a preset whose weights are in the package, or a Hugging Face repository.

    Raises:
        CheckpointError: when there is none, or the repository cannot be reached.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if len(found) != 1:
            names = [p.name for p in found] or "none"
            raise CheckpointError(f"{path}: expected one file of {', '.join(SUFFIXES)} in the folder, found {names}")
        return found[0]
    name = os.fspath(source)
    packaged = packaged_weights(name)
    if packaged is not None:
        return packaged
    looks_like_path = path.suffix in SUFFIXES or name.count("/") != 1 or name.startswith((".", "/", "~"))
    if looks_like_path:
        raise CheckpointError(f"{name}: no such file; give a {' or '.join(SUFFIXES)} file or a Hugging Face id")
    return _download(name)


def packaged_weights(name: str) -> Path | None:
    """The trained weights of a preset that come with the package; None where there are none.

    Raises:
        CheckpointError: they cannot be read, or are of another configuration than the preset's: never half-loaded.
    """
    path = PACKAGED / f"{name}.safetensors"
    if name not in PRESETS or not path.is_file():
        return None
    changed = _changed(dataclasses.asdict(stored_config(path)), dataclasses.asdict(preset(name)))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CheckpointError(
            f"{path}: these weights are of another configuration than the preset {name!r}: {', '.join(changed[:3])}"
            f"{more}; train them again, or remove the file to start from random weights"
        )
    return path


def _changed(stored: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Options, with dots, whose values differ between two configurations as dictionaries."""
    found: list[str] = []
    for name, value in now.items():
        if isinstance(value, Mapping):
            found += _changed(stored[name], value, f"{prefix}{name}.")
        elif stored[name] != value:
            found.append(f"{prefix}{name} {stored[name]!r} instead of {value!r}")
    return found


def _download(repository: str) -> Path:
    import huggingface_hub

    try:
        files = huggingface_hub.HfApi().list_repo_files(repository)
        weights = sorted((f for f in files if Path(f).suffix in SUFFIXES), key=lambda f: SUFFIXES.index(Path(f).suffix))
        if not weights:
            raise CheckpointError(f"{repository}: the repository holds no file of {', '.join(SUFFIXES)}")
        return Path(huggingface_hub.hf_hub_download(repository, weights[0]))
    except CheckpointError:
        raise
    except Exception as error:  # the hub raises its own, the HTTP client's and the operating system's errors
        raise CheckpointError(
            f"{repository}: neither a local file nor a Hugging Face repository that can be reached ({error})"
        ) from error


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by key from a `.safetensors` or a pickled file ({"model": ...} or the bare dictionary).

    Raises:
        CheckpointError: for a file that is missing, truncated, not a checkpoint, or a pickle that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: expected a file of {', '.join(SUFFIXES)}")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for key in ("model", "state_dict"):
        inner = loaded.get(key)
        if isinstance(inner, Mapping):
            loaded = inner
            break
    tensors: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: key {key!r} holds {type(value).__name__}, expected a tensor")
        tensors[key] = value
    if not tensors:
        raise CheckpointError(f"{path}: the checkpoint is empty")
    return tensors


def _read_safetensors(path: Path) -> Mapping[str, object]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, or truncated ({error})") from error


def _read_pickle(path: Path) -> Mapping[str, object]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: holds something other than plain tensors, or is damaged; files that would run code are not "
            f"read ({first})"
        ) from error
    except Exception as error:  # a damaged pickle fails in any of the unpickler's steps, with that step's own error
        raise CheckpointError(f"{path}: not a readable checkpoint, or truncated ({error})") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}")
    return loaded


def aliases(model: nn.Module) -> dict[str, str]:
    """State-dict key -> the key of the parameter or buffer that it is another name of (itself when it is not)."""
    seen: dict[int, str] = {}
    return {key: seen.setdefault(id(value), key) for key, value in model.state_dict(keep_vars=True).items()}


def _completed(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Fill in aliased keys from the name that the file does have; two different values are an error."""
    canonical = aliases(model)
    groups: dict[str, list[str]] = {}
    for key, first in canonical.items():
        groups.setdefault(first, []).append(key)
    out = dict(tensors)
    for keys in groups.values():
        given = [k for k in keys if k in tensors]
        for other in given[1:]:
            if not _same(tensors[given[0]], tensors[other]):
                raise CheckpointError(f"{path}: {given[0]} and {other} name one parameter but differ")
        if given:
            out.update({k: tensors[given[0]] for k in keys})
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def compare(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mismatch:
    """Keys and shapes that differ between a state dict and a model."""
    expected = model.state_dict()
    return Mismatch(
        missing=sorted(set(expected) - set(tensors)),
        unexpected=sorted(set(tensors) - set(expected)),
        shapes=[
            f"{k} {list(tensors[k].shape)} instead of {list(v.shape)}"
            for k, v in sorted(expected.items())
            if k in tensors and tensors[k].shape != v.shape
        ],
    )


def load_checkpoint(model: nn.Module, source: str | os.PathLike[str], *, strict: bool = True) -> Mismatch:
    """Load a file into a model, all or nothing.

    Args:
        model: the model; not touched when anything is wrong.
        source: path or Hugging Face id.
        strict: False loads every key that fits and reports the others in the result and the log.

    Raises:
        CheckpointError: the message names the file and the keys.
    """
    path = find_checkpoint(source)
    return load_tensors(model, read_state_dict(path), path, strict=strict)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, strict: bool = True) -> Mismatch:
    """Load what was read from a file into a model, all or nothing; see `load_checkpoint`.

    Raises:
        CheckpointError: the message names the file and the keys.
    """
    tensors = _completed(model, tensors, path)
    mismatch = compare(model, tensors)
    if mismatch and strict:
        raise CheckpointError(f"{path}: does not fit the model{_other_origin(path, model)}: {mismatch}")
    if mismatch:
        logger.warning("%s: loaded without %s", path, mismatch)
    wrong = {line.split(" ")[0] for line in mismatch.shapes}
    model.load_state_dict({k: v for k, v in tensors.items() if k not in wrong}, strict=False)
    return mismatch


def _other_origin(path: Path, model: nn.Module) -> str:
    """Where a file says of which model it is, and that is another one: its name."""
    config, stored = getattr(model, "config", None), _header_config(path)
    if not isinstance(config, Any4DConfig) or stored is None or stored.name == config.name:
        return ""
    return f" {config.name!r}, and its header says that it is of {stored.name!r}"


def load_submodules(model: nn.Module, source: str | os.PathLike[str], prefixes: list[str] | None) -> None:
    """Load only the keys that start with one of the prefixes (upstream's `specific_pretrained_submodules`).

    Raises:
        CheckpointError: when no prefix is given, or one matches nothing in the file, or a key does not fit.
    """
    path = find_checkpoint(source)
    if not prefixes:
        raise CheckpointError(
            f"{path}: specific_pretrained_submodules: expected a list of key prefixes, got {prefixes}"
        )
    tensors = _completed(model, read_state_dict(path), path)
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in tensors):
            raise CheckpointError(f"{path}: no key starts with {prefix!r} (specific_pretrained_submodules)")
    chosen = {k: v for k, v in tensors.items() if k.startswith(tuple(prefixes))}
    mismatch = compare(model, chosen)
    if mismatch.unexpected or mismatch.shapes:
        raise CheckpointError(f"{path}: does not fit the model: {Mismatch([], mismatch.unexpected, mismatch.shapes)}")
    model.load_state_dict(chosen, strict=False)


def _without_sources(config: Any4DConfig) -> Any4DConfig:
    """The configuration without the files that parts of the model once started from: weights are stored beside it."""
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, pretrained_checkpoint_path=None),
        transformer=dataclasses.replace(config.transformer, pretrained_checkpoint_path=None),
    )


def stored_config(path: Path) -> Any4DConfig:
    """The configuration stored in a `.safetensors` file, or the released architecture's.

    Raises:
        CheckpointError: for a stored configuration that cannot be read.
    """
    return _header_config(path) or preset("any4d")


def _header_config(path: Path) -> Any4DConfig | None:
    if path.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CONFIG_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, or truncated ({error})") from error
    if text is None:
        return None
    try:
        return _without_sources(from_upstream(**json.loads(text)))
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # no JSON, or not of a configuration's form
        raise CheckpointError(f"{path}: its stored configuration cannot be read ({error})") from error


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """What libraries raise when a disk is full or gone, each its own error, as an OSError that names the path."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def save_safetensors(
    tensors: Mapping[str, Tensor],
    canonical: Mapping[str, str],
    config: Any4DConfig,
    path: str | os.PathLike[str],
    *,
    steps: int | None = None,
) -> None:
    """Write each parameter once, under its canonical key, with the configuration in the header; atomically.

    `steps`: how many the weights were trained for, for the header.
    """
    from safetensors.torch import save_file

    once = {k: v.detach().contiguous().cpu() for k, v in tensors.items() if canonical.get(k, k) == k}
    metadata = {CONFIG_KEY: json.dumps(to_upstream(_without_sources(config))), "format": "pt"}
    if steps is not None:
        metadata[STEPS_KEY] = str(steps)
    with atomic_path(path) as temporary:
        save_file(once, temporary, metadata=metadata)


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], config: Any4DConfig | None = None) -> int:
    """Check a checkpoint against a configuration and write it as `.safetensors`; returns the number of tensors.

    Args:
        source: path or Hugging Face id.
        target: the file to write.
        config: by default the one that the file holds, or the released architecture's.

    Raises:
        CheckpointError: when it does not fit, or the target's suffix is another.
        OSError: it cannot be written to its end, as on a full disk; an older file stays as it was.
    """
    from .model import Any4D

    if Path(target).suffix != ".safetensors":
        raise CheckpointError(f"{target}: expected a path that ends in .safetensors")
    path = find_checkpoint(source)
    config = stored_config(path) if config is None else config
    with torch.device("meta"):
        model = Any4D.from_config(config)
    tensors = _completed(model, read_state_dict(path), path)
    mismatch = compare(model, tensors)
    if mismatch:
        raise CheckpointError(f"{path}: does not fit the model {config.name!r}: {mismatch}")
    canonical = aliases(model)
    with writing(target):
        save_safetensors(tensors, canonical, config, target)
    return len(set(canonical.values()))
