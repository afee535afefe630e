"""Where shards lie: a local folder or an fsspec URL. A file appears complete or not at all."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_dpo.files import OBJECT_STORES, scratch_name, write_file

__all__ = ["Folder", "FsspecFolder", "LocalFolder", "open_folder"]

_DAMAGED = "damaged"
_STAMPS = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems say of a file that changes with it, each in words of its own."""


class Folder(ABC):
    """A folder of files that are written once and never changed; made when the first is written."""

    location: str

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the files that are there, sorted; none where the folder is missing."""

    @abstractmethod
    def stamps(self) -> dict[str, str]:
        """What tells each file that is there from an altered one of its name, without reading it."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: If there is no such file any more.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file under a temporary name and rename it; of several writers any one wins.

        Raises:
            OSError: If it cannot be written; then nothing is left of it.
        """

    @abstractmethod
    def set_aside(self, name: str) -> None:
        """Move a damaged file out of the way, where that is permitted."""


class LocalFolder(Folder):
    """A folder of this machine's file systems."""

    def __init__(self, location: str) -> None:
        """Name a folder."""
        self.location = location
        self._path = Path(location).expanduser()

    def names(self) -> list[str]:
        """Names of the shards that are there, sorted."""
        if not self._path.is_dir():
            return []
        return sorted(path.name for path in self._path.iterdir() if _is_shard(path.name))

    def stamps(self) -> dict[str, str]:
        """Size and time of the last change of each shard."""
        found = {}
        for name in self.names():
            with contextlib.suppress(FileNotFoundError):
                stat = (self._path / name).stat()
                found[name] = f"{stat.st_size} {stat.st_mtime_ns}"
        return found

    def read(self, name: str) -> bytes:
        """The content of a shard."""
        return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write a shard, flushed to the disk, and rename it."""
        write_file(self._path / name, data, flush=True)

    def set_aside(self, name: str) -> None:
        """Move a damaged shard into a folder of its own."""
        with contextlib.suppress(OSError):
            (self._path / _DAMAGED).mkdir(exist_ok=True)
            (self._path / name).replace(self._path / _DAMAGED / name)


class FsspecFolder(Folder):
    """A folder behind an fsspec URL, such as ``s3://bucket/folder`` or ``memory://folder``."""

    def __init__(self, location: str) -> None:
        """Connect.

        Raises:
            ValueError: If the URL's scheme is unknown, or its package is not installed.
        """
        import fsspec

        self.location = location
        try:
            fs, path = fsspec.core.url_to_fs(location)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"`reference_cache` must be a folder or a URL that fsspec can open, got {location!r}: {error}"
            ) from error
        self._fs: Any = fs
        self._path: str = path.rstrip("/")

    def names(self) -> list[str]:
        """Names of the shards that are there, sorted."""
        return sorted(self.stamps())

    def stamps(self) -> dict[str, str]:
        """Size of each shard, with the time or the checksum that the store gives."""
        # What other processes wrote since the last look must be seen.
        self._fs.invalidate_cache()
        try:
            with _as_system_errors():
                found = self._fs.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        about = {str(file["name"]).rsplit("/", 1)[-1]: file for file in found}
        return {
            name: " ".join(str(file[field]) for field in _STAMPS if file.get(field) is not None)
            for name, file in about.items()
            if _is_shard(name)
        }

    def read(self, name: str) -> bytes:
        """The content of a shard."""
        with _as_system_errors():
            content: bytes = self._fs.cat_file(f"{self._path}/{name}")
        return content

    def write(self, name: str, data: bytes) -> None:
        """Write a shard under a temporary name and move it."""
        scratch = f"{self._path}/{scratch_name(name)}"
        try:
            with _as_system_errors():
                self._make(self._path)
                self._fs.pipe_file(scratch, data)
                self._fs.mv(scratch, f"{self._path}/{name}")
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(scratch)
            raise

    def set_aside(self, name: str) -> None:
        """Move a damaged shard into a folder of its own."""
        with contextlib.suppress(OSError), _as_system_errors():
            self._make(f"{self._path}/{_DAMAGED}")
            self._fs.mv(f"{self._path}/{name}", f"{self._path}/{_DAMAGED}/{name}")

    def _make(self, path: str) -> None:
        if self.location.partition("://")[0] not in OBJECT_STORES:
            self._fs.makedirs(path, exist_ok=True)


def open_folder(location: str) -> Folder:
    """The folder that a path or a URL names."""
    if location.startswith("file://"):
        return LocalFolder(location.removeprefix("file://"))
    return FsspecFolder(location) if "://" in location else LocalFolder(location)


@contextlib.contextmanager
def _as_system_errors() -> Iterator[None]:
    """Turn what the clients of object stores raise, each in its own way, into OSError.

    No credentials, no connection, no permission: these are to a store what a full disk is to a folder.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".")
