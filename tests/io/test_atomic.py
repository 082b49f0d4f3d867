"""A file is replaced by a complete one or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from any4d_fast.io import MediaError, atomic_path


def test_writes_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "ütf 8 名.bin"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".bin" and temporary.parent == target.parent
        assert not target.exists()
        temporary.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_failure_without_an_old_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "out.bin"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_failing_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device: '.*out.bin'"), atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_errors_of_other_files_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other.bin"), atomic_path(tmp_path / "out.bin"):
        (tmp_path / "other.bin").read_bytes()
    with pytest.raises(OSError, match="^encoder error -2$"), atomic_path(tmp_path / "out.bin"):
        raise OSError("encoder error -2")


def test_permissions(tmp_path: Path) -> None:
    plain, private = tmp_path / "plain", tmp_path / "private"
    reference = tmp_path / "reference"
    reference.touch()
    private.touch(mode=0o600)
    for target in (plain, private):
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"x")
    assert plain.stat().st_mode == reference.stat().st_mode
    assert private.stat().st_mode & 0o777 == 0o600


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.bin"
    link.symlink_to(tmp_path / "real" / "data.bin")
    with atomic_path(link) as temporary:
        temporary.write_bytes(b"x")
    assert link.is_symlink()
    assert (tmp_path / "real" / "data.bin").read_bytes() == b"x"


def test_folder_and_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder.ply").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(MediaError, match=r"folder\.ply: is a folder"), atomic_path(tmp_path / "folder.ply"):
        pass
    with pytest.raises(MediaError, match="cannot write here"), atomic_path(tmp_path / "file" / "out.ply"):
        pass


def test_longest_name(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 251 + ".bin")
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"x")
    assert target.exists()
