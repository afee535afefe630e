"""Which plan is taken: what rounding may do, what an attention may do, and what the trial itself may cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import CONFIGS, FALLEN_BACK, SHARED, tiny_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import lightning_dpo.scoring.select
from lightning_dpo.models.precision import compute_type
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.scoring.select import select_plan
from lightning_dpo.scoring.trial import GradientError

SHARED_PLAN = ScoringPlan("shared", chunked_head=True)
CONCATENATED_PLAN = ScoringPlan("concatenated", chunked_head=True)
CPU = torch.device("cpu")


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


class RoundedProducts(TorchFunctionMode):
    """Rounds what goes into linear layers and attention to 10 bits, as a GPU does with TF32."""

    rounded = (nn.functional.linear, nn.functional.scaled_dot_product_attention)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.rounded:
            args = [self.round(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def round(values: Tensor) -> Tensor:
        mantissa, exponent = values.detach().frexp()
        return values + (((mantissa * 2**11).round() / 2**11).ldexp(exponent) - values).detach()


def uniform_model(name: str) -> Any:
    """A model whose attention is close to uniform, as at its initialisation: mistakes are small."""
    model = tiny_model(name)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(0.1)
    return model


def test_the_type_computed_in_is_not_the_type_kept(tf32: None) -> None:
    model = tiny_model()
    assert compute_type(model, device=CPU) == "tf32"
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_type(model, device=CPU) == "bfloat16"
    assert compute_type(tiny_model().half(), device=CPU) == "float16"
    assert compute_type(tiny_model().double(), device=CPU) == "float64"
    torch.set_float32_matmul_precision("highest")
    assert compute_type(model, device=CPU) == "float32"


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("make", [tiny_model, uniform_model])
def test_half_precision_keeps_shared_prompts(name: str, make: Callable[[str], Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = select_plan(make(name), may_switch_attention=True)
    assert found.plan == SHARED_PLAN
    assert found.precision == "bfloat16"


@pytest.mark.parametrize("name", FALLEN_BACK)
@pytest.mark.parametrize("make", [tiny_model, uniform_model])
def test_half_precision_hides_no_mistake(name: str, make: Callable[[str], Any]) -> None:
    """Rounding allows 0.1 nats; MPT with small weights is wrong by 0.002, which is much for it."""
    with torch.autocast("cpu", torch.bfloat16):
        assert select_plan(make(name), may_switch_attention=True).plan == CONCATENATED_PLAN


def test_tf32_keeps_shared_prompts_of_a_deep_model(tf32: None) -> None:
    config = hf.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": 24})
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    with RoundedProducts():
        found = select_plan(model, may_switch_attention=True)
    assert found.plan == SHARED_PLAN
    assert found.shared_error is not None
    assert found.shared_error > 1e-4


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 0.5


class RaisingBackward(WrongBackward):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise NotImplementedError("no backward kernel")


class KernelError(Exception):
    """Such as a compiler has of its own, derived from nothing that one would name."""


def attention(name: str) -> Callable[..., Any]:
    """SDPA with a defect."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if name == "raises":
            raise KernelError("unsupported head dimension 8")
        defect = {"wrong backward": WrongBackward, "no backward": RaisingBackward}.get(name)
        value = value if defect is None else defect.apply(value)
        output, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
        return output * (float("nan") if name == "not a number" else 1.0), weights

    return attend


@pytest.mark.parametrize("defect", ["raises", "wrong backward", "no backward", "not a number"])
def test_a_faster_attention_with_a_defect_is_given_up(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    select: Any = lightning_dpo.scoring.select
    AttentionInterface.register("test_attention", attention(defect))
    monkeypatch.setattr(select, "FASTEST", {"cpu": ("test_attention",)})
    model = tiny_model()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)  # no attention lies behind the last weight
    found = select_plan(model, may_switch_attention=True)
    assert found.plan == SHARED_PLAN
    assert found.attention == model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(select, "FASTEST", {"cpu": ("test_attention", select.PREFIX_ATTENTION)})
    assert select_plan(model, may_switch_attention=True).attention == select.PREFIX_ATTENTION


@pytest.mark.parametrize("defect", ["wrong backward", "not a number"])
def test_a_defect_shows_among_rounded_products(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    AttentionInterface.register("test_attention", attention(defect))
    monkeypatch.setattr(lightning_dpo.scoring.select, "FASTEST", {"cpu": ("test_attention",)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = select_plan(tiny_model(), may_switch_attention=True)
    assert (found.plan, found.attention) == (SHARED_PLAN, "sdpa")
    assert found.passed_over.startswith("test_attention: ")


def test_a_single_token_is_not_what_most_are_off_by() -> None:
    truth = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    truth[0] *= 100
    outlier, third, lost = truth.clone(), truth.clone(), truth.clone()
    outlier[0] *= 2
    third[40:] *= 1.5
    lost[3] = float("nan")
    assert GradientError.of(outlier, truth).of_most == 0
    assert GradientError.of(outlier, truth).whole > 0.9
    assert GradientError.of(third, truth).of_most == pytest.approx(0.5)
    assert GradientError.of(lost, truth).of_most == float("inf")
    unseen = torch.cat([truth, torch.zeros(200, 8)])  # tokens without a gradient count nowhere
    assert GradientError.of(torch.cat([third, torch.zeros(200, 8)]), unseen).of_most == pytest.approx(0.5)


def test_a_faster_attention_without_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    AttentionInterface.register("test_attention", attention("none"))
    monkeypatch.setattr(lightning_dpo.scoring.select, "FASTEST", {"cpu": ("test_attention",)})
    found = select_plan(tiny_model("gpt2"), may_switch_attention=True)
    assert (found.plan, found.attention) == (SHARED_PLAN, "test_attention")


def test_an_interrupt_leaves_the_attention_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    AttentionInterface.register("test_attention", interrupt)
    monkeypatch.setattr(lightning_dpo.scoring.select, "FASTEST", {"cpu": ("test_attention",)})
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        select_plan(model, may_switch_attention=True)
    assert model.config._attn_implementation == "sdpa"


class PaddingOnly:
    """Attention of FlashAttention's kind: its mask says which tokens are padding, and nothing else."""

    def __init__(self) -> None:
        self.masks: list[int] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        self.masks.append(0 if mask is None else mask.ndim)
        seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        seen = seen if mask is None or mask.ndim != 2 else seen & mask[:, None, None].bool()
        return sdpa_attention_forward(module, query, key, value, seen, **{**options, "is_causal": False})


@pytest.mark.parametrize("layout", ["auto", "shared"])
def test_attention_without_masks_is_never_handed_one(layout: Any) -> None:
    """On CUDA FlashAttention would index beyond its tensors, after which nothing runs there any more."""
    attend = PaddingOnly()
    AttentionInterface.register("test_padding_only", attend)
    AttentionMaskInterface.register("test_padding_only", flash_attention_mask)
    model = tiny_model()
    model.set_attn_implementation("test_padding_only")
    wanted = "attention test_padding_only takes no mask .* leave attn_implementation out"
    if layout == "shared":
        with pytest.raises(ValueError, match=wanted):
            select_plan(model, layout=layout, may_switch_attention=True)
    else:
        found = select_plan(model, may_switch_attention=True)
        assert (found.plan, found.attention) == (CONCATENATED_PLAN, "test_padding_only")
        assert re.search(wanted, found.reason)
    assert attend.masks
    assert max(attend.masks) <= 2


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // 4)
        return result


def test_the_trial_makes_no_logits_of_a_whole_window() -> None:
    """Six rows beyond a window of 300 are 15 million logits of this vocabulary; of Gemma 2's, 6 billion."""
    config = {**CONFIGS["gemma2"].to_dict(), "vocab_size": 8000, "sliding_window": 300}
    model = hf.AutoModelForCausalLM.from_config(hf.Gemma2Config(**config))
    with LargestTensor() as largest:
        assert select_plan(model).plan == SHARED_PLAN
    assert largest.elements < 2_000_000


def test_a_window_that_would_cost_too_much_is_not_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_dpo.scoring import trial

    model = tiny_model("mistral")
    assert len(trial.Trial(model, device=CPU).batch.prompt_ids) == 24
    model.config.sliding_window = 100
    assert len(trial.Trial(model, device=CPU).batch.prompt_ids) == 108 + 8
    monkeypatch.setattr(trial, "_MOST_ELEMENTS", 8 * 164**2 - 1)
    assert len(trial.Trial(model, device=CPU).batch.prompt_ids) == 24


def test_the_choice_is_one_line() -> None:
    line = str(select_plan(tiny_model(), may_switch_attention=True))
    assert line.startswith("scoring: prompts once for all their completions, head in chunks, attention light")
    assert "float32, off by" in line
    line = str(select_plan(tiny_model("mpt")))
    assert "once per completion" in line
    assert "does not keep completions apart" in line
    assert "\n" not in line


def test_the_line_says_which_faster_attention_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    AttentionInterface.register("test_attention", attention("wrong backward"))
    monkeypatch.setattr(lightning_dpo.scoring.select, "FASTEST", {"cpu": ("test_attention",)})
    found = select_plan(tiny_model("gpt2"), may_switch_attention=True)
    assert (found.plan, found.attention) == (SHARED_PLAN, "sdpa")
    assert "attention sdpa (not test_attention: gradients are off by a share of" in str(found)
