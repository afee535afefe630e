"""The commands `lightning-dpo tune` and `lightning-dpo report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jsonargparse import DefaultHelpFormatter

from lightning_dpo.tuning.config import SweepConfig, sweep_parser
from lightning_dpo.tuning.report.page import write_report
from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.run import sweep

__all__ = ["report_command", "tune_command"]

_TUNE = """Run a sweep over config paths of a recipe.

  lightning-dpo tune --config tuning/beta_lr.yaml --data.train pairs.jsonl
  lightning-dpo tune --config tuning/beta_lr.yaml --samples 32 --gpus 0.5 --ray_address auto
  lightning-dpo tune --config tuning/beta_lr.yaml --resume

Any option of `lightning-dpo fit` that begins with --model, --data., --trainer or --seed_everything is laid
over the recipe.
"""


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows types and defaults, and leaves the lines of the description as they are."""


def tune_command(arguments: Sequence[str]) -> None:
    """Run a sweep from the command line.

    Args:
        arguments: What follows `lightning-dpo tune`.
    """
    parser = argparse.ArgumentParser(prog="lightning-dpo tune", allow_abbrev=False, add_help=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--resume", action="store_true")
    if {"-h", "--help"} & set(arguments):
        shown = sweep_parser(
            prog="lightning-dpo tune",
            description=_TUNE,
            formatter_class=_Formatter,
            usage="lightning-dpo tune --config FILE [--resume] [options]",
        )
        shown.add_argument("--resume", action="store_true", help="go on with a sweep that was interrupted")
        shown.print_help()
        return
    known, others = parser.parse_known_args(list(arguments))
    sweep(SweepConfig.from_yaml(known.config, arguments=others), resume=known.resume)


def report_command(arguments: Sequence[str]) -> None:
    """Write the report of a sweep anew.

    Args:
        arguments: What follows `lightning-dpo report`.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dpo report", description="Write the report of a sweep anew.", allow_abbrev=False
    )
    parser.add_argument("folder", help="the sweep's folder or URL")
    result = load_result(parser.parse_args(list(arguments)).folder)
    write_report(result)
    print(f"report: {result.report_path}")
