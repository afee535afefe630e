import json
from dataclasses import replace

import pytest
import torch

from lightning_dpo.demo.grammar import PROMPTS
from lightning_dpo.demo.model import build_model, build_tokenizer, fit_model
from lightning_dpo.demo.task import TaskConfig, load_pairs, prepare_task


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_model_folder_loads_by_itself(tiny_task):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_task.model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_task.model)
    assert model.config.vocab_size == len(tokenizer) == len(build_tokenizer())
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 0)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert tokenizer(PROMPTS[0])["input_ids"] == build_tokenizer()(PROMPTS[0])["input_ids"]


def test_pairs_are_as_many_as_asked_for_and_differ(tiny_task, tiny_config):
    train, validation = load_pairs(tiny_task.train), load_pairs(tiny_task.validation)
    assert (len(train), len(validation)) == (tiny_config.train_pairs, tiny_config.validation_pairs)
    assert all(pair.chosen and pair.rejected and pair.chosen != pair.rejected for pair in train + validation)
    assert {pair.prompt for pair in train} == set(PROMPTS)
    assert sum(pair.score_gap for pair in train) / len(train) > 1
    rows = [json.loads(line) for line in tiny_task.train.read_text().splitlines()]
    assert set(rows[0]) == {"prompt", "chosen", "rejected"}
    assert 0.5 < tiny_task.bayes_accuracy < 1


def test_fitting_lowers_the_loss_and_leaves_the_model_in_eval_mode():
    tokenizer = build_tokenizer()
    losses = []
    for steps in (2, 40):
        model = build_model(tokenizer, hidden_size=16, layers=1)
        losses.append(
            fit_model(model, tokenizer=tokenizer, steps=steps, batch_size=8, lr=2e-2, progress=False)
        )
    assert losses[0] == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), rel=0.1)
    assert losses[1] < 0.8 * losses[0]
    assert not any(module.training for module in model.modules())


def test_the_same_parameters_are_not_made_twice(tiny_task, tiny_config, monkeypatch):
    monkeypatch.setattr("lightning_dpo.demo.task.fit_model", lambda *_a, **_k: pytest.fail("made again"))
    assert prepare_task(tiny_task.folder, config=tiny_config) == tiny_task


def test_the_same_seed_makes_the_same_files_and_another_seed_others(tmp_path, tiny_config):
    small = replace(tiny_config, train_pairs=8, validation_pairs=8)
    torch.manual_seed(1)
    first = prepare_task(tmp_path / "a", config=small, progress=False)
    torch.manual_seed(2)
    again = prepare_task(tmp_path / "b", config=small, progress=False)
    assert contents(first.folder) == contents(again.folder)
    # Other parameters replace a task; nothing else is left beside it.
    other = prepare_task(tmp_path / "a", config=replace(small, seed=1), progress=False)
    assert other.config.seed == 1
    assert other.train.read_text() != again.train.read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_a_failure_leaves_nothing_half_written(tmp_path, tiny_config, monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("stopped")

    monkeypatch.setattr("lightning_dpo.demo.task.fit_model", lambda *_a, **_k: 0.0)
    monkeypatch.setattr("lightning_dpo.demo.task.sample_pairs", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        prepare_task(tmp_path / "task", config=tiny_config, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="`folder` must be missing, empty or an earlier task"):
        prepare_task(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", 0), ("hidden_size", 12), ("train_pairs", 0), ("fit_lr", 0.0), ("label_scale", -1.0)],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        TaskConfig(**{field: value})
