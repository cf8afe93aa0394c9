"""Which output channels of a projection are a head's query or key: by the projection's name and its attention's sizes.

Another model family whose projections lie in an order of their own gets a layout here.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from longact_kernels.sparse.config import Ranges


class Head(NamedTuple):
    """Neighbouring output channels of a projection that belong together.

    Attributes:
        size: how many they are.
        kind: "q" or "k": one head's query or key, whose channels compete with those of their kind; "other": channels
            that compete with all others of the layer, whatever their head; None: channels that train densely, such as
            values and gates.
    """

    size: int
    kind: str | None


class AttentionSizes:
    """What an attention module and its config tell about its heads."""

    def __init__(self, module: nn.Module, config: Any):
        self.module = module
        self.config = getattr(module, "config", None) or config

    def number(self, *names: str) -> int | None:
        """The first of the attributes that is a positive number, the module's before the config's."""
        for owner in (self.module, self.config):
            for name in names:
                # Configs with values for each layer raise when asked for the whole model's.
                try:
                    value = getattr(owner, name, None)
                except ValueError:
                    value = None
                if isinstance(value, int) and value > 0:
                    return value
        return None

    @property
    def q_heads(self) -> int | None:
        return self.number("num_heads", "num_attention_heads", "n_heads", "n_head")

    @property
    def kv_heads(self) -> int | None:
        return self.number("num_key_value_heads", "num_kv_heads")

    @property
    def size(self) -> int | None:
        size = self.number("qk_head_dim", "head_dim", "head_size", "attention_head_size", "attn_head_size", "dim_head")
        if size is None and (hidden := self.number("hidden_size", "embed_dim", "d_model")) and self.q_heads:
            size = hidden // self.q_heads
        return size


# A layout tells the heads of N output channels, or None where its numbers do not add up.
Layout = Callable[[AttentionSizes, int], list[Head] | None]


def _query(attention: AttentionSizes, N: int) -> list[Head] | None:
    d, H = attention.size, attention.q_heads
    if d and H and 2 * d * H == N:
        # Gated attention: each head's query is followed by its gate.
        return [Head(d, "q"), Head(d, None)] * H
    return [Head(d, "q")] * (N // d) if d and N % d == 0 and H in (None, N // d) else None


def _key(attention: AttentionSizes, N: int) -> list[Head] | None:
    if getattr(attention.module, "v_proj", attention) is None:
        # What makes the keys makes the values too.
        return [Head(N, None)]
    d = attention.size
    return [Head(d, "k")] * (N // d) if d and N % d == 0 else None


def _key_value_heads(attention: AttentionSizes, N: int) -> tuple[int, int, int] | None:
    """Size of a head and numbers of query and of key heads where N channels hold queries, keys and values."""
    d, H = attention.size, attention.q_heads
    if not d or not H or N % d or (N // d - H) % 2 or N // d <= H:
        return None
    kv_heads = (N // d - H) // 2
    return (d, H, kv_heads) if H % kv_heads == 0 else None


def _blocks(attention: AttentionSizes, N: int) -> list[Head] | None:
    """All queries, all keys, all values."""
    if not (found := _key_value_heads(attention, N)):
        return None
    d, H, kv_heads = found
    return [Head(d, "q")] * H + [Head(d, "k")] * kv_heads + [Head(d, None)] * kv_heads


def _grouped(attention: AttentionSizes, N: int) -> list[Head] | None:
    """For each key head: the queries that look at it, the key, the value. In blocks where ChatGLM shares keys."""
    if getattr(attention.module, "multi_query_attention", False):
        return _blocks(attention, N)
    if not (found := _key_value_heads(attention, N)):
        return None
    d, H, kv_heads = found
    return ([Head(d, "q")] * (H // kv_heads) + [Head(d, "k"), Head(d, None)]) * kv_heads


def _four_shards(attention: AttentionSizes, N: int) -> list[Head] | None:
    """Four shards, each a block of queries, of values, of keys."""
    d, H = attention.size, attention.q_heads
    if not d or not H or H % 4 or 3 * d * H != N:
        return None
    return ([Head(d, "q")] * (H // 4) + [Head(d, None)] * (H // 4) + [Head(d, "k")] * (H // 4)) * 4


def _keys_values(attention: AttentionSizes, N: int) -> list[Head] | None:
    """All keys, all values. Of another size, they are the same or are compressed further: neither is told apart."""
    d, kv_heads = attention.size, attention.kv_heads
    if not d or not kv_heads or 2 * d * kv_heads != N:
        return [Head(N, None)]
    return [Head(d, "k")] * kv_heads + [Head(d, None)] * kv_heads


def _latent(kind: str, size: str, attention: AttentionSizes, N: int) -> list[Head] | None:
    """Latent attention: for each head its query or key, without a rotary part that lies elsewhere, then its value."""
    d, v = attention.number(size), attention.number("v_head_dim")
    return [Head(d, kind), Head(v, None)] * (N // (d + v)) if d and v and N % (d + v) == 0 else None


def _unknown(attention: AttentionSizes, N: int) -> None:
    return None


# Separate projections, under the names that stand together in one module: a `key` without a `query` is no attention.
PAIRS = {
    "q_proj": "k_proj",
    "query": "key",
    "query_proj": "key_proj",
    "q_lin": "k_lin",
    "project_q": "project_k",
    "Wq": "Wk",
    "wq": "wk",
}
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(PAIRS, _query),
    **dict.fromkeys(PAIRS.values(), _key),
    "query_key": _query,
    "q_b_proj": _query,
    "q_gate_proj": partial(_latent, "q", "qk_head_dim"),  # what follows a query is its gate
    "kv_b_proj": partial(_latent, "k", "qk_nope_head_dim"),
    "kv_proj": _keys_values,
    "query_key_value": _grouped,
    "wqkv": _grouped,
    "qkv_proj": _blocks,
    "c_attn": _blocks,
    "Wqkv": _blocks,
    "W_pack": _blocks,
}
# Modules that use a name in another way.
LAYOUTS_OF_CLASS: dict[tuple[str, str], Layout] = {
    ("GPTBigCodeAttention", "c_attn"): _grouped,
    ("CodeGenAttention", "qkv_proj"): _four_shards,
}

# Names that say that a layer makes queries or keys, perhaps along with values.
QUERY_KEY = re.compile(r"(?<![a-z])w?(q|k|qk|kv|qkv)(?![a-z])|query|key", re.I)


def heads_of(path: str, name: str, attention: AttentionSizes, N: int) -> tuple[Head, ...]:
    """The heads of a projection of N output channels, by its name; `path` is for the error."""
    layout = LAYOUTS_OF_CLASS.get((type(attention.module).__name__, name), LAYOUTS.get(name))
    if layout is None:
        # A name of the user's: queries or keys alone, or neither; where values lie beside them, nobody knows.
        says = QUERY_KEY.search(name)
        if says is None:
            return (Head(N, "other"),)
        layout = _unknown if "v" in says[0].lower() else _key if _says_key(name) else _query
    heads = layout(attention, N)
    if heads is None:
        raise ValueError(
            f"model: cannot tell the heads of {path} from {attention.size} channels a head and {attention.q_heads} "
            f"query heads: it has {N} output channels; pass target_modules=lambda path, module: [(start, stop, "
            f"head_size), ...] if path.endswith({name!r}) else None, with the ranges of the queries and keys"
        )
    return tuple(heads)


def _says_key(name: str) -> bool:
    return "k" in name.lower() and "q" not in name.lower()


def heads_of_ranges(path: str, name: str, ranges: Ranges, N: int) -> tuple[Head, ...]:
    """The heads that ranges of the user's name; the channels between them train densely."""
    heads: list[Head] = []
    end = 0
    for start, stop, size in sorted(ranges):
        if not end <= start < stop <= N or size < 1 or (stop - start) % size:
            raise ValueError(
                f"target_modules: got the range ({start}, {stop}, {size}) for {path}, which has {N} output channels; "
                "needed ranges that do not overlap, each a multiple of its head size"
            )
        heads += [Head(start - end, None)] * (start > end)
        heads += [Head(size, "k" if _says_key(name) else "q")] * ((stop - start) // size)
        end = stop
    return (*heads, *[Head(N - end, None)] * (end < N))
