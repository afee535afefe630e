"""What a module's class says of itself that a sweep makes use of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_dpo.tuning.objective import KL
from lightning_dpo.types import PairBatch

__all__ = ["ModuleTraits"]


@dataclass(frozen=True, slots=True)
class ModuleTraits:
    """What a sweep knows of a LightningModule before it is built.

    The class says it by members of the same names, each of them optional: `logged_metrics`,
    `incomparable_metrics` and `cli_defaults` as class methods, the others as class attributes.

    Attributes:
        logged_metrics: Names that a validation logs; None where only a run can tell.
        incomparable_metrics: Those of them whose unit depends on the loss and its beta.
        cli_defaults: Defaults of the command line by argument of the module.
        shares_reference: Whether trials can read the reference's log-probabilities from one cache.
        exports: Whether the module loads its `policy` as this package does, and its checkpoints become
            Hugging Face folders.
        samples_completions: Whether completions can be sampled from its policy, which gives their KL; to a
            model that its `start_reference()` returns, where it has this method and not `reference_model`.
        metric_names: Names, without "val/", of the numbers that its `step` gives for each example.
        batch_type: What batches it takes, where that is one of this package's types.
    """

    logged_metrics: tuple[str, ...] | None = None
    incomparable_metrics: tuple[str, ...] = ()
    cli_defaults: Mapping[str, Any] = field(default_factory=dict)
    shares_reference: bool = False
    exports: bool = False
    samples_completions: bool = False
    metric_names: tuple[str, ...] = ()
    batch_type: type | None = None

    @classmethod
    def of(cls, module: Any) -> ModuleTraits:
        """Ask a class; a function that makes modules has no traits."""
        told = {each.name: getattr(module, each.name) for each in fields(cls) if hasattr(module, each.name)}
        is_called = {name: callable(member) and not isinstance(member, type) for name, member in told.items()}
        return cls(**{name: member() if is_called[name] else member for name, member in told.items()})

    @property
    def pair_metrics(self) -> tuple[str, ...] | None:
        """Names that a validation logs and that are known of each pair; None where only a run can tell."""
        if self.logged_metrics is None or not self.metric_names:
            return None
        is_of_pairs = self.batch_type is None or issubclass(self.batch_type, PairBatch)
        return tuple(f"val/{name}" for name in self.metric_names) if is_of_pairs else ()

    def metrics(self, *, kl: bool, judged: Sequence[str] = ()) -> tuple[str, ...] | None:
        """Names that a trial's validation logs; None where only a run can tell.

        Args:
            kl: Whether completions are sampled, if the module's class allows it.
            judged: What a judge gives these.
        """
        if self.logged_metrics is None or not (kl and self.samples_completions):
            return self.logged_metrics
        return (*self.logged_metrics, KL, f"{KL}_error", *judged)
