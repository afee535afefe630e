"""The embedded task: reviews with a known score, aligned anywhere, with no download of models or data.

`grammar` holds the language and its true score, `model` and `pairs` the decoder and the preferences sampled
from it, `task` the prepared folder, `run` the whole demonstration.
"""

from lightning_dpo.demo.grammar import PROMPTS, is_grammatical, sample_review, score

__all__ = ["PROMPTS", "is_grammatical", "sample_review", "score"]
