"""OnlineDPOModule: what it samples, which pairs it makes of it, and that the policy follows the judge."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from online_jobs import SHORT, Recording, few_steps, saved_keys, vowels
from resume_jobs import ROWS, source, train
from tiny_folder import save_tiny
from tiny_models import random_batch, random_pairs, tiny_model
from tiny_task import tiny_task_config
from tiny_tokenizers import byte_level
from torch.utils.data import DataLoader
from training import History, loader, sgd, trainer
from transformers import AutoModelForCausalLM

from lightning_dpo import DPOModule, OnlineDPOModule, PairBatch, PreferenceDataModule
from lightning_dpo.cli.main import main
from lightning_dpo.demo.grammar import true_score
from lightning_dpo.demo.task import Task, prepare_task
from lightning_dpo.evaluation import Sample
from lightning_dpo.losses import BCOLoss, IPOLoss, ODPOLoss
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.training.cli import DPOCLI

RECIPE = Path(__file__).parents[2] / "configs" / "online_dpo.yaml"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("online") / "model"
    save_tiny(folder)
    return str(folder)


def data(**options: Any) -> PreferenceDataModule:
    settings = {"tokenizer": byte_level(), "batch_size": 4, "num_processes": 1, **options}
    return PreferenceDataModule(ROWS, **settings)


class Scripted(Recording):
    """Says what it is told to say, each prompt the same: ids of `num_completions` completions."""

    script: Sequence[Sequence[int]] = ()

    def sample(self, batch: PairBatch, *, seed: int) -> list[Sample]:
        prompts = [ids.tolist() for ids in batch.prompt_ids.split(batch.prompt_lengths.tolist())]
        return [Sample(prompt, ids, ids[-1] == 1) for prompt in prompts for ids in self.script]


def scripted(script: Sequence[Sequence[int]], **options: Any) -> Scripted:
    """With a judge that prefers what comes later in the script, unless another one is given."""
    module = Scripted(tiny_model(), num_completions=len(script), **{"judge": in_order, **options})
    module.script = script
    module._tokenizer = byte_level()
    return module


def in_order(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def indifferent(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [1.0] * len(completions)


ONE, TWO = [40, 1], [41, 42, 43, 1]


class TestPairs:
    def test_the_better_one_is_chosen(self) -> None:
        batch = random_batch(3)
        judged = scripted([ONE, TWO]).judged_pairs(batch)
        assert judged.scores[:, 1].gt(judged.scores[:, 0]).all()
        pairs = judged.pairs
        assert torch.equal(pairs.prompt_ids, batch.prompt_ids)
        assert pairs.chosen_ids.tolist() == TWO * 3
        assert pairs.rejected_ids.tolist() == ONE * 3
        assert torch.equal(pairs.margins, judged.scores[:, 1] - judged.scores[:, 0])
        assert pairs.weights.tolist() == [1.0] * 3
        assert judged.lengths.tolist() == [[2, 4]] * 3
        assert not judged.ties.any()

    def test_of_several_the_best_and_the_worst(self) -> None:
        judged = scripted([TWO, ONE, [44, 45, 46, 47, 48, 1]]).judged_pairs(random_batch(2))
        assert judged.pairs.chosen_ids.tolist() == [44, 45, 46, 47, 48, 1] * 2
        assert judged.pairs.rejected_ids.tolist() == ONE * 2

    def test_labels_are_drawn_by_bradley_terry(self) -> None:
        module, count = scripted([ONE, TWO], label_scale=0.5), 3000
        judged = module.judged_pairs(random_batch(count))
        probability = 1 / (1 + math.exp(-0.5 * float(judged.scores[0, 1] - judged.scores[0, 0])))
        better = judged.pairs.chosen_lengths == len(TWO)
        spread = math.sqrt(probability * (1 - probability) / count)
        assert float(better.float().mean()) == pytest.approx(probability, abs=4 * spread)
        assert (judged.pairs.margins[~better] == 0).all()

    def test_ties_weigh_nothing_and_still_count_in_the_divisor(self) -> None:
        batch = PairBatch.from_pairs(random_pairs(3), weights=[1.0, 2.0, 0.0])
        for judged in (
            scripted([ONE, ONE]).judged_pairs(batch),
            scripted([ONE, ONE], label_scale=1.0).judged_pairs(batch),
            scripted([ONE, TWO], judge=indifferent).judged_pairs(batch),
        ):
            assert judged.ties.all()
            assert judged.pairs.weights.tolist() == [0.0] * 3
            assert judged.pairs.denominator == 3.0

    def test_equal_scores_are_a_fair_coin_where_labels_are_drawn(self) -> None:
        judged = scripted([ONE, TWO], judge=indifferent, label_scale=1.0).judged_pairs(random_batch(400))
        assert not judged.ties.any()
        assert float((judged.pairs.chosen_lengths == 2).float().mean()) == pytest.approx(0.5, abs=0.1)

    def test_what_was_cut_loses_the_penalty(self) -> None:
        cut = [44, 45, 46, 47, 48]
        plain = scripted([ONE, cut]).judged_pairs(random_batch(2))
        fined = scripted([ONE, cut], missing_eos_penalty=100.0).judged_pairs(random_batch(2))
        assert plain.finished.tolist() == [[True, False]] * 2
        assert torch.equal(fined.scores, plain.scores - torch.tensor([0.0, 100.0]))
        assert fined.pairs.chosen_ids.tolist() == ONE * 2


class TestTraining:
    @pytest.mark.parametrize("options", [{}, {"refresh_every": 2}, {"loss": IPOLoss(beta=0.3)}], ids=str)
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_with_its_pairs_given_dpo_takes_the_same_steps(
        self, folder: str, options: dict[str, Any], precision: Any
    ) -> None:
        online = Recording(folder, optimizer=sgd, **SHORT, **options)
        trainer(precision=precision, max_steps=4).fit(online, data())
        pairs = [judged.pairs for judged in online.judged]
        assert len(pairs) == 4
        loss = {name: value for name, value in options.items() if name == "loss"}
        offline = DPOModule(folder, optimizer=sgd, **loss)
        runner = trainer(precision=precision, max_steps=4)
        # Ten batches for the same warm-up.
        runner.fit(offline, DataLoader([*pairs, *pairs, *pairs[:2]], batch_size=None))
        start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        torch.testing.assert_close(offline.policy.state_dict(), online.policy.state_dict())
        assert any(not torch.equal(value, start[name]) for name, value in online.policy.state_dict().items())

    def test_completions_come_from_the_policy_as_it_was(self, folder: str) -> None:
        """Steps 0 and 1 sample with the first weights, step 2 with those after two steps."""
        runs = [few_steps(folder, steps=3, refresh_every=every) for every in (None, 1, 2, 10)]
        online, each_step, second_step, never = (run.drawn for run in runs)
        assert online == each_step
        assert second_step[:2] == never[:2]
        assert second_step[1] != online[1]
        assert second_step[2] != never[2]

    def test_the_policy_gets_its_own_weights_back(self, folder: str) -> None:
        module = Recording(folder, **SHORT, refresh_every=5)
        module._tokenizer = byte_level()
        module.configure_model()
        with torch.no_grad():
            for parameter in module.policy.parameters():
                parameter.add_(torch.randn_like(parameter))
        snapshot = module.sampling_weights
        before = {name: value.clone() for name, value in module.state_dict().items()}
        start = AutoModelForCausalLM.from_pretrained(folder).state_dict()

        def fault() -> None:
            with snapshot.lent_to(module.policy):
                assert all(torch.equal(v, start[n]) for n, v in module.policy.state_dict().items())
                raise RuntimeError("a fault")

        with pytest.raises(RuntimeError, match="a fault"):
            fault()
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_what_is_logged(self, folder: str) -> None:
        module = Recording(folder, optimizer=sgd, **SHORT, num_completions=3)
        history = History()
        run = trainer(callbacks=[history], max_steps=2, val_check_interval=2)
        shorter = {"prompt": "the sky", "chosen": " is blue", "rejected": " is green and far away"}
        run.fit(module, data(validation=[*ROWS[:4], shorter]))
        judged = module.judged[-1]
        assert history.values["train/score"][-1] == pytest.approx(float(judged.scores.mean()))
        assert history.values["train/ties"][-1] == pytest.approx(float(judged.ties.float().mean()))
        lengths = judged.lengths.float()
        assert history.values["train/completion_length"][-1] == pytest.approx(float(lengths.mean()))
        unfinished = history.values["train/unfinished"][-1]
        assert unfinished == pytest.approx(1 - float(judged.finished.float().mean()))
        logged = {name for name in run.callback_metrics if name.startswith("val/")}
        assert logged == set(OnlineDPOModule.logged_metrics())

    @pytest.mark.parametrize("judge", [indifferent, vowels])
    def test_a_judge_without_a_view_changes_nothing(self, folder: str, judge: Any) -> None:
        module = Recording(folder, optimizer=sgd, **{**SHORT, "judge": judge})
        trainer(max_steps=3).fit(module, data())
        start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        same = [torch.equal(value, start[name]) for name, value in module.policy.state_dict().items()]
        assert all(same) == (judge is indifferent)

    def test_a_running_mean_begins_with_the_first_pairs_that_count(self, folder: str) -> None:
        asked: list[int] = []

        def undecided_at_first(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
            asked.append(len(completions))
            return (indifferent if len(asked) == 1 else vowels)(prompts, completions)

        module = Recording(folder, optimizer=sgd, loss=BCOLoss(), **{**SHORT, "judge": undecided_at_first})
        trainer(max_steps=3).fit(module, data())
        assert module.judged[0].ties.all()
        assert all(value.isfinite().all() for value in module.state_dict().values())
        start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert any(not torch.equal(value, start[name]) for name, value in module.policy.state_dict().items())

    def test_offsets_come_from_the_judges_scores(self, folder: str) -> None:
        module = Recording(folder, optimizer=sgd, loss=ODPOLoss(beta=0.2), **SHORT)
        trainer(max_steps=1).fit(module, data())
        kept = module.latest.losses
        margins = module.judged[0].pairs.margins
        expected = -torch.nn.functional.logsigmoid(-margins[margins > 0].log())
        torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)

    def test_a_wrong_reference_is_found_at_the_start(self, folder: str, tmp_path: Path) -> None:
        torch.manual_seed(9)
        save_tiny(tmp_path / "other")
        module = OnlineDPOModule(folder, reference=str(tmp_path / "other"), **SHORT)
        with pytest.raises(ValueError, match="policy and reference must agree before the first step"):
            trainer().fit(module, data())


class TestResume:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"refresh_every": 3},
            {"refresh_every": 3, "lora": LoraSettings(r=2, dropout=0.1, target_modules=["c_attn"])},
        ],
        ids=["online", "iterative", "adapter"],
    )
    def test_the_rest_is_the_same(self, tmp_path: Path, options: dict[str, Any]) -> None:
        model = source(tmp_path / "model")
        method = partial(OnlineDPOModule, label_scale=1.0, startup_check=False, **SHORT)
        settings = {"method": method, "trainer_options": {"max_epochs": 1}, "validate": False, **options}
        whole = train(model, folder=tmp_path, **settings)
        assert whole.trainer.global_step == 5
        assert whole.policy is not None
        for step in (2, 4):  # between two refreshes, and after one
            checkpoint = tmp_path / f"step={step}.ckpt"
            kept = [key for key in saved_keys(checkpoint) if key.startswith("sampling_weights.")]
            assert bool(kept) == ("refresh_every" in options)
            assert all("lora_" in key for key in kept) == ("lora" in options or not kept)
            resumed = train(model, ckpt_path=checkpoint, **settings)
            torch.testing.assert_close(whole.policy.state_dict(), resumed.policy.state_dict(), rtol=0, atol=0)

    def test_an_iterative_run_goes_on_as_an_online_one(self, tmp_path: Path) -> None:
        model = source(tmp_path / "model")
        settings = {"method": partial(OnlineDPOModule, startup_check=False, **SHORT), "validate": False}
        settings["trainer_options"] = {"max_epochs": 1}
        train(model, folder=tmp_path, every=2, refresh_every=2, **settings)
        train(model, ckpt_path=tmp_path / "step=2.ckpt", **settings)


class TestMistakes:
    """Each before a model is loaded: the policy that is named does not exist."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"judge": "my.judge"}, r"`judge` must be a function of \(prompts, completions\) .*'my.judge'"),
            ({"num_completions": 1}, "`num_completions` must be at least 2, to make a pair of, got 1"),
            ({"label_scale": 0.0}, "`label_scale` must be above 0, got 0.0; None prefers the better"),
            ({"refresh_every": 0}, "`refresh_every` must be at least 1 optimizer step, got 0"),
            ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
            ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0: completions of one prompt must"),
            ({"top_p": 1.5}, "`top_p` must be above 0 and at most 1, got 1.5"),
            ({"reference": "cached"}, '`reference="cached"` does not go with OnlineDPOModule, whose compl'),
            ({"reference": "cached:other"}, '`reference="cached:other"` does not go with OnlineDPOModule'),
            ({"reference": "adapter"}, "needs an adapter"),
        ],
    )
    def test_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            OnlineDPOModule("not there", **{"judge": vowels, **options})

    def test_no_judge(self) -> None:
        with pytest.raises(ValueError, match=r"`judge` must be a function of .*got None"):
            trainer().fit(OnlineDPOModule("not there"), data())

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (lambda p, c: [math.nan] * len(c), "`judge` must give finite scores, got nan .* 8 of 8"),
            (lambda p, c: [1.0], r"`judge` must give one score for each of 8 .* shape \(1,\)"),
            (lambda p, c: [[1.0]] * len(c), r"`judge` must give one score for each of 8 .* shape \(8, 1\)"),
        ],
    )
    def test_what_the_judge_says(self, folder: str, answer: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            trainer().fit(OnlineDPOModule(folder, judge=answer, max_new_tokens=3), data())

    def test_no_tokenizer(self) -> None:
        with pytest.raises(ValueError, match="OnlineDPOModule needs a tokenizer to show the judge texts"):
            trainer().fit(OnlineDPOModule(tiny_model(), **SHORT), loader())

    def test_batches_of_another_kind(self, folder: str) -> None:
        with pytest.raises(ValueError, match="`batch` must be a PairBatch for OnlineDPOModule, got list"):
            trainer().fit(OnlineDPOModule(folder, **SHORT), DataLoader([[1, 2]], batch_size=None))


class TestRecipe:
    @pytest.fixture
    def options(self, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        monkeypatch.chdir(tmp_path)
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:16]))
        return [
            f"--config={RECIPE}",
            f"--model.policy={folder}",
            "--model.judge=online_jobs.vowels",
            "--model.max_new_tokens=5",
            "--data.train=pairs.jsonl",
            "--data.validation_split=0.25",
            "--data.num_processes=1",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=1",
        ]

    def test_it_runs_and_its_checkpoint_is_exported(self, options: list[str]) -> None:
        cli = DPOCLI(args=["fit", *options])
        assert type(cli.model) is OnlineDPOModule
        assert cli.trainer.global_step == 2
        assert {"train/score", "val/rewards/accuracy"} <= set(cli.trainer.callback_metrics)
        (checkpoint,) = Path().rglob("*.ckpt")
        main(["export", f"--checkpoint={checkpoint}", "--output=exported"])
        AutoModelForCausalLM.from_pretrained("exported")

    def test_an_adapter_and_iterations(self, options: list[str]) -> None:
        extra = ["--model.lora.r=2", "--model.reference=adapter", "--model.refresh_every=2"]
        cli = DPOCLI(args=["fit", *options, *extra, "--model.label_scale=0.5"])
        assert cli.trainer.global_step == 2
        assert cli.model.reference_model is None

    def test_validation_does_without_a_judge(self, options: list[str]) -> None:
        main(["validate", *[option for option in options if "judge" not in option and "steps" not in option]])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    config = tiny_task_config(validation_pairs=1)
    return prepare_task(tmp_path_factory.mktemp("demo") / "task", config=config, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("refresh_every", [None, 4])
def test_the_score_rises_on_the_embedded_task(task: Task, refresh_every: int | None) -> None:
    module = OnlineDPOModule(
        str(task.model),
        judge=true_score,
        refresh_every=refresh_every,
        max_new_tokens=40,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
    )
    history = History()
    pairs = PreferenceDataModule(
        str(task.train), tokenizer=str(task.model), batch_size=16, num_processes=1, max_length=128
    )
    trainer(callbacks=[history], max_epochs=3, gradient_clip_val=1.0).fit(module, pairs)
    scores = history.values["train/score"]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 1.5
