"""Chat templates: a conversation -> the text of its prompt and of what follows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.types import Feedback, PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "RowTexts", "completions_of"]

_SHOWN = 40


class RowTexts(NamedTuple):
    """A pair or a judged completion as the texts that are tokenised.

    Attributes:
        prompt: What the completions continue.
        completions: Each completion by its column, with the template's end of turn where there is a template.
        is_chat: Whether a chat template wrote them, special tokens at the start included.
        ended: For each completion, whether the template ended it with a special token.
    """

    prompt: str
    completions: dict[str, str]
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
    ) -> None:
        """Take a template.

        Args:
            tokenizer: Holds the template, unless one is given.
            chat_template: Jinja text, or a path to it that ends in .jinja; None for the tokenizer's own.
            variables: Passed to the template.

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
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._ends = tuple(special | set(tokenizer.all_special_tokens))

    def __call__(self, row: PreferencePair | Feedback) -> RowTexts:
        """Turn messages into texts.

        Raises:
            BadRow: If the template refuses the messages, or does not begin the whole conversation with the
                prompt as it is rendered at inference.
        """
        assert not isinstance(row.prompt, str)
        prompt = self._apply(row.prompt, row.tools, generation_prompt=True)
        texts: dict[str, str] = {}
        ended: list[bool] = []
        for name, completion in completions_of(row).items():
            whole = self._apply([*row.prompt, *completion], row.tools, generation_prompt=False)
            if not whole.startswith(prompt):
                raise BadRow(Reason.TEMPLATE, _difference(prompt, whole, name))
            text = whole[len(prompt) :]
            # What a template writes behind the end of a turn is never generated.
            stripped = text.rstrip()
            ended.append(stripped.endswith(self._ends))
            texts[name] = stripped if ended[-1] else text
        return RowTexts(prompt, texts, is_chat=True, ended=tuple(ended))

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


def _difference(prompt: str, whole: str, name: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    start = max(0, at - _SHOWN // 2)
    return (
        f"the chat template does not begin prompt + `{name}` with the prompt (rendered with its generation "
        f"prompt): they part at character {at}, {prompt[start : at + _SHOWN]!r} against "
        f"{whole[start : at + _SHOWN]!r}"
    )
