"""The reward that a policy trained by DPO implies, as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_dpo.evaluation.judges.model import ModelJudge
from lightning_dpo.evaluation.kl import completion_kl
from lightning_dpo.evaluation.sampling import Sample
from lightning_dpo.models.load import load_model
from lightning_dpo.types.choices import DtypeName

__all__ = ["ImplicitRewardJudge"]


class ImplicitRewardJudge(ModelJudge):
    """Scores completions by beta log(policy / reference), Eq. 5 of https://arxiv.org/abs/2305.18290.

    Up to a constant of each prompt that is the reward which the policy is the optimum for. Both models are
    loaded when it is first asked.
    """

    def __init__(
        self,
        policy: str,
        *,
        reference: str,
        tokenizer: str | None = None,
        beta: float = 1.0,
        batch_size: int = 16,
        device: str | None = None,
        dtype: DtypeName = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        """Say which models.

        Args:
            policy: The trained model, such as the folder that `lightning-dpo export` writes.
            reference: What it was trained from.
            tokenizer: Of both; None is the policy's.
            beta: Of the training; 1 gives the log-ratio itself, nats.
            batch_size: Completions scored at once.
            device: Where to run them, such as "cuda:1"; None takes a GPU if there is one.
            dtype: Type of their weights.
            trust_remote_code: Run code that comes with a hub repository.

        Raises:
            ValueError: If `beta` is not above 0 or `batch_size` below 1.
        """
        super().__init__(
            policy,
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        if not beta > 0:
            raise ValueError(f"`beta` must be above 0, got {beta=}")
        self.reference = reference
        self.beta = beta
        self._models: list[nn.Module] = []

    def _score(self, samples: Sequence[Sample]) -> Tensor:
        policy, reference = self._models
        result = completion_kl(policy, reference=reference, samples=samples, batch_size=self.batch_size)
        return self.beta * result.logratios

    def _load_models(self) -> None:
        options: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        loaded: list[Any] = [load_model(each, **options) for each in (self.model, self.reference)]
        sizes = [model.get_output_embeddings().weight.shape[0] for model in loaded]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`reference` must have the policy's vocabulary of {sizes[0]} tokens, got {sizes[1]} "
                f"({self.reference}); name what {self.model} was trained from"
            )
        self._models = [model.to(self.device).requires_grad_(False) for model in loaded]
