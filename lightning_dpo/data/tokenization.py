"""PreferencePair -> TokenPair: chat templates, special tokens and truncation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.chat_template import ChatRenderer, RenderedPair
from lightning_dpo.data.formats import hh_text
from lightning_dpo.types import PreferencePair, TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LongPolicy", "PairTokenizer", "TokenLimits", "Tokenised", "tokenizer_identity", "truncate"]

LongPolicy: TypeAlias = Literal["truncate", "drop"]

_ANCHOR = "\n"


class TokenLimits(NamedTuple):
    """How long a pair may be.

    Attributes:
        max_length: Tokens of the prompt and one completion together, at least 2.
        max_prompt_length: Tokens of the prompt, less than `max_length`; None for no limit of its own.
        on_long: Shorten longer pairs, or leave them out.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    on_long: LongPolicy = "truncate"

    def check(self) -> None:
        """Check the limits against each other.

        Raises:
            ValueError: If they leave no room.
        """
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {self.max_length}")
        if self.max_prompt_length is not None and not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"`max_prompt_length` must be at least 1 and less than `max_length` ({self.max_length}), "
                f"got {self.max_prompt_length}"
            )
        if self.on_long not in ("truncate", "drop"):
            raise ValueError(f"`on_long` must be 'truncate' or 'drop', got {self.on_long!r}")


class Tokenised(NamedTuple):
    """A pair that can be trained on.

    Attributes:
        pair: Its token ids.
        truncated: Whether any part was shortened.
    """

    pair: TokenPair
    truncated: bool


class PairTokenizer:
    """Turns pairs into token ids.

    A prompt is tokenised once, on its own, as it is at inference; completions are tokenised as its
    continuation. So both sides share the exact prompt ids, and no token merges across the boundary.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limits: TokenLimits,
        format: str,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Look at what the tokenizer adds by itself.

        Args:
            tokenizer: Any Hugging Face tokenizer with an end-of-sequence token.
            limits: How long a pair may be.
            format: Name of the format the pairs were read as.
            chat_template: Used in place of the tokenizer's own.
            chat_template_kwargs: Further variables for the template, such as ``enable_thinking``.

        Raises:
            ValueError: If the tokenizer has no end-of-sequence token, or no chat template where messages
                need one.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "`tokenizer` must have an end-of-sequence token, which every completion ends with; "
                f"{tokenizer.name_or_path or type(tokenizer).__name__!r} has none. Set tokenizer.eos_token"
            )
        self._tokenizer = tokenizer
        self._limits = limits
        self._eos: int = tokenizer.eos_token_id
        self._prefix = _prefix_ids(tokenizer)
        self._anchor = _anchor_ids(tokenizer)
        self._chat: ChatRenderer | None = None
        self.template: str | None = None
        self._plain_dialogues = False
        if format != "text":
            if chat_template is not None or tokenizer.chat_template is not None:
                self._chat = ChatRenderer(
                    tokenizer, chat_template=chat_template, variables=chat_template_kwargs or {}
                )
                self.template = self._chat.template
            elif format == "hh":
                self._plain_dialogues = True
            else:
                raise ValueError(
                    f"`tokenizer` must have a chat template for data of the format {format!r}, and "
                    f"{tokenizer.name_or_path or type(tokenizer).__name__!r} has none; take the tokenizer of "
                    "an instruction-tuned model or pass `chat_template=` (Jinja text or a .jinja file)"
                )

    def __call__(self, pairs: Sequence[PreferencePair]) -> list[Tokenised | BadRow]:
        """Tokenise pairs; many at once is much faster than one by one.

        Returns:
            For each pair its ids, or why it cannot be used.
        """
        results: list[Tokenised | BadRow | None] = [None] * len(pairs)
        rendered: list[tuple[int, RenderedPair]] = []
        for index, pair in enumerate(pairs):
            try:
                rendered.append((index, self._render(pair)))
            except BadRow as bad:
                results[index] = bad
        texts = [text for _, text in rendered]
        prompts = self._encode_prompts(texts)
        completions = self._encode_completions([t.chosen for t in texts] + [t.rejected for t in texts])
        for number, (index, text) in enumerate(rendered):
            chosen, rejected = (completions[k] for k in (number, number + len(rendered)))
            try:
                results[index] = self._finish(text, prompts[number], chosen, rejected)
            except BadRow as bad:
                results[index] = bad
        assert None not in results
        return results  # type: ignore[return-value]

    def _render(self, pair: PreferencePair) -> RenderedPair:
        if self._chat is not None and not isinstance(pair.prompt, str):
            return self._chat(pair)
        if self._plain_dialogues:
            pair = hh_text(pair)
        assert isinstance(pair.prompt, str)
        assert isinstance(pair.chosen, str)
        assert isinstance(pair.rejected, str)
        return RenderedPair(pair.prompt, pair.chosen, pair.rejected, is_chat=False, ended=(False, False))

    def _encode_prompts(self, texts: Sequence[RenderedPair]) -> list[list[int]]:
        prompts = self._ids([text.prompt for text in texts])
        for text, ids in zip(texts, prompts, strict=True):
            # A chat template writes the first tokens itself.
            if not text.is_chat:
                ids[:0] = self._prefix
            bos = self._tokenizer.bos_token_id
            while len(ids) > 1 and ids[0] == ids[1] == bos:
                del ids[0]
            if not ids:
                ids.append(self._eos if bos is None else bos)
        return prompts

    def _encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._anchor:
            return self._ids(texts)
        # Some tokenizers put a space before whatever they are given; behind an anchor they do not.
        cut = len(self._anchor)
        anchored = self._ids([_ANCHOR + text for text in texts])
        merged = [k for k, ids in enumerate(anchored) if ids[:cut] != self._anchor]
        result = [ids[cut:] for ids in anchored]
        for k, ids in zip(merged, self._ids([texts[k] for k in merged]), strict=True):
            result[k] = ids
        return result

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return cast("list[list[int]]", encoded["input_ids"])

    def _finish(
        self, text: RenderedPair, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> Tokenised:
        for name, ids, ended in zip(("chosen", "rejected"), (chosen, rejected), text.ended, strict=True):
            while len(ids) > 1 and ids[-1] == ids[-2] == self._eos:
                ids.pop()
            if not ids or (ids == [self._eos] and not ended):
                raise BadRow(Reason.EMPTY, f"`{name}` has no tokens")
            if ids[-1] != self._eos and not ended:
                ids.append(self._eos)
        if chosen == rejected:
            raise BadRow(Reason.IDENTICAL, "`chosen` and `rejected` are the same tokens")
        whole = TokenPair(prompt, chosen, rejected)
        pair = truncate(whole, self._limits, keep=self._kept_prefix(prompt))
        if pair == whole:
            return Tokenised(pair, truncated=False)
        if self._limits.on_long == "drop":
            sizes = f"{len(prompt)} + {max(len(chosen), len(rejected))} tokens"
            limit = f"`max_length` is {self._limits.max_length}"
            if self._limits.max_prompt_length is not None:
                limit += f", `max_prompt_length` {self._limits.max_prompt_length}"
            raise BadRow(Reason.LONG, f"{sizes}, {limit}")
        if pair.chosen_ids == pair.rejected_ids:
            raise BadRow(
                Reason.IDENTICAL, f"the same after truncation to `max_length` ({self._limits.max_length})"
            )
        return Tokenised(pair, truncated=True)

    def _kept_prefix(self, prompt: Sequence[int]) -> int:
        bos = self._tokenizer.bos_token_id
        return 1 if bos is not None and prompt[0] == bos else 0


def truncate(pair: TokenPair, limits: TokenLimits, *, keep: int = 0) -> TokenPair:
    """Shorten a pair: the prompt from the left, completions from the right, none to nothing.

    The prompt gives way first, down to half of `max_length` (or to `max_prompt_length`); it stays the same
    for both completions. A completion that is cut loses its end-of-sequence token with its end.

    Args:
        pair: The whole pair.
        limits: How long it may be.
        keep: Tokens at the start of the prompt that stay: a beginning-of-sequence token.
    """
    size = len(pair.prompt_ids)
    longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
    most = limits.max_length - 1 if limits.max_prompt_length is None else limits.max_prompt_length
    least = max(1, limits.max_length // 2) if limits.max_prompt_length is None else most
    room = max(least, limits.max_length - longest)
    wanted = min(size, most, room)
    prompt = pair.prompt_ids
    if wanted < size:
        keep = min(keep, wanted - 1)
        prompt = [*prompt[:keep], *prompt[size - wanted + keep :]]
    rest = limits.max_length - wanted
    return TokenPair(prompt, pair.chosen_ids[:rest], pair.rejected_ids[:rest])


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what decides a tokenizer's output: vocabulary, rules, special tokens and template.

    Two copies of one tokenizer in different folders share it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Set and reset by calls; not used here.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        settings = {key: value for key, value in tokenizer.init_kwargs.items() if "path" not in key}
        rules = {"vocabulary": tokenizer.get_vocab(), "settings": settings}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [type(tokenizer).__name__, rules, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer itself puts before a text, such as a beginning-of-sequence token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return list(full[:start])
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id in full else []


def _anchor_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the anchor if the tokenizer puts a space before texts, else none: see `_encode_completions`."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    anchor, alone, behind = ids(_ANCHOR), ids("a"), ids(_ANCHOR + "a")
    return anchor if behind[: len(anchor)] == anchor and behind[len(anchor) :] != alone else []
