"""OnlineDPOModule: pairs that the policy itself has written and a judge has ranked, anew at each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lightning_dpo.evaluation.judges import judge_samples
from lightning_dpo.evaluation.sampling import Sample, end_tokens, sample_completions
from lightning_dpo.functional import preferred_pairs
from lightning_dpo.parallel import Sharding, WeightSnapshot
from lightning_dpo.scoring.graphs import outside_of_graphs
from lightning_dpo.training.dpo import DPOModule
from lightning_dpo.types import PairBatch, TokenPair
from lightning_dpo.types.checks import check_bounds

__all__ = ["JudgedPairs", "OnlineDPOModule"]

_SNAPSHOT = "sampling_weights"
_SEEDS = 2**31
_JUDGE = (
    "a function of (prompts, completions) that gives a score for each; recipes name it by its import path, "
    "such as my_project.my_judge"
)


class JudgedPairs(NamedTuple):
    """What was sampled for a batch, and what became of it.

    Attributes:
        pairs: A pair for each prompt of the batch. One that teaches nothing weighs 0, and still counts in
            what losses are divided by.
        scores: The judge's score of each completion, (prompts, completions).
        lengths: Tokens of each completion, (prompts, completions).
        finished: Whether each completion ended by itself, (prompts, completions).
        ties: Whether a pair teaches nothing: equal scores that say nothing of which is better, or the same
            completion twice, (prompts,).
    """

    pairs: PairBatch
    scores: Tensor
    lengths: Tensor
    finished: Tensor
    ties: Tensor


class OnlineDPOModule(DPOModule):
    """Aligns a causal language model to a judge of its own completions (https://arxiv.org/abs/2402.04792).

    At each training step completions of the batch's prompts are sampled from the policy, the judge scores
    them, and the best and the worst of each prompt are a pair for any loss of `lightning_dpo.losses`. The
    completions that the training data hold are not looked at. Validation is that of `DPOModule`, on pairs.

    With `refresh_every` completions come from the policy as it was at the last of these steps, which is
    iterative DPO. Samples and labels depend on the weights, the seed, the place in the run and the rank
    alone, so that a resumed run draws those that it would have drawn.

    A prompt whose completions are the same, or have equal scores while `label_scale` is None, weighs 0.

    Beside what `DPOModule` logs there are, under train/, `score` (the judge's mean), `ties` (share of the
    prompts that weigh 0), `completion_length` (mean tokens) and `unfinished` (share of the completions that
    were cut at `max_new_tokens`).

    Attributes:
        judge: Scores completions.
        sampling_weights: The weights that completions are sampled with; None where they are the policy's.
    """

    shares_reference: ClassVar[bool] = False
    trains_on_data: ClassVar[bool] = False
    in_progress_bar = ("loss", "rewards/accuracy", "score")
    judge: Callable[[Sequence[str], Sequence[str]], Any] | None

    def __init__(
        self,
        policy: str | nn.Module,
        *,
        judge: Callable[[Sequence[str], Sequence[str]], Any] | None = None,
        num_completions: int = 2,
        label_scale: float | None = None,
        refresh_every: int | None = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        missing_eos_penalty: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Say what to train, and on whose word; nothing is loaded before `configure_model`.

        Args:
            policy: A folder, a hub id, a .gguf file, ``package:NAME/FILE``, a PreTrainedModel, or any module
                that maps (input_ids, attention_mask) to logits.
            judge: Takes texts of prompts and of their completions, gives a score for each, higher is better:
                a `lightning_dpo.evaluation.Judge`. Validation and export do without.
            num_completions: Completions of each prompt, of which the best and the worst are the pair.
            label_scale: Reward per unit of the judge's score: labels are drawn by Bradley-Terry, as noisy as
                people's. None prefers the better completion.
            refresh_every: Optimizer steps for which completions come from the same weights; None samples
                from the policy as it is.
            max_new_tokens: Longest completion; longer ones are cut.
            temperature: Divides the logits in sampling.
            top_p: In sampling, keep the smallest set of tokens that holds this probability; 1 keeps all.
            missing_eos_penalty: What a completion that was cut loses of its score; None takes nothing off.
            kwargs: Arguments of `DPOModule`: `loss`, `reference`, `optimizer`, `lora` and the others.

        Raises:
            ValueError: If an argument is out of its range, or arguments contradict each other.
        """
        check_bounds(least=2, num_completions=num_completions, unit=", to make a pair of")
        check_bounds(above=0, label_scale=label_scale, hint="; None prefers the better completion")
        as_it_is = "; None samples from the policy as it is"
        check_bounds(least=1, refresh_every=refresh_every, unit=" optimizer step", hint=as_it_is)
        check_bounds(least=1, max_new_tokens=max_new_tokens)
        check_bounds(above=0, temperature=temperature, hint=": completions of one prompt must differ")
        check_bounds(above=0, most=1, top_p=top_p)
        if judge is not None and not callable(judge):
            raise ValueError(f"`judge` must be {_JUDGE}, got {judge!r}")
        super().__init__(policy, **kwargs)
        if self.spec.is_cached:
            raise ValueError(
                f'`reference="{self.spec}"` does not go with OnlineDPOModule, whose completions are new at '
                'each step, so that no cache holds them; use reference="frozen", or "adapter" with `lora`'
            )
        # A judge may be a module: not this one's to train, to save or to move.
        object.__setattr__(self, "judge", judge)
        self.num_completions = num_completions
        self.label_scale = label_scale
        self.refresh_every = refresh_every
        self.missing_eos_penalty = missing_eos_penalty
        self.sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        self.sampling_weights: WeightSnapshot | None = None

    def setup(self, stage: str) -> None:
        """Refuse what could not be run, before a model is loaded.

        Raises:
            ValueError: If there is no judge to train by, the data are no pairs, or `refresh_every` is set
                under FSDP1.
        """
        super().setup(stage)
        if stage == "fit" and self.judge is None:
            raise ValueError(f"`judge` must be {_JUDGE}, got None")
        if self.refresh_every is not None and isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "`refresh_every` keeps earlier weights beside the policy's, which FSDP1 would mix; use "
                "lightning_dpo.parallel.FSDP2Strategy, or leave it out"
            )

    def on_policy_built(self, policy: nn.Module, sharding: Sharding | None) -> None:
        """Make the reference, and keep the weights that completions are sampled with."""
        super().on_policy_built(policy, sharding)
        if self.refresh_every is not None:
            self.sampling_weights = WeightSnapshot(policy)

    @outside_of_graphs
    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Sample, judge, and take the mean loss of the new pairs; logs under train/.

        Raises:
            ValueError: If the batch has no prompts of pairs, or the judge's answer is not a score for each
                completion.
        """
        judged = self.judged_pairs(batch)
        self._log_judged(judged, batch.weights)
        loss: Tensor = super().training_step(judged.pairs, batch_idx)
        return loss

    def judged_pairs(self, batch: PairBatch) -> JudgedPairs:
        """New pairs for the prompts of a batch.

        Args:
            batch: Its prompts, weights and divisor are taken.
        """
        if not isinstance(batch, PairBatch):
            raise ValueError(
                f"`batch` must be a PairBatch for OnlineDPOModule, got {type(batch).__name__}; collate pairs "
                "with PairBatch.from_pairs"
            )
        # First of all, for what comes may draw from the global generator, and only at the first step.
        seed = int(torch.randint(_SEEDS, ()))
        samples = self.sample(batch, seed=seed)
        assert self.judge is not None, "checked before the run"
        scores = judge_samples(self.judge, samples, tokenizer=self.tokenizer())
        finished = torch.tensor([sample.finished for sample in samples])
        scores = scores - (self.missing_eos_penalty or 0.0) * (~finished).float()
        table = scores.view(-1, self.num_completions)
        generator = torch.Generator().manual_seed(seed)
        chosen, rejected, gaps = preferred_pairs(table, label_scale=self.label_scale, generator=generator)
        pairs, same = [], []
        for row, (one, other) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
            first = row * self.num_completions
            prompt, *ids = (
                samples[first].prompt_ids,
                *(samples[first + k].completion_ids for k in (one, other)),
            )
            pairs.append(TokenPair(prompt, *ids))
            same.append(list(ids[0]) == list(ids[1]))
        ties = torch.tensor(same)
        if self.label_scale is None:
            ties |= gaps == 0
        fresh = PairBatch.from_pairs(
            pairs,
            weights=(batch.weights * ~ties).tolist(),
            # As if a tie's loss were 0: accumulated batches and ranks then still add up to one batch.
            denominator=batch.denominator or float(batch.weights.sum()) or 1.0,
            margins=gaps.clamp(min=0).tolist(),
        )
        lengths = torch.tensor([len(sample.completion_ids) for sample in samples])
        shape = table.shape
        return JudgedPairs(fresh.to(self.device), table, lengths.view(shape), finished.view(shape), ties)

    def sample(self, batch: PairBatch, *, seed: int) -> list[Sample]:
        """`num_completions` completions of each prompt of a batch, those of one prompt beside each other.

        Args:
            batch: Its prompts are taken.
            seed: Seeds the samples.
        """
        self.plan()  # may choose another attention for the policy: before the first sample, not after it
        source = batch.host or batch
        prompts = [ids.tolist() for ids in torch.split(source.prompt_ids, source.prompt_lengths.tolist())]
        lent = self._refreshed().lent_to(self.policy) if self.sampling_weights is not None else nullcontext()
        # Compiled graphs would be made anew for every length.
        with torch.compiler.set_stance("force_eager"), lent:
            return sample_completions(
                self.policy,
                prompts=[prompt for prompt in prompts for _ in range(self.num_completions)],
                eos_token_id=end_tokens(self.tokenizer(), model=self.policy),
                seed=seed,
                batch_size=len(prompts) * self.num_completions,
                **self.sampling,
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out an iterative run's earlier weights, where there is no use for them."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("state_dict", {})
        if self.refresh_every is None:
            for key in [key for key in state if key.startswith(f"{_SNAPSHOT}.")]:
                del state[key]

    def _refreshed(self) -> WeightSnapshot:
        assert self.sampling_weights is not None
        assert self.refresh_every is not None
        if self.global_step % self.refresh_every == 0:  # again for each batch that the step accumulates
            self.sampling_weights.take(self.policy)
        return self.sampling_weights

    def _log_judged(self, judged: JudgedPairs, weights: Tensor) -> None:
        if not (self.is_logging_due and float(weights.sum())):
            return
        values = {
            "score": judged.scores.mean(1),
            "ties": judged.ties.float(),
            "completion_length": judged.lengths.float().mean(1),
            "unfinished": 1 - judged.finished.float().mean(1),
        }
        for name, value in values.items():
            mean = (value * weights).sum() / weights.sum()
            self.log(f"train/{name}", mean, prog_bar=name in self.in_progress_bar, batch_size=len(weights))
