"""Tokenizers of a few hundred tokens, built on the spot, with the habits of real ones."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<eot>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes the beginning-of-sequence token itself, and </s> behind each answer, as Llama 2 does.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
# Ends turns with a special token that is not the end-of-sequence token, as Gemma does.
EOT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends turns with nothing but a line break.
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Opens a thought for the model, but does not repeat it in what it has said, as R1's does.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>tools {% for t in tools %}{{ t['name'] }};{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.get('tool_calls', []) %}CALL {{ c['function']['name'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = ["the sky is blue and the sea is green", "hello world, who are you", "is it so?\n\nyes it is\n"] * 4


def byte_level(
    *, template: str | None = None, adds_bos: bool = False, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2 and Llama 3: any text comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(_TEXT, trainer)
    return _wrapped(tokenizer, template, adds_bos, eos)


def metaspace(*, template: str | None = None, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """BPE that puts a space before any text it is given, as Llama 2 and Mistral do."""
    tokenizer = Tokenizer(models.BPE(unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted(set("".join(_TEXT)) | {"▁", "[", "]", "/", "I", "N", "S", "T"})
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_TEXT, trainer)
    return _wrapped(tokenizer, template, adds_bos, "</s>")


def _wrapped(
    tokenizer: Tokenizer, template: str | None, adds_bos: bool, eos: str | None
) -> PreTrainedTokenizerFast:
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    others = [token for token in SPECIAL if token not in ("<s>", eos)]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        additional_special_tokens=others,
        chat_template=template,
    )
