"""Finding the projections of a model, and what is said where there are none to be had."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import backward, tiny_model, tokens

from longact_kernels import LongAct
from longact_kernels.sparse.projections import find_projections


def test_finds_every_projection_with_its_head_size(model):
    found = find_projections(model)
    names = [f"model.layers.{i}.self_attn.{which}_proj" for i in (0, 1) for which in "qk"]
    assert [projection.name for projection in found] == names
    assert {head.size for projection in found for head in projection.heads} == {10}
    assert all(projection.module is model.get_submodule(projection.name) for projection in found)


def test_head_size_from_the_config_alone():
    model = tiny_model(head_dim=None)
    for layer in model.model.layers:
        del layer.self_attn.head_dim
    assert {head.size for projection in find_projections(model) for head in projection.heads} == {32 // 4}


def test_no_projections_names_what_was_looked_for_and_what_is_there():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    model.add_module("gate", torch.nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"^model: no query or key .* q_proj, k_proj.*, saw 0, gate; name them with target_mod"
    ):
        LongAct(model)
    with pytest.raises(ValueError, match=r"no linear layers at all; "):
        LongAct(torch.nn.ReLU())


def test_projections_that_are_no_plain_linear_are_refused():
    class Quantised(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.k_proj = Quantised(32, 20, bias=False)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj is a .*Quantised; needed a plain"):
        LongAct(model)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_a_subclass_with_linears_forward_is_a_linear():
    class Configured(torch.nn.Linear):
        """As torchtitan's, which is built from a config."""

    model = tiny_model()
    model.model.layers[1].self_attn.k_proj = Configured(32, 20, bias=False)
    longact = LongAct(model)
    backward(model, tokens())
    longact.advance()
    assert len(longact.sets["model.layers.1.self_attn.k_proj"]) == 2 * 3
    assert type(longact.restore().model.layers[1].self_attn.k_proj) is Configured


def test_a_second_longact_on_a_model_is_refused():
    model = tiny_model()
    LongAct(model)
    with pytest.raises(ValueError, match=r"SalientLinear already; call restore\(\)"):
        LongAct(model)


def test_unknown_head_size_is_an_error_that_says_where_it_is_looked_for():
    model = torch.nn.Module()
    model.q_proj = torch.nn.Linear(4, 12)
    with pytest.raises(
        ValueError, match=r"the heads of q_proj from None channels a head and .* 12 output channels; pass target_"
    ):
        LongAct(model)
    model.head_dim = 5
    with pytest.raises(ValueError, match=r"the heads of q_proj from 5 channels a head and .* 12 output channels"):
        LongAct(model)


def test_target_modules_by_ending_expression_and_function(model):
    every = [projection.name for projection in find_projections(model)]
    queries = [name for name in every if name.endswith("q_proj")]
    assert [p.name for p in find_projections(model, ["q_proj"])] == queries
    assert [p.name for p in find_projections(model, ["self_attn.k_proj", "q_proj"])] == every
    assert [p.name for p in find_projections(model, r".*layers\.1\..*q_proj")] == queries[1:]
    assert find_projections(model, lambda path, module: None if "q_proj" not in path else [(0, 40, 10)]) == (
        find_projections(model, ["q_proj"])
    )


def test_target_modules_of_a_layer_with_a_name_of_its_own():
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.mixed = torch.nn.Linear(32, 50)
    ranges = [(5, 25, 10), (30, 40, 5)]
    found = find_projections(model, lambda path, module: ranges if path.endswith("mixed") else None)
    assert [head.kind is None for head in found[0].heads] == [True, False, False, True, False, False, True]
    assert [head.size for head in found[0].heads] == [5, 10, 10, 5, 5, 5, 10]
    longact = LongAct(model, target_modules=lambda path, module: ranges if path.endswith("mixed") else None)
    assert list(longact.layers) == [f"model.layers.{i}.self_attn.mixed" for i in (0, 1)]


@pytest.mark.parametrize(
    "ranges", [[(0, 41, 10)], [(0, 35, 10)], [(0, 20, 10), (10, 30, 10)], [(0, 20, 0)], [(5, 5, 1)]]
)
def test_ranges_that_do_not_fit_are_an_error(ranges):
    with pytest.raises(
        ValueError, match=r"^target_modules: got the range .* for model.layers.0.*, which has 40 output"
    ):
        find_projections(tiny_model(), lambda path, module: ranges if path.endswith("q_proj") else None)


@pytest.mark.parametrize("given", ["q", [], {}, [1, 2, 3], [(0, 8)], 4])
def test_a_function_of_target_modules_that_gives_no_ranges_is_named(given):
    with pytest.raises(ValueError, match=r"^target_modules: the function gave .* for '.*q_proj'; needed a list of"):
        LongAct(tiny_model(), target_modules=lambda path, module: given if path.endswith("q_proj") else None)


@pytest.mark.parametrize("function", [lambda: None, lambda path: None, lambda path, module, more: None, int.bit_length])
def test_a_function_of_target_modules_of_other_arguments_is_an_error(function):
    with pytest.raises(ValueError, match=r"^target_modules: the function cannot be called with a path and a module"):
        LongAct(tiny_model(), target_modules=function)


@pytest.mark.parametrize("names", [["all-linear"], ("q_proj", "all-linear")])
def test_all_linear_is_no_name_of_a_list(names):
    with pytest.raises(ValueError, match=r"^target_modules: 'all-linear' names all layers, .*; pass it alone"):
        LongAct(tiny_model(), target_modules=names)


@pytest.mark.parametrize("names", [["q_proj", "kproj"], ["q_proj ", "k_proj"], ["self_attn.q_proj", "k"]])
def test_a_name_of_a_list_that_no_layer_has_is_an_error(names):
    """A slip of the pen would train the layer densely."""
    with pytest.raises(ValueError, match=r"^target_modules: got \['.*'\], which matches no layer"):
        LongAct(tiny_model(), target_modules=names)


def test_a_function_of_target_modules_may_give_any_iterable_of_ranges():
    def heads(ranges):
        found = find_projections(tiny_model(), lambda path, module: ranges() if path.endswith("q_proj") else None)
        return [projection.heads for projection in found]

    assert heads(lambda: iter([(0, 8, 8)])) == heads(lambda: ([0, 8, 8],)) == heads(lambda: [(0, 8, 8)])


@pytest.mark.parametrize("names", [["self_attn"], ["mlp"], ["embed_tokens"], r"", lambda path, module: path == ""])
def test_target_modules_that_are_no_linear_layers_are_named(names):
    with pytest.raises(ValueError, match=r"^target_modules: .* is a .*; needed a plain torch.nn.Linear"):
        LongAct(tiny_model(), target_modules=names)


def test_target_modules_that_match_nothing():
    with pytest.raises(
        ValueError, match=r"^target_modules: got \['query'\], which matches no layer of LlamaFor.* k_proj"
    ):
        find_projections(tiny_model(), ["query"])


def test_a_vision_tower_stays_dense():
    import transformers
    from models import SHAPE

    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **SHAPE},
        vision_config={"model_type": "clip_vision_model", "patch_size": 4, **vision},
        image_token_index=3,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    assert any("vision" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    names = [f"model.language_model.layers.{i}.self_attn.{which}_proj" for i in (0, 1) for which in "qk"]
    assert [projection.name for projection in find_projections(model)] == names


def test_adapters_are_refused_with_what_to_do():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj", "k_proj"]))
    with pytest.raises(ValueError, match=r"q_proj is a peft.*, an adapter around a linear layer.*merge_and_unload"):
        LongAct(adapted)
    merged = adapted.merge_and_unload().requires_grad_(True)
    assert len(LongAct(merged).layers) == 4
    elsewhere = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"none of the 4 layers to train sparsely requires a gradient \(the first is"):
        LongAct(elsewhere)


def test_layers_spread_over_devices_are_refused_with_what_to_do():
    spread = tiny_model()
    spread.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="layers to train sparsely lie on cpu and meta; load the model on one device"):
        LongAct(spread)
    offloaded = tiny_model()
    add_hook_to_module(offloaded.model.layers[1].self_attn.k_proj, AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.k_proj has a forward of its own .* without device_map"):
        LongAct(offloaded)


def test_quantised_weights_are_refused():
    class Int4Tensor(torch.Tensor):
        """Stands for a quantising library's tensor inside a plain linear layer."""

    model = tiny_model()
    linear = model.model.layers[0].self_attn.k_proj
    weight = linear.weight.detach()
    linear.weight = torch.nn.Parameter(weight.as_subclass(Int4Tensor))
    with pytest.raises(
        ValueError, match=r"weight of model.layers.0.self_attn.k_proj is a Int4Tensor of .*quantised, load"
    ):
        LongAct(model)
    linear.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"weight of .*k_proj is a Tensor of torch.int8; needed a plain floating-point"
    ):
        LongAct(model)


def test_layers_that_share_a_weight_are_refused_and_a_tied_head_is_not():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(find_projections(model)) == 4
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.q_proj shares its weight with model.layers.0.self_attn.q_proj"
    ):
        LongAct(model)


@pytest.mark.parametrize(
    ("name", "attributes", "kinds"),
    [
        ("wqkv", {}, "qqk-qqk-"),
        ("query_key_value", {}, "qqk-qqk-"),
        ("query_key_value", {"multi_query_attention": True}, "qqqqkk--"),
        ("W_pack", {}, "qqqqkk--"),
    ],
)
def test_fused_layers_of_code_from_the_hub(name, attributes, kinds):
    model = torch.nn.Module()
    for attribute, value in {"num_heads": 4, "head_dim": 6, **attributes}.items():
        setattr(model, attribute, value)
    model.add_module(name, torch.nn.Linear(8, 48))
    (projection,) = find_projections(model)
    assert projection.heads == tuple((6, None if kind == "-" else kind) for kind in kinds)
    assert projection.attention == ""
