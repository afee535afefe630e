"""What may go wrong while the cache is filled: nothing is lost, and nothing wrong is served."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_jobs import fill_slowly, use_cache
from processes import process_context
from small_disk import mounted
from tiny_models import random_pairs, tiny_model
from training import loader, sgd, trainer

from lightning_dpo import DPOModule, PairBatch
from lightning_dpo.reference.cache import store as store_module
from lightning_dpo.reference.cache.store import ReferenceCache
from lightning_dpo.reference.cache.usage import CacheUsage
from lightning_dpo.reference.fill import FillReferenceCache

COUNT = 48


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "home"))
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def start(model: str, cache: Path, *, pause: float = 0.0, step: int = 1) -> tuple[Any, Connection]:
    """A process that fills a cache, and where it tells of each pass and in the end of its use."""
    context = process_context()
    ours, theirs = context.Pipe(duplex=False)
    options = {"model": model, "cache": str(cache), "pause": pause, "count": COUNT, "step": step}
    process = context.Process(target=fill_slowly, args=(theirs,), kwargs=options)
    process.start()
    theirs.close()  # or its end would not be seen here
    return process, ours


def use(model: str, cache: Path) -> CacheUsage:
    return use_cache(model, str(cache), count=COUNT)


def check_values(model: str, cache: Path) -> None:
    """Every pair is there with the frozen reference's value."""
    batch = PairBatch.from_pairs(random_pairs(COUNT))
    module = DPOModule(model, reference="cached", reference_cache=str(cache), optimizer=sgd)
    module.configure_model()
    frozen = DPOModule(model, optimizer=sgd)
    frozen.configure_model()
    _, served, _ = module.score(batch)
    _, expected, _ = frozen.score(batch)
    assert module.reference.passes == 0
    for name in ("chosen", "rejected", "chosen_common", "rejected_common"):
        np.testing.assert_allclose(getattr(served, name), getattr(expected, name), atol=1e-5, rtol=1e-6)


@pytest.mark.slow
def test_a_killed_pass_goes_on_where_it_stopped(model: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process, told = start(model, cache, pause=0.5)
    for _ in range(5):
        assert told.recv() == "pass"
    process.kill()
    process.join()
    kept = 4 * len(list(cache.glob("*/*.safetensors")))
    assert 16 <= kept < COUNT
    assert use(model, cache) == CacheUsage(passes=(COUNT - kept) // 4, pairs=COUNT, from_cache=kept)
    assert use(model, cache) == CacheUsage(passes=0, pairs=COUNT, from_cache=COUNT)
    check_values(model, cache)


@pytest.mark.slow
def test_two_processes_fill_one_cache(model: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    started = [start(model, cache, pause=0.05, step=step) for step in (1, 2)]
    for (process, told), pairs in zip(started, (COUNT, COUNT // 2), strict=True):
        assert told.poll(120)
        while (line := told.recv()) == "pass":
            assert told.poll(120)
        assert f" of {pairs} pairs from the cache" in line
        process.join(120)
        assert process.exitcode == 0
    assert not list(cache.glob("*/.*"))  # no temporary file is left
    assert use(model, cache) == CacheUsage(passes=0, pairs=COUNT, from_cache=COUNT)
    check_values(model, cache)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", size="16k") as folder:
        yield folder


def test_a_full_disk(model: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(store_module, "FLUSH_SHARE", 1e9)
    cache = small_disk / "cache"
    with pytest.raises(ValueError, match=r"`reference_cache` must be writable.*No space left on device"):
        use(model, cache)
    kept = 4 * len(list(cache.glob("*/*.safetensors")))
    assert 0 < kept < COUNT
    assert not list(cache.glob("*/.*"))
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert use(model, cache) == CacheUsage(passes=(COUNT - kept) // 4, pairs=COUNT, from_cache=kept)
    check_values(model, cache)


def test_a_disk_that_fills_in_training_does_not_stop_it(
    model: str, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (small_disk / "ballast").write_bytes(bytes(16384))
    module = DPOModule(model, reference="cached", reference_cache=str(small_disk / "cache"), optimizer=sgd)
    run = trainer(callbacks=[])
    (fill,) = [c for c in module.configure_callbacks() if isinstance(c, FillReferenceCache)]
    fill.on_fit_start = lambda *_: None  # type: ignore[method-assign]  # as if no pair could be seen ahead
    module.configure_callbacks = lambda: [fill]  # type: ignore[method-assign]
    run.fit(module, loader(random_pairs(COUNT)))
    assert fill.usage == CacheUsage(passes=COUNT // 4, pairs=COUNT, from_cache=0)
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize("how", ["flipped", "torn"])
def test_a_damaged_shard_is_computed_again(
    model: str, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(store_module, "FLUSH_SHARE", 1e9)
    cache = tmp_path / "cache"
    use(model, cache)
    shards = sorted(cache.glob("*/*.safetensors"))
    assert len(shards) == COUNT // 4
    data = bytearray(shards[3].read_bytes())
    if how == "flipped":
        data[-3] ^= 0x10  # within a log-probability or a length
    shards[3].write_bytes(bytes(data) if how == "flipped" else bytes(data[:100]))
    assert use(model, cache) == CacheUsage(passes=1, pairs=COUNT, from_cache=COUNT - 4, damaged=1)
    assert shards[3].name in caplog.text
    assert (shards[3].parent / "damaged" / shards[3].name).exists()
    assert use(model, cache) == CacheUsage(passes=0, pairs=COUNT, from_cache=COUNT)
    check_values(model, cache)


def test_a_cache_that_is_read_only_serves(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    use(model, cache)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lightning_dpo.reference.cache.folder.LocalFolder.write", refuse)
    assert use(model, cache).passes == 0


def test_a_reader_sees_whole_shards_while_a_writer_writes(tmp_path: Path) -> None:
    """Listing and reading at any moment gives nothing but whole shards, large ones too."""
    shards, size = 25, 20_000
    space = store_module.Space("w", "d", "p", "a")
    random = np.random.default_rng(0)
    entries = store_module.Entries(
        random.integers(0, 2**64, (shards * size, 2), dtype=np.uint64),
        random.normal(size=shards * size).astype(np.float32),
        np.ones(shards * size, np.int32),
    )
    pid = os.fork()
    if pid == 0:
        for start in range(0, shards * size, size):
            writer = ReferenceCache(str(tmp_path), space=space)
            writer.add(entries.select(np.arange(start, start + size)))
            writer.flush()
        os._exit(0)
    reader = ReferenceCache(str(tmp_path), space=space)
    deadline = time.monotonic() + 60
    while len(reader) < shards * size and time.monotonic() < deadline:
        reader.load()
        assert reader.damaged == []
    os.waitpid(pid, 0)
    assert len(reader) == shards * size
    served = reader.find(entries.keys[::1000])
    assert served.found.all()
    np.testing.assert_array_equal(served.logps, entries.logps[::1000])
