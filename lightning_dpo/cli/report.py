"""The command `lightning-dpo report`: write the report of a sweep anew."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_dpo.tuning import require_ray

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Write the report.

    Args:
        arguments: What follows `lightning-dpo report`.

    Raises:
        ValueError: If ray is not installed, or the folder holds no sweep.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dpo report", description="Write the report of a sweep anew.", allow_abbrev=False
    )
    parser.add_argument("folder", help="the sweep's folder or URL")
    folder = parser.parse_args(list(arguments)).folder
    require_ray()
    from lightning_dpo.tuning.report.page import write_report
    from lightning_dpo.tuning.results.folder import load_result

    result = load_result(folder)
    write_report(result)
    print(f"report: {result.report_path}")
