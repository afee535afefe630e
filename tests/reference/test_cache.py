from __future__ import annotations

import os
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from cache_entries import SPACE, entries, found
from tiny_models import OwnNetwork, random_batch, random_pairs, tiny_model
from torch import nn

from lightning_dpo import PairBatch
from lightning_dpo.models import identity as identity_module
from lightning_dpo.models.identity import module_identity, source_identity
from lightning_dpo.reference.cache.folder import FsspecFolder, LocalFolder, open_folder
from lightning_dpo.reference.cache.keys import KeyArray, batch_keys
from lightning_dpo.reference.cache.shards import DamagedShardError, decode, encode
from lightning_dpo.reference.cache.store import ReferenceCache
from lightning_dpo.types import CompletionBatch, TokenPair


def pair_keys(batch: PairBatch) -> KeyArray:
    """Keys of both completions and of their first parts, for each pair, (pairs, 8)."""
    keys, common = batch_keys(batch.completions())
    assert common is not None
    return np.concatenate([keys, common]).reshape(4, len(batch), 2).swapaxes(0, 1).reshape(len(batch), 8)


# Keys


def test_a_key_is_of_the_ids_and_of_nothing_else() -> None:
    pairs = random_pairs(7)
    together = pair_keys(PairBatch.from_pairs(pairs, weights=[0, 1, 2, 3, 4, 5, 6], denominator=3.0))
    apart = np.concatenate([pair_keys(PairBatch.from_pairs([pair])) for pair in pairs])
    np.testing.assert_array_equal(together, apart)
    np.testing.assert_array_equal(pair_keys(PairBatch.from_pairs(pairs[::-1])), together[::-1])
    assert len(np.unique(together, axis=0)) == 7


def test_the_first_part_of_a_completion_is_a_completion() -> None:
    batch = PairBatch.from_pairs([TokenPair([1, 2], [3, 4, 5], [6])]).completions()
    keys, common = batch_keys(batch)
    assert common is not None
    alone, _ = batch_keys(CompletionBatch.from_lists([[1, 2]], [[[3], [6]]]))
    np.testing.assert_array_equal(common, alone)
    np.testing.assert_array_equal(common[1], keys[1])
    assert (common[0] != keys[0]).any()


def test_every_part_of_a_pair_is_in_its_key() -> None:
    same_ids = [
        TokenPair([1, 2], [3], [4]),
        TokenPair([1], [2, 3], [4]),
        TokenPair([1], [2], [3, 4]),
        TokenPair([1, 2], [4], [3]),
        TokenPair([1, 2], [3], [5]),
    ]
    assert len(np.unique(pair_keys(PairBatch.from_pairs(same_ids)), axis=0)) == 5


def test_keys_need_nothing_from_the_device() -> None:
    batch = random_batch(3)
    away = batch.to("meta")  # a device that nothing can be read from
    np.testing.assert_array_equal(pair_keys(away), pair_keys(batch))
    np.testing.assert_array_equal(pair_keys(away.to("meta")), pair_keys(batch))


# Shards and the store


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "cache") if request.param == "local" else f"memory://{tmp_path.name}/cache"


def test_what_is_written_is_found_by_the_next_process(root: str) -> None:
    one, other = entries(40), entries(30, seed=1)
    first = ReferenceCache(root, space=SPACE)
    first.add(one)
    assert found(first, one).all()  # before it is written
    first.flush()
    first.add(other)
    first.flush()
    second = ReferenceCache(root, space=SPACE)
    second.load()
    assert len(second) == 70
    assert found(second, one).all()
    assert found(second, other).all()
    assert not found(second, entries(5, seed=2)).any()


def test_another_space_finds_nothing(root: str) -> None:
    cache = ReferenceCache(root, space=SPACE)
    cache.add(entries(3))
    cache.flush()
    for changed in ({"weights": "x"}, {"dtype": "x"}, {"precision": "x"}, {"attention": "x"}):
        other = ReferenceCache(root, space=SPACE._replace(**changed))
        other.load()
        assert len(other) == 0


def test_a_pair_that_two_shards_have_is_held_once(root: str) -> None:
    for _ in range(2):
        cache = ReferenceCache(root, space=SPACE)
        cache.add(entries(9))
        cache.add(entries(9))
        cache.flush()
    cache.load()
    assert len(cache) == 9
    assert len(cache.names()) == 1  # the same content has the same name


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    some = entries(50)
    some.keys[:, 0] = 7
    cache = ReferenceCache(str(tmp_path), space=SPACE)
    cache.add(some)
    cache.flush()
    assert found(cache, some).all()
    assert not cache.find(np.array([[7, 1]], dtype=np.uint64)).found.any()


def test_nothing_is_made_before_something_is_written(tmp_path: Path) -> None:
    cache = ReferenceCache(str(tmp_path / "cache"), space=SPACE)
    cache.load()
    cache.flush()
    assert not (tmp_path / "cache").exists()


def corrupt(root: str, how: str) -> None:
    """Damage the only shard of a cache."""
    fs, path = fsspec.core.url_to_fs(root)
    (name,) = [n for n in fs.find(path) if n.endswith(".safetensors") and "/damaged/" not in n]
    data = bytearray(fs.cat_file(name))
    if how == "flipped byte":
        data[len(data) // 2] ^= 1
    elif how == "flipped header":
        data[12] ^= 1
    elif how == "torn":
        del data[len(data) // 2 :]
    else:
        data.clear()
    fs.pipe_file(name, bytes(data))


@pytest.mark.parametrize("how", ["flipped byte", "flipped header", "torn", "empty"])
def test_a_damaged_shard_is_reported_and_not_served(
    root: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ReferenceCache(root, space=SPACE)
    cache.add(entries(20))
    cache.flush()
    (name,) = cache.names()
    corrupt(root, how)
    cache = ReferenceCache(root, space=SPACE)
    cache.load()
    assert len(cache) == 0
    assert cache.damaged == [name]
    assert "damaged" in caplog.text
    assert name in caplog.text
    cache.add(entries(20))
    cache.flush()
    again = ReferenceCache(root, space=SPACE)
    again.load()
    assert found(again, entries(20)).all()
    assert again.damaged == []


def test_a_shard_of_another_reference_is_not_believed() -> None:
    name, data = encode(entries(2), space="one")
    decode(name, data, space="one")
    with pytest.raises(DamagedShardError, match="another reference"):
        decode(name, data, space="two")


def test_what_cannot_be_written_is_kept_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LocalFolder, name: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    cache = ReferenceCache(str(tmp_path), space=SPACE)
    cache.add(entries(4))
    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "write", full)
        with pytest.raises(OSError, match="No space left"):
            cache.flush()
    assert found(cache, entries(4)).all()
    cache.flush()
    assert len(cache.names()) == 1


def test_a_folder_shows_no_file_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LocalFolder(str(tmp_path))

    def interrupted(_: int) -> None:
        assert folder.names() == []
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.write("a.safetensors", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_by_its_renaming_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LocalFolder(str(tmp_path))
    whole = []

    def refused(source: Path, target: Path) -> None:
        whole.append(source.read_bytes())
        raise OSError("no renaming today")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="no renaming"):
        folder.write("a.safetensors", b"all of it")
    assert whole == [b"all of it"]
    assert list(tmp_path.iterdir()) == []


def test_urls_and_paths(tmp_path: Path) -> None:
    assert isinstance(open_folder(str(tmp_path)), LocalFolder)
    assert isinstance(open_folder(f"file://{tmp_path}"), LocalFolder)
    assert isinstance(open_folder("memory://x"), FsspecFolder)
    with pytest.raises(ValueError, match=r"`reference_cache`.*nosuch://x"):
        open_folder("nosuch://x")


# Identity of weights


def rewrite(path: Path, change: int) -> None:
    """Change a byte in place; size and modification time stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-change, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-change, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_own_memory")
@pytest.mark.parametrize("settled", [False, True])
def test_overwriting_a_folder_changes_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    if settled:  # as if the files had been there for long, so that their hash is remembered
        monkeypatch.setattr(identity_module, "SETTLED_NS", -(10**9))
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    first = source_identity(str(folder))
    assert source_identity(str(folder)) == first
    time.sleep(0.02)  # longer than the kernel's clock tick
    rewrite(folder / "model.safetensors", 5)
    second = source_identity(str(folder))
    assert second != first
    rewrite(folder / "model.safetensors", 5)
    assert source_identity(str(folder)) == first


@pytest.mark.usefixtures("_own_memory")
def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    reads = []
    digest = identity_module.hashlib.file_digest
    monkeypatch.setattr(
        identity_module.hashlib, "file_digest", lambda file, name: reads.append(1) or digest(file, name)
    )
    source_identity(str(folder))
    source_identity(str(folder))
    assert len(reads) == 2  # so young that it could change without a trace
    monkeypatch.setattr(identity_module, "SETTLED_NS", -(10**9))
    first = source_identity(str(folder))
    assert source_identity(str(folder)) == first
    assert len(reads) == 3


@pytest.mark.usefixtures("_own_memory")
def test_a_copy_has_the_same_identity_and_another_config_has_not(tmp_path: Path) -> None:
    model = tiny_model()
    for name in ("one", "other", "changed"):
        model.save_pretrained(tmp_path / name)
    assert source_identity(str(tmp_path / "one")) == source_identity(str(tmp_path / "other"))
    config = tmp_path / "changed" / "config.json"
    assert '"rms_norm_eps": 1e-06' in config.read_text()
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'))
    assert source_identity(str(tmp_path / "one")) != source_identity(str(tmp_path / "changed"))


@pytest.mark.usefixtures("_own_memory")
def test_an_adapter_folder_is_of_its_base_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules="all-linear"))
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    first = source_identity_of_adapter(tmp_path)
    rewrite(tmp_path / "base" / "model.safetensors", 5)
    assert source_identity_of_adapter(tmp_path) != first


def source_identity_of_adapter(folder: Path) -> str:
    return identity_module._folder_identity(folder / "adapter", "adapter", trust_remote_code=False)


@pytest.mark.usefixtures("_own_memory")
def test_a_folder_without_weights(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="got none in"):
        source_identity(str(tmp_path / "model"))


@pytest.mark.usefixtures("_own_memory")
def test_a_hub_repository_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        tiny_model().save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit)
        assert source_identity("org/tiny") == f"hub:org/tiny@{commit}"
    with pytest.raises(ValueError, match="no model could be found under 'org/other'"):
        source_identity("org/other")


def test_a_module_is_known_by_its_content() -> None:
    first = module_identity(tiny_model())
    assert module_identity(tiny_model()) == first
    assert module_identity(tiny_model(seed=1)) != first
    assert module_identity(tiny_model().to(torch.bfloat16)) != first
    changed = tiny_model()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1e-6
    assert module_identity(changed) != first
    other_config = tiny_model()
    other_config.config.rms_norm_eps = 0.1
    assert module_identity(other_config) != first


def test_saving_a_module_leaves_its_identity(tmp_path: Path) -> None:
    model = tiny_model()
    model.config = type(model.config)(**model.config.to_dict())
    first = module_identity(model)
    model.save_pretrained(tmp_path)
    assert module_identity(model) == first


def test_a_network_of_ones_own_is_known_by_its_code_too() -> None:
    class Same(OwnNetwork):
        pass

    torch.manual_seed(0)
    one = OwnNetwork()
    torch.manual_seed(0)
    other = Same()
    assert module_identity(one) != module_identity(other)
    activations = [nn.Sequential(nn.Linear(2, 2), kind) for kind in (nn.ReLU(), nn.GELU(), nn.LeakyReLU(0.3))]
    for net in activations[1:]:
        net.load_state_dict(activations[0].state_dict())
    assert len({module_identity(net) for net in activations}) == 3
