"""Mends of Triton's CPU interpreter, so that kernels can be tested without a GPU.

Imported before any kernel when TRITON_INTERPRET=1 and never otherwise. In triton 3.6 to 3.9 the interpreter
multiplies the raw bits of bfloat16 operands in `tl.dot`, truncates float32 to bfloat16 where GPUs round to nearest
even, misrounds e4m3's subnormal numbers and wraps around beyond its largest where GPUs saturate, and asks for a driver
in `@triton.autotune`; 3.6 also takes `int()` of one-element arrays, forbidden in numpy 2.4.

A third of its time goes into repetitions that change nothing: all of the language is walked and patched anew for each
call of a device function, and types are described anew for each value. They are done once here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot
_get_np_dtype = interpreter._get_np_dtype
_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor
_type_for_tuple_values = tl.core._type_for_tuple_values
_numpy_types: dict[str, Any] = {}


def _rounding_convert(x: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(x).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded)
    if source == tl.bfloat16 and target == tl.float32:
        return np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16
    if source == tl.float32 and target == tl.float8e4nv:
        values = torch.from_numpy(np.array(x, dtype=np.float32)).clamp(-448.0, 448.0)
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return _convert_float(x, source, target, rounding)


def _upcast(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = _rounding_convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
    return _create_dot(self, _upcast(a), _upcast(b), d, *args)


def _first_config(self: Any, *args: Any, config: Any, **kwargs: Any) -> list[float]:
    return [0.0, 0.0, 0.0]


def _indexable(tensor: Any, *scope: Any) -> None:
    _patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(()))


def _patch_lang_once(function: Callable[..., Any]) -> Any:
    """What is patched already, by the launch around this call, stays so until that launch restores it."""
    seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if seen and not any(tl.core.is_builtin(language.load) for language in seen):
        return interpreter._LangPatchScope()
    return _patch_lang(function)


def _numpy_type(kind: Any) -> Any:
    scalar = kind.scalar
    found = _numpy_types.get(scalar.name)
    if found is None:
        found = _numpy_types[scalar.name] = _get_np_dtype(scalar)
    return found


@functools.cache
def _type_of_sizes(*sizes: int) -> Any:
    return _type_for_tuple_values(sizes)


def _tuple_type(values: Any, fields: Any = None) -> Any:
    """The type of a tuple; every tensor has two, of its sizes, as numbers and as constants."""
    if fields is None:
        sizes = [v.value if type(v) is tl.constexpr else v for v in values]
        if all(type(size) is int for size in sizes):
            return _type_of_sizes(*sizes)
    return _type_for_tuple_values(values, fields)


def install() -> None:
    """Patch the interpreter; call once, before kernels are decorated."""
    interpreter._convert_float = _rounding_convert
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang_tensor = _indexable
    interpreter._patch_lang = _patch_lang_once
    interpreter._get_np_dtype = _numpy_type
    tl.core._type_for_tuple_values = _tuple_type
    Autotuner._bench = _first_config
