"""A start on data whose reference is cached: keys lie beside the tokens, values in one mapped file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_entries import SPACE, entries, found
from cache_jobs import used_by
from tiny_folder import save_tiny
from tiny_tokenizers import CHATML, byte_level
from training import sgd, trainer

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.data.feedback import FeedbackDataModule
from lightning_dpo.data.loader import TokenDataset
from lightning_dpo.reference.cache import store as store_module
from lightning_dpo.reference.cache.folder import LocalFolder
from lightning_dpo.reference.cache.keys import batch_keys
from lightning_dpo.reference.cache.shards import encode
from lightning_dpo.reference.cache.store import ReferenceCache
from lightning_dpo.reference.cache.usage import CacheUsage
from lightning_dpo.types import completion_keys


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "home"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the completions that were hashed."""
    lengths: list[int] = []
    key = completion_keys.completion_key

    def counting(prompt: Any, completion: Any, counted: Any = None) -> Any:
        lengths.append(len(completion))
        return key(prompt, completion, counted)

    monkeypatch.setattr(completion_keys, "completion_key", counting)
    return lengths


def rows(count: int, *, first: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"is it {k}", "chosen": f" yes {k}" * (1 + k % 3), "rejected": f" no {k}" * (1 + k % 2)}
        for k in range(first, first + count)
    ]


def data(train: Any, **options: Any) -> PreferenceDataModule:
    settings = {"batch_size": 4, "num_processes": 1, **options}
    return PreferenceDataModule(train, tokenizer=byte_level(), **settings)


@pytest.fixture
def model(tmp_path: Path) -> str:
    save_tiny(tmp_path / "model")
    return str(tmp_path / "model")


def run(model: str, module: PreferenceDataModule, **options: Any) -> CacheUsage:
    runner = trainer(max_epochs=0, **options)
    runner.fit(DPOModule(model, reference="cached", optimizer=sgd), datamodule=module)
    return used_by(runner)


def agree(rows: TokenDataset, batch_of: Any) -> None:
    """What lies beside the tokens is what a batch of the same rows has."""
    indices = np.arange(len(rows))[::-1].copy()
    stored = rows.keys_of(indices)
    assert stored is not None
    keys, common = batch_keys(batch_of(indices).completions())
    every = keys if common is None else np.concatenate([keys, common])
    width = len(every) // len(indices)
    expected = every.reshape(width, len(indices), 2).swapaxes(0, 1)
    np.testing.assert_array_equal(stored, expected)


def batch_of(dataset: Any) -> Any:
    from lightning_dpo.data.sampler import BatchIndices

    return lambda indices: dataset[BatchIndices(indices, np.ones(len(indices), np.float32), 1.0)]


def test_keys_beside_the_tokens_are_those_of_batches(tmp_path: Path) -> None:
    turns = [
        {
            "prompt": [{"role": "user", "content": f"who {k}"}],
            "chosen": [
                {"role": "assistant", "content": "call"},
                {"role": "tool", "content": "an answer"},
                {"role": "assistant", "content": f"yes {k}"},
            ],
            "rejected": [{"role": "assistant", "content": f"the sea and the sky {k}"}],
        }
        for k in range(5)
    ]
    of_turns = PreferenceDataModule(turns, tokenizer=byte_level(template=CHATML), num_processes=1)
    of_several = data({"a": rows(5), "b": rows(7, first=9)}, validation_split=0.4)
    for module in (data(rows(9)), of_turns, of_several):
        module.prepare_data()
        module.setup()
        agree(module.train_pairs, batch_of(module.train_pairs))
    assert of_turns.train_pairs.counted(0) is not None
    split = FeedbackDataModule(rows(6), unpaired_from_pairs=True, tokenizer=byte_level(), num_processes=1)
    judged = [{"prompt": "is it", "completion": f" {k}", "label": k % 2} for k in range(6)]
    single = FeedbackDataModule(judged, tokenizer=byte_level(), num_processes=1)
    for other in (split, single):
        other.prepare_data()
        other.setup()
        agree(other.train_examples, batch_of(other.train_examples))


def test_the_same_tokens_divided_differently_are_another_completion() -> None:
    ids = np.arange(1, 5)
    keys = [completion_keys.completion_key(ids[:cut], ids[cut:]).tolist() for cut in (1, 2, 3)]
    assert len({tuple(key) for key in keys}) == 3


def test_a_second_start_hashes_no_key_and_collates_no_batch(
    model: str, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"validation_split": 0.25, "tokens_per_batch": 96}
    cold = run(model, data(rows(16), **options), num_sanity_val_steps=0)
    assert (cold.pairs, cold.from_cache) == (16, 0)
    assert len(hashed) > 4 * 16
    collated: list[int] = []
    monkeypatch.setattr(
        "lightning_dpo.data.loader.PairDataset.pair", lambda self, index: collated.append(index)
    )
    hashed.clear()
    assert run(model, data(rows(16), **options), num_sanity_val_steps=0) == CacheUsage(0, 16, 16)
    assert hashed == []
    assert collated == []


def test_only_batches_that_lack_something_are_looked_at(model: str, hashed: list[int]) -> None:
    run(model, data(rows(12), shuffle=False))
    hashed.clear()
    # Rows 12 and 13 are new: one batch of four has both.
    assert run(model, data(rows(14), shuffle=False)) == CacheUsage(1, 14, 12)
    at_tokenisation = [key for key in hashed if key]
    assert len(at_tokenisation) < 4 * 14 + 8 * 4


def test_tokens_of_an_older_version_get_their_keys_once(
    model: str, hashed: list[int], tmp_path: Path
) -> None:
    assert run(model, data(rows(8))).from_cache == 0
    [keys] = (tmp_path / "home").rglob("*.u64")
    content = keys.read_bytes()
    keys.unlink()
    assert run(model, data(rows(8))) == CacheUsage(0, 8, 8)
    assert keys.read_bytes() == content
    keys.write_bytes(content[:-8])  # torn
    assert run(model, data(rows(8))) == CacheUsage(0, 8, 8)
    assert keys.read_bytes() == content
    hashed.clear()
    assert run(model, data(rows(8))) == CacheUsage(0, 8, 8)
    assert hashed == []


class OwnCompletions(DPOModule):
    """Asks the reference for the chosen completions alone."""

    def reference_completions(self, batch: Any) -> Any:
        return batch.chosen_completions()


def test_a_module_that_asks_for_other_completions_is_looked_up_batch_by_batch(
    model: str, hashed: list[int]
) -> None:
    module = data(rows(4))
    runner = trainer(max_epochs=0)
    runner.fit(OwnCompletions(model, reference="cached", optimizer=sgd), datamodule=module)
    reference = runner.lightning_module.reference
    assert len(reference.cache) == 4


# The index


def shards(root: Path, count: int, *, parts: int = 3) -> list[Any]:
    written = [entries(count, seed=seed) for seed in range(parts)]
    folder = Path(ReferenceCache(str(root), space=SPACE).location)
    folder.mkdir(parents=True, exist_ok=True)
    for part in written:
        name, content = encode(part, space=SPACE.key)
        (folder / name).write_bytes(content)
    return written


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were read."""
    names: list[str] = []
    own = LocalFolder.read

    def counting(self: LocalFolder, name: str) -> bytes:
        names.append(name)
        return own(self, name)

    monkeypatch.setattr(LocalFolder, "read", counting)
    return names


def opened(root: Path, **options: Any) -> ReferenceCache:
    cache = ReferenceCache(str(root), space=SPACE)
    cache.load(**options)
    return cache


def test_only_the_first_process_of_a_machine_reads_shards(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "INDEX_FROM", 100)
    written = shards(tmp_path, 100)
    first = opened(tmp_path)
    assert len(read) == 3
    read.clear()
    for cache in (opened(tmp_path, is_first=False), opened(tmp_path), first):
        assert read == []
        assert len(cache) == 300
        assert cache.loaded == set(cache.names())
        for part in written:
            assert found(cache, part).all()
            assert not cache.find(part.keys).fresh.any()
        assert not found(cache, entries(50, seed=99)).any()


def test_a_new_shard_is_read_beside_the_index_until_there_are_many(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "INDEX_FROM", 20)
    written = shards(tmp_path, 100)
    cache = opened(tmp_path)
    more = [entries(25, seed=seed) for seed in (10, 11, 12)]
    for part in more:
        cache.add(part)
        cache.flush()
        assert found(cache, part).all()
        assert cache.find(part.keys).fresh.all()
    read.clear()
    assert len(opened(tmp_path)) == 375
    assert len(read) == 3  # 75 are a quarter of 300: they are in the index from now on
    read.clear()
    again = opened(tmp_path)
    assert read == []
    assert all(found(again, part).all() for part in (*written, *more))


@pytest.mark.parametrize("harm", ["altered", "torn", "gone", "nonsense"])
def test_an_index_that_is_harmed_is_made_again(
    harm: str, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "INDEX_FROM", 100)
    written = shards(tmp_path, 100)
    path = opened(tmp_path).index_path
    content = path.read_bytes()
    altered = content[:-4] + bytes(4)
    {
        "altered": lambda: path.write_bytes(altered),
        "torn": lambda: path.write_bytes(content[:-100]),
        "nonsense": lambda: path.write_bytes(b"nonsense"),
        "gone": path.unlink,
    }[harm]()
    read.clear()
    cache = opened(tmp_path)
    assert len(read) == 3
    assert path.read_bytes() == content
    assert all(found(cache, part).all() for part in written)


def test_a_shard_that_was_altered_since_is_found_all_the_same(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "INDEX_FROM", 100)
    shards(tmp_path, 100)
    cache = opened(tmp_path)
    [name, *_] = cache.names()
    shard = Path(cache.location) / name
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    read.clear()
    again = opened(tmp_path)
    assert len(read) == 3
    assert again.damaged == [name]
    assert len(again) == 200
    assert len(opened(tmp_path, is_first=False)) == 200


def test_an_index_that_cannot_be_written_is_done_without(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "INDEX_FROM", 100)
    written = shards(tmp_path, 100)
    (tmp_path / "home").write_text("a file where the folder should be")
    cache = opened(tmp_path)
    assert all(found(cache, part).all() for part in written)
    assert cache.index_path.parent.exists() is False


_SECOND = """
import json, sys
import numpy as np
from lightning_dpo.reference.cache.store import ReferenceCache, Space
def bytes_read():
    return int(open("/proc/self/io").read().split()[1])
cache = ReferenceCache(sys.argv[1], space=Space(*json.loads(sys.argv[2])))
before = bytes_read()
cache.load(is_first=False)
keys = np.array(json.loads(sys.argv[3]), dtype=np.uint64)
assert cache.find(keys).found.all()
read = bytes_read() - before
name, resident, own = str(cache.index_path), 0, 0
lines = open("/proc/self/smaps").read().splitlines()
for start, line in enumerate(lines):
    if line.endswith(name):
        resident += next(int(each.split()[1]) for each in lines[start:] if each.startswith("Rss:"))
        own += next(int(each.split()[1]) for each in lines[start:] if each.startswith("Anonymous:"))
print(json.dumps({"entries": len(cache), "resident": resident, "own": own, "read": read}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_second_process_reads_a_part_of_the_index(tmp_path: Path) -> None:
    written = shards(tmp_path, 400_000)
    cache = opened(tmp_path)
    size = cache.index_path.stat().st_size
    assert size > 28_000_000
    keys = json.dumps([[int(word) for word in key] for key in written[1].keys[:3]])
    done = subprocess.run(
        [sys.executable, "-c", _SECOND, str(tmp_path), json.dumps(SPACE), keys],
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told["entries"] == 1_200_000
    # Pages of the one file, whose number the kernel decides; no copy of them, and nothing read but the lists.
    assert told["resident"] > 0
    assert told["own"] == 0
    assert told["read"] < size / 4
