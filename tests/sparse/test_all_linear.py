"""`target_modules="all-linear"`: every linear layer of the blocks, sparse, with little memory, against plain torch."""

import copy
import re

import pytest
import torch
from models import SHAPE, checkpoint_activations, tiny_model, tokens
from ranks import on_ranks
from situations import HYPER, loss_of, top
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from longact_kernels import LongAct, LongActConfig, LongActWarning, SalientAdamW
from longact_kernels.sparse.projections import find_projections

# Of queries 3 of 10 in each head, of MLPs 1 in 10, of the others a quarter.
DENSITY = {"q_proj|k_proj": 0.3, "mlp": 0.1, "": 0.25}
LOWEST = {"density": DENSITY, "grad": "compact", "target_modules": "all-linear"}
STEPS, PIECES, CLIP = 4, 2, 0.5


def little_memory(model: nn.Module, **options) -> tuple[LongAct, SalientAdamW]:
    """The recipe: all that is no linear layer of a block is frozen, gradients and state are of salient rows alone."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        thaw(layer)
    longact = LongAct(model, **{**LOWEST, **options})
    return longact, SalientAdamW(model.parameters(), **HYPER, longact=longact, state="compact")


def thaw(block: nn.Module) -> None:
    for module in block.modules():
        module.requires_grad_(isinstance(module, nn.Linear))


def batch(step: int, piece: int) -> torch.Tensor:
    return tokens(4, seed=10 * step + piece)


def names_of(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in name]


def largest(saliency: torch.Tensor, name: str) -> list[int]:
    """The set of a layer, written out."""
    if name.endswith(("q_proj", "k_proj")):
        return top(saliency)
    share = 0.1 if "mlp" in name else 0.25
    return top(saliency, len(saliency), int(share * len(saliency) + 0.5))


def written_out(steps: int = STEPS) -> tuple[nn.Module, dict[str, list[int]]]:
    """The same training in plain torch: a dense backward, rows cut out, AdamW for each row of the set."""
    model = tiny_model()
    linears = {name: model.get_submodule(name) for name in names_of(model)}
    seen: dict[str, torch.Tensor] = {}
    for name, linear in linears.items():

        def keep(module, args, y, name=name):
            y = y.detach().abs().flatten(0, -2).amax(0)
            seen[name] = torch.maximum(seen[name], y) if name in seen else y

        linear.register_forward_hook(keep)
    sets: dict[str, list[int]] = {}
    state: dict[str, dict[int, list]] = {name: {} for name in linears}  # by row: step, moments
    (b1, b2), lr, eps, decay = HYPER["betas"], HYPER["lr"], HYPER["eps"], HYPER["weight_decay"]
    for step in range(steps):
        seen.clear()
        model.zero_grad()
        for piece in range(PIECES):
            loss_of(model(input_ids=batch(step, piece)).logits, batch(step, piece)).backward()
        now = {name: largest(saliency, name) for name, saliency in seen.items()}
        sets = sets or now  # a first step has none yet
        grads = {name: linears[name].weight.grad[rows] for name, rows in sets.items()}
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        scale = (CLIP / (norm + 1e-6)).clamp(max=1)
        with torch.no_grad():
            for name, rows in sets.items():
                # Moments of rows that have left are gone.
                kept = {row: state[name].get(row, [0, 0.0, 0.0]) for row in rows}
                for row, g in zip(rows, scale * grads[name], strict=True):
                    t, m, v = kept[row]
                    t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                    weight = linears[name].weight[row]
                    moved = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
                    linears[name].weight[row] = (1 - lr * decay) * weight - lr * moved
                    kept[row] = [t, m, v]
                state[name] = kept
        # The batch that chose a first set does not count again.
        sets = now if step else sets
    return model, sets


def train(run, model, longact, optimizer, steps=range(STEPS)) -> None:
    """The same by the package, on this rank's part of each batch."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for step in steps:
        for piece in range(PIECES):
            ids = batch(step, piece).chunk(size)[rank]
            (size * loss_of(run(input_ids=ids).logits, ids)).backward()
        longact.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def assert_as_written_out(model: nn.Module, sets: dict[str, torch.Tensor], steps: int = STEPS) -> None:
    expected, rows = written_out(steps)
    assert {name: index.tolist() for name, index in sets.items()} == rows
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", ["compact", "full", "checkpointed", "resumed"])
def test_trains_as_written_out_in_plain_torch(form):
    model = tiny_model()
    options = {"grad": "full"} if form == "full" else {}
    longact, optimizer = little_memory(model, **options)
    if form == "checkpointed":
        checkpoint_activations(model, use_reentrant=False)
    assert list(longact.layers) == names_of(model)
    half = STEPS // 2 if form == "resumed" else STEPS
    train(model, model, longact, optimizer, range(half))
    if form == "resumed":
        saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        model = tiny_model()
        model.load_state_dict(weights)
        longact, optimizer = little_memory(model)
        optimizer.load_state_dict(saved)
        train(model, model, longact, optimizer, range(half, STEPS))
    assert all(p.grad is None for p in model.parameters())
    assert_as_written_out(model, longact.sets)


def _rank(rank):
    model = tiny_model()
    longact, optimizer = little_memory(model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel is not needed"):
        DistributedDataParallel(model)  # compact gradients are averaged without it
    train(model, model, longact, optimizer)
    return model.state_dict(), longact.sets


def test_two_ranks_with_all_else_frozen_train_as_one():
    for state, sets in on_ranks(2, _rank):
        model = tiny_model()
        model.load_state_dict(state)
        assert_as_written_out(model, sets)


def half_frozen(grad: str = "compact") -> tuple[nn.Module, LongAct]:
    """The first block is frozen for two steps, and trains in two more."""
    model = tiny_model()
    model.requires_grad_(False)
    thaw(model.model.layers[1])
    longact = LongAct(model, **{**LOWEST, "grad": grad})
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact, state="compact")
    start = copy.deepcopy(model.model.layers[0].state_dict())
    train(model, model, longact, optimizer, range(2))
    assert all(torch.equal(held, start[name]) for name, held in model.model.layers[0].state_dict().items())
    assert all("layers.1." in name for name in longact.sets)
    if longact.compact is not None:
        trained = [layer for name, layer in longact.layers.items() if "layers.1." in name]
        numbers = sum(layer.salient.size * layer.in_features for layer in trained)
        assert longact.compact.flat.buffer.numel() == numbers + len(longact.layers)
        assert optimizer.salient_state_bytes()[1] == 8 * sum(layer.weight.numel() for layer in trained)
    thaw(model.model.layers[0])
    train(model, model, longact, optimizer, range(2, STEPS))
    return model, longact


def _half_frozen_rank(rank):
    model, longact = half_frozen()
    return model.state_dict(), longact.sets


@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_layers_take_no_memory_until_they_train(ranks):
    expected, longact = half_frozen("full")
    for state, sets in on_ranks(2, _half_frozen_rank) if ranks == 2 else [_half_frozen_rank(0)]:
        assert {name: index.tolist() for name, index in sets.items()} == {
            name: index.tolist() for name, index in longact.sets.items()
        }
        for name, p in expected.state_dict().items():
            torch.testing.assert_close(state[name], p, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_is_as_large_as_what_it_holds(tmp_path):
    """On disk: the state of salient rows, their sets and statistics, and some hundred bytes for each tensor."""
    sizes = {}
    for density in (0.1, 1.0):
        model = tiny_model(hidden_size=128, intermediate_size=256)
        longact, optimizer = little_memory(model.bfloat16(), density=density)
        train(model, model, longact, optimizer, range(2))
        path = tmp_path / f"{density}.pt"
        torch.save(optimizer.state_dict(), path)
        held = [held for state in optimizer.state_dict()["state"].values() for held in state.values()]
        of_sets = sum(
            5 * 8 * layer.salient.size + 2 * 4 * (layer.salient.channels.stop - layer.salient.channels.start)
            for layer in longact.layers.values()
        )
        ours, dense = optimizer.salient_state_bytes()
        sizes[density] = path.stat().st_size - 320 * len(held)
        assert sizes[density] <= ours + of_sets + 200 * len(longact.layers)
        assert ours <= 1.02 * density * dense + 64 * len(longact.layers) * 128
        model.save_pretrained(tmp_path / str(density))
        weights = (tmp_path / str(density) / "model.safetensors").stat().st_size
        assert weights <= sum(p.nbytes for p in model.parameters()) + 16_384
    assert sizes[0.1] < 0.13 * sizes[1.0]


def test_autocast_with_a_gradscaler_trains_as_without():
    models = [tiny_model() for _ in range(2)]
    for model, scale in zip(models, (1.0, 2.0**10), strict=True):
        longact, optimizer = little_memory(model)
        model.model.norm.requires_grad_()  # or the scaler sees no gradient
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model(input_ids=batch(step, 0)).logits, batch(step, 0))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert longact.skipped == 0
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    first = [model.model.layers[0].mlp.up_proj.weight for model in (models[0], tiny_model())]
    assert (first[0] != first[1]).any(1).sum() >= int(0.1 * SHAPE["intermediate_size"] + 0.5)


def test_a_gradscaler_that_would_see_nothing_says_so():
    model = tiny_model()
    longact, optimizer = little_memory(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with pytest.raises(RuntimeError, match=r"GradScaler sees no gradients at all, .* such as the norms"):
        for _ in range(2):  # gradients of a first step are whole
            scaler.scale(loss_of(model(input_ids=tokens()).logits, tokens())).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert longact.steps == 1


def test_values_of_a_fused_layer_compete_within_it():
    model = tiny_model("GPT2", hidden_size=40, num_hidden_layers=1)
    longact = LongAct(model, target_modules="all-linear", density=0.3)
    kinds = {
        p.name.rpartition(".")[2]: [h.kind for h in p.heads]
        for p in find_projections(tiny_model("GPT2", hidden_size=40))
    }
    seen = []
    model.transformer.h[0].attn.c_attn.register_forward_hook(
        lambda m, args, y: seen.append(y.abs().flatten(0, 1).amax(0))
    )
    loss_of(model(input_ids=tokens()).logits, tokens()).backward()
    longact.refresh()
    heads, values = seen[0][:80].detach(), seen[0][80:].detach()
    expected = top(heads) + [80 + i for i in top(values, 40, 12)]
    assert longact.sets["transformer.h.0.attn.c_attn"].tolist() == expected, kinds
    assert {n.rpartition("h.0.")[2] for n in longact.layers} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_names_beyond_queries_and_keys():
    model = tiny_model()
    found = find_projections(model, ["q_proj", "v_proj", "down_proj"])
    kinds = {p.name.rpartition(".")[2]: (len(p.heads), p.heads[0].kind) for p in found}
    assert kinds == {"q_proj": (4, "q"), "v_proj": (1, "other"), "down_proj": (1, "other")}
    for layer in model.model.layers:
        layer.self_attn.to_qkv = nn.Linear(32, 80)  # holds queries: no layer that competes as a whole
    with pytest.raises(ValueError, match=r"cannot tell the heads of model.layers.0.self_attn.to_qkv"):
        find_projections(model, ["to_qkv"])


def test_experts_that_are_no_linear_layers_are_named_once_and_stay_dense():
    model = tiny_model("Mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.warns(LongActWarning, match=r"dense") as caught:
        found = find_projections(model, "all-linear")
    assert len(caught) == 1 and "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj" in str(
        caught[0].message
    )
    assert {p.name.rpartition(".")[2] for p in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}


class Experts(nn.Module):
    """A mixture whose experts are linear layers, each called with its own tokens."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 2)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        tokens, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        scores = self.gate(tokens).softmax(-1)
        for i, expert in enumerate(self.experts):
            mine = (scores.argmax(-1) == i).nonzero().flatten()
            out = out.index_add(0, mine, expert(tokens[mine]) * scores[mine, i : i + 1])
        return out.view(x.shape)


def test_linear_experts_are_taken_with_whatever_tokens_they_get():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Experts()
    longact = LongAct(model, target_modules="all-linear", density=0.25, grad="compact", statistic="l2")
    assert not any("gate" in name for name in longact.layers)
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact, state="compact")
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    seen = []
    expert = model.model.layers[0].mlp.experts[1]
    expert.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    before = expert.weight.detach().clone()
    for _ in range(2):
        model(input_ids=tokens(), attention_mask=mask).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < len(seen[0]) < 24 and (expert.weight != before).any(1).sum() == 8
    rows = longact.sets["model.layers.0.mlp.experts.1"].tolist()
    assert rows == top(seen[1].square().sum(0).sqrt(), 32, 8)


def test_a_density_for_each_pattern():
    longact = LongAct(tiny_model(), target_modules="all-linear", density={r"layers\.0": 0.5, "_proj": 0.1})
    for name, layer in longact.layers.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2], 1)
        share = 0.5 if "layers.0." in name else 0.1
        assert layer.salient.size == heads * int(share * len(layer.weight) / heads + 0.5), name


@pytest.mark.parametrize(
    ("density", "message"),
    [
        ({}, "density: got no patterns"),
        ({"q_proj": 0.0, "": 1.0}, "density: got .*, needed a share above 0"),
        ({"q_proj": "many"}, "density: got .*, needed a share above 0"),
        ({"(": 0.3}, r"density: got the pattern '\(', needed a regular expression"),
        ({3: 0.3}, "density: got the pattern 3, needed a regular expression"),
        (
            {"q_proj": 0.3},
            "density: none of its patterns is found in model.layers.0.self_attn.k_proj.*'' is found in all",
        ),
        ({"": 0.3, "q_proj": 0.1}, "density: the pattern 'q_proj' is no layer's"),
        ({"qproj": 0.3, "": 0.1}, "density: the pattern 'qproj' is no layer's"),
    ],
)
def test_densities_that_do_not_fit_are_refused(density, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        LongAct(model, density=density)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("pattern", ["(", "*_proj", "[q"])
def test_target_modules_that_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(ValueError, match=r"^target_modules: got the pattern .*, needed a regular expression"):
        LongActConfig(target_modules=pattern)


def test_a_mapping_is_the_configs_own():
    given = {"": 0.3}
    config = LongActConfig(density=given)
    given[""] = 0.7
    assert config.density == {"": 0.3} and re.search("density={'': 0.3}", str(config))


@pytest.mark.parametrize("options", [{"site": "norm"}, {"site": "rope"}, {"pair_rope": True}])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "k_proj", "o_proj"]])
def test_what_is_about_queries_and_keys_is_refused_beyond_them(options, target):
    model = tiny_model("Qwen3")
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: .* and model.layers.0.* makes neither"):
        LongAct(model, target_modules=target, **options)


@pytest.mark.parametrize(
    "options", [{"axis": "columns"}, {"scope": "layer"}, {"scope": "model"}, {"selection": "current"}]
)
def test_other_options_go_together_with_it(options):
    model = tiny_model()
    longact = LongAct(model, target_modules="all-linear", density={"mlp": 0.1, "": 0.25}, **options)
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact)
    before = copy.deepcopy(model.state_dict())
    for step in range(2):
        loss_of(model(input_ids=batch(step, 0)).logits, batch(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in longact.layers.items():
        moved = (layer.weight != before[f"{name}.weight"]).any(1 if longact.axis == "rows" else 0)
        least = 0 if longact.scope == "model" else 1
        assert least <= moved.sum() <= 2 * layer.salient.size < 1.01 * 2 * 2 * 0.25 * len(moved) + 2, name


def test_another_density_of_one_layer_is_refused_when_resuming():
    model = tiny_model()
    longact, optimizer = little_memory(model)
    train(model, model, longact, optimizer, range(1))
    model = tiny_model()
    _, other = little_memory(model, density={**DENSITY, "mlp": 0.11})  # as many rows, of another share
    with pytest.raises(ValueError, match=r"mlp.gate_proj was saved with density=0.1, this LongAct has density=0.11"):
        other.load_state_dict(optimizer.state_dict())
