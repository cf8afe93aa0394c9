"""Loading a model and its tokenizer by a Hub name, a local folder, or a name in `PACKAGED`."""

from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longact_kernels.integrations.packaged import locate


def load_model(
    name: str, dtype: str | torch.dtype = "bfloat16", trust_remote_code: bool = False, **init_kwargs
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer.

    Args:
        name: a Hub name, a local folder, or a model that comes as a package, without a network: `smollm2`
            (SmolLM2-135M-Instruct) or `gemma3-270m` (Gemma-3-270M, a base model).
        dtype: the dtype of the weights; `"auto"` is that of the checkpoint.
        trust_remote_code: run code from the model's repository.
        init_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: there is no such model, or it cannot be reached; the message is one line and says what to do.
    """
    source = locate(name)
    load_config(name, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, **init_kwargs
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise could_not_load(name, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Loads a model's configuration, which tells soon whether there is such a model.

    Args, Raises: as of `load_model`.
    """
    source = locate(name)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"model: the folder {source} holds no model: it has no config.json")
    try:
        if not Path(source).is_dir():
            look_up(source)
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise could_not_load(name, error) from error


def longest_input(config: PreTrainedConfig) -> int | None:
    """How many tokens a model was made for; None if its configuration does not say."""
    text = config.get_text_config()
    given = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if given and isinstance(factor := rope.get("factor"), int | float):
        given = max(given, int(factor * rope.get("original_max_position_embeddings", given)))
    return given


def could_not_load(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"model: could not load {name!r}: found no folder of that name, and the Hub did not give it "
        f"({(str(error).strip() or repr(error)).splitlines()[0]})"
    )


def look_up(name: str) -> None:
    """Asks the Hub for a model that is not in the local cache: once, where loading would go on asking for minutes."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # the Hub's client lets through whatever its HTTP library raises
        raise OSError(str(error)) from error
