"""Data files and tables -> records with their line numbers, one by one, so that any size of file will do."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

from lightning_dpo.data.bad_rows import BadRow, Reason

__all__ = ["READERS", "Record", "decode", "plain_row", "read_file", "read_table", "suffix_of"]

_CHUNK = 2**20


class Record(NamedTuple):
    """One row as it was read.

    Attributes:
        line: Where it begins in its file, or its number in a table, from 1.
        content: The row; JSON that is still to be decoded, as bytes; or what is wrong with it.
    """

    line: int
    content: Mapping[str, Any] | bytes | BadRow


def decode(record: Record) -> Mapping[str, Any]:
    """The row that a record holds.

    Raises:
        BadRow: If it holds none.
    """
    content = record.content
    if isinstance(content, BadRow):
        raise content
    if isinstance(content, bytes):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadRow(Reason.MALFORMED, f"not JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise BadRow(Reason.MALFORMED, f"not an object but {type(content).__name__}")
    return content


def suffix_of(path: Path) -> str:
    """The suffix that says how a file is read, without .gz; "" for a file that is not data."""
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    return suffix if suffix in READERS else ""


def read_file(path: Path) -> Iterator[Record]:
    """Read a file by its suffix, compressed with gzip or not.

    Raises:
        ValueError: If the file as a whole cannot be read.
    """
    import pyarrow as pa

    try:
        yield from READERS[suffix_of(path)](path)
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        raise ValueError(f"the file {str(path)!r} cannot be read: {error}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _text(raw: IO[bytes], **options: Any) -> io.TextIOWrapper:
    """A file's text; bytes that are no UTF-8 stay recognisable, for `_not_utf8_in`."""
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", **options)


def _not_utf8_in(text: str) -> BadRow | None:
    """What is wrong with a row whose text had bytes that are no UTF-8, which would train as other letters."""
    try:
        text.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    return None


def _not_utf8(error: UnicodeDecodeError) -> BadRow:
    return BadRow(Reason.UNICODE, f"text that is not UTF-8 ({error}); save the file as UTF-8")


def _read_json(path: Path) -> Iterator[Record]:
    """JSON lines, or one JSON array of rows."""
    with _open(path) as file:
        start = file.read(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()
    yield from _read_array(path) if start.startswith(b"[") else _read_lines(path)


def _read_lines(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            content = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if content:
                yield Record(number, content)


def _read_array(path: Path) -> Iterator[Record]:
    """The elements of a JSON array, without holding more of it than one element and a chunk."""
    decoder = json.JSONDecoder()
    with _open(path) as raw, _text(raw) as file:
        buffer, position, line = "", 0, 1
        opened = False
        while True:
            start = _skip(buffer, position, "[" if not opened else ",")
            line += buffer.count("\n", position, start)
            opened = opened or start > 0
            position = start
            if buffer[position : position + 1] == "]":
                return
            element, end = _element(decoder, buffer, position)
            if end < 0:
                more = file.read(max(_CHUNK, len(buffer) - position))
                if not more:
                    detail = "the JSON array breaks off or is broken from here on"
                    yield Record(line, BadRow(Reason.MALFORMED, detail))
                    return
                buffer, position = buffer[position:] + more, 0
                continue
            content = element if isinstance(element, dict) else json.dumps(element).encode()
            yield Record(line, _not_utf8_in(buffer[position:end]) or content)
            line += buffer.count("\n", position, end)
            position = end


def _element(decoder: json.JSONDecoder, buffer: str, position: int) -> tuple[Any, int]:
    """The element at a position and where it ends; -1 if it does not end in the buffer."""
    try:
        element, end = decoder.raw_decode(buffer, position)
    except (ValueError, RecursionError):
        return None, -1
    # A number at the end of the buffer might go on beyond it.
    return (element, end) if end < len(buffer) else (None, -1)


def _skip(buffer: str, position: int, mark: str) -> int:
    while position < len(buffer) and (buffer[position].isspace() or buffer[position] == mark):
        position += 1
    return position


def _read_csv(path: Path) -> Iterator[Record]:
    """Values separated by commas, or tabs in a .tsv file, below a line of column names."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    with _open(path) as raw, _text(raw, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        while True:
            line = max(reader.line_num + 1, 2)
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(line, BadRow(Reason.MALFORMED, f"not CSV: {error}"))
                continue
            # Values beyond those of the first line are under None; a column may well be named "".
            if None in row or any(value is None for value in row.values()):
                names = reader.fieldnames or ()
                detail = f"does not have the {len(names)} values of the first line, {','.join(names)!r:.80}"
                yield Record(line, BadRow(Reason.MALFORMED, detail))
            else:
                cells = {name: _cell(text) for name, text in row.items()}
                yield Record(line, _not_utf8_in("".join(row.values())) or cells)


def _cell(text: str) -> Any:
    """A value, or the chat turns that are written in it as JSON."""
    if not text.lstrip().startswith(("[{", "{")):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    turns = value if isinstance(value, list) else [value]
    is_turn = [isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns]
    return value if is_turn and all(is_turn) else text


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from read_table(file.iter_batches(batch_size=256))


def read_table(parts: Iterable[Any]) -> Iterator[Record]:
    """Read the rows of Arrow tables or record batches, numbered from 1 through all of them."""
    number = 0
    for part in parts:
        for row in _plain_rows(part):
            number += 1
            yield Record(number, row)


def _plain_rows(part: Any) -> Iterator[Mapping[str, Any] | BadRow]:
    try:
        yield from map(plain_row, part.to_pylist())
    except UnicodeDecodeError as error:
        if len(part) == 1:
            yield _not_utf8(error)
            return
        for index in range(len(part)):
            yield from _plain_rows(part.slice(index, 1))


def plain_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a table without the nulls that other rows' keys leave in it."""
    plain: Mapping[str, Any] = _without_nulls(row)
    return plain


def _without_nulls(value: Any) -> Any:
    """Drop the keys that Arrow fills with null because another row's message or tool has them."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


Reader: TypeAlias = Callable[[Path], Iterator[Record]]

READERS: Mapping[str, Reader] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""How a file of each suffix is read."""
