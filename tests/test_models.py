"""Finding the projections of a model, and what is said where there are none to be had."""

import pytest
import torch
from conftest import tiny_model

from longact_kernels import LongAct
from longact_kernels.models import find_projections


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
        pass

    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.k_proj = Quantised(32, 20, bias=False)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj is a .*Quantised; needed a plain"):
        LongAct(model)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


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
