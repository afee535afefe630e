"""Files and folders that appear complete or not at all, and the folder where they are kept between runs."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "OBJECT_STORES",
    "cache_folder",
    "current_name",
    "discard",
    "parquet_bytes",
    "partial_name",
    "previous_name",
    "put_back",
    "put_in_place",
    "scratch_folder",
    "scratch_name",
    "write_file",
]

PARTIAL, REPLACED, OLDER_REPLACED = ".partial", ".being-replaced", ".previous"
"""In the names of what is not whole yet, and of what is just being replaced, now and in an older version."""

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""Schemes of object stores; to make a folder there is to make a bucket, of any name that was mistyped."""

_EXCHANGE, _HERE = 2, -100
"""Linux's RENAME_EXCHANGE and AT_FDCWD."""


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


def parquet_bytes(table: Any, **options: Any) -> bytes:
    """The content of a Parquet file, for whatever writes it whole.

    Args:
        table: An Arrow table.
        options: Of `pyarrow.parquet.write_table`.
    """
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


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


def partial_name(target: Path) -> Path:
    """Where something large is written until it is whole; the next attempt writes there too."""
    return target.with_name(f".{target.name}{PARTIAL}")


def put_in_place(scratch: Path, target: Path) -> None:
    """Give a complete file or folder its name, in place of an older one, and flush the renaming to the disk.

    A folder changes places with the older one at once where the system can do that. Elsewhere the older one
    stands under `previous_name` for a moment; if the process dies then, `put_back` returns it.
    """
    if not scratch.is_dir() or not (target.exists() or target.is_symlink()):
        scratch.replace(target)  # refused where a folder takes the place of a file, or the reverse
    elif _exchange(scratch, target):
        discard(scratch)
    else:
        previous = previous_name(target)
        discard(previous)
        target.rename(previous)
        scratch.rename(target)
    flush_folder(target.parent)
    discard(previous_name(target))


def previous_name(target: Path) -> Path:
    """Where an older folder stands while `put_in_place` replaces it; begins and ends like its own name."""
    return target.with_name(f"{target.stem}{REPLACED}{target.suffix}")


def current_name(path: Path) -> Path:
    """Where a folder is now: under its own name, if it was put back from where it stood aside."""
    return path if path.exists() else path.with_name(path.name.replace(REPLACED, ""))


def put_back(folder: Path) -> None:
    """Return folders to their names that a process was replacing as it died."""
    aside = {path: path.name.replace(REPLACED, "") for path in folder.glob(f"*{REPLACED}*")}
    for path in folder.glob(f".*{OLDER_REPLACED}"):
        aside[path] = path.name.removeprefix(".").removesuffix(OLDER_REPLACED)
    for path, name in aside.items():
        with contextlib.suppress(OSError):
            discard(path) if (folder / name).exists() else path.rename(folder / name)


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


def _exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change names at once; whether the system and the file system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
