"""The command `lightning-dpo`: fit and validate through LightningCLI, and what surrounds them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

__all__ = ["DPOCLI", "main"]


class DPOCLI(LightningCLI):
    """LightningCLI with the defaults of preference optimisation.

    Your own module or data module goes in as in any LightningCLI: ``DPOCLI(MyModule, MyData)``.
    """

    def __init__(
        self,
        model_class: Any = None,
        datamodule_class: Any = None,
        *,
        args: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Parse and run.

        Args:
            model_class: `DPOModule` or a subclass.
            datamodule_class: `PreferenceDataModule` or any data module that yields `PairBatch`.
            args: Command line without the program's name; by default the process's.
            kwargs: For LightningCLI.
        """
        from lightning_dpo.data.datamodule import PreferenceDataModule
        from lightning_dpo.training.dpo import DPOModule

        # "omegaconf+" and not "omegaconf": interpolations then see values given on the command line.
        parser_kwargs = {
            "prog": "lightning-dpo",
            "parser_mode": "omegaconf+",
            **kwargs.pop("parser_kwargs", {}),
        }
        super().__init__(
            model_class or DPOModule,
            datamodule_class or PreferenceDataModule,
            args=list(args) if args is not None else None,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 1, "log_every_n_steps": 1, "callbacks": _default_callbacks()},
            parser_kwargs=parser_kwargs,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only what preference optimisation has a meaning for."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The default loss is set here, so that ``--model.loss.beta`` alone works."""
        parser.set_defaults({"model.loss": {"class_path": "lightning_dpo.losses.DPOLoss"}})

    def before_instantiate_classes(self) -> None:
        """A data module that was given no tokenizer gets the policy's; no bar where none is wanted."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        data = config.get("data")
        if data is not None and "tokenizer" in data and data.tokenizer is None:
            data.tokenizer = config.model.policy
        if config.trainer.enable_progress_bar is False:
            # The trainer refuses a progress bar among the callbacks of a run that is to have none.
            self.trainer_defaults["callbacks"] = []

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: what the command line says wins over what a checkpoint says."""


def export(checkpoint: Path, output: Path, *, merge: bool = True) -> None:
    """Write the policy of a checkpoint as a Hugging Face folder that `from_pretrained` loads.

    Args:
        checkpoint: A file that `fit` saved.
        output: The folder to write; must be missing or empty.
        merge: Fold an adapter into the base weights; false writes the adapter alone.
    """
    from lightning_dpo.training.export import export_checkpoint

    print(f"exported to {export_checkpoint(checkpoint, output, merge=merge)}")


def demo(*, output: Path = Path("outputs/demo"), beta: float | None = None, seed: int = 0) -> None:
    """Sweep over the embedded task and show samples before and after; needs no download and no GPU.

    Args:
        output: Folder for the task's model, data and results.
        beta: One training run with this pull towards the reference, in the place of the sweep.
        seed: Of the one training run.
    """
    if beta is not None:
        from lightning_dpo.demo.run import run_demo

        run_demo(output=output, beta=beta, seed=seed)
        return
    from lightning_dpo.tuning import require_ray

    require_ray()
    from lightning_dpo.demo.sweep import run_demo_sweep

    run_demo_sweep(output=output)


def _tune(arguments: Sequence[str], *, command: str) -> None:
    """What lies in `lightning_dpo.tuning`, which needs an extra."""
    from lightning_dpo.tuning import require_ray

    require_ray()
    from lightning_dpo.cli.tune import report_command, tune_command

    (tune_command if command == "tune" else report_command)(arguments)


_COMMANDS: dict[str, Callable[..., None]] = {"export": export, "demo": demo}

_PACKAGE = Path(__file__).parents[1]

_HELP = """usage: lightning-dpo COMMAND [options]

Direct Preference Optimization for PyTorch Lightning.

commands:
  fit       train on preference pairs
            lightning-dpo fit --config configs/smollm2_dpo.yaml --data.train pairs.jsonl
  validate  accuracy on held-out pairs
            lightning-dpo validate --config … --ckpt_path last.ckpt
  precompute
            compute what `--model.reference cached` needs, ahead of training
            lightning-dpo precompute --config configs/smollm2_dpo.yaml --data.train pairs.jsonl
  tune      search beta, learning rate and loss with Ray Tune
            lightning-dpo tune --config tuning/beta_lr.yaml --data.train pairs.jsonl
  report    write the report of a sweep anew
            lightning-dpo report outputs/sweeps/beta_lr
  export    from a checkpoint to a model folder
            lightning-dpo export --checkpoint last.ckpt --output model/
  plan      memory of each device under each strategy, from the model's configuration alone
            lightning-dpo plan --model 8b --gpus 8 --gpu_memory 80
  demo      a sweep over the embedded task: no download, no GPU
            lightning-dpo demo; one training run: lightning-dpo demo --beta 0.1

`lightning-dpo COMMAND --help` lists the options of one; `--print_config` shows a complete configuration.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Command line without the program's name; by default the process's.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return
    command, rest = arguments[0], arguments[1:]
    try:
        if command == "plan":
            from lightning_dpo.cli.plan import plan

            auto_cli(plan, args=rest, as_positional=False, prog="lightning-dpo plan")
        elif command in _COMMANDS:
            auto_cli(_COMMANDS[command], args=rest, as_positional=False, prog=f"lightning-dpo {command}")
        elif command == "precompute":
            from lightning_dpo.cli.precompute import PrecomputeCLI

            PrecomputeCLI(args=None if args is None else arguments)
        elif command in ("tune", "report"):
            _tune(rest, command=command)
        elif command in DPOCLI.subcommands():
            DPOCLI(args=None if args is None else arguments)
        else:
            known = ", ".join([*DPOCLI.subcommands(), "precompute", "tune", "report", "plan", *_COMMANDS])
            raise ValueError(f"the command must be one of {known}, got {command!r}")
    except ValueError as error:
        ours = _our_error(error)
        if ours is None:
            raise
        print(f"error: {ours}", file=sys.stderr)
        raise SystemExit(2) from None


def _our_error(error: BaseException) -> BaseException | None:
    """What this package raised to tell the user something, alone or within the parser's own error.

    Then a traceback only hides it; an error from anywhere else keeps its traceback.
    """
    link: BaseException | None = error
    while link is not None:
        frames = traceback.extract_tb(link.__traceback__)
        if isinstance(link, ValueError) and Path(frames[-1].filename).is_relative_to(_PACKAGE):
            return link
        link = link.__cause__ or link.__context__
    return None


def _default_callbacks() -> list[Any]:
    from lightning.pytorch.callbacks import RichProgressBar

    return [RichProgressBar()]
