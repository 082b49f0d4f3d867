"""People's own clips as training batches: the folder format of docs/dataset.md through torch's DataLoader.

    config = DatasetConfig(views=4, sizes=((168, 224),), on_error="skip")
    batches = loader(ClipFolder("data/train", config), batch_size=8, seed=0, num_workers=4)
    batch = next(batches)

Which frames of which clips a batch holds depends on the seed and the step only: not on the number of workers, nor on
what ran before. The world's batch of a step is the same for every number of ranks that divides it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import random
import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Generator
from torch.utils.data import DataLoader, Dataset

from ..io.errors import MediaError
from ..io.images import natural_key
from .batch import Batch, collate
from .dataset_files import Clip, is_clip, read_clip
from .dataset_sample import PARTS, DatasetConfig, choose_frames, read_sample
from .dataset_write import ClipArrays, write_clip

__all__ = [
    "PARTS",
    "ClipArrays",
    "ClipFolder",
    "ClipLoader",
    "DatasetConfig",
    "Draw",
    "Sample",
    "Skip",
    "loader",
    "write_clip",
]

MAX_ATTEMPTS = 100
"""So many bad draws one after the other are not bad luck: the data is broken."""

_CACHED_CLIPS = 256  # file lists and poses; a clip of a thousand frames takes about half a megabyte
_HASH_BITS = 64

_logger = logging.getLogger(__name__)


class Draw(NamedTuple):
    """What decides a sample besides the dataset.

    Attributes:
        seed, epoch: any ints.
        clip: its number in `ClipFolder.clips`.
        size: (height, width); None: the first of `DatasetConfig.sizes`.
    """

    seed: int
    epoch: int
    clip: int
    size: tuple[int, int] | None = None


class Skip(NamedTuple):
    """A clip that could not be used, and why."""

    clip: str
    reason: str


class Sample(NamedTuple):
    """One or more drawn samples.

    Attributes:
        batch: their ground truth.
        skipped: the bad draws that they replace.
    """

    batch: Batch
    skipped: tuple[Skip, ...]


class ClipFolder(Dataset[Batch]):
    """The clips in a folder, at any depth; an item is a `Batch` of one sample.

    A clip is a folder with any of the format's files in it, see docs/dataset.md; hidden folders are not looked into.
    An item is drawn anew for every (seed, epoch): `dataset[Draw(seed, epoch, clip)]`; `dataset[clip]` is that of seed 0
    and epoch 0.

    Args:
        path: folder of clips, or one clip.
        config: how samples are drawn.

    Raises:
        MediaError: no such folder, or no clip in it, or none in the wanted split.
    """

    def __init__(self, path: str | os.PathLike[str], config: DatasetConfig | None = None) -> None:
        self.path, self.config = Path(path), config or DatasetConfig()
        if not self.path.is_dir():
            raise MediaError(f"{path}: expected a folder of clips, got {'a file' if self.path.exists() else 'nothing'}")
        found = sorted(_find_clips(self.path, "", set()), key=natural_key)
        if not found:
            raise MediaError(f"{path}: no clip in this folder; expected folders with images/000000.png and so on")
        self.clips = [name for name in found if self.config.split == "all" or self._split(name) == self.config.split]
        if not self.clips:
            raise MediaError(
                f"{path}: none of its {len(found)} clips is in the split {self.config.split!r}; expected at least one: "
                "change DatasetConfig.held_out or split"
            )
        self._cache: OrderedDict[int, Clip] = OrderedDict()

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | Draw) -> Batch:
        """A sample, B=1.

        Raises:
            IndexError: no such clip.
            MediaError: bad data with `on_error="raise"`, or nothing but bad data.
        """
        return self.draw(key if isinstance(key, Draw) else Draw(0, 0, key)).batch

    def draw(self, key: Draw) -> Sample:
        """A sample, and what was skipped to get it.

        Raises:
            IndexError, MediaError: as `dataset[key]`.
        """
        if not 0 <= key.clip < len(self):
            raise IndexError(f"clip: expected 0 to {len(self) - 1}, got {key.clip}")
        size = key.size or self.config.sizes[0]
        generator = random.Random(f"sample/{key.seed}/{key.epoch}/{key.clip}")
        index, skipped = key.clip, list[Skip]()
        for _ in range(MAX_ATTEMPTS):
            try:
                clip = self._clip(index)
                batch = read_sample(clip, choose_frames(clip, self.config, generator), self.config, size)
                return Sample(batch, tuple(skipped))
            except OSError as error:
                problem = MediaError(f"{self.path / self.clips[index]}: cannot be read ({error})")
                if self.config.on_error == "raise":
                    raise problem from error
            except MediaError as error:
                if self.config.on_error == "raise":
                    raise
                problem = error
            skipped.append(Skip(self.clips[index], str(problem)))
            # Also another window of the same clip, where it is the only one.
            index = generator.randrange(len(self))
        raise MediaError(
            f"{self.path}: {MAX_ATTEMPTS} draws one after the other failed, of {len({s.clip for s in skipped})} "
            f"different clips of {len(self)}; the first: {skipped[0].reason}"
        )

    def _clip(self, index: int) -> Clip:
        if index not in self._cache:
            self._cache[index] = read_clip(self.path / self.clips[index])
            if len(self._cache) > _CACHED_CLIPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(index)
        return self._cache[index]

    def _split(self, name: str) -> str:
        group = self.path.resolve().name if name == "." else name.partition("/")[0]
        digest = hashlib.blake2b(os.fsencode(group), digest_size=_HASH_BITS // 8).digest()
        return "held_out" if int.from_bytes(digest, "big") < self.config.held_out * 2**_HASH_BITS else "train"


def _find_clips(folder: Path, name: str, above: set[str]) -> Iterator[str]:
    """Names, relative to the dataset, of the clips in a folder; `above` holds the real paths that lead to it."""
    real = os.path.realpath(folder)
    if real in above:
        return  # a link to a folder above
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise MediaError(f"{folder}: cannot be read ({error.strerror or error})") from error
    if is_clip([entry.name for entry in visible]):
        yield name or "."
        return
    for entry in visible:
        if entry.is_dir():
            yield from _find_clips(folder / entry.name, f"{name}/{entry.name}".lstrip("/"), above | {real})


def loader(
    dataset: ClipFolder,
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    epochs: int | None = None,
    shuffle: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
) -> ClipLoader:
    """Batches of a dataset, without end, in an order that the seed decides.

    Every epoch shuffles the clips anew; epochs follow each other without a gap, so that every batch is full. Resuming
    at a step costs nothing and gives exactly the batches of an unbroken run, replacements of bad clips included.

    Args:
        dataset: the clips.
        batch_size: samples a rank and step; all of one size.
        seed: of the order, the sizes and the windows.
        rank, world_size: this process takes its share of each step's `batch_size * world_size` samples.
        start_step: the first step to give.
        epochs: end after so many passes over the clips; the last batch then may be smaller, and ranks may get
            different numbers of batches. None: go on without end.
        shuffle: False keeps the clips in the order of their names.
        num_workers: processes that read; 0: this one does.
        pin_memory: in page-locked memory, from which copies to a GPU need not wait.
        multiprocessing_context: how workers start, such as "spawn" or "forkserver"; None: as torch does.

    Raises:
        ValueError: a number out of range.
    """
    for name, value, low in (
        ("batch_size", batch_size, 1),
        ("world_size", world_size, 1),
        ("rank", rank, 0),
        ("start_step", start_step, 0),
        ("num_workers", num_workers, 0),
        ("epochs", 1 if epochs is None else epochs, 1),
    ):
        if value < low:
            raise ValueError(f"{name}: expected {low} or more, got {value}")
    if rank >= world_size:
        raise ValueError(f"rank: expected less than world_size {world_size}, got {rank}")
    order = _Order(len(dataset), dataset.config.sizes, batch_size, seed, rank, world_size, start_step, epochs, shuffle)
    return ClipLoader(dataset, order, num_workers, pin_memory, multiprocessing_context)


class ClipLoader(Iterator[Batch]):
    """What `loader` returns: an iterator over batches that remembers what was skipped.

    Attributes:
        step: of the next batch.
        skipped: number of bad draws that were replaced in the batches given so far.
        skipped_clips: the clips they were of, and for each the last reason.
    """

    def __init__(
        self, dataset: ClipFolder, order: _Order, num_workers: int, pin_memory: bool, context: str | None
    ) -> None:
        self.step = order.start_step
        self.skipped = 0
        self.skipped_clips: dict[str, str] = {}
        batches: DataLoader[Sample | MediaError] = DataLoader(
            _Samples(dataset),
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            multiprocessing_context=context if num_workers else None,
            worker_init_fn=_leave_signals,
            # Its own: DataLoader would take a number from the global generator, and a resumed run would differ.
            generator=Generator(),
        )
        self._batches: Iterator[Sample | MediaError] = iter(batches)

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            StopIteration: after `epochs`, or after `close`.
            MediaError: bad data with `on_error="raise"`, or nothing but bad data.
        """
        result = next(self._batches)
        self.step += 1
        if isinstance(result, MediaError):
            raise result
        batch, skipped = result
        for skip in skipped:
            if skip.clip not in self.skipped_clips:
                _logger.warning("skipped %s", skip.reason)
            self.skipped += 1
            self.skipped_clips[skip.clip] = skip.reason
        return batch

    def close(self) -> None:
        """End the worker processes; there are no more batches after it."""
        self._batches = iter(())


def _leave_signals(worker: int) -> None:
    """Ctrl-C, and a cluster's SIGTERM, reach the whole process group: who reads the batches decides what they mean.

    There, a worker that ended by itself would be an error. It ends when it is told to, or its parent is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Samples(Dataset[Sample | MediaError]):
    """A `ClipFolder` that says what it skipped, and returns errors.

    Raised in a worker, an error would come with the worker's traceback around its message, and DataLoader would hold on
    to its processes through the traceback here, and take seconds to end them.
    """

    def __init__(self, dataset: ClipFolder) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Draw) -> Sample | MediaError:
        try:
            return self.dataset.draw(key)
        except MediaError as error:
            return MediaError(str(error))


def _collate(samples: Sequence[Sample | MediaError]) -> Sample | MediaError:
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, MediaError):
            return sample
        good.append(sample)
    return Sample(collate([s.batch for s in good]), tuple(itertools.chain(*(s.skipped for s in good))))


@dataclass(frozen=True)
class _Order:
    """Draws of one rank's batches, step by step: positions in the endless sequence of shuffled epochs."""

    clips: int
    sizes: Sequence[tuple[int, int]]
    batch_size: int
    seed: int
    rank: int
    world_size: int
    start_step: int
    epochs: int | None
    shuffle: bool

    def __iter__(self) -> Iterator[list[Draw]]:
        # A batch reaches into at most a few epochs, and two when they are longer than it.
        order = functools.lru_cache(maxsize=2)(self._clips_of)
        for step in itertools.count(self.start_step):
            # One size for all ranks, so that none waits for another.
            size = random.Random(f"size/{self.seed}/{step}").choice(self.sizes)
            first = (step * self.world_size + self.rank) * self.batch_size
            places = [divmod(place, self.clips) for place in range(first, first + self.batch_size)]
            places = [(epoch, i) for epoch, i in places if self.epochs is None or epoch < self.epochs]
            if not places:
                return
            yield [Draw(self.seed, epoch, order(epoch)[i], size) for epoch, i in places]

    def _clips_of(self, epoch: int) -> Sequence[int]:
        clips = list(range(self.clips))
        if self.shuffle:
            random.Random(f"order/{self.seed}/{epoch}").shuffle(clips)
        return clips
