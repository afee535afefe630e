"""Where rows come from: files, folders, glob patterns, data sets in memory or on the hub."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from lightning_dpo.data.readers import READERS, Record, read_file, read_table, suffix_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    DataArgument: TypeAlias = (
        str | list[str] | list[dict[str, Any]] | dict[str, Any] | Dataset | IterableDataset
    )
else:
    # jsonargparse finds this one. With a class in it, a file's name would be that of a configuration, and
    # the text of a CSV file be taken in the place of its name.
    DataArgument = str | list[str] | list[dict[str, Any]] | dict[str, Any]

__all__ = ["DataArgument", "RowSource", "RowsLike", "open_source"]

RowsLike: TypeAlias = "str | Path | Dataset | Sequence[str | Mapping[str, Any]]"

_SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval", "test"),
}


class RowSource(Protocol):
    """Rows in a fixed order, that may be read any number of times."""

    @property
    def name(self) -> str:
        """What it is called in reports."""

    def fingerprint(self) -> str:
        """Changes when the rows may have changed."""

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        """Each row with the name of the file it is in."""


@dataclass(frozen=True)
class _Files:
    name: str
    paths: tuple[Path, ...]

    def fingerprint(self) -> str:
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return _digest(stats)

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for path in self.paths:
            for record in read_file(path):
                yield path.name, record


@dataclass(frozen=True)
class _Table:
    name: str
    table: Any

    def fingerprint(self) -> str:
        return str(self.table._fingerprint)

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for record in read_table(self.table.with_format("arrow").iter(batch_size=256)):
            yield self.name, record


@dataclass(frozen=True)
class _Rows:
    name: str
    rows: Sequence[Mapping[str, Any]]

    def fingerprint(self) -> str:
        return _digest(list(self.rows))

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for number, row in enumerate(self.rows, 1):
            yield self.name, Record(number, row)


@dataclass(frozen=True)
class _Joined:
    name: str
    sources: tuple[RowSource, ...]

    def fingerprint(self) -> str:
        return _digest([source.fingerprint() for source in self.sources])

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for source in self.sources:
            yield from source


def open_source(rows: RowsLike, *, split: str, streaming: bool = False) -> RowSource:
    """Find rows, without reading them (a hub data set is downloaded).

    Args:
        rows: A file, a folder of files or of a saved data set, a glob pattern, a hub id (``org/name``,
            ``org/name:split`` or ``org/name:configuration:split``), a `datasets.Dataset`, a list of rows,
            or a list of any of the strings.
        split: "train" or "validation": the argument, which also picks among the splits of a folder or of a
            hub data set. Behind a dot may stand which of several data sets it is, as in "train.helpful".
        streaming: Leave a hub data set where it is; its rows come over the network as they are read.

    Raises:
        ValueError: If there is nothing there, naming `split` as the argument.
    """
    if isinstance(rows, (str, Path)):
        return _open_name(str(rows), split, streaming=streaming)
    if hasattr(rows, "_fingerprint") and type(rows).__name__ != "IterableDataset":
        return _Table("Dataset", rows)
    if isinstance(rows, Mapping):
        found = ", ".join(map(str, rows))
        raise ValueError(
            f"`{split}` must be one data set, got several ({found}); pass one of them, or name them: "
            '{"helpful": {"path": ..., "weight": ...}, "harmless": ...}'
        )
    if isinstance(rows, Sequence) and rows:
        names = [row for row in rows if isinstance(row, (str, Path))]
        if len(names) == len(rows):
            sources = tuple(_open_name(str(name), split, streaming=streaming) for name in names)
            return _Joined(f"{len(sources)} sources", sources) if len(sources) > 1 else sources[0]
        dicts = [row for row in rows if isinstance(row, Mapping)]
        if len(dicts) == len(rows):
            return _Rows("rows", dicts)
    if type(rows).__name__ == "IterableDataset":
        raise ValueError(
            f"`{split}` must be rows that can be tokenised before training, got an IterableDataset; only the "
            "`train` of PreferenceDataModule is streamed. Pass a datasets.Dataset or a file"
        )
    raise ValueError(
        f"`{split}` must be a file, a folder, a hub id, a datasets.Dataset or a list of rows, "
        f"got {'an empty list' if rows == [] else type(rows).__name__}"
    )


def _open_name(name: str, split: str, *, streaming: bool = False) -> RowSource:
    if name == "???":
        raise ValueError(
            f"`{split}` must be given, as in `--data.{split} pairs.jsonl` behind `--config`, got '???', "
            "which stands in a recipe for what is still to be named"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        if not suffix_of(path):
            raise ValueError(f"`{split}` must be a file of type {_types()}, got {name!r}")
        return _Files(path.name, (path,))
    if glob.has_magic(name):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
        found = tuple(sorted(match for match in map(Path, matches) if suffix_of(match)))
        if not found:
            raise ValueError(
                f"`{split}` must match files of type {_types()}, got {name!r}, which matches none"
            )
        return _Files(name, found)
    if suffix_of(path) or name.startswith(("/", ".", "~")) or not 0 < name.count("/") < 2:
        raise ValueError(
            f"`{split}` must be an existing file, a folder or a hub id, got {name!r}{_hint(path)}"
        )
    return _open_hub(name, split, streaming=streaming)


def _open_folder(folder: Path, split: str) -> RowSource:
    if (folder / "state.json").is_file():
        from datasets import load_from_disk

        return _Table(folder.name, load_from_disk(str(folder)))
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return _open_folder(folder / _pick(splits, split, f"the data set in {str(folder)!r}"), split)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and suffix_of(path))
    if not files:
        raise ValueError(
            f"`{split}` must hold files of type {_types()}, got the folder {str(folder)!r} with none"
        )
    # Files named after splits are told apart, so that validation rows are not trained on.
    named = {path: _split_of(path, folder) for path in files}
    if any(named.values()):
        files = [path for path in files if named[path] == split.partition(".")[0]]
        if not files:
            raise ValueError(
                f"`{split}` must find files named after the split, got the folder {str(folder)!r} with "
                f"{', '.join(path.name for path in named)}; name one of them"
            )
    return _Files(folder.name, tuple(files))


def _open_hub(name: str, split: str, *, streaming: bool = False) -> RowSource:
    from datasets import get_dataset_split_names, load_dataset

    repository, *rest = name.split(":")
    configuration = rest[0] if len(rest) == 2 else None
    try:
        chosen = (
            rest[-1]
            if rest
            else _pick(get_dataset_split_names(repository, configuration), split, f"the data set {name!r}")
        )
        table = load_dataset(
            repository, configuration, split=chosen, **({"streaming": True} if streaming else {})
        )
    except (OSError, ValueError) as error:
        if str(error).startswith("`"):
            raise
        raise ValueError(
            f"`{split}` must be an existing file, a folder or a hub id, got {name!r}: no such file, "
            f"and the hub says: {error}"
        ) from error
    return _Table(name, table)


def _pick(splits: Sequence[str], split: str, what: str) -> str:
    found = next((name for name in _SPLIT_NAMES[split.partition(".")[0]] if name in splits), None)
    if found is None:
        raise ValueError(
            f"`{split}` must name a split of {what}, which has {', '.join(splits)}; "
            "write org/name:split, or pass a datasets.Dataset"
        )
    return found


def _split_of(path: Path, folder: Path) -> str | None:
    parts = path.relative_to(folder).parts
    for part in parts:
        start = part.lower().replace("-", "_").replace(".", "_").split("_")[0]
        for split, names in _SPLIT_NAMES.items():
            if start in names:
                return split
    return None


def _hint(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f": there is no folder {str(parent)!r}"
    close = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1)
    return f": no such file; did you mean {str(parent / close[0])!r}?" if close else ": no such file"


def _types() -> str:
    return ", ".join(READERS) + " (also with .gz)"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
