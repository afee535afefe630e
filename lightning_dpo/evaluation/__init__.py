"""What a policy does: sampled completions, its KL from the reference, and the best reward at that KL."""

from lightning_dpo.evaluation.best_of_n import BestOfN, best_of_n, best_of_n_kl_bound, best_of_n_policy
from lightning_dpo.evaluation.compare import Comparison, compare_models, compare_samples
from lightning_dpo.evaluation.frontier import (
    MIN_EFFECTIVE_SAMPLES,
    FrontierPoint,
    best_at_kl,
    mixture_log_weights,
    reward_at_kl,
    reweighted_frontier,
    share_of_limit,
)
from lightning_dpo.evaluation.judges import (
    ClassifierJudge,
    ImplicitRewardJudge,
    Judge,
    PairwiseJudge,
    judge_pairs,
    judge_samples,
    judge_texts,
    load_judge,
)
from lightning_dpo.evaluation.kl import Estimate, KLResult, completion_kl, sample_logps
from lightning_dpo.evaluation.monitor import CompletionMonitor
from lightning_dpo.evaluation.optimum import FittedOptimum, fit_optimum
from lightning_dpo.evaluation.realign import RealignedSamples, realigned_model, realigned_samples
from lightning_dpo.evaluation.sampling import Sample, end_tokens, sample_completions
from lightning_dpo.evaluation.win_rate import WinRate, length_controlled_win_rate, win_rate

__all__ = [
    "MIN_EFFECTIVE_SAMPLES",
    "BestOfN",
    "ClassifierJudge",
    "Comparison",
    "CompletionMonitor",
    "Estimate",
    "FittedOptimum",
    "FrontierPoint",
    "ImplicitRewardJudge",
    "Judge",
    "KLResult",
    "PairwiseJudge",
    "RealignedSamples",
    "Sample",
    "WinRate",
    "best_at_kl",
    "best_of_n",
    "best_of_n_kl_bound",
    "best_of_n_policy",
    "compare_models",
    "compare_samples",
    "completion_kl",
    "end_tokens",
    "fit_optimum",
    "judge_pairs",
    "judge_samples",
    "judge_texts",
    "length_controlled_win_rate",
    "load_judge",
    "mixture_log_weights",
    "realigned_model",
    "realigned_samples",
    "reward_at_kl",
    "reweighted_frontier",
    "sample_completions",
    "sample_logps",
    "share_of_limit",
    "win_rate",
]
