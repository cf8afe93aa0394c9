"""What LongAct cannot do right it refuses, by name and early: never dense training in silence."""

import threading

import pytest
import torch
from situations import (
    HYPER,
    assert_same_weights,
    backward,
    moved_rows,
    projections,
    salient_run,
    sets,
    stock_run,
    tiny_model,
    tokens,
    train,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import Trainer, TrainingArguments

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.integrations.trainer import LongActCallback, LongActTrainerMixin

ERRORS = (ValueError, RuntimeError, TypeError)
Q = "model.layers.0.self_attn.q_proj"


def refused_or_sparse(model, train_it, longact, density=0.3) -> str | None:
    """Trains; it either raises, or moves no more than the rows of some sets. Returns what the error says."""
    start = {name: module.weight.detach().clone() for name, module in projections(model).items()}
    try:
        train_it()
    except ERRORS as error:
        return str(error)
    for name, module in projections(model).items():
        if name in start and module.weight.shape == start[name].shape:
            share = (module.weight != start[name]).any(1).float().mean()
            assert 0 < share < 0.95, f"{name} was trained densely, or not at all: {share:.0%} of its rows moved"
    return None


# Adapters and parametrisations over the projections

peft = pytest.importorskip("peft")


def lora(**options):
    return peft.LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "k_proj"], **options})


ADAPTERS = {
    "lora on q and k": lora,
    "lora on q": lambda: lora(target_modules=["q_proj"]),
    "lora on values": lambda: lora(target_modules=["v_proj"]),  # q and k are frozen by it
    "lora on all": lambda: lora(target_modules="all-linear"),
    "dora": lambda: lora(use_dora=True),
    "modules to save": lambda: lora(target_modules=["v_proj"], modules_to_save=["q_proj", "k_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("given", [True, False], ids=["longact=", "found by itself"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_put_on_after_longact_are_an_error(kind, given):
    model = tiny_model()
    longact = LongAct(model)
    with pytest.raises(ERRORS, match=r"(?i)adapter|peft|lora|requires? a?\s*grad|frozen|modules_to_save|ModulesToSave"):
        adapted = peft.get_peft_model(model, ADAPTERS[kind]())
        params = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = SalientAdamW(params, **HYPER, **({"longact": longact} if given else {}))
        for step in range(2):
            adapted(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_adapters_with_a_stock_optimizer_are_an_error():
    model = tiny_model()
    longact = LongAct(model)
    with pytest.raises(ERRORS, match=r"(?i)adapter|peft|lora|requires? a?\s*grad|frozen|attach"):
        adapted = peft.get_peft_model(model, lora())
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], **HYPER)
        longact.attach(optimizer)
        train(adapted, optimizer, range(2))


def test_adapters_before_longact_are_refused_at_once():
    with pytest.raises(ValueError, match="adapter"):
        LongAct(peft.get_peft_model(tiny_model(), lora()))


def test_a_merged_adapter_is_no_adapter():
    model = peft.get_peft_model(tiny_model(), lora()).merge_and_unload().requires_grad_(True)
    model, longact, optimizer = salient_run(model.train())
    train(model, optimizer, range(2))
    assert longact.steps == 2 and all(sets(longact).values())


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


def weight_norm(module):
    parametrizations.weight_norm(module)


def old_weight_norm(module):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module)


def pruned(module):
    prune.random_unstructured(module, "weight", amount=0.5)


OVER = {
    "parametrize": lambda module: parametrize.register_parametrization(module, "weight", Half()),
    "weight_norm": weight_norm,
    "weight_norm of old": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": pruned,
}


@pytest.mark.parametrize("kind", OVER)
@pytest.mark.parametrize("stock", [False, True], ids=["salient", "stock"])
def test_parametrised_weights_are_an_error_after_longact(kind, stock):
    model = tiny_model()
    longact = LongAct(model)
    with pytest.raises(ERRORS, match=Q.replace(".", r"\.")):
        OVER[kind](model.get_submodule(Q))
        if stock:
            longact.attach(optimizer := torch.optim.AdamW(model.parameters(), **HYPER))
        else:
            optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact)
        train(model, optimizer, range(2))


@pytest.mark.parametrize("kind", OVER)
def test_parametrised_weights_are_refused_before_longact(kind):
    model = tiny_model()
    OVER[kind](model.get_submodule(Q))
    with pytest.raises(ERRORS, match=Q.replace(".", r"\.")):
        train(model, salient_run(model)[2], range(2))


def test_a_projection_that_is_replaced_is_an_error_or_an_ordinary_layer_that_is_named():
    model = tiny_model()
    longact = LongAct(model)
    old = model.get_submodule(Q)
    with pytest.raises(ERRORS, match=Q.replace(".", r"\.")):
        model.model.layers[0].self_attn.q_proj = nn.Linear(old.in_features, old.out_features, bias=False)
        optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact)
        train(model, optimizer, range(2))


def test_parameters_that_are_replaced_by_loading_train_as_ever():
    """`load_state_dict(assign=True)` makes new parameter objects, as FSDP2 does."""
    model = tiny_model()
    longact = LongAct(model)
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact)
    train(model, optimizer, range(3))
    plain, expected, theirs = salient_run()
    train(plain, theirs, range(3))
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


# Optimizers that hold other weights


def test_attaching_to_another_models_optimizer():
    longact = LongAct(tiny_model())
    with pytest.raises(ValueError, match="attach"):
        longact.attach(torch.optim.AdamW(tiny_model().parameters()))


def test_attaching_to_the_optimizer_of_a_copy():
    import copy

    model = tiny_model()
    longact = LongAct(model)
    with pytest.raises(ValueError, match="attach"):
        longact.attach(torch.optim.AdamW(copy.deepcopy(model).parameters()))


def test_attaching_to_an_optimizer_of_other_weights_of_the_model():
    model = tiny_model()
    longact = LongAct(model)
    with pytest.raises(ValueError, match="attach"):
        longact.attach(torch.optim.AdamW(model.lm_head.parameters()))


class Wrapper(torch.optim.Optimizer):
    """An optimizer that steps by another one, as ZeroRedundancyOptimizer and Lookahead do."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


def test_attaching_to_an_optimizer_around_a_stock_one():
    """On the ranks that hold no salient weights, the stock one would step without an error."""
    model = tiny_model()
    longact = LongAct(model)
    wrapper = Wrapper(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="this Wrapper steps by the AdamW in it"):
        longact.attach(wrapper)
    longact.attach(Wrapper(SalientAdamW(model.parameters())))
    longact.attach(wrapper.inner)


def test_attaching_before_the_model_is_replaced_by_loading():
    """The optimizer then holds parameters that no layer has any more."""
    model, _, optimizer = stock_run()
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        train(model, optimizer, range(2))
    except ERRORS:
        return
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)), "torch moves nothing"


def test_salient_adamw_with_another_models_controller():
    with pytest.raises(ValueError, match="longact"):
        SalientAdamW(tiny_model().parameters(), longact=LongAct(tiny_model()))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_stock_optimizer_that_nobody_attached_is_sparse_or_an_error(kind):
    model = tiny_model()
    longact = LongAct(model)
    optimizer = kind(model.parameters(), lr=1e-2)
    said = refused_or_sparse(model, lambda: train(model, optimizer, range(3)), longact)
    assert said is None or "attach" in said


def test_a_stock_optimizer_with_a_closure_that_nobody_attached():
    model = tiny_model()
    longact = LongAct(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        return backward(model, tokens())

    said = refused_or_sparse(model, lambda: [optimizer.step(closure) for _ in range(3)], longact)
    assert said is None or "attach" in said


def test_half_of_the_weights_in_an_optimizer_that_nobody_attached():
    model = tiny_model()
    longact = LongAct(model)
    q = [module.weight for name, module in projections(model).items() if "q_proj" in name]
    k = [module.weight for name, module in projections(model).items() if "k_proj" in name]
    longact.attach(one := torch.optim.AdamW(q, lr=1e-2, weight_decay=0.0))
    other = torch.optim.AdamW(k, lr=1e-2, weight_decay=0.0)

    def loop():
        for step in range(3):
            backward(model, tokens(seed=step))
            one.step()
            other.step()
            model.zero_grad()

    said = refused_or_sparse(model, loop, longact)
    assert said is None or "attach" in said


def test_an_optimizer_that_lacks_some_of_the_weights_moves_the_others_right():
    """Those that it lacks stay what they are: nothing is trained densely."""
    model = tiny_model()
    longact = LongAct(model)
    ids = {id(model.get_parameter(f"{Q}.weight"))}
    start = tiny_model()
    optimizer = SalientAdamW([p for p in model.parameters() if id(p) not in ids], **HYPER, longact=longact)
    said = refused = None
    try:
        for step in range(3):
            backward(model, tokens(seed=step))
            optimizer.step()
            model.zero_grad()
    except ERRORS as error:
        refused, said = True, str(error)
    if refused:
        assert Q in said
    else:
        moved = moved_rows(model, start)
        assert not moved[Q] and all(rows for name, rows in moved.items() if name != Q)
        assert longact.steps == 3


class SparseTrainer(LongActTrainerMixin, Trainer):
    pass


def arguments(folder):
    return TrainingArguments(
        output_dir=str(folder), max_steps=2, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
    )


DATA = [{"input_ids": row, "labels": row} for row in tokens(16)]


def test_model_init_with_the_callback_is_an_error(tmp_path):
    """The Trainer trains a model that it makes itself."""
    longact = LongAct(tiny_model())
    trainer = Trainer(
        model_init=lambda: tiny_model(),
        args=arguments(tmp_path),
        train_dataset=DATA,
        callbacks=[LongActCallback(longact)],
    )
    with pytest.raises(ValueError, match="model"):
        trainer.train()


def test_model_init_with_the_mixin_is_an_error(tmp_path):
    longact = LongAct(tiny_model())
    with pytest.raises(ERRORS, match=r"longact|model"):
        SparseTrainer(
            model_init=lambda: tiny_model(), longact=longact, args=arguments(tmp_path), train_dataset=DATA
        ).train()


def test_a_callback_for_another_model_is_an_error(tmp_path):
    longact = LongAct(tiny_model())
    with pytest.raises(ValueError, match=r"model|attach"):
        Trainer(
            model=tiny_model(), args=arguments(tmp_path), train_dataset=DATA, callbacks=[LongActCallback(longact)]
        ).train()


def test_a_mixin_for_another_model_is_an_error(tmp_path):
    longact = LongAct(tiny_model())
    with pytest.raises(ERRORS, match=r"longact|model"):
        SparseTrainer(model=tiny_model(), longact=longact, args=arguments(tmp_path), train_dataset=DATA).train()


def test_the_callback_with_a_salient_optimizer_of_another_model_is_an_error(tmp_path):
    longact = LongAct(tiny_model())
    model = tiny_model()
    with pytest.raises(ValueError, match=r"longact|model|attach"):
        Trainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=DATA,
            optimizers=(SalientAdamW(model.parameters()), None),
            callbacks=[LongActCallback(longact)],
        ).train()


# Weights of other kinds


def replaced(weight) -> nn.Module:
    model = tiny_model()
    model.get_submodule(Q).weight = nn.Parameter(weight(model.get_submodule(Q).weight.detach()))
    return model


WEIGHTS = {
    "column-major": lambda w: w.t().contiguous().t(),
    "a part of a wider one": lambda w: torch.cat((w, w), 1)[:, : w.shape[1]],
    "every second row": lambda w: torch.stack((w, w), 1).flatten(0, 1)[::2],
    "complex": lambda w: w.to(torch.complex64),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("grad", ["full", "compact"])
def test_a_weight_of_another_kind_is_refused_at_construction_or_trains_right(kind, grad):
    model = replaced(WEIGHTS[kind])
    try:
        longact = LongAct(model, grad=grad)
    except ValueError as error:
        assert Q in str(error)
        return
    assert kind != "complex"
    optimizer = SalientAdamW(model.parameters(), **HYPER)
    train(model, optimizer, range(3))
    plain, expected, theirs = salient_run(grad=grad)
    train(plain, theirs, range(3))
    assert sets(longact) == sets(expected)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.to(q), q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", ["full", "compact"])
def test_a_double_model_is_refused_at_construction_or_trains_right(grad):
    model = tiny_model().double()
    try:
        longact = LongAct(model, grad=grad)
    except ValueError as error:
        assert Q in str(error) and "float64" in str(error)
        assert type(model.get_submodule(Q)) is nn.Linear, "the model is left alone"
        return
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact)
    train(model, optimizer, range(3))
    assert longact.steps == 3


def test_a_model_that_becomes_double_afterwards_is_an_error_or_trains_right():
    model = tiny_model()
    longact = LongAct(model)
    model.double()
    try:
        train(model, SalientAdamW(model.parameters(), **HYPER), range(3))
    except ERRORS as error:
        assert Q in str(error) and "float64" in str(error)
    else:
        assert longact.steps == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_becomes_narrow_afterwards_trains(dtype):
    model = tiny_model()
    longact = LongAct(model)
    model.to(dtype)
    train(model, SalientAdamW(model.parameters(), **HYPER), range(3))
    other, expected, optimizer = salient_run(tiny_model().to(dtype))
    train(other, optimizer, range(3))
    assert sets(longact) == sets(expected)
    assert_same_weights(model, other)


# What SalientAdamW does not have


@pytest.mark.parametrize("option", ["amsgrad", "differentiable"])
def test_options_that_it_does_not_have_are_named(option):
    with pytest.raises(ERRORS, match=option):
        SalientAdamW(tiny_model().parameters(), **{option: True})


def test_a_second_derivative_is_an_error():
    model, *_ = salient_run()
    x = torch.randn(2, 3, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(model.get_submodule(Q)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


def test_torch_func_is_an_error():
    model, *_ = salient_run()
    layer = model.get_submodule(Q)

    def loss(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (torch.ones(1, 2, 32),)).square().sum()

    with pytest.raises(RuntimeError):
        torch.func.grad(loss)(layer.weight.detach())


# Options that are changed in the middle of a run

CHANGES = {"density": 0.5, "statistic": "l2", "selection": "current", "refresh_every": 3, "scope": "layer", "ema": 0.5}


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_that_is_changed_mid_run_is_an_error_or_is_followed(option):
    model, longact, optimizer = salient_run()
    train(model, optimizer, range(2))
    try:
        setattr(longact, option, CHANGES[option])
    except (AttributeError, ValueError, TypeError, RuntimeError) as error:
        assert option in str(error)
        train(model, optimizer, range(2, 4))
        assert {len(rows) for rows in sets(longact).values()} == {12, 6}
        return
    assert option in ("density", "refresh_every", "ema"), "sizes and buffers hang on it"
    train(model, optimizer, [2])
    before = sets(longact)
    if option == "density":
        assert {len(rows) for rows in sets(longact).values()} == {20, 10}
    if option == "refresh_every":
        train(model, optimizer, [3])
        assert sets(longact) == before


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(TypeError, match="densty"):
        LongAct(tiny_model(), densty=0.5)
    with pytest.raises(TypeError, match="densty"):
        LongAct.paper(tiny_model(), densty=0.5)


# As torch's


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("grad", ["full", "compact"])
def test_clip_grad_norm_takes_what_torchs_takes(grad, foreach):
    model, longact, _ = salient_run(grad=grad)
    backward(model, tokens())
    norm = longact.clip_grad_norm_(model.parameters(), 0.5, norm_type=2.0, error_if_nonfinite=True, foreach=foreach)
    other, theirs, _ = salient_run(grad=grad)
    backward(other, tokens())
    theirs.mask_gradients()
    assert norm == torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5, foreach=foreach)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("grad", ["full", "compact"])
def test_clip_grad_norm_raises_as_torchs_does(grad):
    model, longact, optimizer = salient_run(grad=grad)
    train(model, optimizer, range(2))
    backward(model, tokens())
    model.lm_head.weight.grad[0, 0] = float("inf")
    before = model.model.norm.weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"total norm of order 2.0 for gradients .* is non-finite"):
        longact.clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
    assert torch.equal(model.model.norm.weight.grad, before)


def test_the_papers_recipe_passes_other_options_on():
    model = tiny_model()
    longact = LongAct.paper(model, target_modules=["q_proj"])
    assert [name for name in longact.layers if "k_proj" in name] == [] and len(longact.layers) == 2
    backward(model, tokens())
    SalientAdamW(model.parameters(), **HYPER).step()
    assert longact.statistic == "l2" and longact.selection == "current"
    LongAct.paper(tiny_model(), nonfinite="skip", freeze_after=3)


# Threads


def test_controllers_made_in_one_thread_while_another_steps():
    model, longact, optimizer = salient_run()
    failures, done = [], threading.Event()

    def make():
        while not done.is_set():
            small = nn.Module()
            small.num_heads, small.head_dim = 2, 4
            small.q_proj, small.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
            try:
                LongAct(small).restore()
                LongAct(tiny_q())
            except Exception as error:
                failures.append(error)

    def tiny_q():
        small = nn.Module()
        small.num_heads, small.head_dim = 2, 4
        small.q_proj, small.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        return small

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for step in range(40):
            train(model, optimizer, [step])
            optimizer.state_dict()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures
    plain, expected, theirs = salient_run()
    train(plain, theirs, range(40))
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


def test_two_threads_train_a_model_each():
    results: dict[int, tuple] = {}

    runs = {seed: salient_run() for seed in (0, 10)}

    def run(seed):
        model, longact, optimizer = runs[seed]
        train(model, optimizer, range(seed, seed + 6))
        results[seed] = model, sets(longact)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 10):
        plain, expected, theirs = salient_run()
        train(plain, theirs, range(seed, seed + 6))
        assert results[seed][1] == sets(expected)
        assert_same_weights(results[seed][0], plain)
