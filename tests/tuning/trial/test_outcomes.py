"""What validation found for each pair: kept, found again, and the same pair in every trial."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from sweep_project import make_project

from lightning_dpo import DPOModule, PairBatch, PreferenceDataModule, TokenPair
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.outcomes import OutcomeRecorder, PairOutcomes, load_outcomes, pair_keys

METRIC = "val/rewards/accuracy"
PAIRS = [TokenPair([1, 2], [3], [4]), TokenPair([1], [2, 3], [4]), TokenPair([1, 2], [4], [3])]


def test_keys_tell_pairs_apart_and_depend_on_nothing_else() -> None:
    keys = pair_keys(PairBatch.from_pairs(PAIRS))
    assert len(set(keys.tolist())) == 3
    again = pair_keys(PairBatch.from_pairs([PAIRS[2], PAIRS[0]], weights=[2.0, 1.0]))
    assert again.tolist() == [keys[2], keys[0]]


def test_a_file_gives_back_what_was_saved_at_some_bytes_a_pair(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    keys = np.sort(random.integers(0, 2**64, 20_000, dtype=np.uint64))
    values = random.integers(0, 2, 20_000).astype(float)
    saved = PairOutcomes(keys, values, np.ones(20_000), 7)
    saved.save(Storage(tmp_path), "a/rank0")
    found = load_outcomes(Storage(tmp_path), "a", step=7)
    assert found is not None
    for one, other in zip(found, saved, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (tmp_path / "a" / "rank0.parquet").stat().st_size < 9 * 20_000
    assert load_outcomes(Storage(tmp_path), "a", step=8) is None
    assert load_outcomes(Storage(tmp_path), "b", step=7) is None


def test_ranks_are_put_together_and_weights_kept(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for rank, (keys, weights) in enumerate([([3, 9], [1, 1]), ([5], [2])]):
        share = PairOutcomes(np.array(keys, np.uint64), np.array(keys) / 10, np.array(weights, float), 4)
        share.save(storage, f"a/rank{rank}")
    found = load_outcomes(storage, "a", step=4)
    assert found is not None
    assert found.keys.tolist() == [3, 5, 9]
    assert found.weights.tolist() == [1, 2, 1]
    assert found.mean == pytest.approx((0.3 + 2 * 0.5 + 0.9) / 4)


@pytest.mark.parametrize("left_out", [False, True], ids=["scored all the same", "left out by the module"])
def test_pairs_of_no_weight_are_not_kept(tmp_path: Path, left_out: bool) -> None:
    batch = PairBatch.from_pairs(PAIRS, weights=[1.0, 0.0, 2.0])
    scored = torch.tensor([True, not left_out, True])
    latest = SimpleNamespace(
        statistics={"rewards/accuracy": torch.tensor([1.0, 0.0, 0.5])[scored]}, weights=batch.weights[scored]
    )
    run: Any = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), sanity_checking=False, global_step=4, global_rank=0
    )
    module: Any = SimpleNamespace(latest=latest)
    recorder = OutcomeRecorder(Storage(tmp_path), trial="a", metric=METRIC)
    recorder.on_validation_start(run, module)
    recorder.on_validation_batch_end(run, module, None, batch, 0)
    recorder.on_validation_end(run, module)
    found = load_outcomes(Storage(tmp_path), "a", step=4)
    assert found is not None
    first, _, third = pair_keys(batch).tolist()
    kept = dict(zip(found.keys.tolist(), zip(found.values, found.weights, strict=True), strict=True))
    assert kept == {first: (1.0, 1.0), third: (0.5, 2.0)}


def test_every_pair_of_a_validation_is_recorded(tmp_path: Path) -> None:
    """The mean of what is kept is the metric that was logged, whatever the size of the batches."""
    folder = make_project(tmp_path)
    found = []
    for batch_size in (2, 3):
        torch.manual_seed(0)
        module = DPOModule(str(folder / "model"), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        data = PreferenceDataModule(
            str(folder / "pairs.jsonl"),
            validation_split=0.25,
            tokenizer=str(folder / "model"),
            batch_size=8,
            validation_batch_size=batch_size,
            cache_dir=str(tmp_path / "cache"),
            num_processes=1,
        )
        recorder = OutcomeRecorder(Storage(tmp_path / "outcomes"), trial=f"t{batch_size}", metric=METRIC)
        trainer = pl.Trainer(
            max_steps=2,
            val_check_interval=1,
            callbacks=[recorder],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        outcomes = load_outcomes(Storage(tmp_path / "outcomes"), f"t{batch_size}", step=2)
        assert outcomes is not None
        assert len(outcomes.keys) == 8
        assert outcomes.mean == pytest.approx(float(trainer.callback_metrics[METRIC]))
        found.append(outcomes)
    np.testing.assert_array_equal(found[0].keys, found[1].keys)
    np.testing.assert_array_equal(found[0].values, found[1].values)
