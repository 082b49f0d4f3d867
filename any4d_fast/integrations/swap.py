"""Swapping one module's methods: its class becomes a subclass of itself, made here, and can be put back.

Parameters, buffers, hooks, flags and submodules stay where they are, so that a state dict, an optimizer, DDP's buckets
and `isinstance` notice nothing. Nothing is written to the class that is swapped, nor to its package.
"""

from __future__ import annotations

import copyreg
import weakref
from typing import Any, TypeVar

from torch import nn

from ..modules.plain import unhooked

_CLASSES: weakref.WeakValueDictionary[tuple[type, type], type] = weakref.WeakValueDictionary()

# Subclasses that UniCeption makes around one module for `torch.utils.checkpoint`: forward calls super().forward.
_WRAPPERS = (
    "uniception.models.encoders.base.UniCeptionViTEncoderBase.wrap_module_with_gradient_checkpointing",
    "uniception.models.info_sharing.base.UniCeptionInfoSharingBase.wrap_module_with_gradient_checkpointing",
)

T = TypeVar("T", bound="Swap")


def qualified(cls: type) -> str:
    """Module and qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def unwrapped(cls: type) -> type:
    """The class that a wrapper for gradient checkpointing was made around; any other class itself."""
    while any(qualified(cls).startswith(name) for name in _WRAPPERS):
        cls = cls.__bases__[0]
    return cls


def owner(cls: type, method: str = "forward") -> type:
    """The class that a method of `cls` comes from; wrappers for gradient checkpointing are looked through."""
    return next(base for base in unwrapped(cls).__mro__ if method in base.__dict__)


class Swap(nn.Module):
    """Methods that take the place of a module's own; `super()` in them is the module's own class."""

    original: type
    """The class that the module had; on the classes that `swap` makes."""

    swapped_by: type[Swap]

    @classmethod
    def extras(cls, original: type) -> dict[str, Any]:
        """Attributes of the class that is made for `original`."""
        return {}

    def _part(self, name: str) -> nn.Module | None:
        """A submodule; None where there is none, or one that does nothing and that nobody watches."""
        found = self._modules.get(name)
        return None if isinstance(found, nn.Identity) and unhooked(found) else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        found = super().__reduce_ex__(max(int(protocol), 2))
        made = type(self)
        if not isinstance(found, tuple) or found[0] is not copyreg.__newobj__ or not is_swapped(self):  # type: ignore[attr-defined]
            return found
        return (_blank, (made.original, made.swapped_by), *found[2:])


def _blank(original: type, swap: type[Swap]) -> nn.Module:
    """A module without state, for copies and pickles of a swapped one."""
    made = _class_for(original, swap)
    blank: nn.Module = made.__new__(made)  # type: ignore[call-overload]
    return blank


def _class_for(original: type, swap: type[Swap]) -> type:
    key = (original, swap)
    made = _CLASSES.get(key)
    if made is None:
        inner = unwrapped(original)
        # A wrapper's forward is to recompute ours: it stays in front, and what it was made around is swapped.
        bases = (swap, original) if inner is original else (original, _class_for(inner, swap))
        names = {"__module__": swap.__module__, "__doc__": swap.__doc__, "original": original, "swapped_by": swap}
        made = type(original)(f"Fast{inner.__name__}", bases, names | swap.extras(inner))
        _CLASSES[key] = made
    return made


def is_swapped(module: nn.Module) -> bool:
    """Whether a module runs on ours."""
    return "swapped_by" in type(module).__dict__


def swapped_below(module: nn.Module) -> bool:
    """Whether a module was swapped and something else then made its class a subclass of ours."""
    return isinstance(module, Swap) and not is_swapped(module)


def swap(module: nn.Module, by: type[Swap]) -> None:
    """Give a module our methods."""
    module.__class__ = _class_for(type(module), by)


def restore(module: nn.Module) -> None:
    """Give a swapped module its own methods back."""
    module.__class__ = type(module).original  # type: ignore[attr-defined]
