from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import datasets
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from pair_rows import BAD, GOOD, jsonl, parts, ready
from tiny_tokenizers import CHATML, THINKING, byte_level
from training import trainer as quiet_trainer

from lightning_dpo.data.bad_rows import Reason
from lightning_dpo.data.datamodule import PreferenceDataModule
from lightning_dpo.types import PairBatch


class Recorder(pl.LightningModule):
    """Writes down which prompts it is given, and what a step makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[tuple[list[int], ...]]]] = []
        self.validated: list[tuple[list[int], ...]] = []
        self.gradients: list[float] = []

    def training_step(self, batch: PairBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, parts(batch)))
        losses = self.weight * batch.chosen_ids.new_tensor([len(p[0]) + p[1][-2] for p in parts(batch)])
        return (losses * batch.weights).sum() / batch.denominator

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self.validated += [p for p, w in zip(parts(batch), batch.weights.tolist(), strict=True) if w]

    def on_before_optimizer_step(self, optimizer) -> None:
        self.gradients.append(self.weight.grad.item())

    def configure_optimizers(self):
        self.trainer.estimated_stepping_batches  # noqa: B018 - makes the loader early, as schedules do
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path: Path, **settings) -> pl.Trainer:
    return quiet_trainer(**{"num_sanity_val_steps": 0, "default_root_dir": tmp_path, **settings})


class TestPreparation:
    def test_rows_become_batches(self, tmp_path: Path, tokenizer) -> None:
        data = ready(jsonl(tmp_path / "a.jsonl", GOOD), tokenizer=tokenizer, batch_size=16, shuffle=False)
        batches = list(data.train_dataloader())
        assert [len(batch) for batch in batches] == [16, 16, 8]
        texts = [[tokenizer.decode(ids) for ids in pair] for batch in batches for pair in parts(batch)]
        assert texts == [[r["prompt"], r["chosen"] + "</s>", r["rejected"] + "</s>"] for r in GOOD]
        assert [batch.denominator for batch in batches] == [16, 16, 8]

    def test_long_rows_are_truncated_or_dropped(self, tmp_path: Path, tokenizer) -> None:
        long = {"prompt": "the sky " * 50, "chosen": " is blue", "rejected": " is green"}
        path = jsonl(tmp_path / "a.jsonl", [*GOOD[:9], long])
        data = ready(path, tokenizer=tokenizer, max_length=30)
        assert (data.report.kept, data.report.truncated, data.report.bad) == (10, 1, 0)
        prompt, chosen, _ = data.train_pairs.pair(9)
        assert len(prompt) + len(chosen) <= 30
        rows = [data.train_pairs.pair(number) for number in range(10)]
        assert data.longest_row == max(len(p) + max(len(c), len(r)) for p, c, r in rows)
        dropped = ready(path, tokenizer=tokenizer, max_length=30, on_long="drop").report
        assert (dropped.kept, dropped.counts, dropped.bad) == (9, {Reason.LONG: 1}, 0)
        with pytest.raises(ValueError, match=r"at least one usable row, got none. Raise `max_length` \(3\)"):
            ready(path, tokenizer=tokenizer, max_length=3, on_long="drop")

    def test_what_may_be_a_mistake_is_said(self, tokenizer) -> None:
        short = copy.deepcopy(tokenizer)
        short.model_max_length = 100
        with pytest.warns(UserWarning, match=r"`max_length` is 101, .* takes 100 tokens"):
            data = ready(GOOD, tokenizer=short, max_length=101, tokens_per_batch=14)
        lengths = data.train_pairs.lengths()
        assert 0 < (lengths > 14).sum() < 40
        with pytest.warns(
            UserWarning, match=rf"^{(lengths > 14).sum()} pairs are longer than `tokens_per_batch`"
        ):
            data.train_dataloader()

    def test_row_limits_and_validation(self, tmp_path: Path, tokenizer) -> None:
        first, second = jsonl(tmp_path / "a.jsonl", GOOD), jsonl(tmp_path / "b.jsonl", GOOD[30:])
        settings = {"train_limit": 6, "validation_limit": 4, "batch_size": 3, "validation_batch_size": 2}
        data = ready(first, validation=second, tokenizer=tokenizer, **settings)
        assert [len(b) for b in data.train_dataloader()] == [3, 3]
        assert [len(b) for b in data.val_dataloader()] == [2, 2]
        assert data.reports["validation"].rows == 4
        text = tokenizer.decode(parts(next(iter(data.val_dataloader())))[0][0])
        assert text == GOOD[30]["prompt"]

    def test_validation_pairs_that_are_named_win_over_a_share(self, tmp_path, tokenizer, caplog) -> None:
        named = jsonl(tmp_path / "b.jsonl", GOOD[30:])
        with caplog.at_level(logging.INFO):
            data = PreferenceDataModule(
                GOOD, validation=named, validation_split=0.25, tokenizer=tokenizer, batch_size=8
            )
        said = [record.message for record in caplog.records]
        assert said == ["`validation_split` (0.25) is not used, since `validation` is given"]
        module = Recorder()
        trainer(tmp_path).fit(module, data)
        assert (len(data.train_pairs), len(data.validation_pairs)) == (40, 10)
        assert sum(len(batch) for _, batch in module.seen) == 40
        prompts = [tokenizer.decode(prompt) for prompt, _, _ in module.validated]
        assert prompts == [row["prompt"] for row in GOOD[30:]]

    def test_a_share_is_held_out(self, tmp_path: Path, tokenizer) -> None:
        path = jsonl(tmp_path / "a.jsonl", GOOD)
        data = ready(path, tokenizer=tokenizer, validation_split=0.25, seed=1)
        held_out = [p for b in data.val_dataloader() for p in parts(b)]
        trained = [p for b in data.train_dataloader() for p in parts(b)]
        assert (len(held_out), len(trained)) == (10, 30)
        assert len({str(p) for p in held_out + trained}) == 40
        again = ready(path, tokenizer=tokenizer, validation_split=0.25, seed=1)
        assert [p for b in again.val_dataloader() for p in parts(b)] == held_out
        with pytest.raises(ValueError, match=r"`validation_split` must leave pairs on both sides"):
            ready(GOOD[:2], tokenizer=tokenizer, validation_split=0.01)


class TestMistakes:
    """Each is one clear error, before a model is loaded."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"train": "pears.jsonl"},
                r"`train` must be an existing file.*'pears.jsonl'.*mean 'pairs.jsonl'",
            ),
            ({"validation": "x/y/z"}, r"`validation` must be an existing file"),
            (
                {"train": "columns.jsonl"},
                r"`train` must have columns `chosen` and `rejected`.*got answer \(text\)",
            ),
            ({"train": "empty.jsonl"}, r"`train` must hold at least one row, got none in 'empty.jsonl'"),
            ({"train": "words.jsonl"}, r"`train` must hold rows, got none.*words.jsonl:1: not JSON"),
            ({"format": "dpo"}, r"`format` must be one of text, chat, hh, messages, sharegpt, got 'dpo'"),
            ({"format": "hh"}, r"rows of the format 'hh', got none.*pairs.jsonl:1: `chosen` does not begin"),
            ({"columns": {"prompt": "q"}}, r"`columns` must name columns of `train` \(prompt.*got 'q'"),
            ({"tokenizer": None}, r"`tokenizer` must be given.*got None"),
            ({"tokenizer": byte_level(eos=None)}, r"`tokenizer` must have an end-of-sequence token"),
            ({"train": "chat.jsonl"}, r"`tokenizer` must have a chat template.*pass `chat_template=`"),
            (
                {"train": "chat.jsonl", "tokenizer": byte_level(template=THINKING)},
                r"`tokenizer` must have a chat template that fits.*they part at character.*<think>",
            ),
            ({"train": "bad.jsonl"}, r"at most a share of 5.0% bad rows, got 3 of 3"),
            ({"batch_size": 0}, r"`batch_size` must be at least 1, got 0"),
            ({"tokens_per_batch": 0}, r"`tokens_per_batch` must be at least 1, got 0"),
            ({"max_length": 1}, r"`max_length` must be at least 2, got 1"),
            ({"max_bad_fraction": 5}, r"`max_bad_fraction` must be between 0 and 1, got 5"),
            ({"on_bad_row": "skip"}, r"`on_bad_row` must be 'drop' or 'raise', got 'skip'"),
            ({"validation_split": 1.5}, r"`validation_split` must be between 0 and 1, got 1.5"),
            (
                {"validation_split": 1.5, "validation": "pairs.jsonl"},
                r"`validation_split` must be between 0 and 1, got 1.5",
            ),
        ],
    )
    def test_one_error_names_the_argument(
        self, settings, message, tmp_path: Path, tokenizer, monkeypatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        jsonl(Path("pairs.jsonl"), GOOD)
        jsonl(Path("columns.jsonl"), [{"answer": "a", "other": "b"}])
        jsonl(Path("empty.jsonl"), [])
        jsonl(Path("words.jsonl"), ["some words", "and more"])
        jsonl(Path("bad.jsonl"), BAD)
        chat = [{"role": "user", "content": "a"}]
        answers = {n: [{"role": "assistant", "content": n}] for n in ("chosen", "rejected")}
        jsonl(Path("chat.jsonl"), [{"prompt": chat, **answers}])
        with pytest.raises(ValueError, match=message):
            ready(**{"train": "pairs.jsonl", "tokenizer": tokenizer, **settings})


class TestTrainer:
    def test_fit_sees_every_pair_and_the_order_changes(self, tmp_path: Path, tokenizer) -> None:
        data = PreferenceDataModule(
            GOOD, validation=GOOD[:7], tokenizer=tokenizer, batch_size=8, num_workers=2
        )
        module = Recorder()
        trainer(tmp_path, max_epochs=2).fit(module, data)
        epochs = [[str(p) for e, b in module.seen if e == epoch for p in b] for epoch in (0, 1)]
        assert all(len(set(epoch)) == len(epoch) == 40 for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert len(module.validated) == 14

    @pytest.mark.parametrize(("tokens", "callbacks"), [(None, False), (60, False), (60, True)])
    def test_accumulated_batches_equal_one_large_batch(self, tmp_path, tokenizer, tokens, callbacks) -> None:
        module = Recorder()
        data = PreferenceDataModule(GOOD[:29], tokenizer=tokenizer, batch_size=4, tokens_per_batch=tokens)
        scheduler = GradientAccumulationScheduler({0: 3})
        settings = {"callbacks": [scheduler]} if callbacks else {"accumulate_grad_batches": 3}
        trainer(tmp_path, **settings).fit(module, data)
        windows = [module.seen[k : k + 3] for k in range(0, len(module.seen), 3)]
        assert len({len(batch) for _, batch in module.seen}) > 1
        slopes = [[len(p[0]) + p[1][-2] for _, batch in window for p in batch] for window in windows]
        assert module.gradients == pytest.approx([sum(s) / len(s) for s in slopes])

    def test_overfitting_repeats_the_same_batches(self, tmp_path: Path, tokenizer) -> None:
        module = Recorder()
        data = PreferenceDataModule(GOOD, validation=GOOD, tokenizer=tokenizer, batch_size=8)
        trainer(tmp_path, overfit_batches=2, max_epochs=2).fit(module, data)
        assert [epoch for epoch, _ in module.seen] == [0, 0, 1, 1]
        assert [b for _, b in module.seen[:2]] == [b for _, b in module.seen[2:]]
        assert len(module.seen[0][1]) == 8

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("every", [3, 5, 7])
    def test_a_run_resumed_in_an_epoch_sees_the_rest_of_it(self, tmp_path, tokenizer, every, workers) -> None:
        def data() -> PreferenceDataModule:
            return PreferenceDataModule(
                GOOD, tokenizer=tokenizer, tokens_per_batch=150, seed=3, num_workers=workers
            )

        whole = Recorder()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=every, save_top_k=-1)
        trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[saving]).fit(whole, data())
        assert len(whole.seen) == 10
        resumed = Recorder()
        path = tmp_path / f"step={every}.ckpt"
        trainer(tmp_path, max_epochs=2).fit(resumed, data(), ckpt_path=path)
        assert resumed.seen == whole.seen[every:]

    def test_without_validation_data_there_is_no_validation(self, tmp_path: Path, tokenizer, recwarn) -> None:
        data = PreferenceDataModule(GOOD, tokenizer=tokenizer)
        trainer(tmp_path, num_sanity_val_steps=2).fit(Recorder(), data)
        assert not [w for w in recwarn if "zero" in str(w.message)]

        class Own(PreferenceDataModule):
            def val_dataloader(self):
                return self.train_dataloader()

        module = Recorder()
        trainer(tmp_path).fit(module, Own(GOOD, tokenizer=tokenizer))
        assert len(module.validated) == 40

    def test_the_loader_is_whole_again_after_a_fit(self, tmp_path: Path, tokenizer) -> None:
        data = PreferenceDataModule(GOOD, tokenizer=tokenizer, batch_size=8)
        trainer(tmp_path).fit(Recorder(), data)
        assert sum(len(batch) for batch in data.train_dataloader()) == 40

    def test_ranks_share_the_pairs(self, tmp_path: Path, tokenizer) -> None:
        data = PreferenceDataModule(
            GOOD[:29], validation=GOOD[:9], tokenizer=tokenizer, batch_size=4, seed=3, validation_batch_size=4
        )
        settings = {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": 2}
        trainer(tmp_path, **settings, callbacks=[Dump(tmp_path)]).fit(Recorder(), data)
        first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
        assert len(first["seen"]) == len(second["seen"]) == 4
        windows = [[p for r in (first, second) for b in r["seen"][k : k + 2] for p in b] for k in (0, 2)]
        assert sorted(len(window) for window in windows) == [13, 16]
        assert len({str(p) for window in windows for p in window}) == 29
        means = [sum(len(p[0]) + p[1][-2] for p in window) / len(window) for window in windows]
        assert first["gradients"] == second["gradients"] == pytest.approx(means)
        assert len(first["validated"] + second["validated"]) == 9


class Dump(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Recorder) -> None:
        result = {
            "seen": [batch for _, batch in pl_module.seen],
            "validated": pl_module.validated,
            "gradients": pl_module.gradients,
        }
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


class TestRealData:
    def test_hh(self, shared_data: Path, tokenizer) -> None:
        folder = str(shared_data / "hh-harmless")
        data = ready(folder, validation=folder, tokenizer=tokenizer, tokens_per_batch=8192)
        assert data.report.format == "hh"
        assert (data.report.rows, data.report.kept, data.report.counts) == (1200, 1196, {Reason.EMPTY: 4})
        assert data.report.examples[Reason.EMPTY].place == "train.jsonl.gz:87"
        held_out = data.reports["validation"]
        assert (held_out.rows, held_out.kept, held_out.counts) == (400, 399, {Reason.DIVERGING: 1})
        batches = list(data.train_dataloader())
        assert sum(len(batch) for batch in batches) == 1196
        for batch in batches:
            lengths = batch.prompt_lengths + batch.chosen_lengths + batch.rejected_lengths
            assert len(batch) * int(lengths.max()) <= 8192

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_sharegpt(self, shared_data: Path, language: str) -> None:
        path = str(shared_data / "sharegpt-dpo" / f"{language}.json")
        chat = byte_level(template=CHATML, eos="<|im_end|>")
        data = ready(path, tokenizer=chat, max_length=100_000)
        assert (data.report.format, data.report.rows) == ("sharegpt", 150)
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        for k in range(len(data.train_pairs)):
            row = rows[data.train_pairs.row(k)]
            prompt, chosen, _ = data.train_pairs.pair(k)
            assert chat.decode(chosen) == row["chosen"]["value"] + "<|im_end|>"
            assert chat.decode(prompt).count("<|im_start|>") == len(row["conversations"]) + 1
        assert data.report.kept >= 140

    def test_a_hub_data_set_object(self, shared_data: Path, tokenizer) -> None:
        path = shared_data / "hh-harmless" / "validation.jsonl.gz"
        table = datasets.Dataset.from_json(str(path), keep_in_memory=True)
        assert ready(table, tokenizer=tokenizer).report.counts == {Reason.DIVERGING: 1}
