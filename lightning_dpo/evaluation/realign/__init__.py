"""One trained policy at other distances from its reference: by its predictions, or by its weights."""

from lightning_dpo.evaluation.realign.curve import RealignedPoint, SamplingSettings, realigned_curve
from lightning_dpo.evaluation.realign.family import FamilyScores, realigned_logps, score_family
from lightning_dpo.evaluation.realign.members import (
    RealignedModel,
    RealignedSamples,
    realigned_model,
    realigned_samples,
)
from lightning_dpo.evaluation.realign.pairs import MemberOnPairs, realigned_pairs
from lightning_dpo.evaluation.realign.weights import WeightFamily

__all__ = [
    "FamilyScores",
    "MemberOnPairs",
    "RealignedModel",
    "RealignedPoint",
    "RealignedSamples",
    "SamplingSettings",
    "WeightFamily",
    "realigned_curve",
    "realigned_logps",
    "realigned_model",
    "realigned_pairs",
    "realigned_samples",
    "score_family",
]
