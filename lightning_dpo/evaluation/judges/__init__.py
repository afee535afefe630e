"""Judges of completions: any callable, a classifier or reward model, a trained policy's implied reward."""

from lightning_dpo.evaluation.judges.base import (
    AnyJudge,
    Judge,
    PairwiseJudge,
    SampleJudge,
    is_pairwise,
    judge_name,
    judge_pairs,
    judge_samples,
    judge_texts,
)
from lightning_dpo.evaluation.judges.classifier import ClassifierJudge
from lightning_dpo.evaluation.judges.implicit import ImplicitRewardJudge
from lightning_dpo.evaluation.judges.load import load_judge
from lightning_dpo.evaluation.judges.model import ModelJudge
from lightning_dpo.evaluation.judges.reward import reward_model_judge
from lightning_dpo.evaluation.judges.texts import samples_of_texts, texts_of_samples

__all__ = [
    "AnyJudge",
    "ClassifierJudge",
    "ImplicitRewardJudge",
    "Judge",
    "ModelJudge",
    "PairwiseJudge",
    "SampleJudge",
    "is_pairwise",
    "judge_name",
    "judge_pairs",
    "judge_samples",
    "judge_texts",
    "load_judge",
    "reward_model_judge",
    "samples_of_texts",
    "texts_of_samples",
]
