"""SalientAdamW against torch.optim.AdamW: on everything, on the salient rows alone, and through a reload."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from models import backward, tiny_model, tokens

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.sparse.registry import salient_weights

HYPER = dict(lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def reloaded(optimizer: torch.optim.Optimizer) -> dict:
    """A state dict that has been through a file, read back the safe way."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def salient_model(**options):
    model = tiny_model()
    return model, LongAct(model, **options)


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("selection", ["lagged", "current"])
def test_density_one_trains_exactly_as_torch_adamw(model, state, selection):
    plain = copy.deepcopy(model)
    longact = LongAct(model, density=1.0, selection=selection)
    ours = SalientAdamW(model.parameters(), **HYPER, longact=longact, state=state)
    theirs = torch.optim.AdamW(plain.parameters(), **HYPER)
    for step in range(20):
        if step == 10:
            saved = reloaded(ours)
            ours = SalientAdamW(model.parameters(), **HYPER, longact=longact, state=state)
            ours.load_state_dict(saved)
        for net, optimizer in ((model, ours), (plain, theirs)):
            backward(net, tokens(seed=step))
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name


class OneLayer:
    """A salient weight with prescribed gradients and sets, without a model around it."""

    def __init__(self, dtype=torch.float32, N=20, K=6, **options):
        torch.manual_seed(0)
        attention = torch.nn.Module()
        attention.head_dim = 10
        attention.q_proj = torch.nn.Linear(K, N, bias=False, dtype=dtype)
        self.longact = LongAct(attention)
        self.layer = self.longact.layers["q_proj"]
        self.weight = self.layer.weight
        self.optimizer = SalientAdamW([self.weight], **{**HYPER, **options})

    def step(self, grad: torch.Tensor, rows: torch.Tensor) -> None:
        salient = self.layer.salient
        salient.index, salient.active, salient.chosen, salient.version = rows, True, True, salient.version + 1
        self.weight.grad = torch.zeros_like(self.weight).index_copy(0, rows, grad[rows])
        self.optimizer.step()


def schedule(steps=12, N=20, K=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        grad = torch.randn(N, K, generator=generator).to(dtype)
        yield grad, torch.randperm(N, generator=generator)[:6].sort().values


def test_salient_rows_follow_adamw_on_those_rows_alone_and_others_keep_their_bits():
    case = OneLayer()
    rows_alone = [row.detach().clone().requires_grad_() for row in case.weight]
    adamws = [torch.optim.AdamW([row], **HYPER) for row in rows_alone]
    for grad, rows in schedule():
        before = copy.deepcopy(case.optimizer.state_dict()["state"]), case.weight.detach().clone()
        case.step(grad, rows)
        for i in rows.tolist():
            rows_alone[i].grad = grad[i]
            adamws[i].step()
        state = case.optimizer.state[case.weight]
        for i, row in enumerate(rows_alone):
            # The CPU kernel divides once where torch divides twice: the last bit may differ.
            torch.testing.assert_close(case.weight[i], row, rtol=1e-6, atol=1e-8)
            theirs = adamws[i].state[row]
            assert state["step"][i] == theirs.get("step", 0)
            if theirs:
                assert torch.equal(state["exp_avg"][i], theirs["exp_avg"])
                assert torch.equal(state["exp_avg_sq"][i], theirs["exp_avg_sq"])
        outside = torch.ones(20, dtype=torch.bool)
        outside[rows] = False
        assert torch.equal(case.weight[outside], before[1][outside])
        for name, value in before[0].get(0, {}).items():
            if name in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(state[name][outside], value[outside]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_state_carries_rows_that_stay_and_forgets_rows_that_leave(dtype):
    case = OneLayer(dtype, state="compact")
    rows_alone = {}
    for grad, rows in schedule(dtype=dtype):
        start = case.weight.detach().float().clone()
        case.step(grad, rows)
        # A row that left starts afresh from its weight when it comes back.
        rows_alone = {i: rows_alone[i] for i in rows.tolist() if i in rows_alone}
        for i in rows.tolist():
            if i not in rows_alone:
                row = start[i].clone().requires_grad_()
                rows_alone[i] = row, torch.optim.AdamW([row], **HYPER)
            row, adamw = rows_alone[i]
            row.grad = grad[i].float()
            adamw.step()
            digits = dict(rtol=1e-6, atol=1e-8) if dtype == torch.float32 else dict(rtol=0, atol=0)
            torch.testing.assert_close(case.weight[i], row.to(dtype), **digits)
    state = case.optimizer.state[case.weight]
    assert all(state[name].shape == (6, 6) for name in ("exp_avg", "exp_avg_sq"))


def test_compact_bf16_moments_move_over_to_the_next_set():
    # Halves of bf16 numbers are bf16 numbers: nothing is rounded.
    case = OneLayer(state="compact", moments=torch.bfloat16, betas=(0.5, 0.5))
    (grad, old), (_, new) = schedule(2)
    case.step(grad, old)
    state = case.optimizer.state[case.weight]
    before = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    case.step(torch.zeros_like(grad), new)
    stays = torch.isin(new, old)
    assert 0 < stays.sum() < len(new)
    for name, value in before.items():
        expected = torch.zeros_like(value)
        expected[stays] = value[torch.isin(old, new)] / 2
        assert state[name].dtype == torch.bfloat16 and torch.equal(state[name], expected), name
    assert torch.equal(state["step"], 1 + stays.int())


def test_compact_keeps_three_tenths_of_the_bytes():
    case = OneLayer(torch.bfloat16, N=1000, K=256, state="compact")
    case.step(*next(schedule(1, 1000, 256, torch.bfloat16)))
    case = OneLayer(torch.bfloat16, N=1000, K=256, state="compact")
    case.step(torch.randn(1000, 256, dtype=torch.bfloat16), torch.arange(0, 1000)[torch.arange(1000) % 10 < 3])
    ours, dense = case.optimizer.salient_state_bytes()
    assert dense == 1000 * 256 * 4 * 3
    assert 0.3 <= ours / dense < 0.305


def test_master_weights_keep_updates_far_below_the_last_digit():
    lr, dtype = 1e-6, torch.bfloat16
    for master_weights in (True, False):
        model = tiny_model().to(dtype)
        longact = LongAct(model)
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = SalientAdamW(model.parameters(), lr=lr, longact=longact, master_weights=master_weights)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(4):
                backward(model, tokens(seed=step))
                optimizer.step()
                optimizer.zero_grad()
        assert [str(warning.message) for warning in caught if "rounds to nothing" in str(warning.message)] == (
            []
            if master_weights
            else [
                "the update of torch.bfloat16 weights rounds to nothing at this learning rate; use "
                "master_weights=True or stochastic_rounding=True"
            ]
        )
        for p, before in zip(model.parameters(), start, strict=True):
            state = optimizer.state[p]
            assert ("master" in state) == master_weights
            assert {v.dtype for k, v in state.items() if k.startswith("exp")} == (
                {torch.float32} if master_weights or id(p) in salient_weights() else {dtype}
            )
            if master_weights:
                assert lr < (state["master"] - before.float()).abs().amax() < 5 * lr
                assert torch.equal(p, state["master"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_follow_fp32_training_of_the_same_gradients(dtype):
    model = tiny_model().to(dtype)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=False)
    reference = torch.optim.AdamW(masters, **HYPER)
    for step in range(5):
        backward(model, tokens(seed=step))
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        for p, master in zip(model.parameters(), masters, strict=True):
            assert torch.equal(optimizer.state[p]["master"], master) and torch.equal(p, master.to(dtype))


@pytest.mark.parametrize(("state", "grad"), [("full", "full"), ("compact", "full"), ("compact", "compact")])
@pytest.mark.parametrize("statistic", ["absmax", "l2"])
@pytest.mark.parametrize("stop", [3, 4])  # with refresh_every=2: in the middle of a refresh period, and at its end
def test_resuming_goes_on_bit_for_bit(state, grad, statistic, stop):
    def fresh():
        model, longact = salient_model(statistic=statistic, refresh_every=2, ema=0.5, grad=grad)
        model.to(torch.bfloat16)
        return model, longact, SalientAdamW(model.parameters(), **HYPER, longact=longact, state=state)

    def train(run, steps):
        model, _, optimizer = run
        for step in steps:
            for piece in tokens(seed=step).chunk(2):
                backward(model, piece)
            optimizer.step()
            optimizer.zero_grad()

    whole = fresh()
    train(whole, range(8))
    first = fresh()
    train(first, range(stop))
    weights, saved = copy.deepcopy(first[0].state_dict()), reloaded(first[2])
    second = fresh()
    second[0].load_state_dict(weights)
    second[2].load_state_dict(saved)
    train(second, range(stop, 8))

    for (name, p), q in zip(second[0].named_parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(p, q), name
    expected, got = whole[2].state_dict()["state"], second[2].state_dict()["state"]
    assert expected.keys() == got.keys()
    for i in expected:
        assert expected[i].keys() == got[i].keys()
        for name, value in expected[i].items():
            assert torch.equal(value, got[i][name]) and value.dtype == got[i][name].dtype, name


def test_finds_salient_weights_without_being_told():
    model, longact = salient_model()
    optimizer = SalientAdamW(model.parameters(), lr=1e-3)
    backward(model, tokens())
    optimizer.step()
    assert longact.steps == 1 and longact.layers["model.layers.0.self_attn.q_proj"].salient.index is not None


def test_a_longact_of_another_model_is_refused():
    _, other = salient_model()
    with pytest.raises(ValueError, match=r"^longact: none of its"):
        SalientAdamW(tiny_model().parameters(), longact=other)


def test_stock_optimizer_sees_masked_gradients_in_the_weights_own_shape():
    """The paper's literal form: rows outside the set get a zero gradient from an ordinary AdamW."""
    model, longact = salient_model(selection="current")
    plain = tiny_model()
    optimizer, reference = (torch.optim.AdamW(net.parameters(), **HYPER) for net in (model, plain))
    longact.attach(optimizer)
    for step in range(4):
        backward(model, tokens(seed=step))
        backward(plain, tokens(seed=step))
        optimizer.step()
        for name, layer in longact.layers.items():
            outside = torch.ones(layer.out_features, dtype=torch.bool)
            outside[layer.salient.index] = False
            plain.get_submodule(name).weight.grad[outside] = 0
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name


def test_another_density_is_explained_and_loads_nothing():
    model, longact = salient_model(density=0.3)
    optimizer = SalientAdamW(model.parameters(), lr=1e-3, longact=longact)
    backward(model, tokens())
    optimizer.step()
    saved = reloaded(optimizer)
    model, longact = salient_model(density=0.5)
    optimizer = SalientAdamW(model.parameters(), lr=1e-3, longact=longact)
    with pytest.raises(ValueError, match=r"saved with 12 salient rows, this LongAct keeps 20"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state and longact.steps == 0


@pytest.mark.parametrize("state", ["full", "compact"])
def test_counting_bytes_makes_no_state(state):
    model, longact = salient_model()
    optimizer = SalientAdamW(model.parameters(), longact=longact, state=state)
    assert optimizer.salient_state_bytes()[0] == 0
    assert not optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())


def test_another_kind_of_state_is_explained():
    model, longact = salient_model()
    optimizer = SalientAdamW(model.parameters(), longact=longact)
    backward(model, tokens())
    optimizer.step()
    other = SalientAdamW(model.parameters(), longact=longact, state="compact")
    with pytest.raises(ValueError, match=r"saved with state='full', this optimizer has state='compact'"):
        other.load_state_dict(reloaded(optimizer))


@pytest.mark.parametrize(
    "argument",
    [
        {"lr": -1.0},
        {"eps": -1e-8},
        {"weight_decay": float("nan")},
        {"betas": (0.9, 1.0)},
        {"lr": torch.tensor([1e-3, 1e-3])},
        {"foreach": True, "fused": True},
        {"lr": torch.tensor(1e-3), "foreach": True},
    ],
)
def test_torchs_arguments_are_refused_in_torchs_words(argument):
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        torch.optim.AdamW(tiny_model().parameters(), **argument)
    with pytest.raises(type(theirs.value), match=f"^{re.escape(str(theirs.value))}$"):
        SalientAdamW(tiny_model().parameters(), **argument)


@pytest.mark.parametrize("argument", [{"state": "half"}, {"moments": torch.float16}])
def test_bad_arguments_are_named(argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"^{name}: got"):
        SalientAdamW(tiny_model().parameters(), **argument)


def test_param_groups_schedulers_and_closures():
    model, _ = salient_model(density=1.0)
    plain = tiny_model()
    runs = []
    for net, kind in ((model, SalientAdamW), (plain, torch.optim.AdamW)):
        params = list(net.parameters())
        optimizer = kind([{"params": params[:3], "lr": 1e-2}, {"params": params[3:-2], "weight_decay": 0.0}], lr=1e-3)
        optimizer.add_param_group({"params": params[-2:], "maximize": True})
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        losses = []
        for step in range(4):

            def closure(net=net, optimizer=optimizer, step=step):
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                return backward(net, tokens(seed=step))

            losses.append(optimizer.step(closure))
            scheduler.step()
        runs.append((losses, [p.detach() for p in params]))
    assert all(torch.equal(a, b) for part in (0, 1) for a, b in zip(runs[0][part], runs[1][part], strict=True))


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_goes_on_from_a_checkpoint_of_torch_adamw(family, state):
    """With every row in the set, SalientAdamW continues what torch.optim.AdamW began, and the other way round."""
    trained = []
    for switch in (None, 3, 6):
        model = tiny_model(family)
        optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
        for step in range(9):
            if step == switch:
                saved, longact = reloaded(optimizer), LongAct(model, density=1.0)
                optimizer = SalientAdamW(model.parameters(), longact=longact, state=state)
                optimizer.load_state_dict(saved)
                assert optimizer.param_groups[0]["betas"] == HYPER["betas"]
                assert "amsgrad" not in optimizer.param_groups[0]
            if switch == 3 and step == 6:
                saved = optimizer.adamw_state_dict()
                longact.restore()
                optimizer = torch.optim.AdamW(model.parameters())
                optimizer.load_state_dict(saved)
            backward(model, tokens(seed=step))
            optimizer.step()
            optimizer.zero_grad()
        trained.append(list(model.parameters()))
    for other in trained[1:]:
        assert all(torch.equal(p, q) for p, q in zip(trained[0], other, strict=True))


@pytest.mark.parametrize("state", ["full", "compact"])
def test_the_set_starts_with_the_moments_of_torch_adamw(state):
    model = tiny_model()
    stock = torch.optim.AdamW(model.parameters(), **HYPER)
    for step in range(3):
        backward(model, tokens(seed=step))
        stock.step()
        stock.zero_grad()
    longact = LongAct(model)
    optimizer = SalientAdamW(model.parameters(), longact=longact, state=state)
    optimizer.load_state_dict(reloaded(stock))
    twin = copy.deepcopy(model)
    LongAct.of(twin).restore()
    weights = {name: layer.weight.detach().clone() for name, layer in longact.layers.items()}
    backward(model, tokens(seed=3))
    grads = {name: layer.weight.grad.clone() for name, layer in longact.layers.items()}
    longact.mask_gradients()
    rows = {name: layer.salient.index for name, layer in longact.layers.items()}
    optimizer.step()
    for name, p in twin.named_parameters():
        p.grad = grads.get(name.removesuffix(".weight"), model.get_parameter(name).grad)
    other = torch.optim.AdamW(twin.parameters())
    other.load_state_dict(reloaded(stock))
    other.step()
    for name, before in weights.items():
        after, dense = longact.layers[name].weight, twin.get_parameter(f"{name}.weight")
        torch.testing.assert_close(after[rows[name]], dense[rows[name]], rtol=1e-6, atol=1e-8)
        outside = [i for i in range(len(after)) if i not in rows[name].tolist()]
        assert torch.equal(after[outside], before[outside])


def test_export_keeps_what_each_row_would_do_next():
    """Rows of several ages: the next step by torch's AdamW is the one that each row's own step count would give."""
    model, longact = salient_model()
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact)
    for step in range(5):
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()
    layer = longact.layers["model.layers.0.self_attn.q_proj"]
    state = optimizer.state[layer.weight]
    assert len(set(state["step"].tolist())) > 2
    exported = optimizer.adamw_state_dict()
    ids = [p for group in exported["param_groups"] for p in group["params"]]
    own = exported["state"][ids[[p is layer.weight for p in model.parameters()].index(True)]]
    beta1, beta2 = HYPER["betas"]
    tau, common = state["step"].double().unsqueeze(1), own["step"].double()
    assert common == tau.max()
    for name, beta in (("exp_avg", beta1), ("exp_avg_sq", beta2)):
        corrected = state[name].double() / (1 - beta**tau).where(tau > 0, torch.ones(()))
        torch.testing.assert_close(own[name].double() / (1 - beta**common), corrected, rtol=1e-6, atol=0)
    torch.optim.AdamW(model.parameters()).load_state_dict(exported)


def test_a_restored_weight_is_not_stepped_with_the_state_of_its_rows():
    model, longact = salient_model()
    optimizer = SalientAdamW(model.parameters(), longact=longact)
    backward(model, tokens())
    optimizer.step()
    longact.restore()
    with pytest.raises(RuntimeError, match=r"stepped as a salient one .*adamw_state_dict"):
        optimizer.step()


def test_amsgrad_checkpoints_are_refused():
    model = tiny_model()
    stock = torch.optim.AdamW(model.parameters(), amsgrad=True)
    backward(model, tokens())
    stock.step()
    with pytest.raises(ValueError, match=r"^load_state_dict: saved with amsgrad=True"):
        SalientAdamW(model.parameters(), longact=LongAct(model)).load_state_dict(reloaded(stock))


def test_copies_and_pickles_keep_their_options():
    model, longact = salient_model()
    optimizer = SalientAdamW(model.parameters(), longact=longact, state="compact", moments=torch.bfloat16)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.compact, twin.moments, twin.master_weights) == (True, torch.bfloat16, True)
