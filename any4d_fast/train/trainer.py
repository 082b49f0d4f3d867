"""The training loop: `train(config)` starts a run, or goes on with the one in its folder."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, head_precision
from ..checkpoint import aliases, load_tensors, save_safetensors, writing
from ..config import ConfigError
from ..io.atomic import atomic_path
from ..model import Any4D
from . import fresh, parallel, toml
from .checkpoints import WEIGHTS, CheckpointFolder, Snapshot
from .config import TrainConfig, differences
from .ema import Average
from .logging import Bar, Board, CsvLog
from .metrics import Accumulator, evaluate
from .optimizer import Optimizer, part_of
from .pictures import draw
from .schedule import ema_decay, learning_rate_factor, step_seed
from .settings import deterministic, own_stream, stop_signals, tensor_float
from .sources import Ahead, Source, open_source
from .step import StepRunner, TrainingStep

logger = logging.getLogger("any4d_fast.train")

EXPORTED = "model.safetensors"
_AGREE_EVERY = 50  # steps, where several processes never log: they stop together all the same
SETTINGS = "config.toml"
_TOKENIZERS = {
    "rays": ("ray_dirs_encoder",),
    "depth": ("depth_encoder", "depth_scale_encoder"),
    "poses": ("cam_rot_encoder", "cam_trans_encoder", "cam_trans_scale_encoder"),
    "flow": ("scene_flow_encoder",),
}


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why. Its last checkpoint is good."""


@dataclass(frozen=True)
class Result:
    """What became of a run.

    Attributes:
        step: steps taken so far, in all calls.
        finished: False: it was stopped (by SIGTERM or `run.max_seconds`) and goes on at the next call.
        weights: the exported averaged weights, once it is finished.
        skipped: steps so far whose gradient was not finite; they changed nothing.
        metrics: of the last validation.
    """

    step: int
    finished: bool
    weights: Path | None
    skipped: int
    metrics: Mapping[str, float]


def train(config: TrainConfig, *, progress: bool = True) -> Result:
    """Run until the last step, a signal or the time limit.

    A folder (`run.output`) that holds a checkpoint of the same run is gone on with, exactly: what a step computes
    depends on the weights, the configuration and the step's number only.

    Raises:
        ConfigError: the configuration cannot be run here, or the folder holds a run with another one.
        CheckpointError, MediaError: the weights to start from, or the data, cannot be read.
        TrainingError: no step of a whole logging period had a finite gradient.
    """
    with opened(config, progress=progress) as trainer:
        return trainer.run()


@contextlib.contextmanager
def opened(config: TrainConfig, *, progress: bool = True) -> Iterator[Trainer]:
    """A run that is ready for its next step, under the settings that its steps need; closed when the block ends.

    Raises:
        ConfigError, CheckpointError, MediaError: as `train`.
    """
    world = parallel.start(config.run.parallel, config.run.device)
    backend = config.run.backend
    try:
        with (
            deterministic(config.run.deterministic),
            tensor_float(config.run.precision == "bf16"),
            contextlib.nullcontext() if backend == "auto" else backends.use_backend(backend),
            # Steps whose gradients are not finite are skipped here.
            head_precision.never_wait(),
            head_precision.use_head_dtype(torch.float32 if config.run.heads == "tf32" else None),
            own_stream(world.device),
        ):
            trainer = Trainer(config, world, progress)
            try:
                yield trainer
            finally:
                trainer.close()
    finally:
        world.close()


class Trainer:
    """A run in one process; `opened` makes one."""

    def __init__(self, config: TrainConfig, world: parallel.World, progress: bool = True) -> None:
        self.config, self.world = config, world
        self.folder = Path(config.run.output)
        self.settings = toml.as_table(config)
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", config.run.keep)
        found = self.checkpoints.latest()
        snapshot = None if found is None else found[0]
        if found is not None:
            self._check_same_run(found[0])
        self.model = self._make_model(found)
        self.canonical = aliases(self.model)
        self.step_module = TrainingStep(self.model, config.inputs, config.loss).train()
        if config.run.parallel == "fsdp":
            parallel.shard(self.step_module, world)
            self.step_module.sharded = True
        self.named = list(self.model.named_parameters())
        self.optimizer = Optimizer(self.named, config.optimizer, config.run.parallel == "fsdp")
        self.average = Average(self.named)
        self.step = 0
        if snapshot is not None:
            self._restore(snapshot)
        self.first = self.step
        micro_batches = config.schedule.accumulate
        self.source: Source = open_source(
            config.data, config.inputs.given, config.run, world, self.step * micro_batches
        )
        self.ahead = Ahead(self.source, self.step * micro_batches, config.schedule.steps * micro_batches, world.device)
        self.runner = StepRunner(self._wrapped(), self.optimizer, config, world, self.ahead.quiet)
        self.metrics: dict[str, float] = {}
        self._open_logs(progress)

    def _check_same_run(self, snapshot: Snapshot) -> None:
        changed = differences(dict(snapshot.settings), json.loads(json.dumps(self.settings)))
        if changed:
            raise ConfigError(
                f"run.output: {self.folder} holds a run with other settings; remove it, give another folder, or start "
                f"from its weights with model.init. Different: {'; '.join(changed)}"
            )
        if snapshot.counters.get("processes") != self.world.size:
            logger.warning(
                "the run was started with %d processes and goes on with %d: it sees other clips from here on",
                snapshot.counters.get("processes", 1), self.world.size,
            )  # fmt: skip

    def _make_model(self, found: tuple[Snapshot, Path] | None) -> Any4D:
        options, seed = self.config.model, self.config.run.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if found is not None:
                model = Any4D.from_preset(options.preset)
                load_tensors(model, found[0].weights, found[1] / WEIGHTS)
            elif options.init is not None:
                model = Any4D.from_pretrained(options.init, config=options.preset, strict=options.strict)
            else:
                model = Any4D.from_preset(options.preset)
                fresh.prepare(model, self._untrained())
        for name, parameter in model.named_parameters():
            trained = self.config.optimizer.parts.get(part_of(name), 1.0) > 0
            parameter.requires_grad_(trained and not name.startswith(self._untrained()))
        model.recompute_activations(*options.recompute)
        return model.to(self.world.device)

    def _untrained(self) -> tuple[str, ...]:
        """Prefixes of the tokenizers of inputs that are never given: they would have no gradient."""
        return tuple(
            f"{module}." for name, modules in _TOKENIZERS.items() if name not in self.config.inputs.given
            for module in modules
        )  # fmt: skip

    def _wrapped(self) -> nn.Module:
        find_unused = self.config.data.source == "folder"  # an input that a batch lacks has no gradient
        step = parallel.distributed(self.step_module, self.world, find_unused)
        wanted = self.config.run.compile
        if not wanted:
            return step
        try:
            compiled = torch.compile(step, mode=wanted if isinstance(wanted, str) else None)
        except RuntimeError as error:  # its message lists the modes that this PyTorch has
            raise ConfigError(f"run.compile: expected a mode of torch.compile, got {wanted!r} ({error})") from error
        assert isinstance(compiled, nn.Module)
        return compiled

    def _open_logs(self, progress: bool) -> None:
        self.bar = Bar(self.config.schedule.steps, self.step, progress and self.world.first)
        self.board: Board | None = None
        if not self.world.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / SETTINGS) as path:
            path.write_text(self.config.to_toml(), encoding="utf-8")
        self.log = CsvLog(self.folder / "metrics.csv", self.step)
        last = self.step == self.config.schedule.steps  # whose validation comes after its checkpoint, and now again
        self.validation_log = CsvLog(self.folder / "validation.csv", self.step - last)
        self.board = Board(self.folder / "tensorboard", self.step)
        if self.step:
            self.bar.say(f"going on from step {self.step} of {self.folder}")

    def run(self) -> Result:
        """All steps that are left."""
        options, schedule = self.config.run, self.config.schedule
        started = self._logged_at = time.monotonic()
        self._logged_step = self._reported_step = self.step
        self._skipped = int(self.optimizer.skipped)
        with stop_signals() as stopped:
            while self.step < schedule.steps:
                self._take_step()
                last = self.step == schedule.steps
                due = _due(self.step, options.log_every)
                if due or last:
                    self._report()
                if not last and _due(self.step, options.validate_every):
                    self.validate()
                late = bool(options.max_seconds) and time.monotonic() - started > options.max_seconds
                # Several processes must stop at the same step, and asking each other waits for the device.
                stop = stopped() or late
                if self.world.size > 1:
                    stop = (last or _due(self.step, options.log_every or _AGREE_EVERY)) and self.world.agree(stop)
                if stop and not last:
                    self.save()
                    self.bar.say(f"stopped after step {self.step}; the same command goes on from here")
                    return Result(self.step, False, None, int(self.optimizer.skipped), self.metrics)
                if last or _due(self.step, options.checkpoint_every):
                    self.save()
        self.validate()
        return Result(self.step, True, self.export(), int(self.optimizer.skipped), self.metrics)

    def _take_step(self) -> None:
        config, step = self.config, self.step
        self.optimizer.set_rate(learning_rate_factor(step, config.schedule))
        fed = [self.ahead() for _ in range(config.schedule.accumulate)]
        self.runner.run(fed, step_seed(config.run.seed, self.world.rank, step))
        self.average.update(ema_decay(step, config.schedule), self.optimizer.norm.isfinite())
        self.step += 1
        self.bar.step(self.step)

    def _report(self) -> None:
        """Log the means since the last report. The only place, with validation, where steps wait for the device."""
        values = self.runner.statistics.take(self.world)
        skipped = int(self.optimizer.skipped)
        now = time.monotonic()
        rate = (self.step - self._logged_step) / max(now - self._logged_at, 1e-9)
        values |= {
            "lr": self.config.optimizer.lr * learning_rate_factor(self.step - 1, self.config.schedule),
            "skipped_steps": float(skipped),
            "steps_per_second": rate,
            **self.source.notes(),
        }
        if self.world.device.type == "cuda":
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.world.device) / 1e9
        period, broken = self.step - self._reported_step, skipped - self._skipped
        self._logged_at, self._logged_step, self._skipped = now, self.step, skipped
        self._reported_step = self.step
        if self.world.first:
            self.log.add(self.step, values)
            assert self.board is not None
            self.board.scalars(self.step, values, "train")
        shown = ("loss", "gradient_norm", "lr", "steps_per_second")
        self.bar.log(self.step, {name: values[name] for name in shown if name in values})
        if period >= 10 and broken == period:
            raise TrainingError(
                f"no gradient of the last {period} steps was finite; the weights are those of before. Lower "
                'optimizer.lr or use run.heads = "tf32" or run.precision = "fp32", and look for broken data'
            )

    def validate(self) -> None:
        """Metrics of the averaged weights on held-out clips: with images alone, and with all inputs as well."""
        options, data = self.config.run, self.config.data
        size = options.validation_batch or data.batch_size
        self.ahead.quiet()
        sets = {"images": (), "all": self.config.inputs.given} if self.config.inputs.given else {"images": ()}
        found = {name: Accumulator() for name in sets}
        pictures = 0
        with self.average.applied(), self._evaluating():
            for fed in self.source.held_out(options.validation_clips, size):
                for name, inputs in sets.items():
                    given = tuple(i for i in inputs if i in fed.given)
                    with torch.autocast(
                        self.world.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16"
                    ):
                        outputs = self.step_module(fed.batch, given)
                    found[name].add(evaluate(outputs, fed.batch))
                    for clip in range(len(fed.batch)) if name == "images" else ():
                        if pictures < options.pictures:
                            self._draw(outputs, fed.batch, clip, pictures)
                            pictures += 1
        self.metrics = {f"{s}/{name}": value for s, acc in found.items() for name, value in acc.result().items()}
        if self.metrics and self.world.first:
            self.validation_log.add(self.step, self.metrics)
            assert self.board is not None
            self.board.scalars(self.step, self.metrics, "validation")
            brief = ("images/depth_abs_rel", "images/flow_epe_dynamic", "images/rotation_degrees")
            shown = "  ".join(f"{n} {self.metrics[n]:.4g}" for n in brief if n in self.metrics)
            self.bar.say(f"validation at step {self.step}: {shown}")
        self._logged_at, self._logged_step = time.monotonic(), self.step

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.step_module.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.step_module.train()

    def _draw(self, outputs: Any, batch: Any, clip: int, number: int) -> None:
        if not self.world.first:
            return
        from PIL import Image

        picture = draw(outputs, batch, clip)
        with atomic_path(self.folder / "pictures" / f"clip{number}-{self.step:08d}.png") as path:
            Image.fromarray(picture).save(path, format="PNG")
        assert self.board is not None
        self.board.picture(self.step, f"clip {number}", picture)

    def save(self) -> None:
        """A checkpoint of this moment; the first process writes it."""
        snapshot = self._snapshot()
        if self.world.first:
            self.checkpoints.save(snapshot, self.model.config, self.canonical)
        self.world.barrier()

    def _snapshot(self) -> Snapshot:
        parameters = dict(self.named)

        def whole(name: str, owned: Tensor) -> Tensor:
            return parallel.gathered(owned, parameters[name]).detach()

        weights = {name: whole(name, parallel.local(p)) for name, p in self.named}
        buffers = {name: b for name, b in self.model.named_buffers() if name in self.canonical}
        average = {**weights, **{name: whole(name, t) for name, t in self.average.tensors.items()}}
        optimizer = {
            name: {key: whole(name, tensor) for key, tensor in state.items()}
            for name, state in self.optimizer.state().items()
        }
        counters = {"skipped": int(self.optimizer.skipped), "processes": self.world.size}
        return Snapshot(self.step, {**weights, **buffers}, {**average, **buffers}, optimizer, counters, self.settings)

    def _restore(self, snapshot: Snapshot) -> None:
        """The rest of a checkpoint, weights being there already."""
        parameters = dict(self.named)

        def own(name: str, tensor: Tensor) -> Tensor:
            return parallel.scattered(tensor, parameters[name])

        self.average.load({name: own(name, snapshot.average[name]) for name in self.average.tensors})
        self.optimizer.load_state(
            {
                name: {key: own(name, tensor) for key, tensor in state.items()}
                for name, state in snapshot.optimizer.items()
            }
        )
        self.optimizer.skipped.fill_(int(snapshot.counters["skipped"]))
        self.step = snapshot.step

    def export(self) -> Path:
        """The averaged weights with the model's configuration, as `Any4D.from_pretrained` reads them."""
        path = self.folder / EXPORTED
        average = self._snapshot().average
        if self.world.first:
            dtype = torch.float16 if self.config.run.export_dtype == "fp16" else torch.float32
            cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in average.items()}
            with writing(path):
                save_safetensors(cast, self.canonical, self.model.config, path, steps=self.step)
            self.bar.say(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MiB")
        self.world.barrier()
        return path

    def close(self) -> None:
        """End what runs in the background; the run's files are complete."""
        self.ahead.close()
        self.source.close()
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
