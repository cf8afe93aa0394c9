"""The LongAct controller: statistics, selection, schedule, what it says about bad input, and what resuming needs."""

import copy
from functools import partial

import pytest
import torch
from models import backward, checkpoint_activations, tiny_model, tokens
from torch.utils.checkpoint import checkpoint

from longact_kernels import LongAct, SalientAdamW


def hooked_outputs(model, run) -> dict[str, torch.Tensor]:
    """What the q/k projections of an unpatched copy put out, taken by forward hooks: an independent witness."""
    outputs, plain = {}, copy.deepcopy(model)
    for name, module in plain.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(lambda m, i, out, name=name: outputs.__setitem__(name, out.detach().float()))
    run(plain)
    return outputs


def top(saliency: torch.Tensor, head_dim: int = 10, count: int = 3) -> list[int]:
    """The plain transcription of per-head selection with ties to the lower index."""
    chosen = []
    for start in range(0, len(saliency), head_dim):
        head = saliency[start : start + head_dim].tolist()
        best = sorted(range(head_dim), key=lambda i: (-head[i], i))[:count]
        chosen += [start + i for i in sorted(best)]
    return chosen


def sets(longact) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in longact.sets.items()}


def statistic_of(y: torch.Tensor, statistic: str, mask: torch.Tensor | None = None) -> torch.Tensor:
    kept = [row if mask is None else row[mask[i]] for i, row in enumerate(y)]
    if statistic == "absmax":
        return torch.cat(kept).abs().amax(0)
    return torch.stack([row.square().sum(0).sqrt() for row in kept]).mean(0)


@pytest.mark.parametrize("statistic", ["absmax", "l2"])
def test_saliency_and_set_are_those_of_the_projections_outputs(model, statistic):
    outputs = hooked_outputs(model, lambda plain: plain(tokens(3)))
    longact = LongAct(model, statistic=statistic)
    backward(model, tokens(3))
    longact.mask_gradients()
    for name, layer in longact.layers.items():
        expected = statistic_of(outputs[name], statistic)
        torch.testing.assert_close(longact.saliency(name), expected, rtol=1e-6, atol=0)
        assert layer.salient.index.tolist() == top(longact.saliency(name))
        outside = [i for i in range(layer.out_features) if i not in layer.salient.index.tolist()]
        assert layer.weight.grad[layer.salient.index].any(1).all() and not layer.weight.grad[outside].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("statistic", ["absmax", "l2"])
def test_padding_tokens_count_for_nothing(statistic, side):
    model = tiny_model()
    ids, mask = tokens(3), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = mask[2, :9] = 0
    mask = mask if side == "left" else mask.flip(1)
    model.get_input_embeddings().weight.data[0] *= 50  # the padding token would win every channel
    ids[mask == 0] = 0
    outputs = hooked_outputs(model, lambda plain: plain(ids, attention_mask=mask))
    longact = LongAct(model, statistic=statistic)
    backward(model, ids, attention_mask=mask)
    longact.mask_gradients()
    for name in longact.layers:
        expected = statistic_of(outputs[name], statistic, mask.bool())
        torch.testing.assert_close(longact.saliency(name), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("statistic", ["absmax", "l2"])
@pytest.mark.parametrize("selection", ["lagged", "current"])
def test_gradient_accumulation_chooses_what_one_batch_would(selection, statistic):
    results = []
    for pieces in (1, 4):
        model = tiny_model()
        longact = LongAct(model, statistic=statistic, selection=selection)
        optimizer = SalientAdamW(model.parameters(), lr=1e-3, longact=longact)
        for step in range(3):
            for piece in tokens(8, seed=step).chunk(pieces):
                backward(model, piece)
            optimizer.step()
            optimizer.zero_grad()
        results.append((sets(longact), [longact.saliency(name) for name in longact.layers]))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("statistic", ["absmax", "l2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_every_activation_once(statistic, reentrant):
    results = []
    for checkpointing in (False, True):
        model = tiny_model()
        longact = LongAct(model, statistic=statistic)
        if checkpointing:
            checkpoint_activations(model, reentrant)
            if reentrant:
                model.enable_input_require_grads()
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, :4] = 0
        for seed in (0, 1):
            backward(model, tokens(seed=seed), attention_mask=mask)
        longact.mask_gradients()
        results.append((sets(longact), torch.cat([longact.saliency(name) for name in longact.layers])))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_a_layer_called_through_checkpoint_alone_counts_once():
    from longact_kernels.functional import RunningStats, salient_linear

    x, weight = torch.randn(2, 5, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    for reentrant in (False, True):
        stats = RunningStats(torch.zeros(8), torch.zeros(8), torch.zeros(()))
        checkpoint(partial(salient_linear, stats=stats), x, weight, use_reentrant=reentrant).sum().backward()
        assert stats.sequences == 2


def test_evaluation_and_generation_leave_no_trace():
    model = tiny_model()
    longact = LongAct(model, refresh_every=3)
    optimizer = SalientAdamW(model.parameters(), lr=1e-3, longact=longact)
    for step in range(2):
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with torch.no_grad():
        model(tokens(seed=7))
        model.generate(tokens(seed=8), max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.eval()
    model(tokens(seed=9))
    model.train()
    after = optimizer.state_dict()["state"]
    for i in before:
        for key, value in before[i].items():
            if key != "salient_flags":  # says whether a forward came, not what was measured
                assert torch.equal(value, after[i][key]), key


def test_lagged_uses_the_batch_before_and_current_its_own():
    for selection in ("lagged", "current"):
        model = tiny_model()
        longact = LongAct(model, selection=selection)
        optimizer = SalientAdamW(model.parameters(), lr=1e-2, longact=longact)
        batch_sets, used = [], []
        for step in range(4):
            outputs = hooked_outputs(model, lambda plain, step=step: plain(tokens(seed=step)))
            batch_sets.append({name: top(statistic_of(y, "absmax")) for name, y in outputs.items()})
            backward(model, tokens(seed=step))
            longact.mask_gradients()
            grads = {name: layer.weight.grad for name, layer in longact.layers.items()}
            used.append({name: grad.any(1).nonzero().flatten().tolist() for name, grad in grads.items()})
            optimizer.step()
            optimizer.zero_grad()
        assert used == (batch_sets if selection == "current" else [batch_sets[0], *batch_sets[:3]])
        assert batch_sets[1] != batch_sets[2], "the batches must differ for this test to tell anything"


@pytest.mark.parametrize("selection", ["lagged", "current"])
def test_refresh_every_keeps_the_set_in_between(selection):
    model = tiny_model()
    longact = LongAct(model, selection=selection, refresh_every=3)
    optimizer = SalientAdamW(model.parameters(), lr=1e-2, longact=longact)
    used = []
    for step in range(7):
        backward(model, tokens(seed=step))
        longact.mask_gradients()
        used.append(sets(longact))
        optimizer.step()
        optimizer.zero_grad()
    changed = [step for step in range(1, 7) if used[step] != used[step - 1]]
    assert changed == [3, 6]


@pytest.mark.parametrize("selection", ["lagged", "current"])
def test_freeze_after_keeps_the_set_for_good_and_stops_measuring(selection):
    model = tiny_model()
    longact = LongAct(model, selection=selection, freeze_after=2)
    optimizer = SalientAdamW(model.parameters(), lr=1e-2, longact=longact)
    used, saliencies = [], []
    for step in range(5):
        backward(model, tokens(seed=step))
        longact.mask_gradients()
        used.append(sets(longact))
        optimizer.step()
        optimizer.zero_grad()
        saliencies.append(torch.cat([longact.saliency(name) for name in longact.layers]))
    # "lagged" chooses for the third step from the second's batch, and no more.
    last = 2 if selection == "lagged" else 1
    assert used[last - 1] != used[last] and all(later == used[last] for later in used[last:])
    assert all(torch.equal(later, saliencies[1]) for later in saliencies[2:])
    assert not longact._statistics.period.buffer.any()


def test_ema_averages_the_saliency_of_refreshes():
    model = tiny_model()
    longact = LongAct(model, ema=0.75)
    optimizer = SalientAdamW(model.parameters(), lr=1e-2, longact=longact)
    average = None
    for step in range(4):
        outputs = hooked_outputs(model, lambda plain, step=step: plain(tokens(seed=step)))
        now = {name: statistic_of(y, "absmax") for name, y in outputs.items()}
        average = now if average is None else {name: 0.75 * average[name] + 0.25 * now[name] for name in now}
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in longact.layers.items():
            torch.testing.assert_close(longact.saliency(name), average[name], rtol=1e-6, atol=0)
            assert layer.salient.index.tolist() == top(longact.saliency(name))


def test_strategies_bottom_and_random():
    def run(**options):
        model = tiny_model()
        longact = LongAct(model, **options)
        optimizer = SalientAdamW(model.parameters(), lr=1e-2, longact=longact)
        seen = []
        for step in range(3):
            backward(model, tokens(seed=step))
            optimizer.step()
            optimizer.zero_grad()
            seen.append(sets(longact))
        return longact, seen

    longact, seen = run(strategy="bottom")
    assert seen[-1] == {name: top(-longact.saliency(name)) for name in longact.layers}
    _, first = run(strategy="random", seed=1)
    _, again = run(strategy="random", seed=1)
    _, other = run(strategy="random", seed=2)
    assert first == again != other
    assert first[0] != first[1]
    assert all(sum(start <= row < start + 10 for row in rows) == 3 for rows in first[0].values() for start in (0, 10))


def test_paper_recipe_is_that_of_the_papers_equations():
    """Against a plain transcription: M, per-head top-k, masked gradient, stock AdamW, all from the step's own batch."""
    model, plain = tiny_model(), tiny_model()
    longact = LongAct.paper(model)
    optimizer, reference = (torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1) for net in (model, plain))
    longact.attach(optimizer)

    activations = {}
    for name in longact.layers:
        plain.get_submodule(name).register_forward_hook(
            lambda module, inputs, q, name=name: activations.__setitem__(name, q.detach())
        )
    for step in range(4):
        backward(model, tokens(3, seed=step))
        optimizer.step()
        optimizer.zero_grad()

        backward(plain, tokens(3, seed=step))
        for name, q in activations.items():
            sequences, length, channels = q.shape
            heads = q.view(sequences, length, channels // 10, 10)
            magnitude = heads.square().sum(1).sqrt().mean(0)  # M[h, d]
            keep = torch.zeros_like(magnitude, dtype=torch.bool)
            keep.scatter_(1, magnitude.topk(3, dim=1).indices, True)  # k = 0.3 · head_dim
            plain.get_submodule(name).weight.grad *= keep.view(-1, 1)
        reference.step()
        reference.zero_grad()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_scope_layer_lets_all_channels_compete():
    model = tiny_model()
    longact = LongAct(model, scope="layer", density=0.25)
    backward(model, tokens())
    longact.mask_gradients()
    for name, layer in longact.layers.items():
        assert layer.salient.index.tolist() == top(longact.saliency(name), layer.out_features, layer.out_features // 4)


def test_heads_of_different_sizes_in_one_model():
    torch.manual_seed(0)
    model = torch.nn.ModuleList([Attention(10), Attention(4), Attention(10)])
    longact = LongAct(model)
    sum(layer(torch.randn(2, 5, 6)) for layer in model).backward()
    longact.mask_gradients()
    for i, (head_dim, count) in enumerate([(10, 3), (4, 1), (10, 3)]):
        for name in (f"{i}.q_proj", f"{i}.k_proj"):
            rows = longact.layers[name].salient.index.tolist()
            assert rows == top(longact.saliency(name), head_dim, count)


def test_churn_is_one_minus_jaccard():
    model = tiny_model()
    longact = LongAct(model)
    optimizer = SalientAdamW(model.parameters(), lr=1e-2, longact=longact)
    seen = []
    for step in range(3):
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(sets(longact))
        if step == 0:
            assert longact.churn == {}
    for name, churn in longact.churn.items():
        old, new = set(seen[1][name]), set(seen[2][name])
        assert churn == pytest.approx(1 - len(old & new) / len(old | new))
    assert any(longact.churn.values())


def poison(model, value):
    model.model.layers[1].self_attn.k_proj.weight.data[7] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("statistic", ["absmax", "l2"])
def test_nonfinite_activations_are_an_error_that_names_the_layer(value, statistic):
    model = tiny_model()
    longact = LongAct(model, statistic=statistic)
    poison(model, value)
    backward(model, tokens())
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.self_attn\.k_proj"):
        longact.mask_gradients()


def test_nonfinite_skip_keeps_the_set():
    model = tiny_model()
    longact = LongAct(model, nonfinite="skip")
    optimizer = SalientAdamW(model.parameters(), lr=0.0)
    for step in range(3):
        if step == 1:
            before = sets(longact)
            poison(model, float("nan"))
        if step == 2:
            assert sets(longact) == before
            poison(model, 0.5)
        backward(model, tokens(seed=step))
        longact.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
    assert sets(longact) != before
    assert longact.skipped == 1 and longact.steps == 3


def test_a_step_without_statistics_says_what_to_do():
    model = tiny_model().eval()
    longact = LongAct(model)
    backward(model, tokens())
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        longact.mask_gradients()


@pytest.mark.parametrize(
    "argument",
    [
        {"density": 0.0},
        {"density": 1.5},
        {"density": -1},
        {"statistic": "l1"},
        {"scope": "token"},
        {"axis": "diagonal"},
        {"site": "value"},
        {"grad": "sparse"},
        {"threshold": -1.0},
        {"selection": "next"},
        {"refresh_every": 0},
        {"ema": 1.0},
        {"freeze_after": 0},
        {"strategy": "best"},
        {"nonfinite": "ignore"},
    ],
)
def test_bad_arguments_are_named_and_leave_the_model_alone(argument):
    model = tiny_model()
    (name, value), *_ = argument.items()
    with pytest.raises(ValueError, match=f"^{name}: got {value!r}, needed"):
        LongAct(model, **argument)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_moving_the_model_takes_the_statistics_and_sets_along():
    model = tiny_model()
    longact = LongAct(model)
    for _ in range(2):
        backward(model, tokens())
        longact.refresh()
    model.to("meta")
    longact.settle()
    for layer in longact.layers.values():
        salient = layer.salient
        assert salient.index.is_meta and all(kept.is_meta for kept in salient.stats.kept.values())


class Attention(torch.nn.Module):
    """Two projections and nothing else, for what needs no language model around it."""

    def __init__(self, head_dim: int = 10):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj = torch.nn.Linear(6, 4 * head_dim), torch.nn.Linear(6, 2 * head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x).sum() + self.k_proj(x).sum()


def attention_sets(statistic: str, rank: int | None = None) -> tuple[dict[str, list[int]], torch.Tensor]:
    """The sets chosen from a batch of 8 sequences, or from a rank's half of it."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(8, 5, 6)
    longact = LongAct(model, statistic=statistic)
    model(x if rank is None else x.chunk(2)[rank]).backward()
    longact.mask_gradients()
    return sets(longact), torch.cat([longact.saliency(name) for name in longact.layers])


def weight_in_forward(rank: int) -> torch.Tensor:
    """A salient weight that DistributedDataParallel ignores, and that the ranks began with different values of."""
    model = Attention()
    model.q_proj.weight.data.fill_(rank)
    LongAct(model, grad="compact")
    torch.nn.parallel.DistributedDataParallel(model)(torch.ones(8, 5, 6))
    return model.q_proj.weight.detach()


def _rank(rank, file, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    results = {statistic: attention_sets(statistic, rank) for statistic in ("absmax", "l2")}
    torch.save({**results, "weight": weight_in_forward(rank)}, folder / str(rank))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (folder / "rendezvous", folder), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in (0, 1)]


@pytest.mark.parametrize("statistic", ["absmax", "l2"])
def test_ranks_choose_the_set_of_the_whole_batch(of_ranks, statistic):
    chosen, saliency = attention_sets(statistic)
    for rank in (0, 1):
        assert of_ranks[rank][statistic][0] == chosen
        torch.testing.assert_close(of_ranks[rank][statistic][1], saliency, rtol=1e-6, atol=0)


def test_ranks_begin_with_the_weights_of_the_first(of_ranks):
    for rank in (0, 1):
        assert (of_ranks[rank]["weight"] == 0).all()


@pytest.mark.parametrize("options", [{"scope": "model"}, {"strategy": "threshold", "density": 0.6}])
def test_sets_with_empty_slots_train_alike_in_every_form(options):
    """Whole or compact state and gradients of sets that layers fill to different parts; channels outside stay."""
    trained = []
    for state, grad in (("full", "full"), ("compact", "full"), ("compact", "compact")):
        model = tiny_model()
        longact = LongAct(model, **options, grad=grad, freeze_after=2)
        optimizer = SalientAdamW(model.parameters(), lr=1e-3, eps=1e-4, longact=longact, state=state)
        for step in range(5):
            if step == 2:
                rows = {name: layer.salient.index for name, layer in longact.layers.items()}
                before = {name: layer.weight.detach().clone() for name, layer in longact.layers.items()}
            backward(model, tokens(seed=step))
            optimizer.step()
            optimizer.zero_grad()
        assert any((one < 0).any() for one in rows.values()) and any((one >= 0).any() for one in rows.values())
        for name, layer in longact.layers.items():
            moved = (layer.weight != before[name]).any(1).nonzero().flatten()
            assert torch.equal(moved, rows[name][rows[name] >= 0])
        trained.append([p.detach() for p in model.parameters()])
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=1e-4, atol=1e-6)


def test_rotary_pairs_are_salient_together():
    model = tiny_model("Qwen3")
    outputs = hooked_outputs(model, lambda plain: plain(tokens(3)))
    longact = LongAct(model, density=0.4, pair_rope=True)
    backward(model, tokens(3))
    longact.mask_gradients()
    for name, layer in longact.layers.items():
        # Heads of ten channels turn i with i + 5; a pair counts by its larger magnitude.
        pairs = outputs[name].abs().amax((0, 1)).view(-1, 2, 5).amax(1)
        expected = [
            10 * head + channel
            for head, values in enumerate(pairs)
            for channel in sorted(c + half for c in values.topk(2).indices.tolist() for half in (0, 5))
        ]
        assert layer.salient.index.tolist() == expected
