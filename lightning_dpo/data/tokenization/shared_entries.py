"""Tokenised rows that machines share through a URL: the first to make them stores them, others fetch them."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import fsspec

from lightning_dpo.data.token_store import TokenRow, TokenStore, entry_files
from lightning_dpo.files import OBJECT_STORES, cache_folder, scratch_folder, scratch_name

__all__ = ["SharedEntries", "token_cache"]


def token_cache(cache_dir: str | None) -> tuple[Path, SharedEntries | None]:
    """Where this machine keeps tokenised rows, and where machines share them, if they do.

    Args:
        cache_dir: A folder, a URL, or None for the user's own cache folder.

    Raises:
        ValueError: If the URL cannot be opened.
    """
    if cache_dir and "://" in cache_dir:
        return cache_folder(), SharedEntries(cache_dir)
    return Path(cache_dir) if cache_dir else cache_folder(), None


class SharedEntries:
    """Copies of cache entries behind an fsspec URL.

    Rows that cannot be fetched are made by this machine, and those that cannot be stored by every machine,
    with a warning.
    """

    def __init__(self, location: str) -> None:
        """Name the place; nothing is read.

        Args:
            location: Such as ``s3://bucket/tokens``.

        Raises:
            ValueError: If fsspec cannot open it.
        """
        self.location = location.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"`cache_dir` must be a folder or a URL that fsspec can open, got {location!r}: {error}"
            ) from error

    def fetch(self, path: Path, kind: type[TokenRow]) -> bool:
        """Copy an entry to this machine, where it appears complete or not at all.

        Args:
            path: The local entry.
            kind: What it holds.

        Returns:
            Whether it is there now.
        """
        rows, keys, report = entry_files(path, kind)
        try:
            if not self._has(path, report):
                return False
            if self._has(path, keys):
                keys.parent.mkdir(parents=True, exist_ok=True)
                scratch_keys = keys.with_name(scratch_name(keys.name))
                self._fs.get_file(self._at(path, keys), str(scratch_keys))
                scratch_keys.replace(keys)
            with scratch_folder(path) as scratch:
                for file in (rows, report):
                    self._fs.get_file(self._at(path, file), str(scratch / file.name))
                TokenStore(scratch, kind)  # cannot be opened if it is not whole
        except Exception as error:  # every store's client has errors of its own
            if not TokenStore.exists(path):  # else another process of this machine was faster
                _warn(f"tokens are made anew, for those in {self.location} cannot be fetched", error)
                return False
        return True

    def store(self, path: Path, kind: type[TokenRow]) -> bool:
        """Copy an entry of this machine there, unless it is there already.

        Args:
            path: The local entry.
            kind: What it holds.

        Returns:
            Whether it was copied.
        """
        rows, keys, report = entry_files(path, kind)
        try:
            if self._has(path, report):
                return False
            for file in (rows, keys, report):  # the report tells that an entry is whole
                if file.exists():
                    self._put(file, self._at(path, file))
        except Exception as error:
            _warn(f"every machine makes its own tokens, for {self.location} cannot keep them", error)
            return False
        return True

    def _has(self, path: Path, file: Path) -> bool:
        self._fs.invalidate_cache()  # another machine may have stored it since the last look
        return bool(self._fs.exists(self._at(path, file)))

    def _put(self, file: Path, target: str) -> None:
        """Store a file under a temporary name and move it."""
        folder, _, name = target.rpartition("/")
        scratch = f"{folder}/{scratch_name(name)}"
        try:
            if self.location.partition("://")[0] not in OBJECT_STORES:
                self._fs.makedirs(folder, exist_ok=True)
            self._fs.put_file(str(file), scratch)
            self._fs.mv(scratch, target)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(scratch)
            raise

    def _at(self, path: Path, file: Path) -> str:
        """Where a file of an entry lies there."""
        return f"{self._root}/{path.parent.name}/{path.name}/{file.name}"


def _warn(what: str, error: Exception) -> None:
    warnings.warn(f"{what}: {type(error).__name__}: {error}", stacklevel=3)
