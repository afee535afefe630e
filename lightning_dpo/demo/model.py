"""A small decoder fitted to the grammar: the model that the embedded task aligns."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dpo.demo.context import quiet, quiet_trainer
from lightning_dpo.demo.grammar import PROMPTS, sample_review, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MAX_NEW_TOKENS", "build_model", "build_tokenizer", "fit_model"]

MAX_NEW_TOKENS = 56
"""More than the grammar's longest review has, with its end-of-sequence token."""

_MAX_POSITIONS = 128
_IGNORED = -100


def build_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each word of the grammar; begins texts with a beginning-of-sequence token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *vocabulary()])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=_MAX_POSITIONS,
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase, *, hidden_size: int = 96, layers: int = 2, seed: int = 0
) -> PreTrainedModel:
    """A Llama-style decoder with random weights, in float32.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        hidden_size: Width of the decoder, a multiple of 8.
        layers: Depth of the decoder.
        seed: Seeds the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def fit_model(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    steps: int = 500,
    batch_size: int = 32,
    lr: float = 6e-3,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Fit a model to fresh reviews of the grammar by maximum likelihood.

    Args:
        model: Fitted in place; left on the CPU in eval mode.
        tokenizer: The model's tokenizer.
        steps: Optimizer steps.
        batch_size: Reviews a step.
        lr: Highest learning rate, after a linear warm-up and before a cosine decay to 0.
        seed: Seeds the reviews.
        progress: Show a progress bar.

    Returns:
        Mean loss of the last tenth of the steps, nats per token.
    """
    rng = random.Random(seed)
    batches = [_batch(rng, tokenizer, batch_size) for _ in range(steps)]
    fitting = _Fitting(model, steps=steps, lr=lr)
    with quiet():
        trainer = quiet_trainer(max_epochs=1, progress=progress)
        trainer.fit(fitting, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    model.cpu().train(mode=False)
    last = fitting.losses[-max(1, steps // 10) :]
    return float(torch.stack(last).mean())


class _Fitting(pl.LightningModule):
    """Next-token prediction."""

    def __init__(self, model: PreTrainedModel, *, steps: int, lr: float) -> None:
        super().__init__()
        self.model = model.train()
        self.steps, self.lr = steps, lr
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # Rows are padded on the right, where a causal model needs no mask.
        logits: Tensor = self.model(input_ids=batch[:, :-1].clamp(min=0), use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=_IGNORED
        )
        self.losses.append(loss.detach())
        self.log("fit/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.steps, pct_start=0.1, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _batch(rng: random.Random, tokenizer: Any, size: int) -> Tensor:
    """Token ids of reviews with their prompts, (size, seq_len), -100 where padded."""
    prompts = [rng.choice(PROMPTS) for _ in range(size)]
    texts = [f"{prompt} {sample_review(rng, prompt=prompt)}" for prompt in prompts]
    rows = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(texts)["input_ids"]]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_IGNORED)
