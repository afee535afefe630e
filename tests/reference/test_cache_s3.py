"""The reference cache in an object store, spoken to over the network by the store's own protocol."""

from __future__ import annotations

from typing import Any

import pytest
import s3fs
from botocore.exceptions import EndpointConnectionError
from cache_jobs import use_cache
from tiny_models import tiny_model

from lightning_dpo.reference.cache import store as store_module
from lightning_dpo.reference.cache.folder import open_folder
from lightning_dpo.reference.cache.usage import CacheUsage
from lightning_dpo.training.saving.checkpoint_io import AtomicCheckpointIO

COUNT = 24


def use(model: str, cache: str = "s3://bucket/runs/cache") -> CacheUsage:
    return use_cache(model, cache, count=COUNT)


def test_it_is_filled_read_and_checked(bucket: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(store_module, "FLUSH_SHARE", 1e9)
    tiny_model().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    assert use(model) == CacheUsage(passes=COUNT // 4, pairs=COUNT, from_cache=0)
    assert use(model) == CacheUsage(passes=0, pairs=COUNT, from_cache=COUNT)
    files = bucket.find("bucket/runs/cache")
    shards = [path for path in files if path.endswith(".safetensors")]
    assert len(shards) == COUNT // 4
    assert not [path for path in files if path.endswith(".tmp")]

    data = bytearray(bucket.cat_file(shards[2]))
    data[-3] ^= 0x10  # within a log-probability or a length
    bucket.pipe_file(shards[2], bytes(data))
    assert use(model) == CacheUsage(passes=1, pairs=COUNT, from_cache=COUNT - 4, damaged=1)
    folder, name = shards[2].rsplit("/", 1)
    assert bucket.exists(f"{folder}/damaged/{name}")
    assert use(model) == CacheUsage(passes=0, pairs=COUNT, from_cache=COUNT)


def test_a_store_that_cannot_be_read_is_named(
    bucket: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"`reference_cache` must be a place.*s3://bucket/.*NoCredentials"):
        use(str(tmp_path / "model"))


def test_a_mistyped_bucket_is_not_made(bucket: Any, tmp_path: Any) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"`reference_cache` must be writable.*bucket does not exist"):
        use(str(tmp_path / "model"), "s3://bukcet/cache")
    assert bucket.ls("") == ["bucket"]


def test_a_connection_that_breaks_is_a_system_error(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which training goes on from, and which all ranks of a pass stop at together."""
    folder: Any = open_folder("s3://bucket/runs/cache")
    folder.write("a.safetensors", b"1")

    def broken(*_: object, **__: object) -> None:
        raise EndpointConnectionError(endpoint_url="https://s3")

    monkeypatch.setattr(folder._fs, "pipe_file", broken)
    with pytest.raises(OSError, match="EndpointConnectionError: Could not connect"):
        folder.write("b.safetensors", b"2")
    assert folder.names() == ["a.safetensors"]


def test_checkpoints_are_written_and_read_there(bucket: Any) -> None:
    AtomicCheckpointIO().save_checkpoint({"a": 1}, "s3://bucket/runs/last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("s3://bucket/runs/last.ckpt") == {"a": 1}
    assert bucket.find("bucket/runs") == ["bucket/runs/last.ckpt"]
