"""What a model's call says about its tokens: which are padding, and where packed sequences begin."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Tokens(NamedTuple):
    """The tokens of a call.

    Attributes:
        mask: bool [B, T], False on padding; None where all tokens count.
        cu_seqlens: int [sequences + 1], the bounds of sequences packed into a batch of one; None without packing.
    """

    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def of(self, x: Tensor) -> "Tokens":
        """The part that fits an activation [B, T, ..]; nothing where none does."""
        if x.ndim < 3:
            return Tokens()
        if self.mask is not None:
            # With cached keys and values, the attention mask also covers the tokens that came before.
            mask = self.mask[:, -x.shape[1] :]
            return Tokens(mask if mask.shape == x.shape[:2] else None)
        return Tokens(None, self.cu_seqlens if len(x) == 1 else None)


@dataclass
class TokensHook:
    """Calls `take` with the tokens of every training call of a model; an object, so that a model's copy has its own."""

    take: Callable[[Tokens], None]
    names: list[str]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module.training and torch.is_grad_enabled():
            # Names by place, and not inspect.Signature.bind: torch.compile follows it.
            self.take(_tokens({**dict(zip(self.names, args, strict=False)), **kwargs}))


def on_tokens(model: nn.Module, take: Callable[[Tokens], None]) -> Iterator[RemovableHandle]:
    """Calls `take` with the tokens of every training call of a language model, and of the model that it wraps."""
    for module in model.modules():
        names = list(inspect.signature(module.forward).parameters)
        if "input_ids" in names and "attention_mask" in names:
            yield module.register_forward_pre_hook(TokensHook(take, names), with_kwargs=True)


def _tokens(call: dict[str, Any]) -> Tokens:
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return Tokens(mask != 0)
    if (bounds := call.get("cu_seq_lens_q")) is not None:
        return Tokens(None, bounds)
    if isinstance(positions, Tensor) and positions.ndim == 2 and len(positions) == 1:
        begins = positions[0] == 0
        begins[0] = True  # the rest of a sequence whose beginning is cached
        return Tokens(
            None, torch.cat((begins.nonzero().flatten(), begins.new_tensor([len(begins)], dtype=torch.int64)))
        )
    return Tokens()
