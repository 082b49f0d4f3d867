"""Which frames of which clips a batch holds: the same in any process, on any number of ranks, after resuming."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from any4d_fast.io.errors import MediaError
from any4d_fast.train import dataset_write
from any4d_fast.train.batch import Batch, collate
from any4d_fast.train.dataset import ClipFolder, DatasetConfig, Draw, loader, write_clip
from any4d_fast.train.dataset_files import read_clip
from any4d_fast.train.dataset_sample import choose_frames
from tests.clip_folders import (
    LOADER,
    SIZE,
    assert_same,
    clips_of,
    fingerprints,
    folder_of,
    frames_of,
    small,
)

WHOLE = DatasetConfig(views=4, sizes=(SIZE,), stride=(1, 1), split="all")


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to the disk takes most of these tests' time; test_dataset.py does it."""
    monkeypatch.setattr(dataset_write, "flush", lambda path: None)


def windows(clip: Path, config: DatasetConfig, draws: int = 300) -> set[tuple[int, ...]]:
    files = read_clip(clip)
    return {tuple(choose_frames(files, config, random.Random(i))) for i in range(draws)}


def test_windows_cover_the_clip_and_keep_the_stride(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", small(8))
    config = DatasetConfig(views=3, stride=(2, 5))
    assert windows(tmp_path / "clip", config) == {(0, 2, 4), (0, 3, 6), (1, 3, 5), (1, 4, 7), (2, 4, 6), (3, 5, 7)}
    every = windows(tmp_path / "clip", dataclasses.replace(config, reference="random"))
    assert {tuple(sorted(window)) for window in every} == windows(tmp_path / "clip", config)
    assert {w.index(max(w)) for w in every} == {0, 2} and all(list(w[1:]) == sorted(w[1:]) for w in every)
    assert len(windows(tmp_path / "clip", DatasetConfig(views=1, stride=(4, 4)))) == 8


def test_windows_start_where_flow_starts(tmp_path: Path) -> None:
    flow = np.zeros((28, 42, 3), np.float32)
    write_clip(tmp_path / "clip", small(8, scene_flow={(2, 3): flow, (5, 3): flow}))
    first = windows(tmp_path / "clip", DatasetConfig(views=3, stride=(1, 2)))
    assert {window[0] for window in first} == {2, 5} and (2, 4, 6) in first and (5, 6, 7) in first
    late = windows(tmp_path / "clip", DatasetConfig(views=3, stride=(3, 3)))
    assert {window[0] for window in late} == {0, 1}  # no room after frames 2 and 5
    anywhere = windows(tmp_path / "clip", DatasetConfig(views=3, stride=(1, 2), reference="random"))
    assert {window[0] for window in anywhere} == {2, 5} and (5, 3, 4) in anywhere


def test_view_0_is_the_world_whichever_frame_it_is(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", small(6))
    dataset = ClipFolder(tmp_path, dataclasses.replace(WHOLE, views=3, reference="random"))
    references = set()
    for epoch in range(20):
        batch = dataset[Draw(0, epoch, 0)]
        frames = frames_of(batch)
        references.add(frames.index(min(frames)))
        expected = 0.1 * (torch.tensor(frames) - frames[0])
        torch.testing.assert_close(batch.camera_poses[0, :, 0, 3], expected, rtol=0, atol=1e-6)
        assert torch.equal(batch.camera_poses[0, 0], torch.eye(4))
    assert len(references) > 1


def test_a_sample_depends_on_seed_epoch_and_clip_alone(tmp_path: Path) -> None:
    config = dataclasses.replace(WHOLE, views=2, stride=(1, 3))
    folder_of(tmp_path, 3)
    a, b = ClipFolder(tmp_path, config), ClipFolder(tmp_path, config)
    keys = [Draw(seed, epoch, clip) for seed in (0, 1) for epoch in range(4) for clip in range(3)]
    drawn = {key: frames_of(a[key]) for key in keys}
    assert drawn == {key: frames_of(b[key]) for key in reversed(keys)}
    assert len({tuple(frames) for frames in drawn.values()}) > 4
    with pytest.raises(IndexError, match="expected 0 to 2, got 3"):
        a[3]
    assert len(list(a)) == len(a) == 3


def test_the_split_is_by_name_and_of_whole_folders(tmp_path: Path) -> None:
    for name in [f"scene{i}" for i in range(40)] + ["house/a", "house/b", "house/c"]:
        (tmp_path / name / "images").mkdir(parents=True)
    parts = {
        split: set(ClipFolder(tmp_path, DatasetConfig(split=split, held_out=0.3)).clips)
        for split in ("train", "held_out", "all")
    }
    assert parts["train"] | parts["held_out"] == parts["all"] and not parts["train"] & parts["held_out"]
    assert 4 < len(parts["held_out"]) < 22
    assert any({"house/a", "house/b", "house/c"} <= part for part in (parts["train"], parts["held_out"]))
    shutil.rmtree(tmp_path / "scene0")
    again = set(ClipFolder(tmp_path, DatasetConfig(split="held_out", held_out=0.3)).clips)
    assert again == parts["held_out"] - {"scene0"}
    with pytest.raises(MediaError, match="none of its 42 clips is in the split 'held_out'"):
        ClipFolder(tmp_path, DatasetConfig(split="held_out", held_out=0))


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    """File systems know bytes; the split is by them."""
    write_clip(tmp_path / "clip", small(3))
    os.rename(tmp_path / "clip", os.fsencode(tmp_path) + b"/caf\xe9")
    found = [
        ClipFolder(tmp_path, DatasetConfig(split=split, held_out=share))
        for split, share in (("train", 0), ("held_out", 1))
    ]
    assert [len(folder) for folder in found] == [1, 1]


def test_clips_are_found_in_folders_links_and_hidden_ones_are_not(tmp_path: Path) -> None:
    write_clip(tmp_path / "data" / "b" / "clip10", small(3))
    write_clip(tmp_path / "data" / "b" / "clip9", small(3))
    write_clip(tmp_path / "elsewhere", small(3))
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "data" / ".tmp-1")
    assert ClipFolder(tmp_path / "data", WHOLE).clips == ["a", "b/clip9", "b/clip10"]
    assert ClipFolder(tmp_path / "elsewhere", WHOLE).clips == ["."]
    (tmp_path / "empty").mkdir()
    for path, message in [("empty", "no clip in this folder"), ("none", "got nothing")]:
        with pytest.raises(MediaError, match=message):
            ClipFolder(tmp_path / path)


def test_config_errors() -> None:
    assert DatasetConfig(sizes=[[28, 42]]).sizes == ((28, 42),)  # type: ignore[arg-type]
    assert DatasetConfig(sizes=(28, 42)).sizes == ((28, 42),)  # type: ignore[arg-type]
    for changes in (
        {"views": 0}, {"sizes": ((28, 41),)}, {"sizes": ()}, {"stride": (0, 1)}, {"stride": (3, 2)}, {"fit": "pad"},
        {"reference": "last"}, {"split": "test"}, {"held_out": 2}, {"require": ("images",)}, {"on_error": "ignore"},
        {"max_depth": -1}, {"stride": 2}, {"held_out": "x"}, {"dynamic_threshold": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"DatasetConfig.{next(iter(changes))}: expected .*, got "):
            DatasetConfig(**changes)  # type: ignore[arg-type]


def test_workers_change_nothing(tmp_path: Path) -> None:
    dataset = ClipFolder(folder_of(tmp_path, 5), LOADER)
    here = loader(dataset, 2, seed=7)
    expected = fingerprints([next(here) for _ in range(6)])
    for workers in (1, 2):
        before = torch.get_rng_state()
        batches = loader(dataset, 2, seed=7, num_workers=workers)
        assert fingerprints([next(batches) for _ in range(6)]) == expected
        assert torch.equal(torch.get_rng_state(), before)
        batches.close()
        with pytest.raises(StopIteration):
            next(batches)


def test_a_dataset_in_use_can_be_sent_to_a_process(tmp_path: Path) -> None:
    dataset = ClipFolder(folder_of(tmp_path, 2), LOADER)
    first = dataset[1]
    assert_same(pickle.loads(pickle.dumps(dataset))[1], first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches(tmp_path: Path, workers: int) -> None:
    dataset = ClipFolder(folder_of(tmp_path, 2), LOADER)
    batches = loader(dataset, 2, num_workers=workers, pin_memory=True)
    batch = next(batches)
    assert all(getattr(batch, field.name).is_pinned() for field in dataclasses.fields(Batch))
    assert_same(batch.to("cuda", non_blocking=True).to("cpu"), next(loader(dataset, 2)))
    batches.close()


def test_resuming_at_a_step(tmp_path: Path) -> None:
    dataset = ClipFolder(folder_of(tmp_path, 5), LOADER)
    whole = loader(dataset, 3, seed=1)
    expected = fingerprints([next(whole) for _ in range(8)])
    assert whole.step == 8
    for step in (1, 5):
        rest = loader(dataset, 3, seed=1, start_step=step)
        assert fingerprints([next(rest) for _ in range(8 - step)]) == expected[step:]
    assert len({shape for _, shape, _ in expected}) == 2
    assert fingerprints([next(loader(dataset, 3, seed=2))]) != expected[:1]


def test_every_epoch_has_every_clip_once_and_windows_anew(tmp_path: Path) -> None:
    dataset = ClipFolder(folder_of(tmp_path, 5), LOADER)
    batches = loader(dataset, 2, seed=0)
    drawn = [next(batches) for _ in range(10)]
    clips = [clip for batch in drawn for clip in clips_of(batch)]
    epochs = [clips[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len({tuple(e) for e in epochs}) > 1
    by_clip = {
        (round(float(b.images[i, 0, 1, 0, 0]) * 255), *b.images[i, :, 0, 0, 0].tolist())
        for b in drawn
        for i in range(2)
    }
    assert len(by_clip) > 5


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batch_of_a_step(tmp_path: Path, world_size: int) -> None:
    dataset = ClipFolder(folder_of(tmp_path, 5), LOADER)
    whole = loader(dataset, 4, seed=3)
    ranks = [loader(dataset, 4 // world_size, seed=3, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(4):
        assert_same(collate([next(rank) for rank in ranks]), next(whole))


def test_one_pass_for_an_evaluation(tmp_path: Path) -> None:
    dataset = ClipFolder(folder_of(tmp_path, 5), LOADER)
    passes = [[clips_of(b) for b in loader(dataset, 2, epochs=1, shuffle=False, num_workers=w)] for w in (0, 1)]
    assert passes == [[[0, 1], [2, 3], [4]]] * 2
    shares = [[c for b in loader(dataset, 2, epochs=1, rank=r, world_size=2) for c in clips_of(b)] for r in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(5))


def test_loader_errors(tmp_path: Path) -> None:
    dataset = ClipFolder(folder_of(tmp_path, 1), LOADER)
    for changes, message in (
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank: expected less than world_size 2, got 2"),
        ({"batch_size": 1, "start_step": -1}, "start_step: expected 0 or more, got -1"),
        ({"batch_size": 1, "epochs": 0}, "epochs: expected 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(dataset, **changes)  # type: ignore[arg-type]
