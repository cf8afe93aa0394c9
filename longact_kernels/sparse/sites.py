"""Statistics of queries and keys as they are after normalisation, or as attention sees them."""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from longact_kernels.functional import observe, reaches
from longact_kernels.sparse.config import Site
from longact_kernels.sparse.salient_set import SalientSet

_NAME = "longact"


@dataclass(eq=False)
class Tap:
    """Takes the statistics of queries or keys; an object, so that a model's copy has its own.

    Attributes:
        salient: the salient set of their projection.
        layer: that projection.
        site: where they are taken, for the error.
        channels, heads: how many they have.
        stats: what they are merged into; None once the sets are frozen.
    """

    salient: SalientSet
    layer: Any
    site: Site
    channels: int
    heads: int
    stats: Any = None

    @property
    def l2(self) -> bool:
        """Whether sums of squares are taken."""
        return self.stats.l2

    def merge_(self, absmax: Tensor, sumsq: Tensor) -> None:
        """Called in backward; of one that does not reach the projection's weight, nothing counts."""
        weight = self.layer.weight
        if weight.requires_grad and not reaches(get_gradient_edge(weight).node):
            return
        self.salient.batch.enter(self.salient.passes)
        if self.stats is not None:
            self.stats.merge_(absmax, sumsq)

    def __call__(self, y: Tensor, channels: Tensor) -> Tensor:
        """Takes a query or key and the same values as [B, T, channels]; returns the query or key."""
        if self.stats is None or not y.requires_grad or not torch.is_grad_enabled():
            self.salient.call.unrecorded |= not torch.is_grad_enabled()
            return y
        if channels.ndim != 3 or channels.shape[-1] != self.channels:
            raise ValueError(
                f"site: {self.site!r} of {self.salient.name} has {channels.shape[-1]} channels where the projection "
                f"has {self.channels}; use site='projection'"
            )
        tokens = self.salient.call.tokens_now()
        if tokens is None:
            return y
        mask, cu_seqlens = tokens.of(channels, self.l2, self.salient.name)
        return observe(y, self, mask, cu_seqlens, channels if cu_seqlens is None else channels.flatten(0, -2))


def tap_norm(attention: nn.Module, path: str, taps: Mapping[str, Tap]) -> list[Callable[[], None]]:
    """Takes what an attention module's query and key norms put out; returns what undoes it.

    Args:
        attention, path: the module, and its name.
        taps: what takes them, for "q" and "k".

    Raises:
        ValueError: if there is no such norm.
    """
    undo = []
    for kind, tap in taps.items():
        names = f"{kind}_norm", f"{kind}_layernorm"
        norm = next((m for name in names if isinstance(m := getattr(attention, name, None), nn.Module)), None)
        if norm is None:
            raise ValueError(
                f"site: 'norm' needs a {' or '.join(names)} in {path}, a {type(attention).__name__}, which has "
                "neither; use site='projection'"
            )
        undo.append(norm.register_forward_hook(partial(_take_norm, tap)).remove)
    return undo


def _take_norm(tap: Tap, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    return tap(out, out if out.ndim == 3 else _by_token(out, tap.heads)) if module.training else out


def _by_token(y: Tensor, heads: int) -> Tensor:
    """[B, T, heads, channels] or [B, heads, T, channels] as [B, T, heads · channels]."""
    # With as many heads as tokens, strides tell: heads lie next to one another in what a projection put out.
    heads_first = y.shape[1] == heads and (y.shape[2] != heads or y.stride(1) < y.stride(2))
    return (y.transpose(1, 2) if heads_first else y).flatten(2)


def tap_rope(attention: nn.Module, path: str, taps: Mapping[str, Tap]) -> list[Callable[[], None]]:
    """Takes the queries and keys that an attention module hands to its attention function; returns what undoes it.

    The module looks that function up in transformers' attention registry, by a name in its config: it gets a config of
    its own that names ours, which takes them and goes on to the one before.

    Args:
        attention, path: the module, and its name.
        taps: what takes them, for "q" and "k".

    Raises:
        ValueError: if the module does not use the registry.
    """
    modelling = sys.modules[type(attention).__module__]
    registry = getattr(modelling, "ALL_ATTENTION_FUNCTIONS", None)
    config: Any = getattr(attention, "config", None)
    if registry is None or config is None:
        raise ValueError(
            f"site: 'rope' needs attention that takes its function from transformers' registry; {path}, a "
            f"{type(attention).__name__}, does not; use site='projection'"
        )
    registry[_NAME] = _tapped_attention
    own = copy.copy(config)
    own._attn_implementation_internal = _NAME
    attention.config = own  # type: ignore[assignment]
    attention._longact = config, taps  # type: ignore[assignment]

    return [partial(_restore_config, attention)]


def _restore_config(attention: Any) -> None:
    attention.config, _ = attention._longact
    del attention._longact


def _tapped_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    config, taps = module._longact
    if module.training:
        query, key = (
            taps[kind](states, states.transpose(1, 2).flatten(2)) if kind in taps else states
            for kind, states in (("q", query), ("k", key))
        )
    modelling = sys.modules[type(module).__module__]
    attend = modelling.ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, getattr(modelling, "eager_attention_forward", None)
    )
    return attend(module, query, key, value, *args, **kwargs)
