"""What one policy does: completions, their rewards and their KL, measured once and kept."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dpo.evaluation import (
    Estimate,
    Sample,
    completion_kl,
    fit_optimum,
    judge_samples,
    sample_completions,
    sample_logps,
)
from lightning_dpo.evaluation.judges import is_pairwise
from lightning_dpo.evaluation.realign import realigned_model
from lightning_dpo.evaluation.sampling import end_tokens
from lightning_dpo.files import parquet_bytes
from lightning_dpo.models.load import load_model
from lightning_dpo.tuning.frontier.limit import FitSettings, write_fit
from lightning_dpo.tuning.recipe.judge import make_judge
from lightning_dpo.tuning.results.export import export_trial
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["Measured", "Measuring", "fit_limit", "measure", "policy_logps", "scoring_judge"]


@dataclass(frozen=True)
class Measured:
    """Completions of one policy.

    Attributes:
        samples: As many of each prompt, those of one prompt together.
        rewards: What the judge gives each, (samples,).
        kl: KL(policy || reference) along each, (samples,), nats.
    """

    samples: list[Sample]
    rewards: Tensor
    kl: Tensor

    @property
    def reward(self) -> Estimate:
        """Mean reward."""
        return Estimate.of(self.rewards)

    @property
    def divergence(self) -> Estimate:
        """KL(policy || reference), nats."""
        return Estimate.of(self.kl)

    def to_parquet(self) -> bytes:
        """The content of a file with one completion in each row."""
        import pyarrow as pa

        columns = {
            "prompt_ids": [list(sample.prompt_ids) for sample in self.samples],
            "completion_ids": [list(sample.completion_ids) for sample in self.samples],
            "finished": [sample.finished for sample in self.samples],
            "reward": self.rewards.tolist(),
            "kl": self.kl.tolist(),
        }
        return parquet_bytes(pa.table(columns))

    @classmethod
    def from_parquet(cls, content: bytes) -> Measured:
        """Read such a file."""
        import pyarrow.parquet as pq

        columns = pq.read_table(io.BytesIO(content)).to_pydict()
        parts = zip(columns["prompt_ids"], columns["completion_ids"], columns["finished"], strict=True)
        rewards, kl = (torch.tensor(columns[name]) for name in ("reward", "kl"))
        return cls([Sample(*part) for part in parts], rewards, kl)


@dataclass(frozen=True)
class Measuring:
    """How policies are measured: the same for all of them.

    Attributes:
        reference: Source of the model that all policies started from.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt that is completed.
        judge: See `FrontierConfig.judge`.
        samples_per_prompt: Completions of each prompt.
        max_new_tokens: Longest completion.
        batch_size: Completions at once.
    """

    reference: str
    tokenizer: Any
    prompts: tuple[tuple[int, ...], ...]
    judge: str | Mapping[str, Any]
    samples_per_prompt: int
    max_new_tokens: int
    batch_size: int

    def sample(
        self, model: nn.Module, *, reference: nn.Module, seed: int, samples_per_prompt: int | None = None
    ) -> list[Sample]:
        """Complete every prompt.

        Args:
            model: The policy.
            reference: Says what ends a completion, the same for all policies.
            seed: Of the samples.
            samples_per_prompt: In the place of the usual number.
        """
        ends = end_tokens(self.tokenizer, model=reference)
        pad = self.tokenizer.pad_token_id
        each = samples_per_prompt or self.samples_per_prompt
        return sample_completions(
            model,
            prompts=[prompt for prompt in self.prompts for _ in range(each)],
            eos_token_id=ends,
            pad_token_id=ends[0] if pad is None else pad,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
            batch_size=self.batch_size,
        )

    def rewards(self, samples: Sequence[Sample]) -> Tensor:
        """What the judge gives samples, (samples,).

        Raises:
            ValueError: If it gives another number of scores, or one that is not finite.
        """
        return judge_samples(scoring_judge(self.judge), samples, tokenizer=self.tokenizer)


def scoring_judge(judge: str | Mapping[str, Any]) -> Any:
    """The judge that a configuration names.

    Args:
        judge: See `FrontierConfig.judge`.

    Raises:
        ValueError: If it cannot be imported or called, or compares completions two by two.
    """
    made = make_judge(judge)
    if is_pairwise(made):
        raise ValueError(f"`judge` must score completions one by one, got one that compares two: {judge!r}")
    return made


def measure(
    spec: TrialSpec,
    measuring: Measuring,
    target: Storage,
    *,
    name: str,
    seed: int,
    checkpoint: str | None = None,
    scale: float | None = None,
    samples_per_prompt: int | None = None,
    with_kl: bool = True,
) -> None:
    """Sample a policy, judge what it says and take its KL; runs on a machine of the cluster.

    Args:
        spec: Gives the environment.
        measuring: How to measure.
        target: Where the file goes.
        name: Of the file.
        seed: Of the samples.
        checkpoint: Folder of the policy's checkpoint; None is the reference.
        scale: Measure the policy realigned by this lambda; None measures it as it is.
        samples_per_prompt: In the place of the usual number.
        with_kl: Take the KL, which is left at 0 where nobody reads it.

    Raises:
        ValueError: If the judge's answer is not valid, or the checkpoint is not one that becomes a model.
    """
    with spec.user_environment():
        reference = _on_device(load_model(measuring.reference), spec)
        policy = reference if checkpoint is None else _trained(spec, checkpoint)
        if scale is not None:
            policy = realigned_model(policy, reference=reference, scale=scale)
        samples = measuring.sample(
            policy, reference=reference, seed=seed, samples_per_prompt=samples_per_prompt
        )
        rewards, kl = measuring.rewards(samples), torch.zeros(len(samples))
        if checkpoint is not None and with_kl:
            size = measuring.batch_size
            kl = completion_kl(policy, reference=reference, samples=samples, batch_size=size).kl
    target.write(name, Measured(samples, rewards, kl).to_parquet())


def policy_logps(
    spec: TrialSpec, measuring: Measuring, samples: Sequence[Sample], *, checkpoint: str | None
) -> Tensor:
    """Log-probability of completions from anywhere, (samples,), nats; runs on a machine of the cluster.

    Args:
        spec: Gives the environment.
        measuring: How to measure.
        samples: The completions.
        checkpoint: Folder of the policy's checkpoint; None is the reference.
    """
    with spec.user_environment():
        policy = (
            _on_device(load_model(measuring.reference), spec)
            if checkpoint is None
            else _trained(spec, checkpoint)
        )
        return sample_logps(policy, samples=samples, batch_size=measuring.batch_size)


def fit_limit(spec: TrialSpec, measuring: Measuring, target: Storage, settings: FitSettings) -> None:
    """Fit a copy of the reference to the best policy at a KL; runs on a machine of the cluster.

    Args:
        spec: Gives the environment.
        measuring: How policies are sampled and judged.
        target: Where what was drawn goes, and how the rounds went once that is there.
        settings: How to fit.
    """
    with spec.user_environment():
        reference, policy = (_on_device(load_model(measuring.reference), spec) for _ in range(2))
        found = fit_optimum(
            policy,
            reference=reference,
            draw=lambda model, seed: measuring.sample(
                model, reference=reference, seed=seed, samples_per_prompt=settings.samples_per_prompt
            ),
            judge=measuring.rewards,
            prompts=len(measuring.prompts),
            kl=settings.kl,
            rounds=settings.rounds,
            most_rounds=settings.most_rounds,
            lr=settings.lr,
        )
    write_fit(target, settings.name, found)


def _trained(spec: TrialSpec, checkpoint: str) -> nn.Module:
    storage = Storage(spec.location)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        if export_trial(storage, checkpoint, model) is None:
            raise ValueError(
                "`module` must save checkpoints of one file that become Hugging Face folders, as a "
                f"PolicyModule without FSDP2 does, got {checkpoint}"
            )
        return _on_device(load_model(str(model)), spec)


def _on_device(model: Any, spec: TrialSpec) -> nn.Module:
    moved: nn.Module = model.to("cuda") if spec.resources.gpus else model
    return moved
