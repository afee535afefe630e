"""The lower bounds that pyproject.toml declares are the versions that `make test-lowest` installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def lower_bounds() -> dict[str, str]:
    """Of what the package needs with `tune` and `lora`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found: dict[str, str] = {}
    for line in [*project["dependencies"], *extras["tune"], *extras["lora"]]:
        requirement = Requirement(line)
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{line} has no lower bound alone"
        assert found.setdefault(requirement.name, bound.version) == bound.version
    return found


def test_every_lower_bound_is_the_version_that_is_tested() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    lines += re.findall(r"^LOWEST_TORCH \?= (\S+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: pinned.get(name) for name in lower_bounds()} == lower_bounds()
