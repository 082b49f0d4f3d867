"""Writing a file so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .errors import MediaError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` when the block ends without an error.

    The temporary file has the same suffix and folder (a rename is atomic only within one file system), starts out
    empty, and is flushed to the disk before the rename. When the block raises, it is removed and an existing `path`
    stays as it was. A symbolic link is followed: its target is replaced, not the link. Missing folders are created.

    Raises:
        MediaError: `path` is a folder, or its folder cannot be created or written.
        OSError: it cannot be written to its end, as on a full disk; the message names `path`.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise MediaError(f"{path}: is a folder; give the name of a file to write")
    # A short name of our own: the target's may already have the longest length that the file system allows.
    temporary = target.parent / f".tmp-{secrets.token_hex(8)}{target.suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb"):
            pass
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o7777)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise MediaError(f"{path}: cannot write here ({error.strerror or error})") from error
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and str(error.filename or temporary) == str(temporary):
            # Of a write ("no space left"), which knows no name, or of a name that nobody gave.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    with contextlib.suppress(OSError):
        # Some file systems cannot flush a folder; the file itself is complete either way.
        flush(target.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
