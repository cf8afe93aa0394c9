"""Every causal-LM family of the installed transformers: where its queries and keys are, by a witness of its own.

The witness is the model's gradient at the output of a projection. With one token the softmax has one entry, so that
queries and keys do not matter: their gradient is zero, that of values and gates is not. With two tokens and a causal
mask the query of the first still does not matter, but its key does. And where all but one head are cut off before the
output projection, the rows that matter are one head's.
"""

import copy
import re
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
import transformers
from families import CLASSES, family_model
from torch import nn

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.sparse.projections import Projection, find_projections
from longact_kernels.sparse.rotary import rotary_pairs

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

RECURRENT = "has no attention: a recurrence in place of the softmax over tokens"
SHARED = "shares one attention among layers, whose sets would be at odds"
# Families that are refused, and why.
REFUSED = {
    "falcon_mamba": RECURRENT,
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "rwkv": RECURRENT,
    "xlstm": RECURRENT,
    "zamba": SHARED,
    "zamba2": SHARED,
    "xlnet": "keeps its projections as bare three-dimensional parameters, not as linear layers",
}
# Families of which no tiny model can be built, and why.
UNBUILT = {
    "gemma3n": "its vision tower needs the timm package; the text model, gemma3n_text, works",
    "gemma4_assistant": "drafts for another model and is not trained by itself",
    "gemma4_unified_assistant": "drafts for another model and is not trained by itself",
}
# Where the witness says nothing, and why.
NO_WITNESS = {
    "blt": "bytes become patches, as many as their entropy asks for",
    "cpmant": "prompt tokens stand before the text",
    "prophetnet": "a token has several streams",
    **dict.fromkeys(("inkling2_text", "inkling2_loop_text"), "each token has an attention sink of its own"),
    "reformer": "its reversible layers make no graph",
}
MIXED_TOKENS = {"zaya": "a convolution over tokens follows the projections"}
MIXED_HEADS = {
    **dict.fromkeys(
        ("flex_olmo", "minimax_m2", "olmo2", "olmo3", "olmo_hybrid", "olmoe"), "queries are normalised across heads"
    ),
    **dict.fromkeys(("bitnet", "dory"), "results are normalised across heads"),
    "diffllama": "the result is a difference of two heads",
    "zaya": "a convolution mixes heads",
}
UNREPEATABLE = {"reformer": "draws its hashes anew at every call"}
OUTPUTS = ("o_proj", "out_proj", "o_a_proj", "attention_out", "out_lin", "c_proj", "Wo", "dense")


def gradients(model: nn.Module, found: list[Projection], T: int, head: int | None = None) -> dict[str, torch.Tensor]:
    """By projection, the gradient of a random sum of the logits at its output, [calls, T, N].

    With `head`, the output projections get the result of that head alone.
    """
    outputs: dict[str, list[torch.Tensor]] = {projection.name: [] for projection in found}
    handles = []
    for projection in found:

        def keep(module, args, output, name=projection.name):
            if output.requires_grad:
                output.retain_grad()
                outputs[name].append(output)

        handles.append(projection.module.register_forward_hook(keep))
        heads = query_heads(found, projection)
        if head is not None and heads:
            out = output_projection(model, projection)

            def cut(module, args, heads=heads):
                by_head = torch.zeros_like(args[0]).flatten(2).unflatten(2, (heads, -1))
                by_head[:, :, head] = 1
                return (args[0] * by_head.view(args[0].shape), *args[1:])

            if not out._forward_pre_hooks:
                handles.append(out.register_forward_pre_hook(cut))
    model.zero_grad(set_to_none=True)
    logits = run(model, T)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    for handle in handles:
        handle.remove()
    return {
        name: torch.stack([y.grad.reshape(T, -1) for y in ys if y.grad is not None]) if ys else torch.empty(0)
        for name, ys in outputs.items()
    }


def run(model: nn.Module, T: int) -> torch.Tensor:
    """The logits of random tokens, with the same dropout at every call."""
    streams = model.config.num_codebooks if "Musicgen" in type(model).__name__ else 1
    ids = torch.randint(5, 60, (T, streams), generator=torch.Generator().manual_seed(0)).T
    torch.manual_seed(0)
    return model(input_ids=ids, use_cache=False).logits.float()


def output_projection(model: nn.Module, projection: Projection) -> nn.Module:
    """The linear layer that takes the heads' results: beside the queries, or one module further out."""
    path = projection.attention
    while True:
        for name, module in model.get_submodule(path).named_modules():
            leaf = name.removesuffix(".linear").rpartition(".")[2]
            if leaf in OUTPUTS and isinstance(getattr(module, "weight", None), torch.Tensor):
                return module
        assert path, f"no output projection near {projection.name}"
        path = path.rpartition(".")[0]


def query_heads(found: list[Projection], projection: Projection) -> int:
    same = [p for p in found if p.attention == projection.attention]
    return sum(head.kind == "q" for p in same for head in p.heads)


def rows(projection: Projection, kind: str | None) -> torch.Tensor:
    return torch.cat([torch.full((head.size,), head.kind == kind) for head in projection.heads])


def head_rows(projection: Projection, kind: str, number: int) -> torch.Tensor:
    """The rows of the `number`th head of a kind."""
    count, masks = 0, []
    for head in projection.heads:
        masks.append(torch.full((head.size,), head.kind == kind and count == number))
        count += head.kind == kind
    return torch.cat(masks)


def pattern(projection: Projection) -> str:
    """What the output channels are: q, k or neither, such as "(q k -) x4"."""
    kinds = [kind or "-" for kind, _ in groupby(head.kind for head in projection.heads)]
    period = next(p for p in range(1, len(kinds) + 1) if kinds == kinds[:p] * (len(kinds) // p))
    text = " ".join(kinds[:period])
    return f"({text}) x{len(kinds) // period}" if period < len(kinds) else text


def table_row(family: str, found: list[Projection]) -> str:
    layers = {re.sub(r"\.\d+(?=\.|$)", "", p.name).removesuffix(".linear"): pattern(p) for p in found}
    shown = dict.fromkeys(f"`{name.rpartition('.')[2]}` {kinds}" for name, kinds in layers.items())
    notes = [
        *(NO_WITNESS[family] for _ in [0] if family in NO_WITNESS),
        *(MIXED_HEADS[family] for _ in [0] if family in MIXED_HEADS),
    ]
    return f"| `{family}` | {CLASSES[family]} | {', '.join(shown)} | {'; '.join(notes)} |"


def table() -> str:
    """The tables of docs/models.md, families in the order of their names."""
    works = [table_row(family, find_projections(family_model(family))) for family in sorted(WORKING)]
    refused = [f"| `{family}` | {CLASSES[family]} | {REFUSED[family]} |" for family in sorted(REFUSED)]
    unbuilt = [f"| `{family}` | {CLASSES[family]} | {UNBUILT[family]} |" for family in sorted(UNBUILT)]
    return "\n".join(
        [
            f"{len(works)} families work. The third column has their layers and what the output channels are: "
            "q query, k key, - dense.",
            "Where there is a note, gradients cannot tell all heads apart, and only names and sizes decide.\n",
            "| `model_type` | class | layers | note |",
            "|---|---|---|---|",
            *works,
            f"\n{len(refused)} are refused with a clear error:\n",
            "| `model_type` | class | reason |",
            "|---|---|---|",
            *refused,
            f"\n{len(unbuilt)} could not be tested:\n",
            "| `model_type` | class | reason |",
            "|---|---|---|",
            *unbuilt,
        ]
    )


WORKING = [family for family in CLASSES if family not in REFUSED | UNBUILT]


@pytest.fixture(scope="module")
def tiny(request):
    return strong(family_model(request.param))


def strong(model: nn.Module) -> nn.Module:
    """The model with weights that act as trained ones do, and without attention sinks, further entries of a softmax."""
    for name, p in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.constant_(p, -1e4)
        elif not name.endswith(".sqk"):  # Dory's scale of queries, in units of its first value
            nn.init.normal_(p, std=0.2)
    return model


every_family = pytest.mark.parametrize(
    ("family", "tiny"), [(family, family) for family in WORKING], indirect=["tiny"], ids=WORKING
)


@every_family
def test_queries_and_keys_are_where_the_model_uses_them(family, tiny):
    found = find_projections(tiny.eval())
    page = PAGE.read_text()
    # Another release of transformers than the page's may have families that it does not list.
    listed = f"| `{family}` |" in page or f"transformers {transformers.__version__.rpartition('.')[0]} " in page
    assert not listed or table_row(family, found) in page, f"run python tests/sparse/{Path(__file__).name}"
    if family not in NO_WITNESS:
        ask_the_gradients(tiny, found, family)


def ask_the_gradients(model: nn.Module, found: list[Projection], family: str) -> None:
    one, two = gradients(model, found, 1), gradients(model, found, 2)
    # RemBERT and RoFormer of transformers 5.17 are not.
    causal = torch.allclose(run(model, 1)[:, 0], run(model, 2)[:, 0], rtol=1e-3, atol=1e-3)
    for projection in found:
        q, k, dense = (rows(projection, kind) for kind in ("q", "k", None))
        g1, g2 = one[projection.name], two[projection.name]
        assert g2.numel(), f"{projection.name} does not matter"
        noise = 1e-3 * g2.abs().max()
        assert (g1[..., q | k].abs() <= noise).all(), f"{projection.name}: queries and keys matter to one token"
        assert (g1[..., dense] != 0).all(), f"{projection.name}: dense rows do not matter"
        first = g2[:, 0, q].abs() <= noise
        assert family in MIXED_TOKENS or not causal or first.all(), (
            f"{projection.name}: the first token's query matters"
        )
        assert (g2[:, 1, q] != 0).all(), f"{projection.name}: the second token's query does not matter"
        assert (g2[..., k] != 0).all(), f"{projection.name}: keys do not matter"
    if family in MIXED_HEADS:
        return
    only = gradients(model, found, 2, head=1)
    for projection in found:
        g, total = only[projection.name], query_heads(found, projection)
        for kind in "qk":
            heads = sum(head.kind == kind for head in projection.heads)
            if heads and total:
                own = head_rows(projection, kind, 1 if kind == "q" else heads // total)
                others = rows(projection, kind) & ~own
                noise = 1e-3 * g.abs().max()
                assert (g[..., others].abs() <= noise).all(), f"{projection.name}: another {kind} head matters"
                assert (g[:, 1, own].abs() > 0).all(), f"{projection.name}: the {kind} head does not matter"


VARIANTS = [
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "(q k -) x2"),
    ("falcon", {"multi_query": False, "num_kv_heads": 4}, "(q k -) x4"),
    ("gpt_bigcode", {"multi_query": False}, "(q k -) x4"),
    ("deepseek_v2", {"q_lora_rank": None}, "q"),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}, "q"),
    ("gemma4_text", {"attention_k_eq_v": True}, "q"),
    ("bert", {"add_cross_attention": True}, "q"),
    ("gpt2", {"add_cross_attention": True}, "q k -"),
]


@pytest.mark.parametrize(("family", "changes", "first"), VARIANTS)
def test_variants_of_a_family(family, changes, first):
    model = strong(family_model(family, **changes)).eval()
    found = find_projections(model)
    assert pattern(found[0]) == first
    assert not any("cross" in projection.name for projection in found)
    if "attention_k_eq_v" in changes:
        full = [p.name for p in found if f".{model.config.layer_types.index('full_attention')}." in p.name]
        assert len(full) == 1 and full[0].endswith("q_proj")
    ask_the_gradients(model, found, family)


@every_family
def test_a_step_moves_the_salient_rows_and_the_dense_ones(family, tiny):
    tiny.train()
    found = find_projections(tiny)
    classes = [type(projection.module) for projection in found]
    plain = run(tiny, 6).detach()
    weights = copy.deepcopy(tiny.state_dict())
    longact = LongAct(tiny)
    optimizer = SalientAdamW(tiny.parameters(), lr=0.1, weight_decay=0.0, longact=longact)
    tiny.zero_grad(set_to_none=True)
    logits = run(tiny, 6)
    assert family in UNREPEATABLE or torch.equal(logits, plain)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    optimizer.step()
    for projection in found:
        weight, layer = projection.module.weight, longact.layers[projection.name]
        if weight.grad is None:
            continue
        moved = (weight != weights[f"{projection.name}.weight"]).any(dim=0 if projection.transposed else 1)
        expected = rows(projection, None)
        expected[layer.salient.index] = True
        assert torch.equal(moved, expected)
        for kind in "qk":
            count = [int(0.3 * head.size + 0.5) for head in projection.heads if head.kind == kind]
            assert (moved & rows(projection, kind)).sum() == sum(count)
    longact.restore()
    assert [type(projection.module) for projection in found] == classes
    assert list(tiny.state_dict()) == list(weights)
    tiny.load_state_dict(weights)
    assert family in UNREPEATABLE or torch.equal(run(tiny, 6), plain)


# Linear layers in a numbered block that "all-linear" leaves dense: what their paths say.
LEFT = re.compile(
    r"router|\.gate(\.|$)|_expert_gate$|cross_?att|encoder_attn|indexer|compressor|altup|vision|image|visual|audio|lm_heads"
    r"|(mamba|mixer)\.(in|x|dt|out)_proj$|o_a_proj$"
)


@every_family
@pytest.mark.filterwarnings("ignore:target_modules. 'all-linear' leaves")
def test_all_linear_layers_of_the_blocks_train_in_their_salient_rows_alone(family, tiny):
    weights = copy.deepcopy(tiny.train().state_dict())
    longact = LongAct(tiny, target_modules="all-linear", density={"": 0.25}, grad="compact")
    for name, module in tiny.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and re.search(r"\.\d+\.", name) and not LEFT.search(name):
            assert name in longact.layers, f"{name} stays dense"
    optimizer = SalientAdamW(tiny.parameters(), lr=0.1, weight_decay=0.0, longact=longact, state="compact")
    tiny.zero_grad(set_to_none=True)
    logits = run(tiny, 6)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    reached = [name for name, layer in longact.layers.items() if layer.weight.grad is not None]
    optimizer.step()
    assert reached
    for name in reached:
        layer = longact.layers[name]
        moved = (layer.weight != weights[f"{name}.weight"]).any(0 if layer.salient.transposed else 1)
        expected = torch.zeros_like(moved)
        expected[longact.sets[name]] = True
        assert not (moved & ~expected).any() and moved.sum() <= 0.25 * len(moved) + len(layer.salient.heads), name
        assert (layer.weight.grad != 0).any() == moved.any(), name
    longact.restore()
    tiny.load_state_dict(weights)


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused(family):
    text = (
        "shares its weight with"
        if REFUSED[family] is SHARED
        else r"no query or key projections in \w+; .* saw .*target"
    )
    with pytest.raises(ValueError, match=f"^model: .*{text}"):
        find_projections(family_model(family))


# Rotary embeddings of every form: halves, neighbours, complex numbers, a part of the channels, first or last, by layer.
ROTARY = [
    "llama",
    "cohere",
    "glm",
    "phi",
    "stablelm",
    "persimmon",
    "gpt_neox",
    "phi3",
    "gpt_oss",
    "llama4_text",
    "laguna",
]
ROTARY += [
    "lfm3",
    "minimax_m2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
    "minicpm3",
    "qwen3_next",
    "olmo2",
    "helium",
]


@pytest.mark.parametrize("family", [family for family in ROTARY if family in CLASSES])
def test_rotary_pairs_are_what_a_query_is_turned_with(family):
    model = family_model(family)
    projection = next(p for p in find_projections(model) if any(head.kind == "q" for head in p.heads))
    attention = model.get_submodule(projection.attention)
    for name, module in attention.named_children():
        if "norm" in name and name.startswith("q") and module is not getattr(attention, "q_a_layernorm", None):
            # A norm over the head would mix its channels.
            module.forward = lambda x: x
    seen = []

    def look(module, query, key, value, *args, **kwargs):
        seen.append(query)
        return eager(module, query, key, value, *args, **kwargs)

    modelling = sys.modules[type(attention).__module__]
    eager = modelling.eager_attention_forward
    projection.module.register_forward_hook(lambda module, args, y: seen.append(y))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modelling, "eager_attention_forward", look)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "eager"
        run(model, 2)
    y, query = seen[:2]
    size = projection.heads[0].size
    pairs = rotary_pairs(attention, size)
    assert torch.equal(pairs[pairs], torch.arange(size)) and (pairs != torch.arange(size)).all()
    turned = 0
    for channel in query[0, 0, 1]:
        (gradient,) = torch.autograd.grad(channel, y, retain_graph=True)
        sources = gradient.reshape(-1, gradient.shape[-1])[1].nonzero().flatten().tolist()
        assert len(sources) <= 2
        if len(sources) == 2:
            turned += 1
            assert pairs[sources[0]] == sources[1]
    assert turned


def test_attention_without_rotary_embedding_says_so():
    model = family_model("gpt2")
    with pytest.raises(ValueError, match=r"^pair_rope: cannot tell the rotary pairs of GPT2Attention, heads of 8"):
        rotary_pairs(model.transformer.h[0].attn, 8)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition("<!-- families -->\n")
    PAGE.write_text(f"{before}<!-- families -->\n\n{table()}\n\n<!-- end{rest.partition('<!-- end')[2]}")
