"""Sampling every policy of a frontier on the cluster; what was measured once is read and not done again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from lightning_dpo.evaluation import MIN_EFFECTIVE_SAMPLES, BestOfN, best_of_n
from lightning_dpo.tuning.cluster.task import beside, run_as_tasks
from lightning_dpo.tuning.frontier.limit import FitSettings, Limit, pick_policies, read_fit
from lightning_dpo.tuning.frontier.measure import Measured, Measuring, fit_limit, measure, policy_logps
from lightning_dpo.tuning.frontier.methods import BestOfMethod, RealignedMethod, folder_name
from lightning_dpo.tuning.frontier.result import Failure, PolicyPoint
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["Run", "Sampler"]

_LIMIT_SEED = 104_729
"""Added to the seeds of samples for the limit, which are others than those that policies were picked by."""


@dataclass(frozen=True, slots=True)
class Run:
    """A trained policy.

    Attributes:
        method: Name of its method.
        strength: What was varied.
        seed: Seed of its run.
        file: Its own file name, with its method's folder.
        checkpoint: Folder of its checkpoint.
    """

    method: str
    strength: float
    seed: int
    file: str
    checkpoint: str


@dataclass(frozen=True)
class Sampler:
    """Samples policies.

    Attributes:
        spec: The environment and the resources of a task.
        measuring: How policies are measured.
        folder: Where files go.
    """

    spec: TrialSpec
    measuring: Measuring
    folder: Storage

    def reference(self, seeds: Sequence[int], *, samples_per_prompt: int) -> list[Measured]:
        """Completions of the reference with each seed."""
        names = [f"reference/{samples_per_prompt}-of-seed-{seed}.parquet" for seed in seeds]
        calls = [
            {"name": name, "seed": seed, "samples_per_prompt": samples_per_prompt}
            for name, seed in zip(names, seeds, strict=True)
        ]
        return list(self._measure(calls))

    def runs(self, runs: Sequence[Run]) -> Iterator[PolicyPoint]:
        """A point for each trained policy, its share not yet known."""
        calls = [{"name": run.file, "seed": run.seed, "checkpoint": run.checkpoint} for run in runs]
        for run, measured in zip(runs, self._measure(calls), strict=True):
            kl, reward = measured.divergence, measured.reward
            yield PolicyPoint(run.method, run.strength, run.seed, *kl, *reward)

    def best_of(
        self, method: BestOfMethod, seeds: Sequence[int], limit: Limit
    ) -> Iterator[PolicyPoint | Failure]:
        """A point for each N and seed, or why there is none.

        Args:
            method: The method; an N that its samples of the reference can show is estimated from them.
            seeds: Of these samples.
            limit: Its samples tell each N that is larger, each seed a part of them.
        """
        drawn = self.reference(seeds, samples_per_prompt=method.samples_per_prompt)
        for number, (seed, measured) in enumerate(zip(seeds, drawn, strict=True)):
            scores = measured.rewards.view(len(self.measuring.prompts), -1)
            part = limit.part(number, of=len(seeds))
            for n in method.values:
                if n <= method.samples_per_prompt:
                    found = best_of_n(scores, n)
                else:
                    found = best_of_n(part.rewards, n, log_weights=part.log_weights)
                    if found.effective_sample_size < MIN_EFFECTIVE_SAMPLES:
                        yield Failure(method.name, f"N {n}, seed {seed}", _too_few(found))
                        continue
                yield PolicyPoint(
                    method.name, n, seed, found.kl, found.kl_error, found.reward, found.reward_error
                )

    def realigned(self, method: RealignedMethod, runs: Sequence[Run]) -> Iterator[PolicyPoint]:
        """A point for each scale of the policy that every seed trained at the method's strength."""
        pairs = [
            (run, scale)
            for run in runs
            if run.method == method.of and run.strength == method.at
            for scale in method.values
        ]
        calls = [
            {
                "name": f"{folder_name(method.name)}/{scale:g}-of-{Path(run.file).name}",
                "seed": run.seed,
                "checkpoint": run.checkpoint,
                "scale": scale,
            }
            for run, scale in pairs
        ]
        for (run, scale), measured in zip(pairs, self._measure(calls), strict=True):
            yield PolicyPoint(method.name, scale, run.seed, *measured.divergence, *measured.reward)

    def limit(
        self,
        runs: Sequence[Run],
        points: Sequence[PolicyPoint],
        *,
        kl: float,
        policies: int,
        samples_per_prompt: int,
        rounds: int = 1,
        fit: FitSettings | None = None,
    ) -> Limit:
        """The best reward at each KL.

        Args:
            runs: The trained policies.
            points: Their points.
            kl: Up to where the limit is wanted, nats.
            policies: How many of them to sample again, beside the reference.
            samples_per_prompt: Completions of each prompt from each, in one round.
            rounds: How many to draw at most, until the limit is known up to there.
            fit: Of a policy to the best one: where all these do not tell it, or there are none of them.
        """
        if fit is not None and not policies:
            return self._fitted(fit)
        picked = [runs[i] for i in pick_policies([(p.kl, p.reward) for p in points], count=policies)]
        found = self._limit(picked, samples_per_prompt, round=0)
        for number in range(1, rounds):
            if found.is_known(up_to=kl):
                break
            found = found.joined(self._limit(picked, samples_per_prompt, round=number))
        return found if fit is None or found.is_known(up_to=kl) else self._fitted(fit)

    @contextlib.contextmanager
    def fitting(self, settings: FitSettings) -> Iterator[Callable[[], object]]:
        """Fit a policy to the best one while the block goes on, unless that was done before.

        Yields:
            What waits until `limit` finds it.
        """
        folder = self.folder / "limit"
        if read_fit(folder, settings.name, prompts=len(self.measuring.prompts)) is not None:
            yield lambda: None
            return
        with beside(self.spec, fit_limit, self.measuring, folder, settings) as fitted:
            yield fitted

    def _fitted(self, settings: FitSettings) -> Limit:
        """The limit from the samples of a policy that is fitted to the best one."""
        with self.fitting(settings) as fitted:
            fitted()
        found = read_fit(self.folder / "limit", settings.name, prompts=len(self.measuring.prompts))
        assert found is not None
        return Limit.of_fit(found)

    def _limit(self, picked: Sequence[Run], samples_per_prompt: int, *, round: int) -> Limit:
        """The limit from one round of samples of the reference and of each policy."""
        common: dict[str, Any] = {"samples_per_prompt": samples_per_prompt, "with_kl": False}
        ending = f"-{samples_per_prompt}{f'-round{round}' if round else ''}.parquet"
        first = _LIMIT_SEED * (round + 1)
        calls = [{"name": f"limit/reference{ending}", "seed": first, **common}]
        for run in picked:
            name = f"limit/{run.file.removesuffix('.parquet')}{ending}"
            calls.append({"name": name, "seed": first + run.seed, "checkpoint": run.checkpoint, **common})
        measured = list(self._measure(calls))
        ratios = []
        if picked:  # the reference alone has no weights
            pool = ray.put([sample for each in measured for sample in each.samples])
            scoring = {"measuring": self.measuring, "samples": pool}
            scored = [{**scoring, "checkpoint": each} for each in (None, *(run.checkpoint for run in picked))]
            reference, *trained = run_as_tasks(self.spec, policy_logps, scored)
            ratios = [logps - reference for logps in trained]
        return Limit.of([each.rewards for each in measured], ratios, prompts=len(self.measuring.prompts))

    def _measure(self, calls: Sequence[Mapping[str, Any]]) -> Iterator[Measured]:
        """Measure what was not measured yet, as many policies at once as fit; in the order of the calls."""
        known = [self.folder.read_bytes(call["name"]) for call in calls]
        missing = [call for call, content in zip(calls, known, strict=True) if content is None]
        common = {"measuring": self.measuring, "target": self.folder}
        done = run_as_tasks(self.spec, measure, [{**common, **call} for call in missing])
        for call, content in zip(calls, known, strict=True):
            if content is None:
                next(done)
                content = self.folder.read_bytes(call["name"])
            assert content is not None
            yield Measured.from_parquet(content)


def _too_few(found: BestOfN) -> str:
    return (
        f"{found.effective_sample_size:.0f} effective samples of the limit's tell it, and "
        f"{MIN_EFFECTIVE_SAMPLES:.0f} are needed: raise `limit_samples_per_prompt`, or a KL of `kls`"
    )
