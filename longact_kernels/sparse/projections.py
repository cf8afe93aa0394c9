"""Finding the layers of a model to train sparsely: query and key projections by its attention's structure, or all."""

import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from longact_kernels.sparse import engines
from longact_kernels.sparse.config import ALL_LINEAR, Ranges, TargetModules
from longact_kernels.sparse.heads import LAYOUTS, PAIRS, AttentionSizes, Head, heads_of, heads_of_ranges
from longact_kernels.warning import LongActWarning


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
            adapted, already salient), if two share a weight, or if the heads of one cannot be told.
    """
    config = getattr(model, "config", None)
    _check_text(model, config)
    found = []
    for path, parent, module, ranges in _candidates(model, target_modules):
        attention, _, name = path.rpartition(".")
        if (inner := getattr(module, "linear", None)) is not None and isinstance(inner, nn.Linear):
            path, module = f"{path}.linear", inner
        transposed = _check_plain(path, module, "model" if target_modules in (None, ALL_LINEAR) else "target_modules")
        N = module.get_parameter("weight").shape[1 if transposed else 0]
        if ranges is None:
            heads = heads_of(path, name, AttentionSizes(parent, config), N)
        else:
            heads = heads_of_ranges(path, name, ranges, N)
        if target_modules == ALL_LINEAR:
            heads = tuple(head if head.kind else head._replace(kind="other") for head in heads)
        if any(head.kind for head in heads):
            found.append(Projection(path, module, heads, attention, transposed))
    if not found:
        raise ValueError(_nothing_found(model, target_modules))
    first: dict[int, str] = {}
    for projection in found:
        other = first.setdefault(id(projection.module.get_parameter("weight")), projection.name)
        if other != projection.name:
            raise ValueError(
                f"model: {projection.name} shares its weight with {other}; needed a weight each, since each has a set "
                "of its own; choose other layers with target_modules"
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
    if not isinstance(target_modules, str) and not callable(target_modules):
        paths = [path for path, _ in model.named_modules()]
        for end in target_modules:
            if not any(_match([end], path, model) for path in paths):
                raise ValueError(_nothing_found(model, [end]))
    for path, module in model.named_modules():
        match = _match(target_modules, path, module)
        if match is not None and match is not False:
            parent = model.get_submodule(path.rpartition(".")[0])
            yield path, parent, module, None if match is True else match


def _match(target_modules: TargetModules, path: str, module: nn.Module) -> Ranges | bool | None:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, path) is not None
    if callable(target_modules):
        match = target_modules(path, module)
        if match is None or isinstance(match, bool):
            return match
        try:
            ranges = [(start, stop, size) for start, stop, size in match]
        except (TypeError, ValueError):
            ranges = []
        if not ranges:
            raise ValueError(
                f"target_modules: the function gave {match!r} for {path!r}; needed a list of (start, stop, head size), "
                "or None for a module that stays as it is"
            )
        return ranges
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


def _check_plain(path: str, module: nn.Module, argument: str) -> bool:
    """Raises, by the argument that took it, where a layer cannot be trained row by row; returns whether its weight is
    stored [in, out]."""
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
            f"{argument}: {path or 'the whole model'} is a {kind}; needed a plain torch.nn.Linear. If the model is "
            "quantised, load it in bfloat16 or float32 instead"
        )
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise ValueError(
            f"model: the weight of {path} is made by something else (a parametrisation, weight_norm, pruning); needed "
            "a plain parameter: remove that first"
        )
    weight = module.get_parameter("weight")
    # Quantising libraries bring tensor types of their own; torch's DTensor shards an ordinary one.
    if type(weight.data).__module__.partition(".")[0] != "torch" or not weight.is_floating_point():
        raise ValueError(
            f"model: the weight of {path} is a {type(weight.data).__name__} of {weight.dtype}; needed a plain "
            "floating-point tensor. If the model is quantised, load it in bfloat16 or float32 instead"
        )
    return transposed


def _nothing_found(model: nn.Module, target_modules: TargetModules | None) -> str:
    seen = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    saw = f"saw {', '.join(seen) or 'no linear layers at all'}"
    if target_modules is None:
        return (
            f"model: no query or key projections in {type(model).__name__}; looked for q_proj, k_proj, qkv_proj and "
            f"other usual names, {saw}; name them with target_modules=[...]"
        )
    return f"target_modules: got {target_modules!r}, which matches no layer of {type(model).__name__}; {saw}"
