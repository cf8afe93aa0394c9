"""Finding the layers of a model to train sparsely: query and key projections by its attention's structure, or all."""

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from longact_kernels.sparse import engines
from longact_kernels.sparse.config import ALL_LINEAR, Ranges, TargetModules
from longact_kernels.warning import LongActWarning


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


class Projection(NamedTuple):
    """A linear layer to train sparsely, such as one that makes queries, keys, or both.

    Attributes:
        name: its module path.
        module: an `nn.Linear`, or a `Conv1D`, whose weight is stored [in, out].
        heads: of the output channels, in their order; the sizes add up to the output features.
        attention: path of the module that holds it, for queries and keys their attention.
        transposed: whether the weight is stored [in, out].
    """

    name: str
    module: nn.Module
    heads: tuple[Head, ...]
    attention: str
    transposed: bool


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


def _latent(attention: AttentionSizes, N: int) -> list[Head] | None:
    """Latent attention, from the latent up: for each head its key without the rotary part, then its value."""
    d, v = attention.number("qk_nope_head_dim"), attention.number("v_head_dim")
    return [Head(d, "k"), Head(v, None)] * (N // (d + v)) if d and v and N % (d + v) == 0 else None


def _gated_latent_query(attention: AttentionSizes, N: int) -> list[Head] | None:
    """Latent attention: for each head its query, then the gate of its value."""
    d, v = attention.number("qk_head_dim"), attention.number("v_head_dim")
    return [Head(d, "q"), Head(v, None)] * (N // (d + v)) if d and v and N % (d + v) == 0 else None


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
    "q_gate_proj": _gated_latent_query,
    "kv_b_proj": _latent,
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

# Parts of a language model whose queries or keys are not those that its text attends with.
ELSEWHERE = re.compile(
    r"cross_?att(n|ention)|encoder_(decoder_)?att(n|ention)|enc_?dec_?att|vision|visual|image|audio|speech|indexer|compressor",
    re.I,
)
# What says where tokens go, to which expert or stream, and how much of it counts.
ROUTER = re.compile(r"(^|\.)(gate|\w*router|shared_expert_gate|altup)(\.|$)")
# An expert that is called with its own tokens.
EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
# A path inside one of a stack of blocks.
IN_BLOCK = re.compile(r"(^|\.)\d+\.")
# Names that say that a layer makes queries or keys, perhaps along with values.
QUERY_KEY = re.compile(r"(?<![a-z])w?(q|k|qk|kv|qkv)(?![a-z])|query|key", re.I)


def find_projections(model: nn.Module, target_modules: TargetModules | None = None) -> list[Projection]:
    """The linear layers to train sparsely, in the order of the model's modules.

    Without `target_modules`, the self-attention of the language model is searched for layers by their usual names,
    separate (`q_proj`, `k_proj`), fused with the values (`qkv_proj`, `query_key_value`, `c_attn`) or up from a latent
    (`q_b_proj`, `kv_b_proj`); where in a fused layer queries, keys and values lie follows from its name and its sizes.
    Left dense: cross-attention, vision and audio towers, linear attention and other recurrences, and keys that are
    the values too.

    Args:
        model: a language model, or a multimodal model around one.
        target_modules: where to look instead. "all-linear": all linear layers of the language model's blocks, with no
            output channel left dense; not its cross-attention, routers, nor experts that are no linear layers. A list
            of name endings, as in PEFT: layers called `name` or `….name`, in the whole model; the channels of those
            that are neither queries nor keys compete within the layer. Any other string: a regular expression that the
            whole path matches. A function `(path, module) -> ranges`: a list of `(start, stop, head size)` output
            channels that compete (the others stay dense), or None for a module that is no such layer.

    Warns:
        LongActWarning: "all-linear" leaves weights of the blocks dense, which are named.

    Raises:
        ValueError: if there are none (naming the linear layers seen), if one cannot be trained row by row (quantised,
            adapted, already salient), if two share a weight, if none requires a gradient, or if the heads of one cannot
            be told.
    """
    config = getattr(model, "config", None)
    _check_text(model, config)
    found = []
    for path, parent, module, ranges in _candidates(model, target_modules):
        attention, _, name = path.rpartition(".")
        if (inner := getattr(module, "linear", None)) is not None and isinstance(inner, nn.Linear):
            path, module = f"{path}.linear", inner
        transposed = _check_plain(path, module)
        N = _weight(module).shape[1 if transposed else 0]
        if ranges is None:
            heads = _heads(path, name, AttentionSizes(parent, config), N)
        else:
            heads = _heads_of_ranges(path, name, ranges, N)
        if target_modules == ALL_LINEAR:
            heads = tuple(head if head.kind else head._replace(kind="other") for head in heads)
        if any(head.kind for head in heads):
            found.append(Projection(path, module, heads, attention, transposed))
    if not found:
        raise ValueError(_nothing_found(model, target_modules))
    first: dict[int, str] = {}
    for projection in found:
        other = first.setdefault(id(_weight(projection.module)), projection.name)
        if other != projection.name:
            raise ValueError(
                f"model: {projection.name} shares its weight with {other}; needed a weight each, since each has a set "
                "of its own; choose other layers with target_modules"
            )
    if not any(_weight(projection.module).requires_grad for projection in found):
        raise ValueError(
            f"model: none of the {len(found)} layers to train sparsely requires a gradient (the first is "
            f"{found[0].name}); unfreeze their weights with requires_grad_(True), or train without LongAct: adapters "
            "beside frozen weights have no rows to choose from"
        )
    return found


def _check_text(model: nn.Module, config: Any) -> None:
    """Raises for models whose calls do not say of all their attention which tokens are padding."""
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: {name} is an encoder with a decoder, whose calls have two lengths and two masks; needed a decoder "
            "or an encoder alone, such as a causal language model"
        )
    told = getattr(model, "main_input_name", "input_ids")
    if told not in ("input_ids", "inputs_embeds"):
        raise ValueError(f"model: {name} reads {told}, not tokens; needed a language model")


def _candidates(
    model: nn.Module, target_modules: TargetModules | None
) -> Iterator[tuple[str, nn.Module, nn.Module, Ranges | None]]:
    """Path, parent and module of every layer to take, and the ranges that a callable `target_modules` gave."""
    if target_modules is None:
        for name, parent in _text_modules(model):
            if _is_recurrence(parent):
                continue
            for child, module in parent.named_children():
                query = next((q for q, k in PAIRS.items() if k == child), child)
                if child in LAYOUTS and hasattr(parent, query) and not _is_container(module):
                    yield f"{name}.{child}" if name else child, parent, module, None
        return
    if target_modules == ALL_LINEAR:
        attending = {path: parent for path, parent, *_ in _candidates(model, None)}
        for path in _block_linears(model):
            known = next((one for one in (path, path.removesuffix(".linear")) if one in attending), None)
            if known is None:
                yield path, model, model.get_submodule(path), ()
            else:
                yield known, attending[known], model.get_submodule(known), None
        return
    for path, module in model.named_modules():
        match = _match(target_modules, path, module)
        if match is not None and match is not False:
            parent = model.get_submodule(path.rpartition(".")[0])
            yield path, parent, module, None if match is True else match


def _match(target_modules: TargetModules, path: str, module: nn.Module) -> Ranges | bool | None:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, path) is not None
    if callable(target_modules):
        return target_modules(path, module)
    return any(path == end or path.endswith(f".{end}") for end in target_modules)


def _block_linears(model: nn.Module) -> list[str]:
    """Paths of all linear layers in the language model's blocks, but for routers; warns of what else is there."""
    found, left = [], []
    for path, module in _text_modules(model):
        if not IN_BLOCK.search(path) or ROUTER.search(path):
            continue
        # Subclasses of modelling files may compute something else, and Mamba's kernels take the weights themselves.
        other = type(module).__module__.startswith("transformers.models.") and not _is_product(module)
        mamba = {"A_log", "D"} <= model.get_submodule(path.rpartition(".")[0])._parameters.keys()
        if isinstance(module, nn.Linear) and (other or mamba):
            left.append(f"{path}.weight")
        elif isinstance(module, nn.Linear) or _is_conv1d(module) or hasattr(module, "base_layer"):
            found.append(path)
        elif not isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding)):
            own = module.named_parameters(recurse=False)
            left += [f"{path}.{name}" for name, p in own if sum(size > 1 for size in p.shape) > 1]
    left = [name for name in left if model.get_parameter(name).requires_grad]
    if found and left:
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in left)
        warnings.warn(
            f"target_modules: {ALL_LINEAR!r} leaves {', '.join(names)} dense: no linear layers, or not used as such; "
            "to save their memory as well, freeze them with requires_grad_(False)",
            LongActWarning,
            stacklevel=2,
        )
    return found


def _text_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the language model in `model`, but for its cross-attention and the towers beside it."""
    text = model
    # A wrapper's decoder may be a wrapper itself; some models call their last linear layer the decoder.
    while callable(getattr(text, "get_decoder", None)):
        decoder: Any = text.get_decoder()  # type: ignore[operator]
        if decoder is text or not any(decoder.children()):
            break
        text = decoder
    prefix = next(name for name, module in model.named_modules() if module is text)
    for inner, module in text.named_modules():
        if not ELSEWHERE.search(inner):
            yield ".".join(part for part in (prefix, inner) if part), module


def _is_recurrence(attention: nn.Module) -> bool:
    """Whether this is linear attention: a state that decays, instead of a softmax over tokens."""
    names = [name for name, _ in attention.named_parameters()] + [name for name, _ in attention.named_buffers()]
    return any(name.rpartition(".")[2] in ("A_log", "slope_rate") for name in names)


def _is_container(module: nn.Module) -> bool:
    """Whether a module that bears a projection's name holds projections with names of their own."""
    return any(child in LAYOUTS for child, _ in module.named_children())


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, a linear layer whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_product(module: nn.Module) -> bool:
    """Whether a linear layer computes x Wᵀ + b; a subclass may have more to it."""
    # Falcon's only writes the same product in another way.
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "FalconLinear"


def _weight(module: nn.Module) -> torch.Tensor:
    assert isinstance(module.weight, torch.Tensor)
    return module.weight


def _check_plain(path: str, module: nn.Module) -> bool:
    """Raises where a layer cannot be trained row by row; returns whether its weight is stored [in, out]."""
    if getattr(module, "salient", None) is not None:
        raise ValueError(
            f"model: {path} is a {type(module).__name__} already; call restore() on the LongAct that swapped it in"
        )
    engines.refuse(path, module, ValueError)
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"model: {path} is a {kind}, an adapter around a linear layer; needed the plain layer: merge the adapter "
            "first (model = model.merge_and_unload()), or train the adapter alone, without LongAct"
        )
    transposed = _is_conv1d(module)
    if not transposed and not _is_product(module):
        raise ValueError(
            f"model: {path} is a {kind}; needed a plain torch.nn.Linear. If the model is quantised, load it in "
            "bfloat16 or float32 instead"
        )
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise ValueError(
            f"model: the weight of {path} is made by something else (a parametrisation, weight_norm, pruning); needed "
            "a plain parameter: remove that first"
        )
    weight = _weight(module)
    # Quantising libraries bring tensor types of their own; torch's DTensor shards an ordinary one.
    if type(weight.data).__module__.partition(".")[0] != "torch" or not weight.is_floating_point():
        raise ValueError(
            f"model: the weight of {path} is a {type(weight.data).__name__} of {weight.dtype}; needed a plain "
            "floating-point tensor. If the model is quantised, load it in bfloat16 or float32 instead"
        )
    return transposed


def _heads(path: str, name: str, attention: AttentionSizes, N: int) -> tuple[Head, ...]:
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


def _heads_of_ranges(path: str, name: str, ranges: Ranges, N: int) -> tuple[Head, ...]:
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


def _nothing_found(model: nn.Module, target_modules: TargetModules | None) -> str:
    seen = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    saw = f"saw {', '.join(seen) or 'no linear layers at all'}"
    if target_modules is None:
        return (
            f"model: no query or key projections in {type(model).__name__}; looked for q_proj, k_proj, qkv_proj and "
            f"other usual names, {saw}; name them with target_modules=[...]"
        )
    return f"target_modules: got {target_modules!r}, which matches no layer of {type(model).__name__}; {saw}"
