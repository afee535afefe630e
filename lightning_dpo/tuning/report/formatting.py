"""How config paths, metrics, values and times are written for people, in the report and in the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["format_duration", "format_number", "format_value", "metric_label", "one_line", "path_labels"]

_GREEK = {"beta": "β"}
_METRICS = {"kl": "KL", "margin": "margin", "tokens_per_second": "tokens/s"}
_CLASS_PATH = re.compile(r"(?:[A-Za-z_]\w*\.)+(_*[A-Z]\w*)")


def path_labels(paths: Iterable[str]) -> dict[str, str]:
    """A short label for each config path: its last part, or the whole path where two would be the same."""
    short = {path: _last_part(path) for path in paths}
    labels = list(short.values())
    return {path: label if labels.count(label) == 1 else path for path, label in short.items()}


def metric_label(metric: str) -> str:
    """The last part of a metric's name: "accuracy" for "val/rewards/accuracy"."""
    last = metric.rpartition("/")[2]
    return _METRICS.get(last, last.replace("_", " "))


def format_value(value: Any) -> str:
    """A parameter's value as text; classes stand without their package."""
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, str):
        found = _CLASS_PATH.fullmatch(value)
        return found[1] if found else value
    return json.dumps(value, default=str) if isinstance(value, Mapping | list | tuple) else str(value)


def one_line(text: str, *, longest: int = 300) -> str:
    """A text that may have lines, such as an error, as one of at most so many characters."""
    joined = " ".join(text.split())
    return joined if len(joined) <= longest else f"{joined[: longest - 1]}…"


def format_number(value: float, digits: int = 3, *, pad: bool = False) -> str:
    """A number to some significant digits: 0.0406, 1240, 3e-6 rather than 0.000003.

    Args:
        value: What is written.
        digits: Significant digits.
        pad: Keep zeros at the end, for columns.
    """
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        if not exponent:
            return mantissa
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    if abs(value) >= 10**digits:
        return f"{round(value)}"
    return f"{value:#.{digits}g}" if pad else f"{value:.{digits}g}"


def format_duration(seconds: float) -> str:
    """A time as 46 s, 12 min or 3 h 05 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _last_part(path: str) -> str:
    parts = path.split(".")
    last = parts[-2] if parts[-1] == "class_path" and len(parts) > 1 else parts[-1]
    return _GREEK.get(last, last)
