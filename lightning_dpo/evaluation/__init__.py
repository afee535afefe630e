"""What a policy does: sampled completions, its KL from the reference, and the best reward at that KL."""

from lightning_dpo.evaluation.frontier import FrontierPoint, best_at_kl, reweighted_frontier
from lightning_dpo.evaluation.kl import Estimate, KLResult, completion_kl
from lightning_dpo.evaluation.monitor import CompletionMonitor
from lightning_dpo.evaluation.sampling import Sample, sample_completions

__all__ = [
    "CompletionMonitor",
    "Estimate",
    "FrontierPoint",
    "KLResult",
    "Sample",
    "best_at_kl",
    "completion_kl",
    "reweighted_frontier",
    "sample_completions",
]
