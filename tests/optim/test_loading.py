"""State dicts that are another run's, or damaged: one line that says why, after which nothing has changed."""

import copy
import warnings

import pytest
import torch
from situations import HYPER, tiny_model, tokens, train

from longact_kernels import LongAct, LongActWarning, SalientAdamW

NAME = "model.layers.0.self_attn.q_proj"


def run(dtype=torch.float32, steps=3, stock=False, optimizer=(), **options):
    model = tiny_model().to(dtype)
    longact = LongAct(model, **options)
    if stock:
        made = torch.optim.AdamW(model.parameters(), **HYPER)
        longact.attach(made)
    else:
        made = SalientAdamW(model.parameters(), **HYPER, **dict(optimizer))
    train(model, made, range(steps))
    return model, longact, made


def contents(model, longact, optimizer):
    """All that a load might change."""
    return copy.deepcopy((model.state_dict(), {n: s.tolist() for n, s in longact.sets.items()}, longact.steps,
                          optimizer.state_dict(), optimizer.param_groups[0]["lr"]))  # fmt: skip


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def refused(ours, saved) -> str:
    before = contents(*ours)
    with pytest.raises(ValueError) as raised:
        ours[2].load_state_dict(saved)
    assert same(contents(*ours), before), "half loaded"
    message = str(raised.value)
    assert "\n" not in message
    train(ours[0], ours[2], [7])
    return message


OTHERS = {
    "density": (dict(density=0.5), dict(density=0.3)),
    "axis": (dict(axis="columns", scope="layer"), dict(scope="layer")),
    "statistic": (dict(statistic="l2"), dict(statistic="absmax")),
    "scope": (dict(scope="layer"), dict(scope="head")),
    "site": (dict(site="rope"), dict(site="projection")),
    "pair_rope": (dict(pair_rope=True, density=0.4), dict(density=0.4)),
    "strategy": (dict(strategy="bottom"), dict(strategy="top")),
    "seed": (dict(strategy="random", seed=1), dict(strategy="random", seed=2)),
    "threshold": (dict(strategy="threshold", threshold=0.5), dict(strategy="threshold", threshold=0.7)),
}


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(("theirs", "ours"), [pair for a, b in OTHERS.values() for pair in ((a, b), (b, a))], ids=str)
def test_other_options_are_refused_by_name(theirs, ours, stock):
    message = refused(run(**ours, stock=stock), run(**theirs, stock=stock)[2].state_dict())
    named = next(name for name, pair in OTHERS.items() if theirs in pair and ours in pair)
    assert f"{named}=" in message or "density" in message, message


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (dict(refresh_every=2), {}),
        (dict(selection="current"), dict(selection="lagged")),
        (dict(nonfinite="skip"), {}),
        (dict(ema=0.5), {}),
        (dict(seed=3), dict(seed=4)),
        (dict(grad="compact"), {}),
        (dict(freeze_after=9), {}),
    ],
    ids=str,
)
def test_the_schedule_may_change(theirs, ours):
    saved = run(**theirs)
    model, longact, optimizer = run(**ours, steps=0)
    model.load_state_dict(saved[0].state_dict())
    optimizer.load_state_dict(saved[2].state_dict())
    assert {n: s.tolist() for n, s in longact.sets.items()} == {n: s.tolist() for n, s in saved[1].sets.items()}
    train(model, optimizer, range(3, 5))


BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        (dict(dtype=FP32), dict(dtype=BF16), "master"),
        (dict(dtype=BF16), dict(dtype=FP32), "master"),
        (dict(dtype=BF16), dict(dtype=BF16, optimizer=dict(master_weights=False)), "master"),
        (dict(dtype=BF16, optimizer=dict(master_weights=False)), dict(dtype=BF16), "master"),
        (dict(dtype=HALF, optimizer=dict(master_weights=False)), dict(dtype=FP32), "torch.float16"),
        (dict(optimizer=dict(moments=BF16)), {}, "torch.bfloat16"),
        ({}, dict(optimizer=dict(moments=BF16)), "torch.float32"),
        (dict(optimizer=dict(state="compact")), {}, "compact"),
        ({}, dict(optimizer=dict(state="compact")), "compact"),
        (dict(target_modules=["q_proj"]), {}, "k_proj"),
        ({}, dict(target_modules=["q_proj"]), "target_modules"),
    ],
    ids=str,
)
def test_other_dtypes_masters_and_layers_are_refused(theirs, ours, says):
    assert says in refused(run(**ours), run(**theirs)[2].state_dict())


def damaged(state: dict, i: int, kind: str) -> None:
    own = state["state"][i]
    {
        "no moments": lambda: own.pop("exp_avg_sq"),
        "no set": lambda: own.pop("salient_rows"),
        "no statistics": lambda: own.pop("salient_absmax"),
        "moments of another shape": lambda: own.update(exp_avg=own["exp_avg"][:-1]),
        "moments of another dtype": lambda: own.update(exp_avg=own["exp_avg"].double()),
        "steps of another shape": lambda: own.update(step=own["step"][:-1]),
        "a channel outside": lambda: own.update(salient_rows=own["salient_rows"] + 1000),
        "channels that fall": lambda: own.update(salient_rows=own["salient_rows"].flip(0)),
        "one channel twice": lambda: own["salient_rows"].__setitem__(1, own["salient_rows"][0]),
        "statistics of another shape": lambda: own.update(salient_saliency=own["salient_saliency"][:-1]),
        "a list in place of a tensor": lambda: own.update(exp_avg=[1.0, 2.0]),
        "a group less": lambda: state["param_groups"].pop(),
        "a parameter less": lambda: state["param_groups"][0]["params"].pop(),
        "no groups": lambda: state.pop("param_groups"),
        "no state": lambda: state.pop("state"),
    }[kind]()


@pytest.mark.parametrize("kind", [
    "no moments", "no set", "no statistics", "moments of another shape", "moments of another dtype",
    "steps of another shape", "a channel outside", "channels that fall", "one channel twice",
    "statistics of another shape", "a list in place of a tensor", "a group less", "a parameter less", "no groups",
    "no state",
])  # fmt: skip
def test_damaged_states_are_refused_and_nothing_is_half_loaded(kind):
    ours = run()
    _, _, theirs = run(steps=5)
    saved = copy.deepcopy(theirs.state_dict())
    names = [name for name, _ in ours[0].named_parameters()]
    damaged(saved, names.index(f"model.layers.1.{NAME.split('.', 3)[3]}.weight"), kind)
    refused(ours, saved)


def test_a_checkpoint_of_another_optimizer_and_of_another_model():
    ours = run()
    model = tiny_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(input_ids=tokens(seed=0)).logits.sum().backward()
    sgd.step()
    assert "exp_avg" in refused(ours, sgd.state_dict())
    adamw = torch.optim.AdamW(model.parameters())
    adamw.step()
    saved = adamw.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(3, 3)
    assert "[3, 3]" in refused(ours, saved)


def on(name, value):
    """A value in the place of one of the state of the layer NAME."""

    def damage(saved, i):
        own = saved["param_groups"][0].get("longact", {}).get(NAME) or saved["state"][i]
        own[name] = value

    return damage


WRONG = {
    "None": None,
    "list": [1, 2],
    "empty": torch.empty(0),
    "sparse": torch.ones(40).to_sparse(),
    "meta": torch.ones(40, device="meta"),
}


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["options", "rows", "steps", "flags", "times", "saliency"])
def test_what_is_kept_of_a_set_has_its_form(name, value, stock):
    ours, saved = run(stock=stock), copy.deepcopy(run(stock=stock, steps=5)[2].state_dict())
    names = [own for own, _ in ours[0].named_parameters()]
    on(f"salient_{name}", value)(saved, names.index(f"{NAME}.weight"))
    assert NAME in refused(ours, saved)


FORMS = {
    "keys of strings": lambda saved, i: saved.update(state={str(key): own for key, own in saved["state"].items()}),
    "one key of a string": lambda saved, i: saved["state"].update({str(i): saved["state"].pop(i)}),
    "a list of states": lambda saved, i: saved.update(state=[*saved["state"].values()]),
    "no states": lambda saved, i: saved.update(state=None),
    "a state that is a list": lambda saved, i: saved["state"].update({i: [1]}),
    "no groups": lambda saved, i: saved.update(param_groups=None),
    "a group without parameters": lambda saved, i: saved["param_groups"][0].update(params=None),
    "no learning rate": lambda saved, i: saved["param_groups"][0].update(lr=None),
    "a master that is none": on("master", None),
    "a step that is text": on("step", "three"),
    "rows that are a list": on("rows", [1, 2]),
    "something that is no tensor": on("more", None),
    "a step that is sparse": on("step", torch.ones(5).to_sparse()),
    "moments that are sparse": on("exp_avg", torch.ones(5, 8).to_sparse()),
    "moments without a memory": on("exp_avg", torch.ones(5, 8, device="meta")),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_no_optimizer_saves_is_refused_in_a_line(form):
    options = dict(dtype=BF16, optimizer=dict(state="compact"))
    ours, saved = run(**options), copy.deepcopy(run(**options)[2].state_dict())
    FORMS[form](saved, [name for name, _ in ours[0].named_parameters()].index(f"{NAME}.weight"))
    assert "object" not in refused(ours, saved)


@pytest.mark.parametrize("of", [NAME, "model.norm"])
@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("exp_avg", "exp_avg_sq", "master") for value in (float("nan"), float("-inf"))]
    + [("step", -1), ("salient_steps", -3)],
)
def test_numbers_that_no_step_leaves_are_refused_by_name(of, state, name, value):
    if of != NAME and name == "salient_steps":
        return
    options = dict(dtype=BF16, optimizer=dict(state=state))
    ours, saved = run(**options), copy.deepcopy(run(**options)[2].state_dict())
    own = saved["state"][[one for one, _ in ours[0].named_parameters()].index(f"{of}.weight")]
    own[name].view(-1)[-1] = value
    message = refused(ours, saved)
    assert name in message and (of != NAME or NAME in message)


@pytest.mark.parametrize(
    ("name", "value"), [("exp_avg", float("nan")), ("exp_avg_sq", float("inf")), ("step", -1), ("step", 2.0**40)]
)
def test_bad_numbers_of_torchs_optimizer_are_refused_by_name(name, value):
    ours, model = run(), tiny_model()
    adamw = torch.optim.AdamW(model.parameters(), **HYPER)
    train(model, adamw, [0])
    saved = copy.deepcopy(adamw.state_dict())
    saved["state"][3][name].view(-1)[0] = value
    assert name in refused(ours, saved)


@pytest.mark.parametrize("value", [1e300, 1e39, 10**400, float("inf"), float("nan"), -1.0, None, "1"], ids=repr)
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_hyperparameters_that_float32_cannot_hold(name, value):
    model, longact, optimizer = run()
    optimizer.param_groups[0][name] = value
    before = contents(model, longact, optimizer)[0]
    with pytest.raises(ValueError, match=rf"^param_groups\[0\]: {name}: got .* needed a finite float32"):
        train(model, optimizer, [3])
    assert same(model.state_dict(), before)
    optimizer.param_groups[0].update(lr=torch.tensor(1e300, dtype=torch.float64), eps=1e-8, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"^param_groups\[0\]: lr: got 1e"):
        train(model, optimizer, [4])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda longact, model: longact.attach(None), "optimizer: got a NoneType"),
        (lambda longact, model: longact.attach([model]), "optimizer: got a list"),
        (lambda longact, model: LongAct.of(None), "model: got a NoneType"),
        (lambda longact, model: longact.clip_grad_norm_(None, 1.0), "parameters: got a NoneType"),
        (lambda longact, model: longact.clip_grad_norm_(model, 1.0), "parameters: got a LlamaForCausalLM"),
        (lambda longact, model: longact.clip_grad_norm_(model.named_parameters(), 1.0), "parameters: got a tuple"),
        (lambda longact, model: longact.clip_grad_norm_(model.parameters(), torch.ones(2)), "max_norm: got a tensor"),
        (lambda longact, model: longact.clip_grad_norm_(model.parameters(), None), "max_norm: got None"),
    ],
)
def test_arguments_of_another_type(call, says):
    model, longact, _ = run()
    with pytest.raises(TypeError, match=f"^{says}"):
        call(longact, model)
    longact.clip_grad_norm_(model.parameters(), torch.ones(1), "inf")


@pytest.mark.parametrize("stock", [False, True])
def test_a_weight_put_in_the_place_of_one_that_trains_is_told(stock):
    model, longact, optimizer = run(stock=stock)
    layer = longact.layers[NAME]
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    before = layer.weight.detach().clone()
    with pytest.warns(LongActWarning, match=f"{NAME} has another weight"):
        train(model, optimizer, [3])
    assert torch.equal(layer.weight, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": [layer.weight]})
        train(model, optimizer, [4, 5])
        assert not torch.equal(layer.weight, before)


def test_a_weight_put_in_with_an_optimizer_of_its_own():
    model, longact, optimizer = run()
    layer = longact.layers[NAME]
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    before = layer.weight.detach().clone()
    own = SalientAdamW([layer.weight], **HYPER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
            own.step()
            optimizer.step()
            model.zero_grad()
    assert not torch.equal(layer.weight, before)
