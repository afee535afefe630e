from __future__ import annotations

import lightning.pytorch as pl

from lightning_dpo import DPOModule
from lightning_dpo.tuning.recipe.module_traits import ModuleTraits


class Half(pl.LightningModule):
    exports = True

    @classmethod
    def logged_metrics(cls) -> tuple[str, ...]:
        return ("val/loss",)


def test_a_module_that_says_nothing_shares_and_exports_nothing() -> None:
    traits = ModuleTraits.of(pl.LightningModule)
    assert traits == ModuleTraits()
    assert traits.metrics(kl=True) is None


def test_each_member_is_optional() -> None:
    traits = ModuleTraits.of(Half)
    assert traits.exports
    assert not traits.shares_reference
    assert traits.metrics(kl=True) == ("val/loss",)


def test_the_kl_is_known_where_completions_can_be_sampled() -> None:
    traits = ModuleTraits.of(DPOModule)
    assert "val/kl" in (traits.metrics(kl=True) or ())
    assert "val/kl" not in (traits.metrics(kl=False) or ())
    assert set(traits.incomparable_metrics) < set(traits.logged_metrics or ())
