"""DPOCLI: LightningCLI with the defaults of preference optimisation, for DPO and for modules of your own."""

from __future__ import annotations

import pydoc
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import fsspec
import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lightning_dpo.data.datamodule import PreferenceDataModule, TokenDataModule
from lightning_dpo.training.callbacks.progress_bar import ShortProgressBar
from lightning_dpo.training.cli_parser import LossAwareParser
from lightning_dpo.training.dpo import DPOModule

__all__ = ["DPOCLI", "class_arguments", "data_class_in", "model_class_in"]

_CONFIG = ("--config", "-c")

_BASES: dict[str, tuple[type[Any], str]] = {
    "model": (pl.LightningModule, "the model that is trained is `--model.policy`"),
    "data": (pl.LightningDataModule, "the pairs are `--data.train`"),
}
"""The base class of what each argument names, and what else a user may have meant by it."""


class DPOCLI(LightningCLI):
    """LightningCLI with the defaults of preference optimisation.

    A configuration that names a module, ``model: {class_path: some.Module, init_args: {...}}``, trains that
    module, and one that names a data module reads from that. Where no class is named, the arguments are those
    of DPOModule and PreferenceDataModule, as in ``--model.policy``. From Python your classes go in as in any
    LightningCLI: ``DPOCLI(MyModule, MyData)``. An option wins over what a recipe says, wherever it stands.
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
            model_class: Any LightningModule; by default the one that the configuration names, or `DPOModule`.
            datamodule_class: Any LightningDataModule; by default the one that the configuration names, or
                `PreferenceDataModule`.
            args: Command line without the program's name; by default the process's.
            kwargs: For LightningCLI.

        Raises:
            ValueError: If a class that is named cannot be imported.
        """
        arguments = _recipes_first(sys.argv[1:] if args is None else args)
        texts = list(_config_texts(arguments))
        self._named_model = None if model_class else model_class_in(texts, arguments)
        self._named_data = None if datamodule_class else data_class_in(texts, arguments)
        model = _import("model", self._named_model) or model_class or DPOModule
        _import("data", self._named_data)
        self._model_defaults = _cli_defaults(model)
        needs_data = not _brings_data(model) or _is_mentioned("data", texts, arguments)
        if datamodule_class is None and needs_data:
            datamodule_class = PreferenceDataModule
        # "omegaconf+" and not "omegaconf": interpolations then see values given on the command line.
        parser_kwargs = {
            "prog": "lightning-dpo",
            "parser_mode": "omegaconf+",
            **kwargs.pop("parser_kwargs", {}),
        }
        super().__init__(
            pl.LightningModule if self._named_model else model,
            pl.LightningDataModule if self._named_data else datamodule_class,
            args=arguments,
            subclass_mode_model=kwargs.pop("subclass_mode_model", self._named_model is not None),
            subclass_mode_data=kwargs.pop("subclass_mode_data", self._named_data is not None),
            auto_configure_optimizers=False,
            save_config_callback=kwargs.pop("save_config_callback", SaveConfigBesideLogs),
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 1, "log_every_n_steps": 1, "callbacks": [ShortProgressBar()]},
            parser_kwargs=parser_kwargs,
            parser_class=LossAwareParser,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only what preference optimisation has a meaning for."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the defaults that the module's class names, so that ``--model.loss.beta`` alone works."""
        if self._named_model:
            # As a default, so that a recipe for DPOModule may be laid over it: its values are arguments.
            value = {"class_path": self._named_model, "init_args": self._model_defaults}
            parser.set_defaults({"model": value})
        else:
            for name, value in self._model_defaults.items():
                parser.set_defaults({f"model.{name}": value})
        if self._named_data:
            parser.set_defaults({"data": {"class_path": self._named_data}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; arguments from Python are no mistake here, which Lightning would warn of."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Give a data module without a tokenizer the policy's."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        policy, data = class_arguments(config.model).get("policy"), class_arguments(config.get("data"))
        if isinstance(policy, str) and "tokenizer" in data and data["tokenizer"] is None:
            data["tokenizer"] = policy
        if self.subcommand in ("fit", "validate"):
            _check_checkpoint(config.get("ckpt_path"))

    def before_validate(self) -> None:
        """Refuse to validate on nothing, before anything is read.

        Raises:
            ValueError: If the data module holds no rows out.
        """
        data = self.datamodule
        if isinstance(data, TokenDataModule) and data.validation is None and data.validation_split is None:
            raise ValueError(
                "`validation` must name the rows to validate on, got None; set it, or hold out a share of "
                "`train` with `validation_split`"
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer; its progress bar is the default one unless there is to be none or another."""
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        own = config.trainer.callbacks or []
        others = own if isinstance(own, list) else [own]
        if config.trainer.enable_progress_bar is False or any(isinstance(c, ProgressBar) for c in others):
            # The trainer refuses a second progress bar, and one in a run that is to have none.
            self.trainer_defaults.pop("callbacks", None)
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise ValueError(f"`trainer` cannot be made of these settings: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: what the command line says wins over what a checkpoint says."""


class SaveConfigBesideLogs(SaveConfigCallback):
    """Saves the run's configuration in the logger's folder; without a logger over no file that is there."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save it, unless a file of that name lies where the run has no folder of its own."""
        folder = trainer.log_dir  # rank 0 tells the others, so all must ask
        is_taken = folder is not None and not trainer.loggers and Path(folder, self.config_filename).exists()
        if trainer.strategy.broadcast(is_taken):
            rank_zero_info(f"the configuration is not saved: {folder} has a {self.config_filename} already")
            self.already_saved = True
        super().setup(trainer, pl_module, stage)


def model_class_in(texts: Iterable[str], arguments: Sequence[str]) -> str | None:
    """Find which LightningModule a recipe names, before anything is parsed.

    Args:
        texts: YAML of the recipe, later ones laid over earlier ones.
        arguments: Command-line arguments, laid over the texts.

    Returns:
        The class path; None where the arguments of `DPOModule` are set directly.
    """
    return _class_in("model", texts, arguments)


def data_class_in(texts: Iterable[str], arguments: Sequence[str]) -> str | None:
    """Find which LightningDataModule a recipe names, before anything is parsed.

    Args:
        texts: YAML of the recipe, later ones laid over earlier ones.
        arguments: Command-line arguments, laid over the texts.

    Returns:
        The class path; None where the arguments of `PreferenceDataModule` are set directly.
    """
    return _class_in("data", texts, arguments)


def class_arguments(config: Any) -> Any:
    """Look up the arguments of a class in a parsed configuration, whether its class is named there or not.

    Args:
        config: What stands under `model` or `data`; may be None.

    Returns:
        The part of it that holds the arguments; changes to it are changes to the configuration.
    """
    if config is None:
        return {}
    return config.get("init_args") or {} if "class_path" in config else config


def _class_in(key: str, texts: Iterable[str], arguments: Sequence[str]) -> str | None:
    found = None
    for text in texts:
        config = _mapping(text).get(key)
        found = (config.get("class_path") if isinstance(config, dict) else None) or found
    for name, value in _options(arguments):
        if name in (f"--{key}.class_path", f"--{key}.help"):
            found = value
        elif name == f"--{key}":
            # A class, a mapping, or a file that holds one.
            mapping = _mapping(value) or _mapping(_read(value) or "")
            found = mapping.get("class_path", found) if mapping else value
    return found


def _is_mentioned(key: str, texts: Iterable[str], arguments: Sequence[str]) -> bool:
    names = (argument.partition("=")[0] for argument in arguments)
    named = any(name == f"--{key}" or name.startswith(f"--{key}.") for name in names)
    return named or any(key in _mapping(text) for text in texts)


def _import(key: str, name: str | None) -> Any:
    """The class with that import path; a class that is imported already is found by its name alone."""
    if name is None:
        return None
    base, hint = _BASES[key]
    known = (each for each in _subclasses(base) if each.__name__ == name)
    found = pydoc.locate(name) if "." in name else next(known, None)
    if not callable(found):
        raise ValueError(
            f"`{key}` must be the import path of a {base.__name__}, got {name!r}, which is none; {hint}"
        )
    return found


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for each in base.__subclasses__():
        yield each
        yield from _subclasses(each)


_OLDER_FORMAT = b"\x80\x02"
"""How files begin that torch wrote before it took to zip archives."""


def _check_checkpoint(name: Any) -> None:
    """Find a missing checkpoint before data and model are loaded; words such as "last" are Lightning's."""
    is_path = isinstance(name, str) and ("/" in name or name.endswith(".ckpt"))
    if not is_path or "://" in name or name.startswith("registry"):
        return
    wanted = f"`ckpt_path` must be a file or folder that the trainer saved, got {name!r}, which"
    if not Path(name).exists():
        raise ValueError(f"{wanted} does not exist")
    if Path(name).is_file() and not is_zipfile(name):
        with Path(name).open("rb") as file:
            if file.read(2) != _OLDER_FORMAT:
                raise ValueError(f"{wanted} is broken or no checkpoint")


def _brings_data(model_class: Any) -> bool:
    own = getattr(model_class, "train_dataloader", None)
    return own is not None and own is not pl.LightningModule.train_dataloader


def _config_texts(arguments: Sequence[str]) -> Iterator[str]:
    """YAML that ``--config`` names; what cannot be read is left to the parser, whose error says so."""
    for name, value in _options(arguments):
        if name in _CONFIG:
            yield _read(value) or value


def _recipes_first(arguments: Sequence[str]) -> list[str]:
    """The command line with ``--config`` before all other options: the parser lets the last one win."""
    recipes: list[str] = []
    others: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        is_recipe = argument.partition("=")[0] in _CONFIG
        (recipes if is_recipe else others).append(argument)
        if is_recipe and "=" not in argument and waiting:
            recipes.append(waiting.pop(0))
    command = next((place for place, other in enumerate(others) if other.startswith("-")), len(others))
    return [*others[:command], *recipes, *others[command:]]


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options and their values, as ``--name=value`` or as two arguments."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if equals:
            yield name, value
        elif name.startswith("-") and position + 1 < len(arguments):
            yield name, arguments[position + 1]


def _read(name: str) -> str | None:
    try:
        with fsspec.open(name, "r", encoding="utf-8") as file:
            return str(file.read())
    except (OSError, ValueError, ImportError):
        return None


def _mapping(text: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _cli_defaults(model_class: Any) -> dict[str, Any]:
    defaults = getattr(model_class, "cli_defaults", None)
    return {} if defaults is None else defaults()
