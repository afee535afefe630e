"""The same rows as files of every type."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_dpo.data.readers import decode

ROWS = [
    {"prompt": "Sky?", "chosen": "blue\nof course", "rejected": "red"},
    {"prompt": "Sea?", "chosen": "gré\u2028en, “mostly”", "rejected": 'a "stone"'},
    {"prompt": "Sun?", "chosen": "yellow", "rejected": "[not json"},
]


def write(path: Path, rows: list[dict]) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith((".csv", ".tsv")):
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        elif name.endswith(".json"):
            json.dump(rows, file, indent=2, ensure_ascii=False)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def contents(source) -> list[dict]:
    return [dict(decode(record)) for _, record in source]
