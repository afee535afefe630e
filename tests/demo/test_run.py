import json
import math

import pytest
import torch

from lightning_dpo.demo.measure import agreement, measure
from lightning_dpo.demo.pairs import LabelledPair
from lightning_dpo.demo.run import run_demo
from lightning_dpo.demo.tables import print_result
from lightning_dpo.demo.task import load_pairs


@pytest.fixture(scope="module")
def output(tmp_path_factory, tiny_task):
    folder = tmp_path_factory.mktemp("run")
    (folder / "task").symlink_to(tiny_task.folder)
    return folder


@pytest.fixture(scope="module")
def result(output, tiny_config):
    return run_demo(
        output=output,
        task=tiny_config,
        lr=0.02,
        epochs=3,
        batch_size=16,
        samples_per_prompt=16,
        verbose=False,
    )


def models(result):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = (result.policy, result.task.model)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    return policy, reference, AutoTokenizer.from_pretrained(result.policy)


def test_dpo_raises_the_true_score_at_a_measured_kl(result):
    before, after = result.before.score, result.after.score
    assert after.mean - before.mean > 4 * math.hypot(before.standard_error, after.standard_error)
    assert 0.1 < result.after.kl.mean < 20
    assert result.after.kl.standard_error > 0
    assert result.before.kl.mean == 0
    # What any policy may have at this KL bounds what DPO has, up to the noise of both.
    assert result.best.reward > after.mean - 3 * after.standard_error
    assert result.best.kl == pytest.approx(result.after.kl.mean, rel=1e-3)


def test_accuracy_is_the_one_that_the_trainer_logged(result):
    assert result.agreement.accuracy == pytest.approx(result.validation_accuracy, abs=1e-6)
    assert result.agreement.accuracy > 0.5
    assert result.agreement.correlation > 0.1


def test_the_exported_policy_changed_and_the_reference_did_not(result):
    policy, reference, tokenizer = models(result)
    pairs = load_pairs(result.task.validation)
    agreed = agreement(policy, reference=reference, tokenizer=tokenizer, pairs=pairs)
    assert agreed.accuracy == result.agreement.accuracy
    again = measure(
        policy, reference=reference, tokenizer=tokenizer, sample_from="reference", samples_per_prompt=16
    )
    assert again.reviews == result.before.reviews
    changed = [
        not torch.equal(p, q) for p, q in zip(policy.parameters(), reference.parameters(), strict=True)
    ]
    assert all(changed)


def test_an_untrained_policy_agrees_by_chance_alone(result):
    _, reference, tokenizer = models(result)
    pairs = [LabelledPair("review of the film :", "the plot was good .", "the plot was bad .")] * 2
    agreed = agreement(reference, reference=reference, tokenizer=tokenizer, pairs=pairs)
    assert (agreed.accuracy, agreed.correlation) == (0.5, 0.0)
    with pytest.raises(ValueError, match="`sample_from`"):
        measure(reference, reference=reference, tokenizer=tokenizer, sample_from="both")


def test_the_figures_are_written_and_shown(result, output):
    from rich.console import Console

    written = json.loads((output / "result.json").read_text())
    assert written == result.summary()
    console = Console(record=True, width=120)
    print_result(result, beta=0.1, console=console)
    text = console.export_text()
    for expected in ("reference", "after DPO", "best possible", f"{result.after.kl.mean:.2f} ±", "before"):
        assert expected in text


def test_a_second_run_replaces_the_first_and_torch_keeps_its_threads(result, output, tiny_config):
    threads = torch.get_num_threads()
    short = run_demo(
        output=output,
        task=tiny_config,
        lr=0.005,
        epochs=1,
        batch_size=64,
        samples_per_prompt=4,
        verbose=False,
    )
    assert torch.get_num_threads() == threads
    assert short.task == result.task
    assert short.after.kl.mean < result.after.kl.mean
    assert not [p for p in output.iterdir() if p.name.startswith(".")]
    assert {p.name for p in output.iterdir()} == {"task", "policy", "cache", "result.json"}


def test_options_of_the_command_line_reach_the_run(monkeypatch, tmp_path):
    from lightning_dpo.demo.__main__ import main

    seen = {}
    monkeypatch.setattr("lightning_dpo.demo.run.run_demo", lambda **options: seen.update(options))
    main(["--output", str(tmp_path), "--beta", "0.3", "--seed", "7"])
    assert seen == {"output": tmp_path, "beta": 0.3, "lr": 0.01, "epochs": 4, "seed": 7}
    main(["--lr", "0.01"])
    assert seen["lr"] == 0.01


def test_the_kl_falls_as_beta_rises(tmp_path, tiny_task, tiny_config):
    (tmp_path / "task").symlink_to(tiny_task.folder)
    options = {
        "output": tmp_path,
        "task": tiny_config,
        "epochs": 3,
        "batch_size": 16,
        "samples_per_prompt": 16,
    }
    small, large = (run_demo(beta=beta, **options, verbose=False).after.kl for beta in (0.2, 0.8))
    assert large.mean < small.mean - 4 * math.hypot(small.standard_error, large.standard_error)


def test_a_beta_out_of_range_is_named_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="`beta`"):
        run_demo(output=tmp_path, beta=0.0)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder for the task as shipped, which is prepared once."""
    return tmp_path_factory.mktemp("shipped")


@pytest.mark.heavy
def test_a_large_beta_leaves_the_task_as_shipped_grammatical(shipped):
    result = run_demo(output=shipped, beta=0.8, samples_per_prompt=16, verbose=False)
    assert result.after.score.mean > result.before.score.mean + 3
    assert result.after.grammatical > 0.85
    assert result.after.kl.mean < 4


@pytest.mark.heavy
def test_the_task_as_shipped_is_learned(shipped):
    result = run_demo(output=shipped, samples_per_prompt=64, verbose=False)
    assert abs(result.before.score.mean) < 1
    assert result.before.grammatical > 0.9
    assert result.after.score.mean > 8
    assert result.after.grammatical > 0.85
    assert result.after.kl.mean < 10
    assert result.agreement.accuracy > 0.74
    assert result.task.bayes_accuracy > 0.8
