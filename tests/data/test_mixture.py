"""Several data sets by name: their shares of an epoch, and each one's own validation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feedback_rows import ROWS as JUDGED
from feedback_rows import ready_feedback
from pair_rows import jsonl, parts, ready
from tiny_folder import tiny_lm
from tiny_models import OwnNetwork
from training import sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.data.mixture import Mixture
from lightning_dpo.data.sampler import PairBatchSampler
from lightning_dpo.reference.fill import FillReferenceCache
from lightning_dpo.training.kto import KTOModule


def rows(name: str, count: int, length: int = 1) -> list[dict]:
    return [
        {"prompt": f"{name} {n}", "chosen": " blue" * length, "rejected": " green" * length}
        for n in range(count)
    ]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    sets = {"helpful": rows("helpful", 20), "harmless": rows("harmless", 60, length=2)}
    return {name: jsonl(tmp_path / f"{name}.jsonl", some) for name, some in sets.items()}


def prompts(loader, tokenizer) -> list[list[str]]:
    return [[tokenizer.decode(part[0]) for part in parts(batch)] for batch in loader]


def epochs(data, tokenizer, count: int) -> list[list[list[str]]]:
    loader = data.train_dataloader()
    found = []
    for epoch in range(count):
        loader.pair_sampler.set_epoch(epoch)
        found.append(prompts(loader, tokenizer))
    return found


def shares(batches: list[list[str]]) -> Counter:
    return Counter(prompt.split()[0] for batch in batches for prompt in batch)


@pytest.mark.parametrize("settings", [{"batch_size": 8}, {"tokens_per_batch": 100}])
def test_an_epoch_has_each_data_sets_share(files, tokenizer, settings) -> None:
    train = {
        "helpful": {"path": files["helpful"], "weight": 0.7},
        "harmless": {"path": files["harmless"], "weight": 0.3},
    }
    data = ready(train, tokenizer=tokenizer, **settings)
    seen = epochs(data, tokenizer, 10)
    assert len({len(batches) for batches in seen}) == 1
    for batches in seen:
        assert shares(batches) == {"helpful": 56, "harmless": 24}
    # Over the epochs every row of a data set comes equally often, but for one round that is not over.
    times = Counter(prompt for batches in seen for batch in batches for prompt in batch)
    assert len(times) == 80
    assert {times[f"helpful {n}"] for n in range(20)} == {28}
    assert {times[f"harmless {n}"] for n in range(60)} == {4}
    assert seen[0] != seen[1]
    assert epochs(ready(train, tokenizer=tokenizer, **settings), tokenizer, 10) == seen


def test_weights_are_proportions(files, tokenizer) -> None:
    train = {name: {"path": path, "weight": 5} for name, path in files.items()}
    assert shares(epochs(ready(train, tokenizer=tokenizer), tokenizer, 1)[0]) == {
        "helpful": 40,
        "harmless": 40,
    }


def test_without_weights_every_row_comes_once(files, tokenizer) -> None:
    data = ready(files, tokenizer=tokenizer)
    [batches] = epochs(data, tokenizer, 1)
    assert sorted(p for batch in batches for p in batch) == sorted(
        [*(f"helpful {n}" for n in range(20)), *(f"harmless {n}" for n in range(60))]
    )
    assert (data.report.rows, data.reports["train.helpful"].rows) == (80, 20)
    assert data.validation_sets == ()


def test_ranks_share_a_mixture_and_an_epoch_goes_on_in_the_middle() -> None:
    origins = np.repeat([0, 1, 2], [7, 50, 300])
    lengths = np.random.default_rng(0).integers(5, 90, len(origins))

    def sampler(rank: int = 0, world_size: int = 1, **settings) -> PairBatchSampler:
        mixture = Mixture(origins, weights=[0.5, 0.3, 0.2], seed=3)
        place = {"rank": rank, "world_size": world_size}
        return PairBatchSampler(lengths, tokens_per_batch=400, seed=3, mixture=mixture, **place, **settings)

    sizes = set()
    for epoch in range(6):
        whole = sampler()
        whole.set_epoch(epoch)
        batches = [batch.indices.tolist() for batch in whole]
        counts = np.bincount(origins[np.concatenate(batches)])
        assert counts.tolist() == [179, 107, 71]
        sizes.add(len(batches))
        apart = []
        for rank in (0, 1):
            mine = sampler(rank, 2)
            mine.set_epoch(epoch)
            apart += [b.indices.tolist() for b in mine if b.weights.all()]
        assert sorted(apart) == sorted(batches)
        rest = sampler()
        rest.set_epoch(epoch)
        rest.start = 5
        assert [batch.indices.tolist() for batch in rest] == batches[5:]
    assert len(sizes) == 1


def test_in_order_without_shuffling(files, tokenizer) -> None:
    train = {name: {"path": path, "weight": 1} for name, path in files.items()}
    [batches] = epochs(ready(train, tokenizer=tokenizer, shuffle=False, batch_size=80), tokenizer, 1)
    assert batches[0] == [f"helpful {n % 20}" for n in range(40)] + [f"harmless {n}" for n in range(40)]


def test_each_data_set_has_validation_metrics_of_its_own(files, tokenizer) -> None:
    torch.manual_seed(0)
    data = ready(
        {"helpful": files["helpful"], "harmless": files["harmless"]},
        validation_split=0.25,
        tokenizer=tokenizer,
        batch_size=4,
    )
    assert data.validation_sets == ("helpful", "harmless")
    assert shares(prompts(data.val_dataloader(), tokenizer)) == {"helpful": 5, "harmless": 15}
    assert shares(prompts(data.train_dataloader(), tokenizer)) == {"helpful": 15, "harmless": 45}
    module = DPOModule(OwnNetwork(vocab=len(tokenizer)), optimizer=sgd)
    run = trainer(max_epochs=2)
    run.fit(module, datamodule=data)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    for name in ("loss", "rewards/margin", "logps/chosen"):
        one, other, total = (found[f"val/{prefix}{name}"] for prefix in ("helpful/", "harmless/", ""))
        assert one != other
        assert total == pytest.approx((5 * one + 15 * other) / 20, abs=1e-5)
    # The same numbers as of each data set alone.
    alone = trainer()
    for name in data.validation_sets:
        kept = [rows(name, 60, 2 if name == "harmless" else 1)[k] for k in _held_out(data, name)]
        single = ready(files[name], validation=kept, tokenizer=tokenizer)
        [metrics] = alone.validate(module, datamodule=single, verbose=False)
        assert metrics["val/loss"] == pytest.approx(found[f"val/{name}/loss"], abs=1e-5)


def _held_out(data, name: str) -> np.ndarray:
    pairs = data.validation_pairs
    indices = pairs.indices[pairs.origins() == data.validation_sets.index(name)]
    return indices - (20 if name == "harmless" else 0)


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_cached_reference_is_filled_with_what_all_epochs_draw(
    files, tokenizer, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {
        "helpful": {"path": files["helpful"], "weight": 0.7},
        "harmless": {"path": files["harmless"], "weight": 0.3},
    }
    data = ready(train, tokenizer=tokenizer, batch_size=8)
    module = DPOModule(tiny_lm(tokenizer), reference="cached", optimizer=sgd)
    run = trainer(max_epochs=epochs)
    passes = []
    filled = FillReferenceCache.on_train_start

    def note(self: FillReferenceCache, *args: Any) -> None:
        filled(self, *args)
        passes.append(module.reference.passes)

    monkeypatch.setattr(FillReferenceCache, "on_train_start", note)
    run.fit(module, datamodule=data)
    assert passes == [module.reference.passes]
    assert passes[0] > 0


def test_named_sets_to_validate_on_and_judged_completions(tmp_path: Path, tokenizer) -> None:
    sets = {"one": jsonl(tmp_path / "1.jsonl", JUDGED), "two": jsonl(tmp_path / "2.jsonl", JUDGED[:4])}
    data = ready_feedback(
        {"one": {"path": sets["one"], "weight": 1}, "two": {"path": sets["two"], "weight": 3}},
        validation=sets,
        tokenizer=tokenizer,
        batch_size=16,
    )
    [batch] = data.train_dataloader()
    assert batch.origins.bincount().tolist() == [4, 12]
    [batch] = data.val_dataloader()
    assert batch.origins.bincount().tolist() == [12, 4]
    assert data.validation_sets == ("one", "two")
    [logged] = trainer().validate(KTOModule(tiny_lm(tokenizer)), datamodule=data, verbose=False)
    assert {"val/one/rewards/auc", "val/two/rewards/auc", "val/rewards/auc"} <= set(logged)
    desirable = [8, 2]  # of the first and of the second data set
    means = [logged[f"val/{name}/logps/desirable"] for name in ("one", "two")]
    weighted = sum(n * mean for n, mean in zip(desirable, means, strict=True)) / sum(desirable)
    assert weighted == pytest.approx(logged["val/logps/desirable"], rel=1e-5)
    pairs = ready_feedback(
        {"a": rows("a", 3), "b": rows("b", 2)}, unpaired_from_pairs=True, tokenizer=tokenizer, batch_size=16
    )
    [batch] = pairs.train_dataloader()
    assert batch.origins.bincount().tolist() == [6, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"path": "a.jsonl"}}, "`train` must name its data sets, got {'path': 'a.jsonl'}: write"),
        ({"train": {"path": "a.jsonl", "weight": 1}}, "or the path alone where there is one"),
        ({"train": {}}, "`train` must name at least one data set"),
        ({"train": {"a/b": "x"}}, "`train` must name data sets by letters.*'a/b'"),
        ({"train": {"a": {"path": "x", "weigth": 1}}}, r"the data set 'a' as a path or as \{path"),
        ({"train": {"a": {"path": "x", "weight": 0}}}, "'a' a weight above 0, got 0"),
        ({"train": {"a": {"path": "x", "weight": 1}, "b": "y"}}, "for all of its data sets or .* none for b"),
        (
            {"train": "x", "validation": {"a": {"path": "x", "weight": 1}}},
            "`validation` must have no weight",
        ),
        ({"train": {"a": "missing.jsonl"}}, "`train.a` must be an existing file"),
    ],
)
def test_mistakes(settings, message, tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        ready(tokenizer=tokenizer, **settings)


def test_a_margin_that_only_some_have_is_not_used(files, tokenizer) -> None:
    numbered = [{**row, "margin": 1.0, "weight": 2.0} for row in rows("numbered", 4)]
    data = ready({"a": numbered, "b": rows("b", 2)}, tokenizer=tokenizer, shuffle=False)
    [batch] = data.train_dataloader()
    assert batch.margins is None
    assert batch.weights.tolist() == [2.0] * 4 + [1.0] * 2
    with pytest.raises(ValueError, match=r"`validation_split` must leave pairs on both sides.*of 'b'"):
        ready({"a": numbered, "b": rows("b", 2)}, validation_split=0.2, tokenizer=tokenizer)
