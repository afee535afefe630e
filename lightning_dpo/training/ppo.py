"""PPOModule: a policy that learns from what a judge says of its completions, near to its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dpo.evaluation.judges import judge_samples, reward_model_judge
from lightning_dpo.evaluation.sampling import end_tokens, sample_completions
from lightning_dpo.functional import (
    adapted_kl_coefficient,
    clipped_policy_loss,
    clipped_value_loss,
    k3_kl,
    token_advantages,
    whiten,
)
from lightning_dpo.models.modes import evaluating
from lightning_dpo.models.scalar_head import ScalarHead
from lightning_dpo.parallel import Sharding, shard_head, sum_over_ranks, weighted_moments
from lightning_dpo.scoring.forward import ScoringPlan, lay_out, token_states
from lightning_dpo.scoring.graphs import outside_of_graphs
from lightning_dpo.scoring.lm_head import require_head
from lightning_dpo.scoring.select import require_states
from lightning_dpo.training.referenced import ReferencedModule
from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import CompletionBatch, PairBatch, Rollout
from lightning_dpo.types.checks import check_bounds

__all__ = ["PPOModule"]

_COEFFICIENT = "kl_coefficient"
"""Where checkpoints hold it."""


class PPOModule(ReferencedModule):
    """Maximises E[r] - beta * KL(policy || reference), Eq. 3 of https://arxiv.org/abs/2305.18290, by PPO.

    A batch is a rollout: each of its prompts is answered once by the policy, at temperature 1 and in eval
    mode; the answers are judged; and the policy and a value head on its hidden states take a step for each
    minibatch, several times over (https://arxiv.org/abs/1707.06347). Batches are `PairBatch`, of which only
    the prompts are read. The trainer counts optimizer steps, of which a batch has `epochs_per_rollout` x
    `minibatches`; the learning rate changes from batch to batch.

    Attributes:
        judge: What gives completions their scores; a reward model is loaded in `setup`.
        value_head: Maps the hidden state before a token to what is expected from there on, after
            `configure_model`.
        kl_coefficient: beta, as it is now.
    """

    batch_type = PairBatch
    metric_names = tuple(f"rollout/{name}" for name in ("score", "kl", "reward", "length", "finished"))
    in_progress_bar = shown_after_validation = ("rollout/score", "rollout/kl")
    shares_reference = False
    judge: Callable[[Sequence[str], Sequence[str]], Any] | None

    def __init__(
        self,
        policy: str | nn.Module,
        *,
        judge: Callable[[Sequence[str], Sequence[str]], Any] | None = None,
        reward_model: str | None = None,
        kl_coefficient: float = 0.05,
        target_kl: float | None = None,
        kl_gain: float = 0.1,
        max_new_tokens: int = 128,
        unfinished_penalty: float = 0.0,
        epochs_per_rollout: int = 4,
        minibatches: int = 4,
        clip_range: float = 0.2,
        value_clip_range: float = 0.2,
        value_coefficient: float = 0.1,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        whiten_advantages: bool = True,
        max_grad_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Say what to train; nothing is loaded before `setup`.

        Args:
            policy: A folder, a hub id, a .gguf file, ``package:NAME/FILE``, a PreTrainedModel, or a network
                that offers its hidden states as `lightning_dpo.models.own` asks.
            judge: Scores completions: any callable of (prompts, completions), as texts; a number for each.
            reward_model: In place of `judge`, the folder or hub id of a reward model of the policy's
                tokenizer, such as a `RewardModule` exports. Every rank loads it whole.
            kl_coefficient: beta, or with `target_kl` the first one.
            target_kl: KL that beta is adapted to reach, nats per completion; None keeps beta as it is.
            kl_gain: How fast it is adapted: by at most a fifth of this in each rollout.
            max_new_tokens: Longest completion.
            unfinished_penalty: Taken off the score of a completion that was cut there.
            epochs_per_rollout: How often each completion is learned from.
            minibatches: Into how many steps a rollout is divided.
            clip_range: How far a token's probability may go in a rollout, as a share of what it was.
            value_clip_range: How far a value may, in the score's unit: a fifth of the scores' spread or more.
            value_coefficient: Share of the value loss in the loss.
            gamma: Discount of each token.
            gae_lambda: 0 trusts the values, 1 the rewards.
            whiten_advantages: Give a rollout's advantages mean 0 and variance 1.
            max_grad_norm: Clips gradients, in place of the trainer's `gradient_clip_val`; 0 does not.
            kwargs: Arguments of `ReferencedModule`: `reference`, `optimizer`, `lora` and the others.

        Raises:
            ValueError: If a number is out of its range, or the reference cannot score new completions.
        """
        super().__init__(policy, **kwargs)
        self.automatic_optimization = False
        check_bounds(least=1, epochs_per_rollout=epochs_per_rollout, minibatches=minibatches)
        check_bounds(least=1, max_new_tokens=max_new_tokens)
        check_bounds(least=0, kl_coefficient=kl_coefficient, kl_gain=kl_gain, max_grad_norm=max_grad_norm)
        check_bounds(least=0, value_coefficient=value_coefficient, unfinished_penalty=unfinished_penalty)
        check_bounds(above=0, clip_range=clip_range, value_clip_range=value_clip_range, target_kl=target_kl)
        check_bounds(least=0, most=1, gamma=gamma, gae_lambda=gae_lambda)
        if self.spec.is_cached or self.spec.kind == "none":
            raise ValueError(
                "`reference` must score completions that are sampled in training, which "
                f'{kwargs["reference"]!r} cannot; use "frozen", "adapter" (with `lora`) or a model'
            )
        if (judge is None) == (reward_model is None):
            raise ValueError(
                "`judge`, a callable such as lightning_dpo.demo.grammar.true_score, or `reward_model`, the "
                f"folder of one, must be given, got {'neither' if judge is None else 'both'}"
            )
        if isinstance(policy, nn.Module):
            require_head(policy, use="values")
        object.__setattr__(self, "judge", judge)  # it may be a module, but is not this one's to save or move
        self.reward_model = reward_model
        self.kl_coefficient, self.target_kl, self.kl_gain = kl_coefficient, target_kl, kl_gain
        self.max_new_tokens, self.unfinished_penalty = max_new_tokens, unfinished_penalty
        self.epochs_per_rollout, self.minibatches = epochs_per_rollout, minibatches
        self.clip_range, self.value_clip_range = clip_range, value_clip_range
        self.value_coefficient, self.gamma, self.gae_lambda = value_coefficient, gamma, gae_lambda
        self.whiten_advantages, self.max_grad_norm = whiten_advantages, max_grad_norm
        self._remember(reward_model=reward_model)

    @classmethod
    def incomparable_metrics(cls) -> tuple[str, ...]:
        """The reward, in which the KL counts beta times."""
        return ("val/rollout/reward",)

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks of every run; asked for first, so that settings of the trainer are refused here.

        Raises:
            ValueError: If the trainer is to do what a rollout's steps do by themselves.
        """
        for name, unset, instead in (
            ("gradient_clip_val", (None, 0), "`max_grad_norm` of PPOModule clips"),
            ("accumulate_grad_batches", (1,), "a larger `batch_size` gives larger steps, of `minibatches`"),
        ):
            value = getattr(self.trainer, name)
            if value not in unset:
                raise ValueError(f"`{name}` must not be set for PPO, got {value}; {instead}")
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        """Refuse what does not go together, and load a reward model, before the policy is loaded.

        Raises:
            ValueError: Under FSDP1, or if the reward model has another tokenizer.
        """
        super().setup(stage)
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "`strategy` must let a batch be sampled and learned from by many passes, got FSDP1; use "
                "lightning_dpo.parallel.FSDP2Strategy"
            )
        if self.reward_model is not None and self.judge is None:
            loaded = reward_model_judge(self.reward_model, tokenizer=self.tokenizer())
            object.__setattr__(self, "judge", loaded)

    def on_policy_built(self, policy: nn.Module, sharding: Sharding | None) -> None:
        """Make the reference, and put the value head beside the policy."""
        super().on_policy_built(policy, sharding)
        self.value_head = ScalarHead.of(policy, output_head=require_head(policy, use="values"))
        if sharding is not None:
            shard_head(self.value_head, sharding)

    def trained_modules(self) -> list[nn.Module]:
        """The policy and the value head."""
        return [self.policy, self.value_head]

    def scheduled_steps(self) -> int:
        """Batches of the run: the learning rate is the same for all steps of one."""
        steps = super().scheduled_steps()
        limit = self.trainer.max_steps
        return steps if limit < 0 else min(steps, -(-limit // (self.epochs_per_rollout * self.minibatches)))

    def plan(self) -> ScoringPlan:
        """How tokens are scored, found out on the policy at hand the first time."""
        plan = super().plan()
        require_states(plan, self.policy)
        return plan

    def predict(self, completions: CompletionBatch) -> tuple[Tensor, Tensor]:
        """Log-probability of each completion token and the value before it, (tokens,) each."""
        rows = lay_out(completions, model=self.policy, plan=self.plan())
        logps, states = token_states(self.policy, rows)
        return logps, self.value_head(states)

    @torch.no_grad()
    def rollout(self, batch: PairBatch, *, seed: int) -> Rollout:
        """Answer a batch's prompts, and find out what there is to learn from the answers.

        Args:
            batch: Pairs, of which the prompts are used.
            seed: Of the sampling.
        """
        if not isinstance(batch, PairBatch):
            raise ValueError(f"`batch` must be a PairBatch for PPOModule, got {type(batch).__name__}")
        tokenizer = self.tokenizer()
        prompts = [ids.tolist() for ids in torch.split(batch.prompt_ids, batch.prompt_lengths.tolist())]
        samples = sample_completions(
            self.policy,
            prompts=prompts,
            eos_token_id=end_tokens(tokenizer, model=self.policy),
            max_new_tokens=self.max_new_tokens,
            seed=seed,
            batch_size=len(prompts),
        )
        completions = CompletionBatch.from_lists(prompts, [[s.completion_ids] for s in samples])
        completions = completions.to(self.device)
        finished = torch.tensor([s.finished for s in samples], device=self.device)
        assert self.judge is not None, "a reward model is loaded in setup"
        with torch.autocast(self.device.type, enabled=False):  # a reward model keeps its own precision
            scores = judge_samples(self.judge, samples, tokenizer=tokenizer).to(self.device)
        scores = scores - self.unfinished_penalty * (~finished).float()
        plan = self.plan()
        reference_logps = self.reference.token_logps(completions, plan=plan)
        with evaluating(self.policy):
            logps, values = self.predict(completions)
        lengths = completions.completion_lengths
        weights = batch.weights.repeat_interleave(lengths).to(logps)
        advantages = token_advantages(
            logps - reference_logps,
            values=values,
            scores=scores,
            lengths=lengths,
            coefficient=self.kl_coefficient,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
        )
        returns = advantages + values
        if self.whiten_advantages:
            mean, variance = weighted_moments(advantages, weights)
            advantages = whiten(advantages, mean=mean, variance=variance)
        return Rollout(
            completions, weights, logps, reference_logps, values, advantages, returns, scores, finished
        )

    def step(self, batch: PairBatch, *, seed: int = 0) -> StepOutput:
        """What the policy's answers to a batch's prompts are worth; the loss is their negative reward."""
        return self._output(self.rollout(batch, seed=seed), batch)

    @outside_of_graphs
    def training_step(self, batch: PairBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Sample, judge and learn; logs what `metric_names` names and the updates' figures under train/."""
        rollout = self.rollout(batch, seed=int(torch.randint(2**31, ())))
        updates = [self._update(rollout.select(numbers)) for numbers in self._minibatches(len(batch))]
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        output = self._output(rollout, batch)
        self.latest = output._replace(num_tokens=output.num_tokens * (1 + self.epochs_per_rollout))
        weights = batch.weights.to(self.device)
        if not sum_over_ranks(weights.sum()):  # fillers, which say nothing of the policy
            return
        means = {name: weighted_moments(output.statistics[name], weights)[0] for name in self.metric_names}
        for name, mean in means.items():
            self.log(f"train/{name}", mean, prog_bar=name in self.in_progress_bar, batch_size=len(batch))
        returns = rollout.returns
        unexplained = weighted_moments(returns - rollout.values, rollout.weights)[1]
        figures = {
            **{name: torch.stack([update[name] for update in updates]).mean() for name in updates[0]},
            "ppo/entropy": -weighted_moments(rollout.logps, rollout.weights)[0],
            "ppo/explained_variance": 1 - unexplained / weighted_moments(returns, rollout.weights)[1],
            "ppo/kl_coefficient": torch.tensor(self.kl_coefficient, dtype=torch.float32),
        }
        self.log_dict({f"train/{name}": value for name, value in figures.items()}, batch_size=len(batch))
        if self.target_kl is not None:
            self.kl_coefficient = adapted_kl_coefficient(
                self.kl_coefficient,
                kl=float(means["rollout/kl"]),
                target=self.target_kl,
                gain=self.kl_gain,
            )

    @outside_of_graphs
    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Collect the batch's numbers; the seed is the same in every validation."""
        output = self.step(batch, seed=batch_idx * self.trainer.world_size + self.global_rank)
        self.latest = output.detach()
        self.val_metrics.update(output.statistics, output.weights)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norm and the learning rate, then clip, which the trainer leaves to the module."""
        super().on_before_optimizer_step(optimizer)
        if self.max_grad_norm:
            self.configure_gradient_clipping(optimizer, self.max_grad_norm, "norm")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the KL coefficient too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_COEFFICIENT] = self.kl_coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take an adapted KL coefficient; one that is not adapted stays what the user says."""
        super().on_load_checkpoint(checkpoint)
        if self.target_kl is not None:
            self.kl_coefficient = checkpoint.get(_COEFFICIENT, self.kl_coefficient)

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        """Numbers of the completions of each step: as many steps on every rank, or ranks would not meet."""
        fewest = self.trainer.strategy.reduce(torch.tensor(count, device=self.device), reduce_op="min")
        for _ in range(self.epochs_per_rollout):
            for numbers in torch.randperm(count).tensor_split(min(self.minibatches, int(fewest))):
                yield numbers.sort().values

    def _update(self, part: Rollout) -> dict[str, Tensor]:
        """One optimizer step; figures of it."""
        logps, values = self.predict(part.completions)
        policy = clipped_policy_loss(
            logps, old_logps=part.logps, advantages=part.advantages, clip_range=self.clip_range
        )
        value = clipped_value_loss(
            values, old_values=part.values, returns=part.returns, clip_range=self.value_clip_range
        )
        # Gradients are averaged over ranks, whose minibatches may differ in tokens: theirs together count.
        count = sum_over_ranks(part.weights.sum()) / self.trainer.world_size
        count = count.clamp(min=torch.finfo(count.dtype).tiny)  # fillers alone: a loss of 0, not 0 / 0

        def mean(losses: Tensor) -> Tensor:
            return (losses * part.weights).sum() / count

        loss = mean(policy.losses) + self.value_coefficient * mean(value.losses)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        figures = {
            "loss": loss,
            "ppo/policy_loss": mean(policy.losses),
            "ppo/value_loss": mean(value.losses),
            "ppo/clip_fraction": mean(policy.clipped.float()),
            "ppo/update_kl": mean(k3_kl(part.logps - logps)),
        }
        return {name: figure.detach() for name, figure in figures.items()}

    def _output(self, rollout: Rollout, batch: PairBatch) -> StepOutput:
        kl, lengths = rollout.kl, rollout.completions.completion_lengths
        reward = rollout.scores - self.kl_coefficient * kl
        numbers = (rollout.scores, kl, reward, lengths.to(kl), rollout.finished.to(kl))
        statistics = dict(zip(self.metric_names, numbers, strict=True))
        tokens = self.num_tokens(rollout.completions)
        return StepOutput.of(-reward, batch, statistics=statistics, num_tokens=tokens)
