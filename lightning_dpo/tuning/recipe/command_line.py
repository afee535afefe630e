"""The command line of `fit` for trials: one class reads a recipe, the other one makes what it describes."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from lightning_dpo.losses import PreferenceLoss
from lightning_dpo.training.cli import DPOCLI, class_arguments
from lightning_dpo.tuning.config_paths import config_paths, import_object
from lightning_dpo.tuning.recipe.trial_loggers import LogParameters, TrialRun, name_runs, named_loggers

__all__ = ["KnownPaths", "ParsedRecipe", "TrialCLI"]


class _RecipeCLI(DPOCLI):
    """The command line of `fit`, for any module, without its files."""

    def __init__(self, module: Any, data: Any, *, args: Sequence[str]) -> None:
        """Parse, and instantiate where the subclass does.

        Args:
            module: The LightningModule's class, or None for the one that the recipe names, or the default.
            data: The LightningDataModule's class, or None for the one that the recipe names, or the default.
            args: The command line.
        """
        super().__init__(
            module,
            data,
            args=args,
            run=False,
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False},
        )


class ParsedRecipe(_RecipeCLI):
    """A recipe with its values, read and checked; nothing is made, and no random state is touched."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _set_seed(self) -> None:
        """Leave random states alone."""

    def get(self, path: str, default: Any = None) -> Any:
        """The value of a config path.

        Args:
            path: Such as ``model.reference``.
            default: Where the recipe has no such path.
        """
        section, _, name = path.partition(".")
        arguments = class_arguments(self.config.get(section))
        return arguments.get(name, default) if name in arguments else default

    @property
    def data_class(self) -> Any:
        """The LightningDataModule's class."""
        return import_object(self._named_data) if self._named_data else self._datamodule_class

    def check_loss(self) -> None:
        """Make the loss alone, which costs nothing: a value out of its range is found before a trial runs.

        Raises:
            ValueError: By the loss, for example for a beta that is not positive.
        """
        given = self.get("model.loss")
        class_path = getattr(given, "class_path", None)
        if class_path is None or not _is_loss(import_object(class_path)):
            return  # of a module that has none, or of its own kind
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--loss", type=PreferenceLoss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of jsonargparse have another name for it
            parser.instantiate_classes(Namespace(loss=given))  # type: ignore[no-untyped-call]

    def paths(self) -> set[str]:
        """Every config path that the recipe has, inner ones too."""
        return config_paths(self.config)

    def to_yaml(self) -> str:
        """The complete configuration, for `fit`."""
        text: str = self.parser.dump(self.config, skip_link_targets=False, skip_none=False)
        return text


def _is_loss(made: Any) -> bool:
    return isinstance(made, type) and issubclass(made, PreferenceLoss)


class KnownPaths(ParsedRecipe):
    """A recipe read without the arguments that are unknown: a misspelt path is reported with those it has."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what the command line itself knows: classes, and those within them, without inner values."""
        known = {action.dest for action in parser._actions}
        super().parse_arguments(parser, [arg for arg in args if _is_known(arg[2:].partition("=")[0], known)])


def _is_known(path: str, known: Container[str]) -> bool:
    """Whether a path is one of an argument, or chooses its class or one within it, as in model.loss.loss."""
    argument = path.removesuffix(".class_path")
    while argument not in known and argument != path and argument.count(".") > 1:
        argument = argument.rpartition(".")[0]
    return argument in known


class TrialCLI(_RecipeCLI):
    """Makes model, data and trainer of a trial: no progress bar, and no files but the sweep's own."""

    def __init__(
        self,
        module: Any,
        data: Any,
        *,
        args: Sequence[str],
        callbacks: Sequence[pl.Callback] = (),
        trainer_options: Mapping[str, Any] | None = None,
        run: TrialRun | None = None,
    ) -> None:
        """Parse and instantiate; nothing is trained.

        Args:
            module: The LightningModule's class.
            data: The LightningDataModule's class, or None for the default.
            args: The command line.
            callbacks: Added to the trainer's.
            trainer_options: Take the place of the configured trainer arguments.
            run: What the recipe's loggers call the trial; without it they log nothing.
        """
        self._run = run
        self._callbacks = list(callbacks)
        self._trainer_options = dict(trainer_options or {})
        super().__init__(module, data, args=args)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer, the recipe's loggers with the names of the trial."""
        if self._run is not None:
            name_runs(self.config.trainer.get("logger"), self._run)
        super().instantiate_classes()

    def let_go(self) -> None:
        """Keep nothing of what was made: jsonargparse keeps its parser, which holds on to this object."""
        vars(self).clear()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        own = config.get("callbacks") or []
        kept = [
            callback
            for callback in [*(own if isinstance(own, list) else [own]), *callbacks]
            if not isinstance(callback, ProgressBar | ModelCheckpoint)
        ]
        options = {**config, **self._trainer_options, "callbacks": [*kept, *self._callbacks]}
        loggers = [] if self._run is None else named_loggers(config.get("logger"))
        if self._run is not None and loggers:
            options["logger"] = loggers
            options["callbacks"].append(LogParameters(self._run))
        return pl.Trainer(**options)
