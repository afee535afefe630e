"""litgpt's GPT with what it takes to share prompts between completions and to run its head in chunks."""

from __future__ import annotations

from litgpt.model import GPT
from torch import Tensor, nn


class SharedPromptsGPT(GPT):
    """A GPT that says how its hidden states come about; weights and `forward` are litgpt's own."""

    def hidden_states(self, input_ids: Tensor, *, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states, (rows, seq_len, hidden), where rows hold several sequences.

        Args:
            input_ids: Token ids, (rows, seq_len).
            position_ids: Position of each token in its own sequence, (rows, seq_len).
            attention_mask: True where a query sees a key, (rows, 1, seq_len, seq_len).
        """
        states = self.transformer.wte(input_ids)
        if self.config.scale_embeddings:
            states = states * self.config.n_embd**0.5
        cos, sin = self.cos[position_ids], self.sin[position_ids]
        for block in self.transformer.h:
            states = block(states, cos, sin, attention_mask)
        return self.transformer.ln_f(states)

    def output_head(self) -> nn.Module:
        """The module that maps hidden states to logits."""
        return self.lm_head
