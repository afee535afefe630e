"""Training rows that are tokenised as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny_folder import save_tiny, tiny_lm
from tiny_tokenizers import byte_level
from training import sgd, trainer

from lightning_dpo import DPOModule, PairBatch, PreferenceDataModule
from lightning_dpo.data.feedback import FeedbackDataModule
from lightning_dpo.data.streaming import RowStream
from lightning_dpo.data.tokenization import PairTokenizer
from lightning_dpo.losses import SimPOLoss
from lightning_dpo.reference.fill import FillReferenceCache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "home"))


def row(number: int) -> dict[str, str]:
    return {"prompt": f"{number}:", "chosen": " yes" * (1 + number % 5), "rejected": f" no {number % 7}"}


def rows(count: int) -> Iterator[dict[str, str]]:
    return map(row, range(count))


def numbers(batch: PairBatch) -> list[int]:
    """Which rows are in a batch, by their prompts; without fillers."""
    decoder = byte_level()
    prompts = torch.split(batch.prompt_ids, batch.prompt_lengths.tolist())
    kept = [ids for ids, weight in zip(prompts, batch.weights, strict=True) if weight > 0]
    return [int(decoder.decode(ids).split(":")[0]) for ids in kept]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows(40)))
    return path


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of a tokenizer was given."""
    counts: list[int] = []
    call = PairTokenizer.__call__

    def counting(self: PairTokenizer, given: Any) -> Any:
        counts.append(len(given))
        return call(self, given)

    monkeypatch.setattr(PairTokenizer, "__call__", counting)
    return counts


class Seen(DPOModule):
    """Notes the rows of each step's batches and what their losses are divided by."""

    def __init__(self, policy: Any = None, **options: Any) -> None:
        if policy is None:
            torch.manual_seed(1)
            policy = tiny_lm(byte_level())
            options = {"reference": "none", "loss": SimPOLoss(beta=2.0), "warmup_ratio": 0.0, **options}
        super().__init__(policy, **{"optimizer": sgd, **options})
        self.rows: list[list[int]] = []
        self.denominators: list[float | None] = []

    def training_step(self, batch: PairBatch, batch_idx: int) -> torch.Tensor:
        self.rows.append(numbers(batch))
        self.denominators.append(batch.denominator)
        return super().training_step(batch, batch_idx)


def stream(train: Any, **options: Any) -> PreferenceDataModule:
    settings = {"streaming": True, "batch_size": 2, "shuffle": False, **options}
    return PreferenceDataModule(train, tokenizer=byte_level(), **settings)


def fit(data: PreferenceDataModule, *, module: Seen | None = None, **options: Any) -> Seen:
    made = Seen() if module is None else module
    settings = {"max_steps": 6, "num_sanity_val_steps": 0, **options}
    ckpt_path = settings.pop("ckpt_path", None)
    trainer(**settings).fit(made, datamodule=data, ckpt_path=ckpt_path)
    return made


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def test_no_more_rows_are_tokenised_than_steps_take(file: Path, tokenised: list[int], tmp_path: Path) -> None:
    module = fit(stream(str(file)), max_steps=6)
    assert module.rows == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert sum(tokenised) == 1 + 12  # the chat template is tried on the first row
    assert not list((tmp_path / "home").rglob("*.arrow"))


def test_an_iterable_dataset_is_streamed_and_read_no_further(tokenised: list[int]) -> None:
    read: list[int] = []

    def generate() -> Iterator[dict[str, str]]:
        for number in range(1000):
            read.append(number)
            yield row(number)

    data = stream(IterableDataset.from_generator(generate), streaming=False)
    module = fit(data, max_steps=3, accumulate_grad_batches=2)
    assert module.rows == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert sum(tokenised) == 13
    assert max(read) < 64  # the rows that the format is found from
    assert data.report.rows == data.report.kept == 12


def test_what_is_trained_on_is_what_tokenising_before_gives(file: Path) -> None:
    streamed = fit(stream(str(file)), max_steps=5)
    before = fit(stream(str(file), streaming=False), max_steps=5)
    assert streamed.rows == before.rows
    for one, other in zip(streamed.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_stream_that_ends_begins_again(file: Path) -> None:
    module = fit(stream(str(file), train_limit=5), max_steps=5)
    assert flat(module.rows) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_and_workers_share_the_rows_without_overlap(file: Path, workers: int, shuffle: bool) -> None:
    data = stream(str(file), shuffle=shuffle, shuffle_buffer=4)
    data.prepare_data()
    streamed: RowStream = data._streamed._stream  # type: ignore[union-attr,assignment]
    parts = 2 * workers
    first = [
        flat([numbers(each.pairs) for each in streamed.batches(part, parts, first=0, stop=20 // parts)])
        for part in range(parts)
    ]
    assert sorted(flat(first)) == list(range(40))
    assert all(part != sorted(part) for part in first) == shuffle


def test_shards_of_a_stream_are_read_by_one_reader_each() -> None:
    read: dict[int, list[int]] = {}

    def generate(shards: list[int]) -> Iterator[dict[str, str]]:
        for shard in shards:
            for number in range(shard * 10, shard * 10 + 10):
                read.setdefault(shard, []).append(number)
                yield row(number)

    data = stream(IterableDataset.from_generator(generate, gen_kwargs={"shards": [0, 1, 2, 3]}))
    data.prepare_data()
    read.clear()
    streamed: RowStream = data._streamed._stream  # type: ignore[union-attr,assignment]
    found = flat([numbers(each.pairs) for each in streamed.batches(1, 2, first=0, stop=10)])
    assert set(read) == {2, 3}
    assert sorted(found) == list(range(20, 40))


def test_workers_give_the_same_batches_after_a_resumption(file: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = {"num_workers": 2, "shuffle": True, "shuffle_buffer": 8}
    whole = fit(stream(str(file), **data), max_steps=7)
    assert sorted(flat(whole.rows)) == sorted(set(flat(whole.rows)))
    part = fit(stream(str(file), **data), max_steps=3, **saving(tmp_path))
    rest = fit(stream(str(file), **data), max_steps=7, ckpt_path=str(tmp_path / "last.ckpt"))
    assert part.rows + rest.rows == whole.rows


def saving(folder: Path) -> dict[str, Any]:
    checkpoint = pl.callbacks.ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=1)
    return {"enable_checkpointing": True, "callbacks": [checkpoint]}


def test_a_run_goes_on_where_it_was_left_without_tokenising_what_is_passed_over(
    file: Path, tmp_path: Path, tokenised: list[int]
) -> None:
    data: dict[str, Any] = {"shuffle": True, "shuffle_buffer": 8}
    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    whole = fit(stream(str(file), **data), max_steps=8, **options)
    part = fit(stream(str(file), **data), max_steps=3, **saving(tmp_path), **options)
    tokenised.clear()
    rest = fit(stream(str(file), **data), max_steps=8, ckpt_path=str(tmp_path / "last.ckpt"), **options)
    assert part.rows + rest.rows == whole.rows
    assert len(rest.rows) == 10
    assert sum(tokenised) == 1 + 2 * 10
    for one, other in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_batches_are_filled_by_tokens(file: Path, tmp_path: Path, tokenised: list[int]) -> None:
    budget: dict[str, Any] = {"batch_size": None, "tokens_per_batch": 56}
    whole = fit(stream(str(file), **budget), max_steps=4, accumulate_grad_batches=2)
    assert flat(whole.rows) == list(range(len(flat(whole.rows))))
    assert len({len(batch) for batch in whole.rows}) > 1
    sizes = {number: size(number) for number in range(40)}
    for batch, following in zip(whole.rows, whole.rows[1:], strict=False):
        assert len(batch) * max(sizes[n] for n in batch) <= 56
        assert (len(batch) + 1) * max(sizes[n] for n in [*batch, following[0]]) > 56
    # The mean over the pairs of a step, however they are divided.
    for first, second, one, other in zip(
        whole.rows[::2], whole.rows[1::2], whole.denominators[::2], whole.denominators[1::2], strict=True
    ):
        assert one == other == (len(first) + len(second)) / 2
    assert sum(tokenised) <= 1 + len(flat(whole.rows)) + 32
    fit(stream(str(file), **budget), max_steps=2, accumulate_grad_batches=2, **saving(tmp_path))
    rest = fit(
        stream(str(file), **budget),
        max_steps=4,
        accumulate_grad_batches=2,
        ckpt_path=str(tmp_path / "last.ckpt"),
    )
    assert rest.rows == whole.rows[4:]


def size(number: int) -> int:
    tokenizer = byte_level()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in row(number).values()]
    return sum(map(len, ids)) + 2


def test_bad_rows_are_counted_and_leave_their_batches_smaller(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = [json.dumps(each) for each in rows(12)]
    content[3] = json.dumps({"prompt": "3:", "chosen": "", "rejected": " no"})
    content[6] = "{"
    content[7] = json.dumps({"prompt": "7:", "chosen": " same", "rejected": " same"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(content))
    data = stream(str(path), max_bad_fraction=0.5)
    with caplog.at_level("INFO"):
        module = fit(data, max_steps=6)
    assert module.rows == [[0, 1], [2], [4, 5], [], [8, 9], [10, 11]]
    assert (data.report.rows, data.report.kept, data.report.bad) == (12, 9, 3)
    assert "pairs.jsonl (text): 12 rows, 9 kept, 3 left out (25.0%)" in caplog.text
    assert "pairs.jsonl:7: not JSON" in caplog.text
    with pytest.raises(ValueError, match=r"bad row at pairs.jsonl:4, empty completion"):
        fit(stream(str(path), on_bad_row="raise"), max_steps=6)


def test_too_many_bad_rows_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dpo.data.streaming.loader._JUDGED_FROM", 10)
    path = tmp_path / "pairs.jsonl"
    good, bad = json.dumps(row(1)), json.dumps({"prompt": "x", "chosen": "", "rejected": " no"})
    path.write_text("\n".join([good, bad, good] * 10))
    with pytest.raises(ValueError, match=r"`train` must have at most a share of 5.0% bad rows, got 3 of 10"):
        fit(stream(str(path)), max_steps=9)


def test_validation_rows_are_tokenised_before(file: Path, tmp_path: Path) -> None:
    data = stream(str(file), validation=list(rows(4)))
    runner = trainer(max_steps=4, num_sanity_val_steps=0)
    runner.fit(Seen(), datamodule=data)
    assert runner.callback_metrics["val/loss"] > 0
    assert data.reports["validation"].kept == 4


def test_a_cached_reference_is_filled_as_rows_come(file: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    used = []
    for _ in range(2):
        runner = trainer(max_steps=3, num_sanity_val_steps=0)
        runner.fit(Seen(str(tmp_path / "model"), reference="cached"), datamodule=stream(str(file)))
        used += [c.usage for c in runner.callbacks if isinstance(c, FillReferenceCache)]
    assert [(each.passes, each.pairs, each.from_cache) for each in used] == [(3, 6, 0), (0, 6, 6)]


def test_what_streams_cannot_do_is_said_at_once(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`max_steps` must be given with `streaming`.*got -1"):
        fit(stream("there_is_no_such_file.jsonl"), max_steps=-1)
    with pytest.raises(ValueError, match=r"`streaming` must be false where reference"):
        fit(stream(str(file)), max_steps=-1, max_epochs=0)
    with pytest.raises(ValueError, match=r"`train` must be one data set with `streaming`, got several: a, b"):
        stream({"a": str(file), "b": str(file)})
    with pytest.raises(ValueError, match=r"`shuffle_buffer` must be at least 0, got -1"):
        stream(str(file), shuffle_buffer=-1)
    endless = IterableDataset.from_generator(lambda: rows(3))
    to_validate_on = stream(str(file), validation=endless)
    with pytest.raises(ValueError, match=r"`validation` must be .*IterableDataset"):
        to_validate_on.prepare_data()
    judged = FeedbackDataModule(endless, tokenizer=byte_level())
    with pytest.raises(ValueError, match=r"`train` must be .*IterableDataset.*PreferenceDataModule"):
        judged.prepare_data()
    few = stream(Dataset.from_list(list(rows(2))))
    few.prepare_data()
    reader = few._streamed._stream.batches(3, 4, first=0, stop=1)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"`train` must have a row at least for each of the 4 processes"):
        next(reader)
    with pytest.warns(UserWarning, match=r"`validation_split` \(0.1\) is not used with `streaming`"):
        stream(str(file), validation_split=0.1)
    policy = Seen().settings.policy
    module = Seen(policy, reference="cached", reference_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r'`reference="cached"` does not go with streamed training data'):
        fit(stream(str(file)), module=module)
