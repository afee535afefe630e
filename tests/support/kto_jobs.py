"""What ranks do with judged completions in tests."""

from __future__ import annotations

import torch
from feedback_rows import feedback_loader, random_examples
from step_jobs import rank_and_count
from tiny_models import tiny_model
from together_jobs import State, strategy_of
from training import sgd, trainer

from lightning_dpo import FeedbackBatch, KTOModule
from lightning_dpo.losses import KTOLoss
from lightning_dpo.parallel import full_state, is_sharded

EXAMPLES = random_examples(8, seed=2)
HALVES = (EXAMPLES[:4], EXAMPLES[4:])


def module() -> KTOModule:
    """A policy that is away from its reference, so that z0 is above 0."""
    policy, reference = tiny_model(seed=3), tiny_model()
    return KTOModule(
        policy,
        reference=reference,
        loss=KTOLoss(beta=0.05),
        optimizer=sgd,
        warmup_ratio=0.0,
        startup_check=False,
    )


def by_hand() -> tuple[tuple[float, float, float], State]:
    """z0 over both halves, each mismatched within itself, loss and AUC of all; the policy after a step."""
    method = module()
    method.configure_model()
    sums = torch.zeros(2)
    with torch.no_grad():
        for examples in HALVES:
            other = FeedbackBatch.from_examples(examples).mismatched_completions()
            reference = method.reference.logps(other, plan=method.plan())
            assert reference is not None
            logratios = method.logps(other).logps - reference.logps
            sums += torch.stack([logratios.sum(), torch.tensor(float(len(examples)))])
    z0 = sums[0] / sums[1]
    whole = FeedbackBatch.from_examples(EXAMPLES)
    completions = whole.completions()
    reference = method.reference.logps(completions, plan=method.plan())
    assert reference is not None
    policy = method.logps(completions)
    loss = method.loss(policy, reference, labels=whole.labels, z0=z0).mean()
    loss.backward()
    sgd(method.policy.parameters()).step()
    rewards = (policy.logps - reference.logps).detach()
    auc = (rewards[whole.labels][:, None] > rewards[~whole.labels][None, :]).float().mean()
    return (float(z0), float(loss), float(auc)), plain(method.policy.state_dict())


def validate_and_step(*, strategy: str) -> tuple[tuple[float, float, float], State]:
    """The same of a validation and a step with one half on each rank."""
    rank, count = rank_and_count()
    method = module()
    run = trainer(devices=count, strategy=strategy_of(strategy), use_distributed_sampler=False, max_steps=1)
    run.fit(method, feedback_loader(HALVES[rank]))
    state = full_state(method.policy) if is_sharded(method.policy) else plain(method.policy.state_dict())
    method = module()
    run = trainer(devices=count, strategy=strategy_of(strategy), use_distributed_sampler=False)
    metrics = run.validate(method, feedback_loader(HALVES[rank]), verbose=False)[0]
    return (metrics["val/z0"], metrics["val/loss"], metrics["val/rewards/auc"]), state


def plain(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}
