"""The commands `lightning-dpo tune` and `lightning-dpo report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.report import write_report
from lightning_dpo.tuning.results import load_result
from lightning_dpo.tuning.run import sweep

__all__ = ["report_command", "tune_command"]

_TUNE = """Run a sweep over config paths of a recipe.

  lightning-dpo tune --config tuning/beta_lr.yaml --data.train pairs.jsonl
  lightning-dpo tune --config tuning/beta_lr.yaml --samples 32 --gpus 0.5 --ray_address auto
  lightning-dpo tune --config tuning/beta_lr.yaml --resume

Any field of SweepConfig is an option (--samples, --scheduler, --gpus, --storage, --name ...), and any option
of `lightning-dpo fit` that begins with --model, --data., --trainer or --seed_everything is laid over the
recipe.
"""


def tune_command(arguments: Sequence[str]) -> None:
    """Run a sweep from the command line.

    Args:
        arguments: What follows `lightning-dpo tune`.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dpo tune",
        description=_TUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the sweep, a YAML file")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that was interrupted")
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
