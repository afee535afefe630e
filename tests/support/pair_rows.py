"""Rows of preference pairs, files of them, and data modules that have read them."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_dpo.data.datamodule import PreferenceDataModule
from lightning_dpo.types import PairBatch

GOOD = [
    {"prompt": f"the sky {n}", "chosen": f" is blue {n}", "rejected": f" is green {n}"} for n in range(40)
]
COLOURS = [
    {"prompt": f"is it {colour}?", "chosen": " yes it is", "rejected": f" no not {colour}"}
    for colour in ("red", "green", "grey", "white", "pink", "brown", "black", "gold")
]
BAD = [
    {"prompt": "a", "chosen": "", "rejected": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    {"prompt": "a", "chosen": "", "rejected": "c"},
]


def jsonl(path: Path, rows: list[dict | str]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def ready(train, **settings) -> PreferenceDataModule:
    data = PreferenceDataModule(train, **settings)
    data.prepare_data()
    data.setup()
    return data


def parts(batch: PairBatch) -> list[tuple[list[int], ...]]:
    names = ("prompt", "chosen", "rejected")
    columns = [
        [ids.tolist() for ids in getattr(batch, f"{n}_ids").split(getattr(batch, f"{n}_lengths").tolist())]
        for n in names
    ]
    return list(zip(*columns, strict=True))
