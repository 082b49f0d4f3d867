"""`accelerate(model)`: other people's modules on these kernels, in place, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from . import dinov2, timm, uniception, vggt
from .checks import norm_reasons
from .recogniser import Recogniser
from .swap import Swap, owner, qualified, restore, swap, swapped_below
from .transformer import FusedLayerNorm

TABLE: tuple[Recogniser, ...] = (*uniception.TABLE, *dinov2.TABLE, *timm.TABLE, *vggt.TABLE)


@dataclass(frozen=True)
class Swapped:
    """A module that runs on ours: its path in the model, its class, and the ops that took over."""

    path: str
    cls: str
    ours: str


@dataclass(frozen=True)
class Kept:
    """A module of a known family that stays as it was: its path in the model, its class, and why."""

    path: str
    cls: str
    reason: str


@dataclass
class Report:
    """What `accelerate` found in a model; both lists are empty for one that it does not know.

    Attributes:
        swapped: modules that now run on ours.
        kept: modules of known families that do not fit, with the reason.
    """

    swapped: list[Swapped] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def __str__(self) -> str:
        """A table with a line for each class and outcome, how many there are and where the first one is."""
        if not self.swapped and not self.kept:
            return "nothing swapped: no module of a known family"
        cells = [("modules", "first", "class", "runs on")]
        cells += _grouped([(s.path, s.cls, s.ours) for s in self.swapped])
        cells += _grouped([(k.path, k.cls, f"as before: {k.reason}") for k in self.kept])
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([f"{len(self.swapped)} modules swapped, {len(self.kept)} kept", *lines])


def _grouped(found: list[tuple[str, str, str]]) -> list[tuple[str, str, str, str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for path, cls, outcome in found:
        groups.setdefault((cls, outcome), []).append(path or "(the model)")
    return [(str(len(paths)), paths[0], cls.rpartition(".")[2], outcome) for (cls, outcome), paths in groups.items()]


def accelerate(model: nn.Module) -> Report:
    """Run a model's known modules on any4d_fast's ops, in place, forward and backward.

    Known are modules of UniCeption (so Any4D's original code and MapAnything), DINOv2 from torch.hub, from timm and in
    other packages' copies, and VGGT; they are found by the name of their class, and what they are made of is checked.
    What does not fit stays as it is and is in the report; after an error everything is as it was. A swapped module
    keeps its parameters, buffers, hooks and submodules, so state dicts and optimizers go on working; its class becomes
    a subclass of what it was. Nothing global is changed. Gradients of gradients, and functorch's transforms, need
    `deaccelerate`.

    Call it before `fully_shard`; before or after DistributedDataParallel, `torch.compile`, `.to` or loading weights.
    Calling it again does nothing but report the same.

    Args:
        model: any module; changed in place.

    Returns:
        What runs on ours now, and what was kept and why.

    Raises:
        TypeError: `model` is no module.
    """
    _check(model)
    before = {module for module in model.modules() if isinstance(module, Swap)}
    try:
        return _swap_all(model)
    except BaseException:
        for module in model.modules():
            if isinstance(module, Swap) and module not in before:
                restore(module)
        raise


def _swap_all(model: nn.Module) -> Report:
    report = Report()
    for path, module in list(model.named_modules()):
        known = _find(module)
        if known is None:
            continue
        reasons = [] if isinstance(module, Swap) else known.why_not(module)
        name = _name(module)
        if reasons:
            report.kept.append(Kept(path, name, "; ".join(reasons)))
        elif known.swap is not None:
            _swap(module, known.swap)
            report.swapped.append(Swapped(path, name, known.ours))
        for child in known.norms:
            _norm(report, path, child, getattr(module, child, None))
    return report


def deaccelerate(model: nn.Module) -> list[str]:
    """Undo `accelerate`: every swapped module gets its own class back.

    Args:
        model: any module; changed in place.

    Returns:
        Paths of the modules that were restored.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: another library made a class of its own out of a swapped module's (`fully_shard` does); nothing
            is restored then.
    """
    _check(model)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Swap)]
    for path, module in found:
        if swapped_below(module):
            raise RuntimeError(
                f"model: expected modules as accelerate left them, got {path or 'the model'} with the class "
                f"{type(module).__name__}, which something else derived since; undo that first"
            )
    for _, module in found:
        restore(module)
    return [path for path, _ in found]


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")


def _find(module: nn.Module) -> Recogniser | None:
    cls = _original(module)
    return next((line for line in TABLE if line.matches(cls)), None)


def _original(module: nn.Module) -> type:
    """The class that a module has, or had before it was swapped."""
    return next((cls for cls in _originals(type(module))), type(module))


def _originals(cls: type) -> Iterator[type]:
    for base in cls.__mro__:
        if "swapped_by" in base.__dict__:
            yield base.original  # type: ignore[attr-defined]


def _name(module: nn.Module) -> str:
    return qualified(owner(_original(module)))


def _swap(module: nn.Module, by: type[Swap]) -> None:
    if not isinstance(module, Swap):
        swap(module, by)


def _norm(report: Report, path: str, child: str, norm: nn.Module | None) -> None:
    """Swap a LayerNorm that a known module holds."""
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.Identity):
        return
    where = f"{path}.{child}" if path else child
    reasons = [] if isinstance(norm, Swap) else norm_reasons(norm, "it")
    name = qualified(_original(norm))
    if reasons:
        report.kept.append(Kept(where, name, "; ".join(reasons)))
        return
    _swap(norm, FusedLayerNorm)
    report.swapped.append(Swapped(where, name, "layer_norm"))
