from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_jobs import used_by
from tiny_models import OwnNetwork, random_batch, random_pairs, tiny_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from training import History, loader, sgd, trainer

from lightning_dpo import DPOModule, PairBatch
from lightning_dpo.losses import LDDPO, WPO, DPOLoss, IPOLoss, LengthNormalizedDPOLoss, SimPOLoss
from lightning_dpo.models import build as builder_module
from lightning_dpo.models.load import load_model
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.reference import cached as cached_module
from lightning_dpo.reference.cache.store import ReferenceCache, Space
from lightning_dpo.reference.cache.usage import CacheUsage
from lightning_dpo.reference.cached import CachedReference
from lightning_dpo.reference.starting_policy import StartingPolicy
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.types import PairLogps


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


class Passes:
    """Forward passes: of the policy in training, and of anything in eval mode without gradient."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[str] = []
        self.without_gradient = 0

        def counting(source: str, **options: Any) -> Any:
            self.loaded.append(source)
            model = load_model(source, **options)
            self.watch(model)
            return model

        monkeypatch.setattr(builder_module, "load_model", counting)

    def watch(self, model: nn.Module) -> None:
        getattr(model, "model", model).register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.without_gradient += not torch.is_grad_enabled()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


PROOF = 2
"""Trial passes without gradient by which the layout is chosen; they are of the policy."""


def run(
    policy: Any, train: Any = None, validation: Any = None, **options: Any
) -> tuple[DPOModule, CacheUsage]:
    settings = {"reference": "cached", "optimizer": sgd, **options.pop("module", {})}
    module = DPOModule(policy, **settings)
    runner = trainer(num_sanity_val_steps=0, **options)
    runner.fit(module, loader() if train is None else train, validation)
    return module, used_by(runner) if settings["reference"].startswith("cached") else CacheUsage(0, 0, 0)


def test_a_second_run_with_other_settings_makes_no_reference_pass(
    folder: str, passes: Passes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"loss": DPOLoss(beta=0.5)},
        {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3)},
        {"loss": IPOLoss(beta=0.2)},
        {"loss": IPOLoss(beta=0.2, length_normalized=False)},
        {"loss": LengthNormalizedDPOLoss(beta=2.0)},
        {"loss": LDDPO(DPOLoss(), alpha=0.5)},
        {"loss": WPO(DPOLoss())},
        {"layout": "concatenated"},
        {"gradient_checkpointing": True, "warmup_ratio": 0.5},
    ]
    for number, change in enumerate(changes):
        passes.without_gradient = 0
        passes.loaded.clear()
        caplog.clear()
        with caplog.at_level("INFO"):
            module, used = run(
                folder, max_epochs=2, default_root_dir=tmp_path / f"out{number}", module=change
            )
        assert passes.loaded == [folder]  # the policy, and never a second model
        assert module.reference_model is None
        trials = 1 if change.get("layout") == "concatenated" else PROOF
        if number == 0:
            assert used == CacheUsage(passes=4, pairs=16, from_cache=0)
            assert passes.without_gradient == trials + 4
        else:
            assert used == CacheUsage(passes=0, pairs=16, from_cache=16), change
            assert passes.without_gradient == trials, change
            assert "reference passes: 0 (16 of 16 pairs from the cache)" in caplog.text


@pytest.mark.parametrize("loss", [DPOLoss(beta=0.3), LDDPO(DPOLoss(), alpha=0.5)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_goes_as_with_a_frozen_reference(folder: str, loss: Any, shuffle: bool) -> None:
    curves, ends = [], []
    for reference in ("frozen", "cached", "cached"):  # cold, then warm
        torch.manual_seed(5)
        history = History()
        batches = DataLoader(random_pairs(16), batch_size=4, collate_fn=PairBatch.from_pairs, shuffle=shuffle)
        module = DPOModule(folder, reference=reference, loss=loss, optimizer=sgd)
        trainer(max_epochs=3, callbacks=[history]).fit(module, batches, loader(count=6))
        curves.append(history.values["train/loss"])
        ends.append({name: value.clone() for name, value in module.policy.state_dict().items()})
    assert curves[0][-1] < curves[0][0] - 0.05
    for curve, end in zip(curves[1:], ends[1:], strict=True):
        assert curve == pytest.approx(curves[0], abs=1e-5)
        torch.testing.assert_close(end, ends[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["shared", "concatenated"])
def test_what_is_served_equals_the_frozen_reference(folder: str, layout: Any) -> None:
    run(folder)
    pairs = random_pairs(16)
    batch = PairBatch.from_pairs([pairs[i] for i in (3, 11, 0, 7, 15)])
    served, computed = [], []
    for reference, results in (("cached", served), ("frozen", computed)):
        module = DPOModule(folder, reference=reference, optimizer=sgd)
        module.configure_model()
        plan = ScoringPlan(layout, chunked_head=True)
        results.append(module.reference.logps(batch.completions(), plan=plan))
    for name, value in computed[0]._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(served[0], name), value, atol=1e-5, rtol=1e-6, msg=name)
            assert getattr(served[0], name).dtype == value.dtype


def test_what_is_served_is_what_was_computed_to_the_digit(folder: str) -> None:
    pairs = random_pairs(16)
    run(folder, loader(pairs, batch_size=4))
    frozen = DPOModule(folder)
    cached = DPOModule(folder, reference="cached")
    for module in (frozen, cached):
        module.configure_model()
    for start in range(0, 16, 4):
        batch = PairBatch.from_pairs(pairs[start : start + 4])
        _, served, _ = cached.score(batch)
        _, expected, _ = frozen.score(batch)
        for name in (
            "chosen",
            "rejected",
            "chosen_common",
            "rejected_common",
            "chosen_lengths",
            "rejected_lengths",
        ):
            torch.testing.assert_close(
                getattr(served, name), getattr(expected, name), atol=1e-6, rtol=0, msg=name
            )


def test_order_batches_and_layout_hit(folder: str) -> None:
    pairs = random_pairs(16)
    run(folder, loader(pairs))
    for train in (loader(pairs[::-1], batch_size=3), loader(pairs[4:9], batch_size=1)):
        assert run(folder, train)[1].passes == 0
    assert run(folder, loader(pairs), module={"layout": "concatenated"})[1].passes == 0
    more = [*pairs[:8], *random_pairs(4, seed=9)]
    assert run(folder, loader(more))[1] == CacheUsage(passes=1, pairs=12, from_cache=8)


def test_a_pair_that_comes_twice_is_computed_once(folder: str) -> None:
    pairs = random_pairs(4)
    assert run(folder, loader([*pairs, *pairs]), loader(pairs))[1] == CacheUsage(1, 4, 0)


def test_other_weights_miss(folder: str, tmp_path: Path) -> None:
    run(folder)
    assert run(folder)[1].passes == 0
    tiny_model(seed=1).save_pretrained(folder)  # in place: same path, same sizes
    history = History()
    _, used = run(folder, callbacks=[history])
    assert used == CacheUsage(passes=4, pairs=16, from_cache=0)
    assert history.values["train/loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    tiny_model(seed=0).save_pretrained(tmp_path / "elsewhere")
    assert run(str(tmp_path / "elsewhere"))[1].passes == 0


@pytest.mark.parametrize(
    "change",
    [{"module": {"dtype": "bfloat16"}}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}],
    ids=["dtype", "mixed", "true"],
)
def test_another_precision_misses(folder: str, change: dict[str, Any]) -> None:
    run(folder)
    history = History()
    _, used = run(folder, **change, callbacks=[history])
    assert used == CacheUsage(passes=4, pairs=16, from_cache=0)
    assert history.values["train/loss"][0] == pytest.approx(np.log(2), abs=1e-3)
    assert run(folder, **change)[1].passes == 0
    assert run(folder)[1].passes == 0


def test_a_resumed_run_is_compared_with_the_start(folder: str, passes: Passes, tmp_path: Path) -> None:
    """The checkpoint's policy is trained; what the cache lacks must come from the starting weights."""
    module, _ = run(folder)
    checkpoint = tmp_path / "trained.ckpt"
    module.trainer.save_checkpoint(checkpoint)
    module = DPOModule(folder, reference="cached", reference_cache=str(tmp_path / "empty"), optimizer=sgd)
    passes.loaded.clear()
    resumed, frozen = History(), History()
    runner = trainer(max_epochs=2, callbacks=[resumed])
    runner.fit(module, loader(), ckpt_path=checkpoint, weights_only=False)
    assert passes.loaded == [folder, folder]  # the policy, and the reference for the pass
    assert module.reference_model is None  # gone after it
    assert used_by(runner) == CacheUsage(passes=4, pairs=16, from_cache=0)
    module = DPOModule(folder, optimizer=sgd)
    trainer(max_epochs=2, callbacks=[frozen]).fit(module, loader(), ckpt_path=checkpoint, weights_only=False)
    assert resumed.values["train/loss"] == pytest.approx(frozen.values["train/loss"], abs=1e-5)
    assert resumed.values["train/loss"][0] < np.log(2) - 0.01


def test_a_second_fit_of_a_trained_module_is_compared_with_the_start(folder: str) -> None:
    start = DPOModule(folder, optimizer=sgd)
    start.configure_model()
    module, _ = run(folder, module={"startup_check": False})
    new = random_pairs(5, seed=7)
    trainer().fit(module, loader(new))
    batch = PairBatch.from_pairs(new)
    plan = ScoringPlan("shared", chunked_head=True)
    expected = start.reference.logps(batch.completions(), plan=plan)
    served = module.reference.logps(batch.completions(), plan=plan)
    assert expected is not None
    assert served is not None
    torch.testing.assert_close(served.logps, expected.logps, atol=1e-5, rtol=1e-5)


def test_a_policy_that_was_changed_by_hand_is_not_taken_for_the_reference(
    folder: str, passes: Passes
) -> None:
    module = DPOModule(folder, reference="cached", optimizer=sgd, startup_check=False)
    module.configure_model()
    with torch.no_grad():
        module.policy.lm_head.weight.mul_(1.5)
    history = History()
    trainer(callbacks=[history]).fit(module, loader())
    assert passes.loaded == [folder, folder]
    assert history.values["train/loss"][0] != pytest.approx(np.log(2), abs=1e-3)


def test_validation_alone_uses_the_cache(folder: str) -> None:
    module = DPOModule(folder, reference="cached", optimizer=sgd)
    results = []
    for expected in (3, 0):
        runner = trainer()
        results.append(runner.validate(module, loader(count=10), verbose=False)[0])
        assert used_by(runner) == CacheUsage(passes=expected, pairs=10, from_cache=0 if expected else 10)
    assert results[0] == results[1]
    assert results[0]["val/loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_a_policy_given_as_a_module(passes: Passes) -> None:
    policy = tiny_model()
    passes.watch(policy)
    _, used = run(policy)
    assert used.passes == 4
    assert run(tiny_model())[1].passes == 0
    assert run(tiny_model(seed=1))[1].passes == 4
    torch.manual_seed(0)
    assert run(OwnNetwork())[1].passes == 4
    assert passes.loaded == []


def test_a_policy_given_as_a_module_has_its_whole_data_computed_ahead() -> None:
    batches = DataLoader(random_pairs(16), batch_size=4, collate_fn=PairBatch.from_pairs, shuffle=True)
    _, used = run(tiny_model(), batches, limit_train_batches=2, max_epochs=4)
    assert used.passes == 4


def test_a_policy_given_as_a_module_that_was_trained_since() -> None:
    module, _ = run(tiny_model(), module={"startup_check": False})
    trainer().fit(module, loader())  # all there
    with pytest.raises(ValueError, match=r"weights to compute them are gone.*Give `policy` by name"):
        trainer().fit(module, loader(random_pairs(4, seed=8)))


def test_a_limited_run_computes_what_it_uses(folder: str) -> None:
    _, used = run(folder, loader(random_pairs(40), batch_size=4), limit_train_batches=2)
    assert used == CacheUsage(passes=2, pairs=8, from_cache=0)
    _, used = run(folder, loader(random_pairs(40), batch_size=4), max_steps=3)
    assert used == CacheUsage(passes=1, pairs=12, from_cache=8)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(random_pairs(12))


def stream() -> DataLoader[Any]:
    return DataLoader(Stream(), batch_size=4, collate_fn=PairBatch.from_pairs)


def test_pairs_first_seen_in_training_are_computed_by_the_reference(folder: str, passes: Passes) -> None:
    histories = [History(), History(), History()]
    module, used = run(folder, stream(), callbacks=[histories[0]])
    assert used == CacheUsage(passes=3, pairs=12, from_cache=0)
    assert passes.loaded == [folder, folder]
    assert module.reference_model is None
    _, used = run(folder, stream(), callbacks=[histories[1]])
    assert used == CacheUsage(passes=0, pairs=12, from_cache=12)
    assert passes.loaded == [folder, folder, folder]
    run(folder, stream(), callbacks=[histories[2]], module={"reference": "frozen"})
    for history in histories[:2]:
        assert history.values["train/loss"] == pytest.approx(histories[2].values["train/loss"], abs=1e-5)
    with pytest.raises(ValueError, match="let the data loader have a length"):
        run(tiny_model(seed=3), stream())


def test_another_attention_misses(folder: str) -> None:
    run(folder)
    eager = {"module": {"attn_implementation": "eager"}}
    assert run(folder, **eager)[1] == CacheUsage(passes=4, pairs=16, from_cache=0)
    assert run(folder, **eager)[1].passes == 0
    assert run(folder)[1].passes == 0


def test_an_adapters_base_is_a_reference_without_dropout(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tiny_model("gpt2").save_pretrained(tmp_path)
    lora = LoraSettings(r=2, target_modules=["c_attn"])
    adapted = DPOModule(str(tmp_path), lora=lora, disable_dropout=False)
    whole = DPOModule(str(tmp_path))
    for module in (adapted, whole):
        module.configure_model()
    adapted.policy.train()
    batch = random_batch(4)
    first, second, expected = (module.score(batch)[1] for module in (adapted, adapted, whole))
    assert first is not None
    assert second is not None
    assert expected is not None
    assert torch.equal(first.chosen, second.chosen)
    torch.testing.assert_close(first.chosen, expected.chosen, atol=1e-4, rtol=1e-4)
    assert adapted.policy.training


def test_a_policy_at_its_start_is_a_reference_without_dropout() -> None:
    policy, batch, plan = tiny_model("gpt2"), random_batch(4).completions(), ScoringPlan()
    expected = StartingPolicy(policy).logps(batch, plan=plan).logps
    policy.train()
    assert torch.equal(StartingPolicy(policy).logps(batch, plan=plan).logps, expected)
    assert policy.training


def test_an_adapter_shares_its_base_models_entries(folder: str, passes: Passes) -> None:
    pytest.importorskip("peft")
    module, used = run(folder, module={"lora": LoraSettings(r=4), "startup_check": False})
    assert used.passes == 4
    assert passes.loaded == [folder]
    assert module.reference_model is None
    assert run(folder)[1].passes == 0
    trainer().fit(module, loader(random_pairs(4, seed=8)))  # its base is at hand after training, too
    served = module.latest
    assert served is not None
    assert served.reference is not None
    start = DPOModule(folder)
    start.configure_model()
    batch = PairBatch.from_pairs(random_pairs(4, seed=8))
    plan = ScoringPlan("shared", chunked_head=True)
    expected = start.reference.logps(batch.completions(), plan=plan)
    assert expected is not None
    torch.testing.assert_close(served.reference.chosen, PairLogps.of(expected).chosen, atol=1e-5, rtol=1e-5)


def test_another_model_as_the_cached_reference(folder: str, passes: Passes, tmp_path: Path) -> None:
    tiny_model(seed=4).save_pretrained(tmp_path / "other")
    other = str(tmp_path / "other")
    settings = {"reference": f"cached:{other}", "startup_check": False}
    histories = [History(), History(), History()]
    _, used = run(folder, module=settings, callbacks=[histories[0]])
    assert used.passes == 4
    assert passes.loaded == [folder, other]
    passes.loaded.clear()
    _, used = run(folder, module=settings, callbacks=[histories[1]])
    assert used == CacheUsage(passes=0, pairs=16, from_cache=16)
    assert passes.loaded == [folder]
    run(folder, module={**settings, "reference": other}, callbacks=[histories[2]])
    for history in histories[:2]:
        assert history.values["train/loss"] == pytest.approx(histories[2].values["train/loss"], abs=1e-5)
    assert run(other)[1].passes == 0  # the same weights, as a policy's start


def test_a_stale_cache_is_found_at_the_start(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder)
    find = ReferenceCache.find

    def wrong(self: ReferenceCache, keys: Any) -> Any:
        found = find(self, keys)
        return found._replace(logps=found.logps + 3)

    monkeypatch.setattr(ReferenceCache, "find", wrong)
    with pytest.raises(
        ValueError, match=r"must agree before the first step.*is not what the policy starts from.*remove"
    ):
        run(folder)


def test_a_reference_that_gives_no_numbers_is_not_cached(tmp_path: Path) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite for 4 of 4 pairs"):
        run(broken)
    assert not list(tmp_path.rglob("reference/*/*.safetensors"))


def test_a_loss_without_reference_may_have_one_cached(folder: str) -> None:
    _, used = run(folder, module={"loss": SimPOLoss(beta=2.0)})
    assert used.pairs == 16


def test_only_a_reference_with_weights_of_its_own_can_be_updated(folder: str) -> None:
    for reference, expected in (("cached", False), ("frozen", True)):
        module = DPOModule(folder, reference=reference)
        module.configure_model()
        assert module.reference.can_update is expected
    assert CachedReference.can_update is False


def test_a_url_is_a_cache(folder: str, tmp_path: Path) -> None:
    location = {"reference_cache": f"memory://{tmp_path.name}"}
    assert run(folder, module=location)[1].passes == 4
    assert run(folder, module=location)[1].passes == 0
    assert run(folder)[1].passes == 4


def test_mistakes() -> None:
    with pytest.raises(ValueError, match='`reference="cached:SOURCE"` must name a model'):
        DPOModule(tiny_model(), reference="cached:")
    with pytest.raises(ValueError, match="no such folder"):
        run(tiny_model(), module={"reference": "cached:./nowhere"})
    with pytest.raises(ValueError, match="needs data loaders that yield PairBatch, got dict"):
        run(tiny_model(), DataLoader([{"x": 1}], batch_size=None))


@pytest.mark.parametrize("reference", ["frozen", "cached"])
def test_only_the_policys_confidences_are_computed(folder: str, reference: str) -> None:
    module = DPOModule(folder, reference=reference, loss=WPO(DPOLoss()), optimizer=sgd)
    trainer().fit(module, loader())
    assert module.latest is not None
    policy, scored = module.latest.policy, module.latest.reference
    assert isinstance(policy, PairLogps)
    assert isinstance(scored, PairLogps)
    assert policy.chosen_confidence is not None
    assert scored.chosen_confidence is None


_PRECISIONS = """
import json, os, sys
import torch
from lightning_dpo.models.precision import matmul_precision
for setting, device in json.loads(sys.argv[1]):
    if not os.fork():
        exec(setting)
        print(matmul_precision(torch.device(device)), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_keys_say_what_products_run_in_by_whichever_interface_it_was_set() -> None:
    """Each in a process of its own: torch does not unset what was set by both."""
    older, newer = "torch.set_float32_matmul_precision('{}')", "torch.backends.{}fp32_precision = 'tf32'"
    settings = {
        ("", "cpu"): "highest",
        (older.format("high"), "cuda"): "high",
        (older.format("medium"), "cpu"): "medium",
        (older.format("medium"), "cuda"): "medium",
        (newer.format("cuda.matmul."), "cuda"): "high",
        (newer.format("cuda.matmul."), "cpu"): "highest",
        (newer.format(""), "cpu"): "high",
    }
    command = [sys.executable, "-c", _PRECISIONS, json.dumps(list(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == list(settings.values()), done.stderr


@pytest.fixture
def newer_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_a_run_goes_on_where_torch_does_not_say_its_precision(folder: str, newer_tf32: None) -> None:
    run(folder)
    _, used = run(folder)
    assert used == CacheUsage(passes=0, pairs=16, from_cache=16)


class Asked:
    """A reference that keeps where the batches were."""

    def __init__(self) -> None:
        self.devices: set[str] = set()

    def logps(self, batch: Any, *, plan: Any) -> Any:
        self.devices.add(batch.prompt_ids.device.type)
        return batch


def test_shards_on_the_cpu_are_computed_where_the_run_says(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `cpu_offload` weights are on the CPU, and batches and autocast on the GPU; meta stands for it."""
    gpu = torch.device("meta")
    module = DPOModule(folder, reference="cached")
    module.configure_model()
    reference = module.reference
    assert isinstance(reference, CachedReference)
    monkeypatch.setattr(
        cached_module, "autocast_dtype", lambda device: torch.bfloat16 if device == gpu else None
    )
    whole = reference.open(device=gpu)
    monkeypatch.setattr(cached_module, "is_sharded", lambda _: True)
    sharded = reference.open(device=gpu)
    for cache, precision in ((whole, "None highest"), (sharded, "torch.bfloat16 gathered highest")):
        space = Space(reference.identity, "torch.float32 as torch.float32", precision, "default")
        assert Path(cache.location).name == space.key
    asked = Asked()
    monkeypatch.setattr(CachedReference, "_running", lambda _: asked)
    reference.keep_in_step(plan=ScoringPlan())
    assert asked.devices == {"meta"}


def test_a_run_says_where_it_computes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Any] = []
    opened = CachedReference.open

    def opening(self: CachedReference, **options: Any) -> ReferenceCache:
        devices.append(options["device"])
        return opened(self, **options)

    monkeypatch.setattr(CachedReference, "open", opening)
    run(folder)
    assert devices == [torch.device("cpu")]
