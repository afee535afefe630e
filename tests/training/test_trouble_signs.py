"""Numbers by which it shows that preference optimisation goes wrong."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_pairs, tiny_model
from training import History, loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.losses import DPOLoss, SimPOLoss
from lightning_dpo.training.metrics.trouble_signs import TROUBLE_SIGNS, TroubleSigns
from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import PairLogps

ZERO = torch.zeros(5)
LENGTHS = torch.tensor([4, 2, 3, 9, 1]), torch.tensor([2, 4, 3, 1, 2])
POLICY = PairLogps(
    torch.tensor([1.0, -1.0, -2.0, -3.0, 0.5]), torch.tensor([-1.0, -4.0, 1.0, -5.0, -0.5]), *LENGTHS
)
ACCURACY = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5])
WEIGHTS = torch.tensor([1.0, 1.0, 2.0, 3.0, 1.0])


def output(policy: PairLogps | None, reference: PairLogps | None, part: slice = slice(None)) -> StepOutput:
    statistics = {"rewards/accuracy": ACCURACY[part]}
    return StepOutput(ZERO.sum(), ZERO[part], WEIGHTS[part], statistics, 0, policy, reference)


def test_by_hand_over_two_batches() -> None:
    signs = TroubleSigns()
    for part in (slice(0, 2), slice(2, 5)):
        policy = POLICY._replace(
            **{name: value[part] for name, value in POLICY._asdict().items() if value is not None}
        )
        reference = PairLogps(ZERO[part], ZERO[part], *(lengths[part] for lengths in LENGTHS))
        signs.update(output(policy, reference, part))
    found = {name: float(value) for name, value in signs.compute().items()}
    assert found == pytest.approx(
        {
            "logratio/chosen": (1 - 1 - 4 - 9 + 0.5) / 8,
            "logratio/rejected": (-1 - 4 + 2 - 15 - 0.5) / 8,
            "logratio/both_fall": (1 + 3) / 8,
            "rewards/accuracy_chosen_longer": 1.0,
            "rewards/accuracy_chosen_shorter": (1 + 0.5) / 2,
        }
    )


def test_many_pairs_add_up_in_a_module_cast_to_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 4000, generator=generator)
    accuracy = (chosen > rejected).float()
    lengths = torch.randint(1, 9, (2, 4000), generator=generator)
    signs = torch.nn.ModuleList([TroubleSigns()]).to(torch.bfloat16)[0]
    for start in range(0, 4000, 8):
        part = slice(start, start + 8)
        policy, reference = (
            PairLogps(*logps, lengths[0, part], lengths[1, part])
            for logps in ((chosen[part], rejected[part]), (torch.zeros(8), torch.zeros(8)))
        )
        statistics = {"rewards/accuracy": accuracy[part]}
        ones = torch.ones(8)
        signs.update(StepOutput(ZERO.sum(), ones, ones, statistics, 0, policy, reference))
    found = {name: float(value) for name, value in signs.compute().items()}
    longer = lengths[0] - lengths[1]
    expected = {
        "logratio/chosen": chosen,
        "logratio/rejected": rejected,
        "logratio/both_fall": ((chosen < 0) & (rejected < 0)),
        "rewards/accuracy_chosen_longer": accuracy[longer > 0],
        "rewards/accuracy_chosen_shorter": accuracy[longer < 0],
    }
    assert found == pytest.approx({name: float(v.double().mean()) for name, v in expected.items()}, abs=1e-6)


def test_without_a_reference_the_lengths_alone_are_known() -> None:
    signs = TroubleSigns()
    signs.update(output(POLICY, None))
    assert set(signs.compute()) == {"rewards/accuracy_chosen_longer", "rewards/accuracy_chosen_shorter"}
    signs.reset()
    signs.update(output(None, None))  # a step of a user's own
    assert signs.compute() == {}


def test_a_run_logs_them() -> None:
    module = DPOModule(tiny_model(), loss=DPOLoss(0.5), optimizer=sgd)
    history, run = History(), trainer(max_epochs=2, log_every_n_steps=1)
    run.callbacks.append(history)
    pairs = random_pairs(8)
    run.fit(module, loader(pairs), loader(pairs))
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    chosen, rejected = found["val/logratio/chosen"], found["val/logratio/rejected"]
    assert chosen - rejected == pytest.approx(found["val/logratio/margin"], abs=1e-4)
    assert history.values["train/logratio/chosen"][0] == pytest.approx(0, abs=1e-4)
    longer = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs]
    counts = sum(n > 0 for n in longer), sum(n < 0 for n in longer)
    assert min(counts) > 0
    both = [found[f"val/rewards/accuracy_chosen_{name}"] for name in ("longer", "shorter")]
    assert all(0 <= value <= 1 for value in both)
    signs = {f"val/{name}" for name in TROUBLE_SIGNS}
    assert signs <= found.keys()
    assert signs <= set(DPOModule.logged_metrics())
    free = trainer()
    [logged] = free.validate(DPOModule(tiny_model(), loss=SimPOLoss()), loader(pairs), verbose=False)
    assert "val/logratio/both_fall" not in logged
    assert "val/rewards/accuracy_chosen_longer" in logged
