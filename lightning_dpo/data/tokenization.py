"""PreferencePair -> TokenPair: text or chat messages become token ids, special tokens included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.chat_template import ChatTemplate, PairTexts
from lightning_dpo.data.formats import FORMATS
from lightning_dpo.data.truncation import TokenLimits, truncate
from lightning_dpo.types import PreferencePair, TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PairTokenizer", "Tokenised", "tokenizer_identity"]

_ANCHOR = "\n"
_SHOWN = 20


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

    Attributes:
        limits: How long a pair may be.
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
        self.limits = limits
        self._tokenizer = tokenizer
        self._eos: int = tokenizer.eos_token_id
        self._prefix = _prefix_ids(tokenizer)
        self._anchor = _anchor_ids(tokenizer)
        self._template: ChatTemplate | None = None
        self._variables = dict(chat_template_kwargs or {})
        self._as_text = FORMATS[format].as_text
        if not FORMATS[format].is_chat:
            return
        if chat_template is not None or tokenizer.chat_template is not None:
            self._template = ChatTemplate(tokenizer, chat_template=chat_template, variables=self._variables)
        elif self._as_text is None:
            raise ValueError(
                f"`tokenizer` must have a chat template for data of the format {format!r}, and "
                f"{tokenizer.name_or_path or type(tokenizer).__name__!r} has none; take the tokenizer of "
                "an instruction-tuned model or pass `chat_template=` (Jinja text or a .jinja file)"
            )

    def key_parts(self) -> dict[str, Any]:
        """What decides the ids of a pair, for the key of the cache."""
        return {
            "tokenizer": tokenizer_identity(self._tokenizer),
            "limits": self.limits,
            "template": None if self._template is None else self._template.text,
            "variables": self._variables,
        }

    def __call__(self, pairs: Sequence[PreferencePair]) -> list[Tokenised | BadRow]:
        """Tokenise pairs; many at once is much faster than one by one.

        Returns:
            For each pair its ids, or why it cannot be used.
        """
        results: list[Tokenised | BadRow | None] = [None] * len(pairs)
        usable: list[tuple[int, PairTexts]] = []
        for index, pair in enumerate(pairs):
            try:
                usable.append((index, self._texts(pair)))
            except BadRow as bad:
                results[index] = bad
        texts = [text for _, text in usable]
        prompts = self._encode_prompts(texts)
        completions = self._encode_completions([t.chosen for t in texts] + [t.rejected for t in texts])
        for number, (index, text) in enumerate(usable):
            chosen, rejected = (completions[k] for k in (number, number + len(usable)))
            try:
                results[index] = self._finish(text, prompts[number], chosen, rejected)
            except BadRow as bad:
                results[index] = bad
        assert None not in results
        return results  # type: ignore[return-value]

    def _texts(self, pair: PreferencePair) -> PairTexts:
        if self._template is not None:
            texts = self._template(pair)
        else:
            plain = pair if self._as_text is None else self._as_text(pair)
            assert isinstance(plain.prompt, str)
            assert isinstance(plain.chosen, str)
            assert isinstance(plain.rejected, str)
            texts = PairTexts(plain.prompt, plain.chosen, plain.rejected, is_chat=False, ended=(False, False))
        for name in ("prompt", "chosen", "rejected"):
            _check_unicode(getattr(texts, name), name)
        return texts

    def _encode_prompts(self, texts: Sequence[PairTexts]) -> list[list[int]]:
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
        self, text: PairTexts, prompt: list[int], chosen: list[int], rejected: list[int]
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
        pair = truncate(whole, self.limits, keep=self._kept_prefix(prompt))
        if pair == whole:
            return Tokenised(pair, truncated=False)
        if self.limits.on_long == "drop":
            sizes = f"{len(prompt)} + {max(len(chosen), len(rejected))} tokens"
            limit = f"`max_length` is {self.limits.max_length}"
            if self.limits.max_prompt_length is not None:
                limit += f", `max_prompt_length` {self.limits.max_prompt_length}"
            raise BadRow(Reason.LONG, f"{sizes}, {limit}")
        if pair.chosen_ids == pair.rejected_ids:
            raise BadRow(
                Reason.IDENTICAL, f"the same after truncation to `max_length` ({self.limits.max_length})"
            )
        return Tokenised(pair, truncated=True)

    def _kept_prefix(self, prompt: Sequence[int]) -> int:
        bos = self._tokenizer.bos_token_id
        return 1 if bos is not None and prompt[0] == bos else 0


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


def _check_unicode(text: str, name: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - _SHOWN) : error.start + _SHOWN]
        raise BadRow(
            Reason.UNICODE,
            f"the text of `{name}` has half of a surrogate pair at character {error.start}, {shown!r}",
        ) from None


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
