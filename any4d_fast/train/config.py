"""What a training run is: frozen dataclasses that a TOML file fills in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import PRESETS, ConfigError, ModalityConfig
from . import toml
from .batch import INPUTS
from .dataset_sample import DatasetConfig
from .losses import LossConfig
from .stream_config import StreamConfig

PARTS = ("encoder", "tokenizers", "transformer", "heads", "pose", "scale")
"""Parts of the model with a learning rate of their own."""


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class ModelOptions:
    """The model and what it starts from.

    Attributes:
        preset: architecture, a name in `any4d_fast.config.PRESETS`.
        init: weights to start from: a file or a Hugging Face id; random (by the run's seed) by default.
        strict: False starts from whatever fits, and the log names the rest.
        recompute: what is computed again in place of being kept for the backward pass: "mlp", "blocks", "heads".
    """

    preset: str = "tiny"
    init: str | None = None
    strict: bool = True
    recompute: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.preset in PRESETS, "model.preset", self.preset, f"one of {', '.join(sorted(PRESETS))}")
        wrong = set(self.recompute) - {"mlp", "blocks", "heads"}
        _require(not wrong, "model.recompute", list(self.recompute), "names among mlp, blocks, heads")


@dataclass(frozen=True)
class DataOptions:
    """Where clips come from.

    Attributes:
        source: "stream" renders clips as they are needed; "folder" reads clips of the format in docs/dataset.md.
        path: the folder.
        held_out: a folder of clips for validation; without one, the clips of `path` that `folder.held_out` holds out,
            or none where `folder.split` trains on them too.
        batch_size: clips of one forward pass, per process.
        workers: processes that read clips of a folder.
        stream: what rendered clips are drawn from.
        folder: how clips are read.
    """

    source: Literal["stream", "folder"] = "stream"
    path: str | None = None
    held_out: str | None = None
    batch_size: int = 8
    workers: int = 4
    stream: StreamConfig = field(default_factory=StreamConfig)
    folder: DatasetConfig = field(default_factory=DatasetConfig)

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        _require(self.workers >= 0, "data.workers", self.workers, "at least 0")
        needs = self.source == "folder"
        _require((self.path is not None) == needs, "data.path", self.path, "a folder" if needs else "none for a stream")
        _require(needs or self.held_out is None, "data.held_out", self.held_out, "none for a stream")


@dataclass(frozen=True)
class InputOptions:
    """True geometry that the model is given besides images, and how often (arXiv 2512.10935, section 3.3).

    The probabilities are those of `any4d_fast.config.ModalityConfig`, drawn for every sample.

    Attributes:
        given: which inputs there are, of rays, depth, poses. The tokenizer of what is never given is not trained.
        images_prob: of a sample's images.
        overall_prob: of any geometric input at all.
        dropout_prob: of leaving all geometric inputs of one view out.
        ray_dirs_prob, depth_prob, cam_prob: of rays, depth and poses.
        sparse_depth_prob: of giving few of the depth pixels only.
        sparsification_removal_percent: share (0 to 1) of depth pixels that a sparse depth map lacks.
        metric_scale_hidden_prob: of giving depth and poses up to scale, where they are given.
    """

    given: tuple[str, ...] = INPUTS
    images_prob: float = 1.0
    overall_prob: float = 0.9
    dropout_prob: float = 0.05
    ray_dirs_prob: float = 0.5
    depth_prob: float = 0.5
    cam_prob: float = 0.5
    sparse_depth_prob: float = 0.5
    sparsification_removal_percent: float = 0.9
    metric_scale_hidden_prob: float = 0.05

    def __post_init__(self) -> None:
        known = set(self.given) <= set(INPUTS) and len(set(self.given)) == len(self.given)
        _require(known, "inputs.given", list(self.given), f"different names among {', '.join(INPUTS)}")
        for f in dataclasses.fields(self):
            if f.name != "given":
                value = getattr(self, f.name)
                _require(0 <= value <= 1, f"inputs.{f.name}", value, "a probability between 0 and 1")

    def drawn_by_model(self) -> ModalityConfig:
        """What the model draws; sparse depth and hidden scales are drawn before it (`inputs.training_views`)."""
        names = ("images_prob", "overall_prob", "dropout_prob", "ray_dirs_prob", "depth_prob", "cam_prob")
        return ModalityConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW.

    Attributes:
        lr: peak learning rate.
        parts: factors on it by part of the model: encoder, tokenizers, transformer, heads, pose, scale; 1 by default,
            and 0 freezes a part.
        betas, eps: of AdamW.
        weight_decay: of matrices and convolutions; norms, biases, tokens and LayerScales have none.
        clip: largest norm of the gradient of all parameters; longer ones are scaled down. 0: no limit.
    """

    lr: float = 6e-4
    parts: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optimizer.lr", self.lr, "a number above 0")
        unknown = sorted(set(self.parts) - set(PARTS))
        _require(not unknown, "optimizer.parts", unknown, f"names among {', '.join(PARTS)}")
        factors = all(0 <= v < math.inf for v in self.parts.values())
        _require(factors, "optimizer.parts", self.parts, "factors of at least 0")
        _require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        _require(0 <= self.eps < math.inf, "optimizer.eps", self.eps, "at least 0")
        _require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "at least 0")
        _require(self.clip >= 0, "optimizer.clip", self.clip, "at least 0")


@dataclass(frozen=True)
class ScheduleOptions:
    """Steps and learning rate: linear warm-up, then a cosine.

    Attributes:
        steps: optimizer steps of the whole run.
        warmup: steps until the peak.
        final: learning rate of the last step, as a share of the peak.
        accumulate: forward and backward passes of a step.
        ema: decay of the weights' moving average; it starts lower, `min(ema, (1 + n) / (10 + n))` after n steps.
    """

    steps: int = 1000
    warmup: int = 50
    final: float = 0.0
    accumulate: int = 1
    ema: float = 0.999

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "schedule.steps", self.steps, "at least 1")
        _require(0 <= self.warmup <= self.steps, "schedule.warmup", self.warmup, "between 0 and schedule.steps")
        _require(0 <= self.final <= 1, "schedule.final", self.final, "a share between 0 and 1")
        _require(self.accumulate >= 1, "schedule.accumulate", self.accumulate, "at least 1")
        _require(0 <= self.ema < 1, "schedule.ema", self.ema, "a decay in [0, 1)")


@dataclass(frozen=True)
class RunOptions:
    """How and where it runs, and what it writes.

    Attributes:
        output: folder of checkpoints, logs, pictures and the final weights. A run that was interrupted there goes on.
        seed: of weights, data and draws.
        device: a GPU where there is one by default; with several processes each takes its own.
        precision: "bf16": autocast; "fp32".
        heads: of the dense heads under "bf16" on a GPU: "fp16" with scaled gradients, or "tf32" (values beyond 65,504).
        parallel: "ddp" or "fsdp" over the processes that torchrun started.
        backend: of every operator: "auto" (the fastest, or what ANY4D_FAST_BACKEND says), "eager" (plain PyTorch),
            "triton", "cuda".
        compile: run the step through torch.compile; a text names its mode, such as "reduce-overhead".
        cuda_graph: replay forward, backward and optimizer as one CUDA graph for each size, where it can be captured.
        deterministic: only algorithms that give the same bits every time.
        log_every, validate_every, checkpoint_every: steps; 0: never (but the last step is always kept).
        validation_clips: held-out clips of a validation.
        validation_batch: clips of one of its forward passes; `data.batch_size` by default.
        keep: checkpoints to keep; older ones are removed.
        pictures: clips of a validation that are drawn.
        max_seconds: stop with a checkpoint after so long; the next call goes on from there. 0: no limit.
        export_dtype: of the exported weights, "fp32" or "fp16".
    """

    output: str = "runs/train"
    seed: int = 0
    device: str | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    heads: Literal["fp16", "tf32"] = "fp16"
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    backend: Literal["auto", "eager", "triton", "cuda"] = "auto"
    compile: bool | str = False
    cuda_graph: bool = False
    deterministic: bool = False
    log_every: int = 50
    validate_every: int = 0
    validation_clips: int = 16
    validation_batch: int | None = None
    checkpoint_every: int = 1000
    keep: int = 2
    pictures: int = 2
    max_seconds: float = 0.0
    export_dtype: Literal["fp32", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("log_every", "validate_every", "checkpoint_every", "pictures"):
            _require(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "at least 0")
        for name in ("validation_clips", "keep"):
            _require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")
        batch = self.validation_batch
        _require(batch is None or batch >= 1, "run.validation_batch", batch, "at least 1")
        _require(self.output != "", "run.output", self.output, "a folder")
        _require(0 <= self.seed < 2**64, "run.seed", self.seed, "a number from 0 to 2^64 - 1")
        _require(self.max_seconds >= 0, "run.max_seconds", self.max_seconds, "at least 0")
        plain = self.parallel == "none" and not self.compile
        _require(not self.cuda_graph or plain, "run.cuda_graph", True, 'parallel = "none" and compile = false')


@dataclass(frozen=True)
class TrainConfig:
    """A training run; every table of the TOML file is one of these."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    inputs: InputOptions = field(default_factory=InputOptions)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        accumulated = self.run.cuda_graph and self.schedule.accumulate > 1
        _require(not accumulated, "schedule.accumulate", self.schedule.accumulate, "1 with run.cuda_graph")
        weights = self.loss.weights()
        _require(any(weights.values()), "loss", weights, "at least one weight above 0")

    @classmethod
    def load(
        cls,
        path: str | Path,
        assignments: Sequence[str] = (),
        *,
        init: str | None = None,
        output: str | None = None,
    ) -> TrainConfig:
        """From a TOML file, or one of the package: tiny and the parts before it (docs/training.md), finetune, smoke.

        Args:
            path: the file or name.
            assignments: `key=value` after it, as in "optimizer.lr=1e-4"; values are TOML, else text.
            init, output: `model.init` and `run.output`, where they are given.

        Raises:
            ConfigError: the message names the file or the key, and what was expected.
        """
        table = toml.override(toml.read(find_config(path)), assignments)
        for section, key, value in (("model", "init", init), ("run", "output", output)):
            if value is not None:
                table.setdefault(section, {})[key] = value
        return toml.build(cls, table)

    def to_toml(self) -> str:
        """The whole configuration, defaults included, as TOML."""
        return toml.dumps(toml.as_table(self))


CONFIGS = Path(__file__).parent / "configs"


def find_config(path: str | Path) -> Path:
    """The file itself, or the one of that name in the package."""
    given = Path(path)
    packaged = CONFIGS / f"{path}.toml"
    return packaged if not given.exists() and given.name == str(path) and packaged.exists() else given


FREE = frozenset(
    f"run.{name}"
    for name in (
        "output", "device", "parallel", "log_every", "validate_every", "validation_clips", "validation_batch",
        "checkpoint_every", "keep", "pictures", "max_seconds", "export_dtype", "cuda_graph",
        "heads",
    )
)  # fmt: skip
"""What may differ when a run is resumed: none of it changes what is computed, beyond rounding."""


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys, with dots, whose values differ between two tables and that are not in `FREE`."""
    found: list[str] = []
    for name in sorted({*before, *after}):
        key = f"{prefix}{name}"
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{key}.")
        elif old != new and key not in FREE:
            found.append(f"{key}: {old!r} -> {new!r}")
    return found
