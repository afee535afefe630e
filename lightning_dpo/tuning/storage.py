"""Where a sweep keeps its files: a folder or any fsspec URL, that all machines see."""

from __future__ import annotations

import contextlib
import os
import posixpath
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from lightning_dpo.files import write_file

__all__ = ["Storage"]


class Storage:
    """A folder on any file system.

    Attributes:
        location: The folder as it is shown to users.
        path: The folder as its file system names it.
    """

    def __init__(self, location: str | Path) -> None:
        """Name a folder; nothing is read or written."""
        given = str(location)
        self.is_local = "://" not in given
        self.location = str(Path(given).expanduser().absolute()) if self.is_local else given.rstrip("/")
        self._fs, self.path = fsspec.core.url_to_fs(self.location)

    def __truediv__(self, name: str) -> Storage:
        """A folder within."""
        return Storage(f"{self.location}/{name}")

    def ray_options(self) -> dict[str, Any]:
        """The file system, as keyword arguments of Ray's configurations."""
        if self.is_local:
            return {}
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return {"storage_filesystem": PyFileSystem(FSSpecHandler(self._fs))}

    def read(self, name: str) -> str | None:
        """The text of a file; None where there is none."""
        try:
            return str(self._fs.read_text(self._at(name), encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_bytes(self, name: str) -> bytes | None:
        """The content of a file; None where there is none."""
        try:
            return bytes(self._fs.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file; on a local file system a reader never sees half of it."""
        target = self._at(name)
        if self.is_local:
            write_file(Path(target), content)
            return
        self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
        self._fs.pipe_file(target, content.encode() if isinstance(content, str) else content)

    def names(self, suffix: str) -> list[str]:
        """Sorted names of the files in the folder that end in `suffix`."""
        if not self._fs.isdir(self.path):
            return []
        self._fs.invalidate_cache()
        found = (posixpath.basename(entry) for entry in self._fs.ls(self.path, detail=False))
        return sorted(name for name in found if name.endswith(suffix))

    def is_empty(self) -> bool:
        """Whether the folder is missing or holds nothing."""
        return not self._fs.isdir(self.path) or not self._fs.ls(self.path, detail=False)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes out of a local folder for as long as the block lasts; it is made if missing.

        Raises:
            ValueError: If another process has claimed it.
        """
        if not self.is_local or sys.platform == "win32":
            yield
            return
        import fcntl

        Path(self.path).mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some file systems lock no folders
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ValueError(
                        f"`name` must be of a sweep that does not run, got {self.location}, which another "
                        "process works on: wait for it, or end it first"
                    ) from error
            yield
        finally:
            os.close(folder)

    def put(self, source: Path, name: str) -> str:
        """Copy a local file or folder into this one, in the place of an earlier one; returns its location."""
        target = self._at(name)
        if self._fs.exists(target):
            self._fs.rm(target, recursive=True)
        self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
        self._fs.put(str(source), target, recursive=source.is_dir())
        return f"{self.location}/{name}"

    def add(self, source: Path) -> None:
        """Copy what is in a local folder into this one, beside what is there."""
        self._fs.makedirs(self.path, exist_ok=True)
        self._fs.put(f"{source}/", f"{self.path}/", recursive=True)

    def remove(self, path: str) -> None:
        """Remove a folder, given by its path on this file system, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)

    def fetch(self, path: str, target: Path) -> None:
        """Copy a folder, given by its path on this file system, to a local one."""
        self._fs.get(path.rstrip("/") + "/", str(target) + "/", recursive=True)

    def _at(self, name: str) -> str:
        return posixpath.join(self.path, name)
