"""Frozen dataclasses <-> TOML: every key is checked against a field, every value against its type."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ..config import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def read(path: Path) -> dict[str, Any]:
    """The tables of a file.

    Raises:
        ConfigError: the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error


def override(table: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The tables with `key.subkey=value` set; values are TOML, and what is no TOML is text.

    Raises:
        ConfigError: an assignment without `=`, or through something that is no table.
    """
    out: dict[str, Any] = copy.deepcopy(table)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not equals or not all(names):
            raise ConfigError(f"--set: expected key=value, as in optimizer.lr=1e-4, got {assignment!r}")
        target: Any = out
        for name in names[:-1]:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set: {key}: {name!r} is a value, not a table")
        target[names[-1]] = _value(text.strip())
    return out


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a table; what the table does not name keeps its default.

    Raises:
        ConfigError: an unknown key (the message lists the known ones) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    unknown = sorted(set(table) - set(known))
    if unknown:
        place = f"[{where}]" if where else "the configuration"
        raise ConfigError(f"{place}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    values = {
        name: _converted(hints[name], value, f"{where}.{name}" if where else name) for name, value in table.items()
    }
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{f'[{where}]' if where else 'configuration'}: {error}") from error


def _converted(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _any_of(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, Mapping):
            return build(kind, value, where)
        raise ConfigError(f"{where}: expected a table [{where}], got {value!r}")
    if origin in (tuple, list, Sequence):
        return _sequence(origin, arguments, value, where)
    if origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return {name: _converted(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
        raise ConfigError(f"{where}: expected a table, got {value!r}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}")


def _any_of(kinds: Sequence[Any], value: Any, where: str) -> Any:
    errors = []
    for kind in kinds:
        if kind is type(None):
            if value is None:
                return None
            continue
        try:
            return _converted(kind, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _sequence(origin: Any, arguments: Sequence[Any], value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    if origin is tuple and Ellipsis not in arguments:
        if len(value) != len(arguments):
            raise ConfigError(f"{where}: expected {len(arguments)} values, got {value!r}")
        kinds: Sequence[Any] = arguments
    else:
        kinds = [arguments[0]] * len(value)
    items = [_converted(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))]
    return items if origin is list else tuple(items)


def as_table(config: Any) -> dict[str, Any]:
    """A dataclass as nested tables of plain values, without what is None: `build` makes the same dataclass of it."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init)
            return {name: plain(item) for name, item in pairs if item is not None}
        if isinstance(value, Mapping):
            return {str(name): plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    table: dict[str, Any] = plain(config)
    return table


def dumps(table: Mapping[str, Any], prefix: str = "") -> str:
    """The tables as TOML text."""
    lines = [f"{name} = {_text(value)}" for name, value in table.items() if not isinstance(value, Mapping)]
    for name, value in table.items():
        if isinstance(value, Mapping):
            path = f"{prefix}.{name}" if prefix else name
            lines += ["", f"[{path}]", dumps(value, path).rstrip("\n")]
    return "\n".join(lines).lstrip("\n").rstrip("\n") + "\n"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)
