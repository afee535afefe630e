"""The command `lightning-dpo tune`: a sweep over config paths of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jsonargparse import DefaultHelpFormatter

from lightning_dpo.tuning import require_ray

__all__ = ["run"]

_DESCRIPTION = """Run a sweep over config paths of a recipe.

  lightning-dpo tune --config tuning/beta_lr.yaml --data.train pairs.jsonl
  lightning-dpo tune --config tuning/beta_lr.yaml --samples 32 --gpus 0.5 --ray_address auto
  lightning-dpo tune --config tuning/beta_lr.yaml --resume

Any option of `lightning-dpo fit` that begins with --model, --data., --trainer or --seed_everything is laid
over the recipe.
"""


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows types and defaults, and leaves the lines of the description as they are."""


def run(arguments: Sequence[str]) -> None:
    """Run a sweep.

    Args:
        arguments: What follows `lightning-dpo tune`.

    Raises:
        ValueError: If ray is not installed, or the sweep is not valid.
    """
    require_ray()
    from lightning_dpo.tuning.config import SweepConfig, sweep_parser
    from lightning_dpo.tuning.run import sweep

    if {"-h", "--help"} & set(arguments):
        shown = sweep_parser(
            prog="lightning-dpo tune",
            description=_DESCRIPTION,
            formatter_class=_Formatter,
            usage="lightning-dpo tune --config FILE [--resume] [options]",
        )
        shown.add_argument("--resume", action="store_true", help="go on with a sweep that was interrupted")
        shown.print_help()
        return
    parser = argparse.ArgumentParser(prog="lightning-dpo tune", allow_abbrev=False, add_help=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--resume", action="store_true")
    known, others = parser.parse_known_args(list(arguments))
    sweep(SweepConfig.from_yaml(known.config, arguments=others), resume=known.resume)
