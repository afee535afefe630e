"""A `fit` recipe whose values a sweep overrides, held as text."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentError

from lightning_dpo.training.cli import model_class_in
from lightning_dpo.training.dpo import DPOModule
from lightning_dpo.tuning.config_paths import as_arguments, import_object, nearest
from lightning_dpo.tuning.recipe.command_line import KnownPaths, ParsedRecipe, TrialCLI
from lightning_dpo.tuning.recipe.module_traits import ModuleTraits
from lightning_dpo.tuning.recipe.trial_loggers import TrialRun

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What `fit` would run, held as text: workers on other machines need no copy of the files.

    Attributes:
        texts: The YAML files, later ones laid over earlier ones.
        overrides: Values by config path, laid over them.
        module: The LightningModule: a class, its import path, or None for the one that the recipe names, or
            DPOModule.
        data: The LightningDataModule: a class, its import path, or None for the one that the recipe names, or
            PreferenceDataModule.
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
    def module_class(self) -> Any:
        """The module's class."""
        return self._given_module or self._named_module or DPOModule

    @property
    def traits(self) -> ModuleTraits:
        """What the module's class says of itself."""
        return ModuleTraits.of(self.module_class)

    def parse(self, overrides: Mapping[str, Any] | None = None) -> ParsedRecipe:
        """Read the recipe with a trial's values; nothing is made.

        Args:
            overrides: The trial's values by config path.

        Raises:
            ValueError: If the configuration is not valid.
        """
        with self._command_line(overrides or {}) as args:
            return ParsedRecipe(*self._classes, args=args)

    def instantiate(
        self,
        overrides: Mapping[str, Any],
        *,
        callbacks: Sequence[pl.Callback] = (),
        trainer_options: Mapping[str, Any] | None = None,
        run: TrialRun | None = None,
    ) -> TrialCLI:
        """Make model, data and trainer from the recipe with a trial's values.

        Args:
            overrides: The trial's values by config path.
            callbacks: Added to the trainer's.
            trainer_options: Take the place of the recipe's trainer arguments.
            run: What the recipe's loggers call the trial; without it they log nothing.

        Raises:
            ValueError: If the configuration is not valid.
        """
        with self._command_line(overrides) as args:
            return TrialCLI(
                *self._classes, args=args, callbacks=callbacks, trainer_options=trainer_options, run=run
            )

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
            if path not in known and not self._takes(path, examples):
                raise ValueError(
                    f"the recipe has no config path {path!r}; did you mean {nearest(path, known)!r}?"
                )
        for example in examples:
            try:
                parsed = self.parse(example)
            except ValueError as error:
                lists = [path for path, value in example.items() if isinstance(value, list)]
                if not lists:
                    raise
                raise ValueError(
                    f"{error}\n`space` gives {lists[0]} a list as its value; values to try are "
                    f"{{grid: {example[lists[0]]}}} or {{choice: {example[lists[0]]}}}"
                ) from error
            try:
                parsed.check_loss()
            except ValueError as error:
                raise ValueError(f"the recipe does not take {_told(example)}: {error}") from error

    @property
    def _given_module(self) -> Any:
        return import_object(self.module) if isinstance(self.module, str) else self.module

    @property
    def _named_module(self) -> Any:
        """The class that the recipe's own texts or values name."""
        name = model_class_in(self.texts, as_arguments(self.overrides))
        return None if name is None else import_object(name)

    @property
    def _classes(self) -> tuple[Any, Any]:
        """What is passed to the command line, which finds by itself what the recipe names."""
        return self._given_module, import_object(self.data) if isinstance(self.data, str) else self.data

    def _known_paths(self, examples: Sequence[Mapping[str, Any]]) -> set[str]:
        """Paths of the recipe under each class that a sweep chooses."""
        known: set[str] = set()
        merged = [{**self.overrides, **example} for example in examples] or [dict(self.overrides)]
        choices = [{k: v for k, v in one.items() if k.endswith("class_path")} for one in merged]
        unique = {tuple(sorted(choice.items())): choice for choice in choices}
        for choice in unique.values():
            with self._command_line(choice) as args:
                known |= KnownPaths(*self._classes, args=args).paths()
        return known

    def _takes(self, path: str, examples: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the parser takes a path that the recipe does not have yet: of a class within a class."""
        merged = [{**self.overrides, **example} for example in examples] or [dict(self.overrides)]
        for values in merged:
            classes = {name: value for name, value in values.items() if name.endswith("class_path")}
            with contextlib.suppress(ValueError):
                if path in values:
                    return path in self.parse({**classes, path: values[path]}).paths()
        return False

    @contextlib.contextmanager
    def _command_line(self, overrides: Mapping[str, Any]) -> Iterator[list[str]]:
        """The recipe as arguments of `fit`; what its parser does not take is told as a ValueError."""
        merged = {**self.overrides, **overrides}
        with TemporaryDirectory() as folder:
            arguments = []
            for number, text in enumerate(self.texts):
                file = Path(folder) / f"recipe{number}.yaml"
                file.write_text(text, encoding="utf-8")
                arguments.append(f"--config={file}")
            try:
                yield arguments + as_arguments(merged)
            except ArgumentError as error:
                raise ValueError(f"the recipe does not take {_told(merged)}: {error}") from error


def _told(overrides: Mapping[str, Any]) -> str:
    """Values as an error names them."""
    return ", ".join(f"{path}={value!r}" for path, value in overrides.items()) or "its own values"
