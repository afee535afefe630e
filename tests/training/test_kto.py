"""KTOModule: what it trains on, what it logs, and what it refuses before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from feedback_rows import ROWS, feedback_loader, random_examples
from pair_rows import GOOD
from tiny_folder import save_tiny
from tiny_models import random_pairs, tiny_model
from tiny_tokenizers import byte_level
from torch.optim import AdamW
from training import History, loader, sgd, trainer
from transformers import AutoModelForCausalLM

from lightning_dpo import DPOModule, FeedbackDataModule, KTOModule, PreferenceDataModule
from lightning_dpo.losses import DPOLoss, KTOLoss, UnpairedAPOZeroLoss
from lightning_dpo.reference.fill import FillReferenceCache
from lightning_dpo.training.metrics.feedback import reward_auc
from lightning_dpo.types import FeedbackBatch, TokenExample


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    save_tiny(tmp_path / "model")
    return str(tmp_path / "model")


def adamw(params: Any) -> AdamW:
    return AdamW(params, lr=5e-3)


def feedback(rows: Any = ROWS, **settings: Any) -> FeedbackDataModule:
    options = {"tokenizer": byte_level(), "batch_size": 4, "validation": ROWS[:6], **settings}
    return FeedbackDataModule(rows, **options)


class TestTraining:
    def test_the_policy_learns_and_the_reference_stays(self) -> None:
        module = KTOModule(tiny_model(), loss=KTOLoss(beta=0.3), optimizer=adamw, warmup_ratio=0.0)
        history = History()
        examples = random_examples(8)
        trainer(max_epochs=8, callbacks=[history]).fit(module, feedback_loader(examples, batch_size=8))
        losses = history.values["train/loss"]
        assert losses[0] == pytest.approx(0.5, abs=1e-6)
        assert losses[-1] < 0.4
        assert history.values["train/rewards/auc"][0] == 0.5
        assert history.values["train/rewards/auc"][-1] == 1.0
        assert history.values["train/rewards/margin"][-1] > 0.5
        start = tiny_model().state_dict()
        assert all(torch.equal(value, start[k]) for k, value in module.reference.model.state_dict().items())
        assert any(not torch.equal(value, start[k]) for k, value in module.policy.state_dict().items())

    def test_z0_takes_no_gradient(self) -> None:
        """The gradient is that of the loss with z0 as a number."""
        batch = FeedbackBatch.from_examples(random_examples(6, seed=2))
        module = KTOModule(tiny_model(seed=3), reference=tiny_model(), loss=KTOLoss(beta=0.05))
        module.configure_model()
        output = module.step(batch)
        z0 = float(output.statistics["z0"][0])
        assert z0 > 0
        output.loss.backward()
        measured = [p.grad.clone() for p in module.policy.parameters()]
        module.zero_grad()
        reference = module.reference.logps(batch.completions(), plan=module.plan())
        policy = module.logps(batch.completions())
        module.loss(policy, reference, labels=batch.labels, z0=z0).mean().backward()
        for ours, parameter in zip(measured, module.policy.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, atol=1e-5, rtol=1e-4)

    def test_fillers_are_seen_by_nothing(self) -> None:
        examples = random_examples(6, seed=2)
        module = KTOModule(tiny_model(), reference=tiny_model(seed=3))
        module.configure_model()
        whole = FeedbackBatch.from_examples([*examples, *examples[:1]], weights=[1.0] * 6 + [0.0])
        # The filler stands last, so that only the mismatch of the one before it is another.
        judged = module.step(whole)
        z0 = float(judged.statistics["z0"][0])
        kept = module.loss(judged.policy, judged.reference, labels=whole.labels, z0=z0)[:6].mean()
        assert float(judged.loss) == pytest.approx(float(kept), abs=1e-6)
        alone = FeedbackBatch.from_examples(examples[:1], weights=[0.0])
        assert float(module.step(alone).loss) == 0.0

    def test_apo_zero_scores_no_mismatched_completions(self) -> None:
        batch = FeedbackBatch.from_examples(random_examples(4))
        plain = KTOModule(tiny_model(), loss=UnpairedAPOZeroLoss())
        kto = KTOModule(tiny_model())
        for module in (plain, kto):
            module.configure_model()
        assert len(plain.reference_completions(batch)) == 4
        assert len(kto.reference_completions(batch)) == 8
        assert plain.step(batch).num_tokens < kto.step(batch).num_tokens

    def test_what_a_validation_logs(self, folder: str) -> None:
        module = KTOModule(folder, optimizer=adamw)
        run = trainer()
        run.fit(module, feedback())
        logged = {name for name in run.callback_metrics if name.startswith("val/")}
        assert logged == set(KTOModule.logged_metrics())
        assert set(KTOModule.incomparable_metrics()) < logged
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        margin = metrics["val/rewards/desirable"] - metrics["val/rewards/undesirable"]
        assert metrics["val/rewards/margin"] == pytest.approx(margin, abs=1e-6)
        assert metrics["val/rewards/margin"] == pytest.approx(0.1 * metrics["val/logratio/margin"], abs=1e-6)
        assert 0 <= metrics["val/rewards/auc"] <= 1

    def test_class_means_do_not_depend_on_the_batches(self, folder: str) -> None:
        found = []
        other = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight))
        for size in (2, 3, 12):
            module = KTOModule(folder, reference=other, startup_check=False)
            [values] = trainer().validate(
                module, feedback(validation=ROWS, validation_batch_size=size), verbose=False
            )
            found.append(
                [values[f"val/{name}"] for name in ("rewards/auc", "rewards/margin", "logps/desirable")]
            )
        assert found[0] == pytest.approx(found[1], abs=1e-5)
        assert found[0] == pytest.approx(found[2], abs=1e-5)


class TestAUC:
    @pytest.mark.parametrize(
        ("rewards", "labels", "auc"),
        [
            ([0.0, 0.0, 0.0], [True, False, False], 0.5),
            ([2.0, 1.0, 3.0], [True, False, False], 0.5),
            ([2.0, 1.0, 2.0], [True, False, False], 0.75),
            ([4.0, 1.0, 3.0], [True, False, False], 1.0),
            ([0.0, 1.0, 3.0, 2.0], [True, False, False, True], 0.25),
        ],
    )
    def test_by_hand(self, rewards: list[float], labels: list[bool], auc: float) -> None:
        assert float(reward_auc(torch.tensor(rewards), labels=torch.tensor(labels))) == auc

    def test_weights_count_as_repetitions(self) -> None:
        rewards, labels = torch.randn(8).round(decimals=1), torch.tensor([True, False] * 4)
        weights = torch.tensor([1, 2, 3, 0, 1, 1, 2, 1])
        repeated = reward_auc(rewards.repeat_interleave(weights), labels=labels.repeat_interleave(weights))
        assert float(reward_auc(rewards, labels=labels, weights=weights)) == pytest.approx(float(repeated))

    def test_one_label_has_none(self) -> None:
        assert reward_auc(torch.zeros(2), labels=torch.tensor([True, True])).isnan()


class TestCachedReference:
    def run(
        self, folder: str, data: FeedbackDataModule, *, reference: str, epochs: int = 1
    ) -> tuple[Any, Any]:
        module = KTOModule(folder, reference=reference, optimizer=sgd, loss=KTOLoss(beta=0.3))
        history = History()
        run = trainer(max_epochs=epochs, callbacks=[history])
        run.fit(module, data)
        fill = [callback for callback in run.callbacks if isinstance(callback, FillReferenceCache)]
        return history.values, fill[0].usage if fill else None

    @pytest.mark.parametrize(("shuffle", "epochs"), [(True, 1), (False, 2)])
    def test_it_gives_what_a_frozen_one_does(self, folder: str, shuffle: bool, epochs: int) -> None:
        frozen, _ = self.run(folder, feedback(shuffle=shuffle), reference="frozen", epochs=epochs)
        first, filled = self.run(folder, feedback(shuffle=shuffle), reference="cached", epochs=epochs)
        again, found = self.run(folder, feedback(shuffle=shuffle), reference="cached", epochs=epochs)
        for name in ("train/loss", "train/z0", "train/rewards/margin"):
            assert first[name] == pytest.approx(frozen[name], abs=1e-4)
            assert again[name] == pytest.approx(frozen[name], abs=1e-4)
        assert filled.passes > 0
        assert (found.passes, found.from_cache) == (0, found.pairs)

    def test_other_mismatches_in_every_epoch_are_refused(self) -> None:
        module = KTOModule("not there", reference="cached")
        with pytest.raises(
            ValueError, match=r"`reference=.cached.` does not go with KTOLoss .*`max_epochs: 1`"
        ):
            trainer(max_epochs=2).fit(module, feedback())


class TestMistakes:
    """Each before a model is loaded: the policy that is named does not exist."""

    def test_pairs_for_kto(self) -> None:
        data = PreferenceDataModule(GOOD, tokenizer=byte_level())
        with pytest.raises(ValueError, match="`datamodule` must give FeedbackBatch for KTOModule, got Pref"):
            trainer().fit(KTOModule("not there"), data)

    def test_judged_completions_for_dpo(self) -> None:
        with pytest.raises(ValueError, match="`datamodule` must give PairBatch for DPOModule, got Feedback"):
            trainer().fit(DPOModule("not there"), feedback())

    def test_batches_of_one(self) -> None:
        with pytest.raises(ValueError, match=r"`batch_size` must be at least 2 for KTOLoss, .* got 1"):
            trainer().fit(KTOModule("not there"), feedback(batch_size=1))

    def test_losses_of_pairs(self) -> None:
        with pytest.raises(ValueError, match=r"`loss` must be one of unpaired feedback, .* got DPOLoss"):
            KTOModule("not there", loss=DPOLoss())  # type: ignore[arg-type]

    def test_losses_of_judged_completions_for_dpo(self) -> None:
        with pytest.raises(ValueError, match=r"`loss` must be a loss of pairs, .* got KTOLoss"):
            DPOModule("not there", loss=KTOLoss())  # type: ignore[arg-type]

    def test_no_reference(self) -> None:
        with pytest.raises(ValueError, match='`reference="none"` does not go with KTOLoss'):
            KTOModule("not there", reference="none")

    def test_batches_of_the_other_kind_from_own_loaders(self) -> None:
        with pytest.raises(ValueError, match="`batch` must be a FeedbackBatch for KTOModule, got PairBatch"):
            trainer().fit(KTOModule(tiny_model()), loader(random_pairs(4)))
        with pytest.raises(ValueError, match="`batch` must be a PairBatch for DPOModule, got FeedbackBatch"):
            trainer().fit(DPOModule(tiny_model()), feedback_loader(random_examples(4)))

    def test_a_wrong_reference_is_found_at_the_start(self) -> None:
        module = KTOModule(tiny_model(), reference=tiny_model(seed=5))
        with pytest.raises(ValueError, match="policy and reference must agree before the first step"):
            trainer().fit(module, feedback_loader(random_examples(4)))


class TestBatches:
    def test_partners_are_the_next_of_another_prompt(self) -> None:
        prompts = [[1], [1], [2], [1]]
        batch = FeedbackBatch.from_examples([TokenExample(p, [k], True) for k, p in enumerate(prompts, 5)])
        assert batch.partners.tolist() == [2, 2, 3, 2]
        assert batch.mismatched_completions().completion_ids.tolist() == [7, 7, 8, 7]
        assert batch.all_completions().prompt_of.tolist() == [0, 1, 2, 3] * 2
        assert batch.mismatch_weights.tolist() == [1.0] * 4

    def test_nothing_is_mismatched_where_all_prompts_are_the_same(self) -> None:
        batch = FeedbackBatch.from_examples([TokenExample([1], [k], True) for k in (5, 6)])
        assert batch.partners.tolist() == [0, 1]
        assert batch.mismatch_weights.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(
        ("examples", "message"),
        [
            ([], "`examples` must hold at least one"),
            ([TokenExample([1], [], True)], "no empty part, got 1 prompt and 0 completion tokens at index 0"),
            ([TokenExample([1], [2], "yes")], "labels that are true or false, got 'yes' at index 0"),  # type: ignore[arg-type]
        ],
    )
    def test_mistakes(self, examples: list[TokenExample], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            FeedbackBatch.from_examples(examples)
