"""Files and folders that appear complete or not at all, and the folder where they are kept between runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "cache_folder",
    "discard",
    "flush_folder",
    "put_in_place",
    "scratch_folder",
    "scratch_name",
    "write_file",
]

PREVIOUS = ".previous"
"""Ends the name of a folder that is just being replaced."""


def cache_folder() -> Path:
    """Where tokens, reference log-probabilities and checksums are kept from run to run.

    $LIGHTNING_DPO_CACHE, or a folder in the user's cache.
    """
    root = os.environ.get("LIGHTNING_DPO_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dpo"


def scratch_name(name: str) -> str:
    """A hidden name beside a file's own, that no other process takes."""
    return f".{name}.{uuid.uuid4().hex[:12]}.tmp"


def write_file(path: Path, content: str | bytes, *, flush: bool = False) -> None:
    """Write a file under another name and rename it: a reader never sees half of it.

    Args:
        path: Where to; its folder is made if it is missing, and a file of this name is replaced.
        content: Text, written as UTF-8, or bytes.
        flush: Wait until the disk has it, so that it survives a loss of power.

    Raises:
        OSError: If it cannot be written; what was there still is, and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(scratch_name(path.name))
    try:
        with scratch.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside its place, which takes the place's name when the block ends.

    What stands there must be an empty folder, or nothing. Several processes may write one target at a time:
    the first to finish is kept, and the others get an OSError as their block ends.

    Args:
        target: The name that the folder takes.

    Raises:
        OSError: If something stands there by then; what was written is gone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:32]}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())
        with contextlib.suppress(OSError):
            target.rmdir()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_in_place(scratch: Path, target: Path) -> None:
    """Give a complete file or folder its name, in place of an older one, and flush the renaming to the disk.

    A folder cannot be replaced at once: the older one stands under another name for a moment, from which
    `put_back` returns it if the process dies between the two renamings.
    """
    if scratch.is_dir():
        previous = previous_name(target)
        discard(previous)
        if target.exists() or target.is_symlink():
            target.rename(previous)
        scratch.rename(target)
        flush_folder(target.parent)
        discard(previous)
    else:
        scratch.replace(target)  # refused where a folder stands
        flush_folder(target.parent)


def previous_name(target: Path) -> Path:
    """Where an older folder stands while `put_in_place` replaces it."""
    return target.with_name(f".{target.name}{PREVIOUS}")


def put_back(folder: Path) -> None:
    """Return folders to their names that a process was replacing as it died."""
    for previous in folder.glob(f".*{PREVIOUS}"):
        target = folder / previous.name.removeprefix(".").removesuffix(PREVIOUS)
        with contextlib.suppress(OSError):
            discard(previous) if target.exists() else previous.rename(target)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make a renaming survive a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
