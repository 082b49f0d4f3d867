"""One optimizer step: forward, losses, backward, update; in eager mode or as a CUDA graph, and never waiting.

Statistics add up on the device and are read when they are logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ModalityConfig
from ..head_loop import Outputs
from ..model import Any4D
from .batch import Batch
from .config import InputOptions, TrainConfig
from .inputs import training_views
from .losses import LossConfig, compute_losses
from .optimizer import Optimizer, part_of
from .parallel import World
from .sources import Fed

logger = logging.getLogger("any4d_fast.train")

WARM_UP = 2
"""Steps of a size before its graph is captured: the first builds kernels, the second is watched for waits."""

_PACKAGE = Path(__file__).parents[1]


class TrainingStep(nn.Module):
    """The model with its inputs' draws and its losses, so that what wraps it wraps all of a step.

    Attributes:
        sharded: its parameters are sharded over processes: those of inputs that a batch lacks get a gradient of zero,
            because FSDP exchanges what has one, and that must be the same in all processes.
    """

    def __init__(self, model: Any4D, inputs: InputOptions, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.loss = loss
        self.modalities = inputs.drawn_by_model()
        self.sharded = False

    def train(self, mode: bool = True) -> TrainingStep:
        super().train(mode)
        # The model's own flag decides how its inputs are drawn, and nothing else: off, the same probabilities are drawn
        # on the device alone. Its modules are in training mode all the same.
        self.model.training = False
        return self

    def forward(self, batch: Batch, given: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]] | list[Outputs]:
        """Losses in training mode: the total and each term, [] float32. Otherwise outputs, with all of `given`."""
        norm = self.model.encoder.data_norm_type
        if not self.training:
            # No graphs: their memory would lie beside the training step's.
            return self.model.run(batch.views(norm, given), ModalityConfig(), None, cuda_graphs=False)
        views = training_views(batch, norm, given, self.inputs)
        outputs = self.model.run(views, self.modalities, None)
        with torch.autocast(batch.images.device.type, enabled=False):
            losses = compute_losses(outputs, batch, self.loss)
        total = losses.total
        if self.sharded:
            tokenizers = (p for n, p in self.model.named_parameters() if p.requires_grad and part_of(n) == "tokenizers")
            total = total + sum(0 * parameter.sum() for parameter in tokenizers)
        return total, losses.terms


class Statistics:
    """Sums of what steps report, on the device; a step whose gradient is not finite does not count.

    Attributes:
        names: of the sums but the last, which counts steps.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, values: dict[str, Tensor], norm: Tensor) -> None:
        """One step's values, [] each."""
        if self._sums is None:
            self.names = [*values, "gradient_norm"]
            self._sums = torch.zeros(len(self.names) + 1, device=norm.device)
        row = torch.stack([*(v.detach().float() for v in values.values()), norm, torch.ones_like(norm)])
        self._sums += torch.where(torch.isfinite(norm), row, torch.zeros_like(row))

    def take(self, world: World) -> dict[str, float]:
        """Means since the last call, over all processes; waits for the device."""
        if self._sums is None:
            return {}
        *sums, count = world.mean(self._sums.clone()).tolist()
        self._sums.zero_()
        return {name: value / count if count else float("nan") for name, value in zip(self.names, sums, strict=True)}


@dataclasses.dataclass
class _Graph:
    """A captured step and the memory that its batch is copied into."""

    graph: torch.cuda.CUDAGraph
    batch: Batch


class StepRunner:
    """Runs optimizer steps.

    Args:
        step: the training step as a module, wrapped by what averages gradients or compiles.
        optimizer: updates its parameters.
        config: the run's.
        world: the processes.
        quiet: waits until nobody else uses the GPU; called before a graph is captured.
    """

    def __init__(
        self, step: nn.Module, optimizer: Optimizer, config: TrainConfig, world: World, quiet: Callable[[], None]
    ) -> None:
        self.step = step
        self.optimizer = optimizer
        self.world = world
        self.statistics = Statistics()
        self._quiet = quiet
        self._accumulate = config.schedule.accumulate
        self._compiled = bool(config.run.compile)
        self._autocast = config.run.precision == "bf16"
        self._graphed = config.run.cuda_graph and world.device.type == "cuda"
        self._seen: dict[object, int] = {}
        self._graphs: dict[object, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._graphed else None

    @property
    def graphs(self) -> int:
        """Captured CUDA graphs."""
        return len(self._graphs)

    def run(self, fed: Sequence[Fed], seed: int) -> None:
        """One step on `accumulate` batches, drawing from `seed`; its statistics are in `statistics`."""
        torch.manual_seed(seed)
        if not self._graphed:
            self._compute(fed)
            return
        ((batch, given),) = fed
        key = (tuple(batch.images.shape), given)
        if key in self._graphs:
            self._replay(self._graphs[key], batch)
            return
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen < WARM_UP:
            self._compute(fed)
        elif seen == WARM_UP:
            self._watch(fed, seed)
        elif self._capture(key, batch, given):
            self._replay(self._graphs[key], batch)
        else:
            torch.manual_seed(seed)
            self._compute(fed)

    def _compute(self, fed: Sequence[Fed]) -> None:
        self.optimizer.zero_grad()
        reported: dict[str, Tensor] = {}
        for i, (batch, given) in enumerate(fed):
            last = i + 1 == len(fed)
            if self._compiled:
                torch.compiler.cudagraph_mark_step_begin()
            no_sync = getattr(self.step, "no_sync", None)
            with contextlib.nullcontext() if last or no_sync is None else no_sync():
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
                    total, terms = self.step(batch, given)
                (total / self._accumulate).backward()
            for name, value in {"loss": total, **terms}.items():
                part = value.detach() / self._accumulate
                reported[name] = reported[name] + part if name in reported else part
        self.optimizer.step()
        self.statistics.add(reported, self.optimizer.norm)

    def _watch(self, fed: Sequence[Fed], seed: int) -> None:
        """A step in which waiting for the device is an error: then no graph can hold it, and the log says why."""
        self._quiet()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._compute(fed)
            return
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            self._give_up(f"the host waits for the device at {_place(error)}")
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.manual_seed(seed)
        self._compute(fed)

    def _capture(self, key: object, batch: Batch, given: tuple[str, ...]) -> bool:
        """Capture the step of a size; nothing is computed yet."""
        self._quiet()
        static = Batch(**{name: tensor.clone() for name, tensor in batch._tensors().items()})
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._compute([Fed(static, given)])
        except RuntimeError as error:
            self._give_up(f"{str(error).splitlines()[0]} (at {_place(error)})")
            self.optimizer.zero_grad()
            return False
        self._graphs[key] = _Graph(graph, static)
        logger.info("captured a CUDA graph of the step at %s", list(batch.images.shape))
        return True

    def _replay(self, captured: _Graph, batch: Batch) -> None:
        targets, sources = captured.batch._tensors(), batch._tensors()
        for kind in dict.fromkeys(tensor.dtype for tensor in targets.values()):
            names = [name for name, tensor in targets.items() if tensor.dtype == kind]
            torch._foreach_copy_([targets[name] for name in names], [sources[name] for name in names])
        captured.graph.replay()

    def _give_up(self, why: str) -> None:
        self._graphed = False
        logger.warning("run.cuda_graph: the step cannot be captured, it runs eagerly: %s", why)


def _place(error: BaseException) -> str:
    """The innermost line of this package that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    own = [frame for frame in inside if Path(frame.filename) != Path(__file__)] or inside
    return f"{Path(own[-1].filename).relative_to(_PACKAGE)}:{own[-1].lineno}" if own else "an unknown place"
