"""Rows -> token ids: text or chat messages become tokens, special tokens included."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.formats import FEEDBACK_FORMATS, FORMATS, Format
from lightning_dpo.data.tokenization.chat_template import (
    ChatTemplate,
    CompletionTurns,
    Piece,
    RowTexts,
    completions_of,
)
from lightning_dpo.data.tokenization.encode import TextEncoder
from lightning_dpo.data.tokenization.truncation import TokenLimits, shorten
from lightning_dpo.types import Feedback, PreferencePair, TokenExample, TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FeedbackTokenizer", "PairTokenizer", "RowTokenizer", "Tokenised", "tokenizer_identity"]

_ANCHOR = "\n"
_SHOWN = 20


class Tokenised(NamedTuple):
    """A row that can be trained on.

    Attributes:
        pair: Its token ids: a pair, or one judged completion.
        truncated: Whether any part was shortened.
        counted: For each completion whether each of its tokens is trained on; None for one of which all are.
    """

    pair: TokenPair | TokenExample
    truncated: bool
    counted: tuple[list[bool] | None, ...] = (None, None)


class _Completion(NamedTuple):
    """A completion's ids, and whether each of them is trained on; None where all are."""

    ids: list[int]
    counted: list[bool] | None


class RowTokenizer(ABC):
    """Turns rows into token ids.

    A prompt is tokenised once, on its own, as it is at inference; completions are tokenised as its
    continuation. So both sides of a pair share the exact prompt ids, and no token merges across the boundary.

    Attributes:
        kind: What a row becomes.
        formats: The formats that rows may have been read as, by name.
        limits: How long a prompt with a completion may be.
        has_turns: Whether completions may be of several turns, of which only some are trained on.
    """

    kind: ClassVar[type[TokenPair] | type[TokenExample]]
    formats: ClassVar[Mapping[str, Format]]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limits: TokenLimits,
        format: str,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        completion_turns: CompletionTurns = "all",
    ) -> None:
        """Look at what the tokenizer adds by itself.

        Args:
            tokenizer: Any Hugging Face tokenizer with an end-of-sequence token.
            limits: How long a pair may be.
            format: Name of the format the rows were read as.
            chat_template: Used in place of the tokenizer's own.
            chat_template_kwargs: Further variables for the template, such as ``enable_thinking``.
            completion_turns: Train on all assistant turns of a completion, or on the last one alone.

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
        self._ids = TextEncoder(tokenizer)
        self._eos: int = tokenizer.eos_token_id
        self._prefix = _prefix_ids(tokenizer)
        self._anchor = _anchor_ids(tokenizer)
        self._template: ChatTemplate | None = None
        self._variables = dict(chat_template_kwargs or {})
        self._as_text = self.formats[format].as_text
        self.has_turns = self.formats[format].has_turns
        self._turns: CompletionTurns = completion_turns
        if not self.formats[format].is_chat:
            return
        if chat_template is not None or tokenizer.chat_template is not None:
            self._template = ChatTemplate(
                tokenizer, chat_template=chat_template, variables=self._variables, turns=completion_turns
            )
        elif self._as_text is None:
            raise ValueError(
                f"`tokenizer` must have a chat template for data of the format {format!r}, and "
                f"{tokenizer.name_or_path or type(tokenizer).__name__!r} has none; take the tokenizer of "
                "an instruction-tuned model or pass `chat_template=` (Jinja text or a .jinja file)"
            )

    @property
    def template_text(self) -> str | None:
        """The Jinja text that conversations are written with in place of the tokenizer's own, or None."""
        return None if self._template is None else self._template.text

    def key_parts(self) -> dict[str, Any]:
        """What decides the ids of a row, for the key of the cache."""
        return {
            "tokenizer": tokenizer_identity(self._tokenizer),
            "limits": self.limits,
            "template": self.template_text,
            "variables": self._variables,
            # Left out where it decides nothing, so that entries of versions that knew of none are found.
            **({"completion_turns": self._turns} if self.has_turns else {}),
        }

    def __call__(self, rows: Sequence[Any]) -> list[Tokenised | BadRow]:
        """Tokenise rows; many at once is much faster than one by one.

        Returns:
            For each row its ids, or why it cannot be used.
        """
        results: list[Tokenised | BadRow | None] = [None] * len(rows)
        usable: list[tuple[int, RowTexts]] = []
        for index, row in enumerate(rows):
            try:
                usable.append((index, self._texts(row)))
            except BadRow as bad:
                results[index] = bad
        texts = [text for _, text in usable]
        prompts = self._encode_prompts(texts)
        pieces = [piece.text for t in texts for part in t.completions.values() for piece in part]
        ids = iter(self._encode_completions(pieces))
        for (index, text), prompt in zip(usable, prompts, strict=True):
            own = [_joined(part, [next(ids) for _ in part]) for part in text.completions.values()]
            try:
                results[index] = self._finish(rows[index], text, prompt, own)
            except BadRow as bad:
                results[index] = bad
        assert None not in results
        return results  # type: ignore[return-value]

    @abstractmethod
    def _as_ids(
        self, row: Any, prompt: Sequence[int], completions: Sequence[Sequence[int]]
    ) -> TokenPair | TokenExample:
        """Make what a row becomes."""

    def _texts(self, row: PreferencePair | Feedback) -> RowTexts:
        if self._template is not None:
            texts = self._template(row)
        else:
            plain = row if self._as_text is None else self._as_text(row)
            assert isinstance(plain.prompt, str)
            completions = {name: [Piece(text)] for name, text in completions_of(plain).items()}
            texts = RowTexts(plain.prompt, completions, is_chat=False, ended=(False,) * len(completions))
        _check_unicode(texts.prompt, "prompt")
        for name, pieces in texts.completions.items():
            _check_unicode("".join(piece.text for piece in pieces), name)
        return texts

    def _encode_prompts(self, texts: Sequence[RowTexts]) -> list[list[int]]:
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

    def _finish(self, row: Any, text: RowTexts, prompt: list[int], parts: list[_Completion]) -> Tokenised:
        for name, (ids, counted), ended in zip(text.completions, parts, text.ended, strict=True):
            while len(ids) > 1 and ids[-1] == ids[-2] == self._eos:
                ids.pop()
            if not ids or (ids == [self._eos] and not ended):
                raise BadRow(Reason.EMPTY, f"`{name}` has no tokens")
            if ids[-1] != self._eos and not ended:
                ids.append(self._eos)
            if counted is not None:
                counted[len(ids) :] = []
                counted += [True] * (len(ids) - len(counted))
        completions = [part.ids for part in parts]
        masks = tuple(part.counted for part in parts)
        if _are_same(completions):
            raise BadRow(Reason.IDENTICAL, "`chosen` and `rejected` are the same tokens")
        short_prompt, short = shorten(prompt, completions, self.limits, keep=self._kept_prefix(prompt))
        if (short_prompt, short) == (prompt, completions):
            return Tokenised(self._as_ids(row, prompt, completions), truncated=False, counted=masks)
        if self.limits.on_long == "drop":
            sizes = f"{len(prompt)} + {max(map(len, completions))} tokens"
            limit = f"`max_length` is {self.limits.max_length}"
            if self.limits.max_prompt_length is not None:
                limit += f", `max_prompt_length` {self.limits.max_prompt_length}"
            raise BadRow(Reason.LONG, f"{sizes}, {limit}")
        if _are_same(short):
            raise BadRow(
                Reason.IDENTICAL, f"the same after truncation to `max_length` ({self.limits.max_length})"
            )
        kept = tuple(
            None if mask is None else mask[: len(ids)] for ids, mask in zip(short, masks, strict=True)
        )
        for name, mask in zip(text.completions, kept, strict=True):
            if mask is not None and not any(mask):
                limit = f"`max_length` ({self.limits.max_length})"
                raise BadRow(Reason.LONG, f"nothing of `{name}` to train on is left within {limit}")
        return Tokenised(self._as_ids(row, short_prompt, short), truncated=True, counted=kept)

    def _kept_prefix(self, prompt: Sequence[int]) -> int:
        bos = self._tokenizer.bos_token_id
        return 1 if bos is not None and prompt[0] == bos else 0


class PairTokenizer(RowTokenizer):
    """Turns preference pairs into token pairs."""

    kind = TokenPair
    formats = FORMATS

    def _as_ids(
        self, row: PreferencePair, prompt: Sequence[int], completions: Sequence[Sequence[int]]
    ) -> TokenPair:
        chosen, rejected = completions
        return TokenPair(prompt, chosen, rejected)


class FeedbackTokenizer(RowTokenizer):
    """Turns judged completions into token examples."""

    kind = TokenExample
    formats = FEEDBACK_FORMATS

    def _as_ids(
        self, row: Feedback, prompt: Sequence[int], completions: Sequence[Sequence[int]]
    ) -> TokenExample:
        [completion] = completions
        return TokenExample(prompt, completion, row.label)


def _joined(pieces: Sequence[Piece], ids: Sequence[list[int]]) -> _Completion:
    """A completion from its pieces."""
    if all(piece.counted for piece in pieces):
        return _Completion([token for part in ids for token in part], None)
    counted = [piece.counted for piece, part in zip(pieces, ids, strict=True) for _ in part]
    return _Completion([token for part in ids for token in part], counted)


def _are_same(completions: Sequence[Sequence[int]]) -> bool:
    """Whether there are several completions, all of them alike."""
    return len(completions) > 1 and all(completion == completions[0] for completion in completions)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what decides a tokenizer's output: vocabulary, rules, special tokens and template.

    Two copies of one tokenizer in different folders share it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    rest = [special, tokenizer.chat_template]
    if backend is not None:
        return _core_identity(type(tokenizer).__name__, backend.to_str(), json.dumps(rest, default=str))
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if "path" not in key}
    return _digest(
        [type(tokenizer).__name__, {"vocabulary": tokenizer.get_vocab(), "settings": settings}, *rest]
    )


@lru_cache(maxsize=4)
def _core_identity(name: str, text: str, rest: str) -> str:
    """The identity of a tokenizer with a fast core; worked out once a process, not for each split."""
    rules = json.loads(text)
    # Set and reset by calls; not used here.
    rules.pop("truncation", None)
    rules.pop("padding", None)
    return _digest([name, rules, *json.loads(rest)])


def _digest(content: Any) -> str:
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
