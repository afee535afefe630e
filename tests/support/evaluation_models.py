"""Models small enough to enumerate everything they can say."""

import itertools

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_dpo.evaluation import Sample

VOCAB, EOS, MAX_NEW = 5, 4, 3
PROMPT = [1, 2]


def tiny_llama(seed: int, *, vocab: int = VOCAB, spread: float = 3.0) -> LlamaForCausalLM:
    """A decoder whose next-token distributions are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=EOS,
        )
        model = LlamaForCausalLM(config).eval()
        nn.init.normal_(model.lm_head.weight, std=spread / 4)
    return model


class Bigram(nn.Module):
    """A user's own network: logits depend on the last token alone. Refuses padding before a token."""

    def __init__(self, seed: int = 0, *, vocab: int = VOCAB) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert bool((attention_mask[:, 0] == 1).all()), "padding before a token"
        return self.table[input_ids]


def completions() -> list[list[int]]:
    """Everything that can be said in at most MAX_NEW tokens: ended by EOS, or cut at MAX_NEW."""
    words = [token for token in range(VOCAB) if token != EOS]
    ended = [[*head, EOS] for length in range(MAX_NEW) for head in itertools.product(words, repeat=length)]
    return ended + [list(cut) for cut in itertools.product(words, repeat=MAX_NEW)]


@torch.no_grad()
def logp(model: nn.Module, completion: list[int]) -> float:
    """log pi(completion | PROMPT) in float64, one plain forward pass of one unpadded row."""
    ids = torch.tensor([[*PROMPT, *completion]])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    logits = output if isinstance(output, Tensor) else output.logits
    table = logits[0].double().log_softmax(-1)
    start = len(PROMPT) - 1
    return float(sum(table[start + k, token] for k, token in enumerate(completion)))


def samples() -> list[Sample]:
    return [Sample(PROMPT, completion, completion[-1] == EOS) for completion in completions()]
