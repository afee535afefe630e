"""Chat templates: a conversation -> the text of its prompt and of what follows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.types import Feedback, Message, PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "CompletionTurns", "Piece", "RowTexts", "completions_of"]

CompletionTurns: TypeAlias = Literal["last", "all"]
"""Which of a completion's assistant turns are trained on."""

_SHOWN = 40


class Piece(NamedTuple):
    """A part of a completion's text that is tokenised on its own.

    Attributes:
        text: The part.
        counted: Whether its tokens are trained on.
    """

    text: str
    counted: bool = True


class RowTexts(NamedTuple):
    """A pair or a judged completion as the texts that are tokenised.

    Attributes:
        prompt: What the completions continue.
        completions: The pieces of each completion by its column, with the template's end of turn where there
            is a template; the last piece is trained on.
        is_chat: Whether a chat template wrote them, special tokens at the start included.
        ended: For each completion, whether the template ended it with a special token.
    """

    prompt: str
    completions: dict[str, list[Piece]]
    is_chat: bool
    ended: tuple[bool, ...]


def completions_of(row: PreferencePair | Feedback) -> dict[str, Any]:
    """The completions of a row, text or messages, by their columns."""
    if isinstance(row, Feedback):
        return {"completion": row.completion}
    return {"chosen": row.chosen, "rejected": row.rejected}


class ChatTemplate:
    """Applies a chat template to conversations, and checks that it continues prompts without changing them.

    Attributes:
        text: Jinja text, or None for the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None,
        variables: Mapping[str, Any],
        turns: CompletionTurns = "all",
    ) -> None:
        """Take a template.

        Args:
            tokenizer: Holds the template, unless one is given.
            chat_template: Jinja text, or a path to it that ends in .jinja; None for the tokenizer's own.
            variables: Passed to the template.
            turns: Which of a completion's assistant turns are trained on.

        Raises:
            ValueError: If the template file does not exist.
        """
        if chat_template is not None and chat_template.endswith(".jinja"):
            path = Path(chat_template).expanduser()
            if not path.is_file():
                raise ValueError(
                    f"`chat_template` must be Jinja text or an existing file, got {chat_template!r}"
                )
            chat_template = path.read_text(encoding="utf-8")
        self._tokenizer = tokenizer
        self.text = chat_template
        self._variables = dict(variables)
        self._turns = turns
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._ends = tuple(special | set(tokenizer.all_special_tokens))

    def __call__(self, row: PreferencePair | Feedback) -> RowTexts:
        """Turn messages into texts.

        Raises:
            BadRow: If the template refuses the messages, or does not begin the whole conversation with each
                part that a model sees, or has written, at inference.
        """
        assert not isinstance(row.prompt, str)
        prompt = self._apply(row.prompt, row.tools, generation_prompt=True)
        texts: dict[str, list[Piece]] = {}
        for name, completion in completions_of(row).items():
            texts[name] = self._pieces(row, prompt, completion, name)
        ended = tuple(pieces[-1].text.endswith(self._ends) for pieces in texts.values())
        return RowTexts(prompt, texts, is_chat=True, ended=ended)

    def _pieces(
        self, row: PreferencePair | Feedback, prompt: str, completion: list[Message], name: str
    ) -> list[Piece]:
        """A completion's assistant turns and what stands between them, up to the last one."""
        whole = self._apply([*row.prompt, *completion], row.tools, generation_prompt=False)
        written = [index for index, message in enumerate(completion) if message["role"] == "assistant"]
        pieces: list[Piece] = []
        end = len(prompt)
        for index in written:
            before, seen_as = prompt, "the prompt (rendered with its generation prompt)"
            if index:
                seen = [*row.prompt, *completion[:index]]
                seen_as = f"what the model sees before turn {index + 1} of it"
                before = self._apply(seen, row.tools, generation_prompt=True)
            if not whole.startswith(before):
                raise BadRow(Reason.TEMPLATE, _difference(before, whole, name, seen_as))
            after = whole
            if index + 1 < len(completion):
                said = [*row.prompt, *completion[: index + 1]]
                after = self._without_tail(self._apply(said, row.tools, generation_prompt=False))
                if not whole.startswith(after):
                    raise BadRow(
                        Reason.TEMPLATE,
                        _difference(after, whole, name, f"what ends with turn {index + 1} of it"),
                    )
            if len(before) > end:
                pieces.append(Piece(whole[end : len(before)], counted=False))
            text = self._without_tail(after[len(before) :])
            pieces.append(Piece(text, counted=self._turns == "all" or index == written[-1]))
            end = len(before) + len(text)
        return pieces

    def _without_tail(self, text: str) -> str:
        """What a template writes behind the end of a turn is never generated."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(self._ends) else text

    def _apply(self, messages: Any, tools: Any, *, generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            raise BadRow(Reason.TEMPLATE, f"the chat template raises: {error}") from None
        assert isinstance(text, str)
        return text


def _difference(prompt: str, whole: str, name: str, part: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    start = max(0, at - _SHOWN // 2)
    return (
        f"the chat template does not begin prompt + `{name}` with {part}: they part at character {at}, "
        f"{prompt[start : at + _SHOWN]!r} against "
        f"{whole[start : at + _SHOWN]!r}"
    )
