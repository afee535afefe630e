from __future__ import annotations

import pytest

from lightning_dpo.tuning.report.formatting import (
    format_duration,
    format_number,
    format_value,
    path_labels,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.20174, "0.202"),
        (0.0406, "0.0406"),
        (3e-6, "3e-6"),
        (9.094e-6, "9.09e-6"),
        (2.5e-6, "2.5e-6"),
        (1240.4, "1240"),
        (0.0, "0"),
        (-0.00005, "-5e-5"),
        (123456.0, "1.23e5"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert format_number(value) == text


def test_numbers_of_a_column_keep_their_zeros() -> None:
    assert [format_number(value, 4, pad=True) for value in (0.767, 17.0, 11.46)] == [
        "0.7670",
        "17.00",
        "11.46",
    ]


def test_only_classes_lose_their_package() -> None:
    assert format_value("lightning_dpo.losses.IPOLoss") == "IPOLoss"
    assert format_value("data/pairs.v2.jsonl") == "data/pairs.v2.jsonl"
    assert format_value("pairs.jsonl") == "pairs.jsonl"
    assert format_value(True) == "True"
    assert format_value({"a": 1}) == '{"a": 1}'


def test_paths_are_short_unless_two_would_be_the_same() -> None:
    assert path_labels(["model.loss.beta", "model.loss.class_path", "model.optimizer.lr"]) == {
        "model.loss.beta": "β",
        "model.loss.class_path": "loss",
        "model.optimizer.lr": "lr",
    }
    assert path_labels(["a.size", "b.size"]) == {"a.size": "a.size", "b.size": "b.size"}


def test_durations() -> None:
    assert [format_duration(value) for value in (46.2, 720, 11100)] == ["46 s", "12 min", "3 h 05 min"]
