"""Tiny random models of transformers' families, tokens for them, and a training step's backward."""

import torch

SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


# As Qwen/Qwen3-8B's configuration has it.
QWEN3_8B = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


def tiny_model(family: str = "Llama", **changes) -> torch.nn.Module:
    """A randomly initialised causal LM in training mode, the same one at every call; heads of 10 channels."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{**SHAPE, "head_dim": 10, "attn_implementation": "eager", **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        # Biases start at zero, where a mistake in them would not show.
        torch.nn.init.normal_(p, std=0.2)
    return model.train()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def checkpoint_activations(model: torch.nn.Module, use_reentrant: bool) -> None:
    """Under the name that the installed version of transformers has for it."""
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": use_reentrant})


def backward(model: torch.nn.Module, ids: torch.Tensor, **inputs) -> torch.Tensor:
    """One forward and backward; the loss is a sum, so that gradients of micro-batches add up to the batch's."""
    logits = model(input_ids=ids, **inputs).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    return loss.detach()


def checkpointing_option(on: bool) -> dict[str, bool]:
    """The option of `TrainingArguments`, under the name that the installed version of transformers has for it."""
    from transformers import TrainingArguments

    new = "activation_checkpointing"
    return {new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing": on}
