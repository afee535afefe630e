"""A `fit` recipe whose values a sweep overrides, and the command line that turns it into a trainer."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from lightning_dpo.training.cli import DPOCLI
from lightning_dpo.training.dpo import DPOModule
from lightning_dpo.tuning.config_paths import as_arguments, config_paths, nearest
from lightning_dpo.tuning.search.space import import_object

__all__ = ["Recipe", "TrialCLI"]


@dataclass(frozen=True)
class Recipe:
    """What `fit` would run, held as text: workers on other machines need no copy of the files.

    Attributes:
        texts: The YAML files, later ones laid over earlier ones.
        overrides: Values by config path, laid over them.
        module: The LightningModule: a class, its import path, or None for DPOModule.
        data: The LightningDataModule, likewise.
    """

    texts: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    module: Any = None
    data: Any = None

    @classmethod
    def read(cls, files: Iterable[Path], **kwargs: Any) -> Recipe:
        """Read the YAML files."""
        return cls(tuple(file.read_text(encoding="utf-8") for file in files), **kwargs)

    @property
    def is_preference(self) -> bool:
        """Whether the module is a DPOModule."""
        model = self.module_class
        return isinstance(model, type) and issubclass(model, DPOModule)

    @property
    def module_class(self) -> Any:
        """The module's class."""
        found = import_object(self.module) if isinstance(self.module, str) else self.module
        return found or DPOModule

    @property
    def data_class(self) -> Any:
        """The data module's class, or None for the default."""
        return import_object(self.data) if isinstance(self.data, str) else self.data

    def cli(
        self,
        overrides: Mapping[str, Any],
        *,
        callbacks: Sequence[pl.Callback] = (),
        trainer_options: Mapping[str, Any] | None = None,
        parse_only: bool = False,
        known_only: bool = False,
    ) -> TrialCLI:
        """Parse the recipe with a trial's values, and instantiate it.

        Args:
            overrides: The trial's values by config path.
            callbacks: Added to the trainer's.
            trainer_options: Take the place of the recipe's trainer arguments.
            parse_only: Stop before anything is instantiated.
            known_only: Leave out values whose path the command line itself does not have, inner ones too.

        Raises:
            ValueError: If the configuration is not valid.
        """
        merged = {**self.overrides, **overrides}
        with TemporaryDirectory() as folder:
            arguments = []
            for number, text in enumerate(self.texts):
                file = Path(folder) / f"recipe{number}.yaml"
                file.write_text(text, encoding="utf-8")
                arguments.append(f"--config={file}")
            arguments += as_arguments(merged)
            try:
                return TrialCLI(
                    self,
                    args=arguments,
                    callbacks=callbacks,
                    trainer_options=dict(trainer_options or {}),
                    parse_only=parse_only,
                    known_only=known_only,
                )
            except ArgumentError as error:
                given = ", ".join(f"{path}={value!r}" for path, value in merged.items())
                raise ValueError(f"the recipe does not take {given or 'its own values'}: {error}") from error

    def check(self, examples: Iterable[Mapping[str, Any]]) -> None:
        """Parse the recipe with examples of what a sweep will set.

        Args:
            examples: Overrides of a trial, as `SearchSpace.examples` gives them.

        Raises:
            ValueError: For a path that the recipe does not have, with the nearest one, or a wrong value.
        """
        examples = list(examples)
        wanted = dict.fromkeys(itertools.chain(self.overrides, *examples))
        known = self._known_paths(examples)
        for path in wanted:
            if path not in known:
                raise ValueError(
                    f"the recipe has no config path {path!r}; did you mean {nearest(path, known)!r}?"
                )
        for example in examples:
            self.cli(example, parse_only=True)

    def resolved(self, overrides: Mapping[str, Any]) -> str:
        """The complete configuration of a trial as YAML, for `fit`."""
        cli = self.cli(overrides, parse_only=True)
        parser = cli.parser
        # What `fit` shows on the terminal is a default of the command line and no part of a recipe.
        text: str = parser.dump(cli.config, skip_link_targets=False, skip_none=False)
        return text

    def _known_paths(self, examples: Sequence[Mapping[str, Any]]) -> set[str]:
        """Paths of the recipe under each class that a sweep chooses."""
        known: set[str] = set()
        merged = [{**self.overrides, **example} for example in examples] or [dict(self.overrides)]
        choices = [{k: v for k, v in one.items() if k.endswith("class_path")} for one in merged]
        unique = {tuple(sorted(choice.items())): choice for choice in choices}
        # Not with what a misspelt path would set: it is to be reported with its like.
        for choice in unique.values():
            known |= config_paths(self.cli(choice, parse_only=True, known_only=True).config)
        return known


class TrialCLI(DPOCLI):
    """The command line of `fit`, for one trial: no progress bar, and no files but the sweep's own."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        args: Sequence[str],
        callbacks: Sequence[pl.Callback] = (),
        trainer_options: Mapping[str, Any] | None = None,
        parse_only: bool = False,
        known_only: bool = False,
    ) -> None:
        """Parse, and instantiate unless `parse_only`; nothing is trained.

        Args:
            recipe: Says which classes.
            args: The command line.
            callbacks: Added to the trainer's.
            trainer_options: Take the place of the configured trainer arguments.
            parse_only: Leave classes and random states alone.
            known_only: Leave out arguments that the parser does not have.
        """
        self._recipe = recipe
        self._callbacks = list(callbacks)
        self._trainer_options = dict(trainer_options or {})
        self._parse_only = parse_only
        self._known_only = known_only
        with warnings.catch_warnings():
            # Lightning warns where a program with a command line of its own uses another from within.
            warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
            super().__init__(
                recipe.module_class,
                recipe.data_class,
                args=args,
                run=False,
                save_config_callback=None,
                parser_kwargs={"exit_on_error": False},
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without what is unknown if that is asked for."""
        if self._known_only:
            known = {action.dest for action in parser._actions}
            args = [arg for arg in args if arg[2:].partition("=")[0].removesuffix(".class_path") in known]
        super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Preference optimisation's defaults, for its own modules only."""
        if self._recipe.is_preference:
            super().add_arguments_to_parser(parser)

    def before_instantiate_classes(self) -> None:
        """Likewise."""
        if self._recipe.is_preference:
            super().before_instantiate_classes()

    def instantiate_classes(self) -> None:
        """Make model, data and trainer."""
        if not self._parse_only:
            super().instantiate_classes()

    def _set_seed(self) -> None:
        if not self._parse_only:
            super()._set_seed()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        own = config.get("callbacks") or []
        kept = [
            callback
            for callback in [*(own if isinstance(own, list) else [own]), *callbacks]
            if not isinstance(callback, ProgressBar | ModelCheckpoint)
        ]
        return pl.Trainer(**{**config, **self._trainer_options, "callbacks": [*kept, *self._callbacks]})
