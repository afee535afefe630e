"""What a pair's weight and margin do in training: a weight of 2 is the pair twice, losses see margins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_folder import save_tiny
from tiny_models import random_pairs, tiny_model
from torch import Tensor
from torch.utils.data import DataLoader
from training import History, sgd, trainer

from lightning_dpo import DPOModule, PairBatch, PreferenceDataModule
from lightning_dpo.losses import (
    LDDPO,
    WPO,
    AOTLoss,
    BCOLoss,
    DPOLoss,
    ODPOLoss,
    PreferenceLoss,
    SFTLoss,
)

WEIGHTS = [1.0, 2.0, 1.0, 3.0, 1.0, 2.0]
REPEATED = [0, 1, 1, 2, 3, 3, 3, 4, 5, 5]
MARGINS = [0.5, 1.0, 4.0, 0.25, 2.0, 8.0]
MEASURED_TIME = {"train/tokens_per_second", "train/data_wait"}


def run(batches: list[PairBatch], loss: PreferenceLoss, **options: Any) -> tuple[dict[str, Tensor], dict]:
    """The policy's weights after two epochs, and what was logged of them last."""
    module, history = DPOModule(tiny_model(), loss=loss, optimizer=sgd), History()
    run = trainer(max_epochs=2, callbacks=[history], accumulate_grad_batches=len(batches), **options)
    run.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))
    validated = {k: float(v) for k, v in run.callback_metrics.items() if k.startswith("val/")}
    return {name: value.detach() for name, value in module.policy.state_dict().items()}, {
        **validated,
        "train/grad_norm": history.values["train/grad_norm"][-1],
    }


@pytest.mark.parametrize(
    "loss",
    [
        DPOLoss(0.3),
        SFTLoss(),
        WPO(LDDPO(ODPOLoss(0.3))),
        DPOLoss(0.5, divergence="chi_squared_kl", max_reward=2.0),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_a_weight_of_2_is_the_pair_twice(loss: PreferenceLoss) -> None:
    pairs = random_pairs(6)
    repeated = PairBatch.from_pairs([pairs[k] for k in REPEATED], margins=[MARGINS[k] for k in REPEATED])
    weighted = PairBatch.from_pairs(pairs, weights=WEIGHTS, margins=MARGINS)
    # Two batches of weights 4 and 6, which the trainer halves: each is divided by half of 10.
    halves = [
        PairBatch.from_pairs(
            pairs[part], weights=WEIGHTS[part], margins=MARGINS[part], denominator=sum(WEIGHTS) / 2
        )
        for part in (slice(0, 3), slice(3, 6))
    ]
    expected, logged = run([repeated], loss)
    start = tiny_model().state_dict()
    assert any((expected[name] - start[name]).abs().max() > 1e-4 for name in start)
    for batches in ([weighted], halves):
        ended, numbers = run(batches, loss)
        torch.testing.assert_close(ended, expected, atol=1e-5, rtol=1e-5)
        assert numbers == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in logged.items()}


@pytest.mark.parametrize(
    "make",
    [DPOLoss, lambda: BCOLoss(0.3), lambda: SFTLoss(token_weighted=True)],
    ids=["DPOLoss", "BCOLoss", "token-weighted SFTLoss"],
)
def test_weights_count_in_what_a_loss_keeps_and_in_all_that_is_logged(
    make: Callable[[], PreferenceLoss],
) -> None:
    pairs = random_pairs(6)
    weighted = PairBatch.from_pairs(pairs, weights=WEIGHTS)
    ends, logged = [], []
    for batch in (PairBatch.from_pairs([pairs[k] for k in REPEATED]), weighted):
        module, history = DPOModule(tiny_model(), loss=make(), optimizer=sgd), History()
        trainer(max_epochs=3, callbacks=[history]).fit(module, DataLoader([batch], batch_size=None))
        ends.append(module.state_dict())
        logged.append({k: v for k, v in history.values.items() if k not in MEASURED_TIME})
    torch.testing.assert_close(ends[1], ends[0], atol=1e-5, rtol=1e-5)
    assert {"train/loss", "train/grad_norm", "train/logps/chosen"} <= logged[0].keys()
    assert logged[1] == {k: pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in logged[0].items()}


def test_the_data_module_weights_pairs_as_if_they_were_repeated(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path))
    save_tiny(tmp_path / "tiny")
    rows = [
        {"prompt": f"is it {n}?", "chosen": f" yes {n}", "rejected": f" no, not {n}", "weight": weight}
        for n, weight in enumerate(WEIGHTS)
    ]
    repeated = [{k: v for k, v in rows[n].items() if k != "weight"} for n in REPEATED]
    ends = []
    for data, batch_size, accumulate in ((repeated, 10, 1), (rows, 6, 1), (rows, 2, 3), (rows, 4, 2)):
        policy = str(tmp_path / "tiny")
        pairs = PreferenceDataModule(data, tokenizer=policy, batch_size=batch_size, shuffle=False)
        module = DPOModule(policy, optimizer=sgd)
        trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(module, pairs)
        ends.append({name: value.detach() for name, value in module.policy.state_dict().items()})
    for ended in ends[1:]:
        torch.testing.assert_close(ended, ends[0], atol=1e-5, rtol=1e-5)


class Watching(DPOLoss):
    """A loss of a user's own, which writes down the margins that it is given."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.seen: list[Any] = []

    def forward(self, policy: Any, reference: Any = None) -> Tensor:
        self.seen.append((policy.margins, reference.margins))
        return super().forward(policy, reference)


def test_a_loss_sees_the_margins_of_real_pairs_and_no_fillers() -> None:
    batch = PairBatch.from_pairs(random_pairs(4), weights=[1, 0, 2, 0], margins=MARGINS[:4])
    module = DPOModule(tiny_model(), loss=Watching())
    module.configure_model()
    output = module.step(batch)
    ((margins, of_reference),) = module.loss.seen
    assert margins.tolist() == [MARGINS[0], MARGINS[2]]
    assert of_reference is None
    assert output.policy.margins.tolist() == margins.tolist()
    assert output.weights.tolist() == [1, 2]


def test_pairs_without_margins_are_none_to_the_loss() -> None:
    module = DPOModule(tiny_model(), loss=Watching())
    module.configure_model()
    module.step(PairBatch.from_pairs(random_pairs(2)))
    assert module.loss.seen == [(None, None)]
    module.loss = ODPOLoss()
    with pytest.raises(
        ValueError, match="`policy` must hold `margins` for ODPOLoss, got None; give the rows"
    ):
        module.step(PairBatch.from_pairs(random_pairs(2)))


def test_margins_stay_on_the_cpu_beside_the_weights() -> None:
    batch = PairBatch.from_pairs(random_pairs(2), weights=[1, 2], margins=[0.5, 3])
    moved = batch.to("meta")
    assert moved.chosen_ids.device.type == "meta"
    assert moved.margins.tolist() == [0.5, 3.0]
    assert moved.host is batch


@pytest.mark.parametrize("name", ["weights", "margins"])
def test_as_many_numbers_as_pairs(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must have one entry for each of 3 pairs, got \[1, 2\]"):
        PairBatch.from_pairs(random_pairs(3), **{name: [1, 2]})


def test_a_loss_that_compares_pairs_takes_no_weights() -> None:
    module = DPOModule(tiny_model(), loss=AOTLoss())
    module.configure_model()
    pairs = random_pairs(3)
    module.step(PairBatch.from_pairs(pairs, weights=[1, 1, 0]))
    with pytest.raises(ValueError, match=r"`loss` must give each pair .* got AOTLoss, .* `weight` out"):
        module.step(PairBatch.from_pairs(pairs, weights=[1, 2, 0]))
