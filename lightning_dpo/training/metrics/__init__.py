"""What training logs: numbers of each pair or judged completion, and their means over all ranks."""

from lightning_dpo.training.metrics.pairs import METRIC_NAMES, PairStatistics, pair_statistics

__all__ = ["METRIC_NAMES", "PairStatistics", "pair_statistics"]
