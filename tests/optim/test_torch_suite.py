"""`SalientAdamW` held to what torch asks of its own AdamW: the inputs, errors and schedulers of torch's test suite.

The inputs come from `torch.testing._internal`, which a wheel of torch ships without the tests themselves.
"""

import copy
import io
import itertools
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from longact_kernels import SalientAdamW

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

pytestmark = pytest.mark.slow

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
INPUTS = INFO.optim_inputs_func(device="cpu")
FORMS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]
UNSUPPORTED = ("amsgrad", "differentiable")
OURS = partial(SalientAdamW, longact=False)  # on purpose without one
OURS_AND_THEIRS = (OURS, torch.optim.AdamW)


def supported(kwargs: dict) -> bool:
    return not any(kwargs.get(name) for name in UNSUPPORTED)


GOOD = [given for given in INPUTS if supported(given.kwargs)]
EVERY = pytest.mark.parametrize("given", GOOD, ids=lambda given: given.desc)
EACH = pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form), "default"))


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = (4, 3), (7,), (), (2, 3, 4), (0, 5), (1, 9)
    made = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    return [*made, nn.Parameter(torch.randn(6, 5, dtype=dtype).t())]


def gradients(params, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        skip = i == 1 and step % 2  # one parameter is out of every second step
        p.grad = None if skip else torch.randn(p.shape, dtype=p.dtype, generator=generator)


def pair(kwargs, make=parameters):
    for kind in OURS_AND_THEIRS:
        params = make()
        yield params, kind(params, **copy.deepcopy(kwargs))


def assert_alike(ours, theirs, exact=False) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **({"rtol": 0, "atol": 0} if exact else {}))


# Updates


@EVERY
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        *itertools.product((torch.float32, torch.float64), FORMS),
        *((torch.complex64, form) for form in FORMS if True not in form.values()),
    ],
)
def test_updates_are_torchs(given, form, dtype):
    results = []
    for params, optimizer in pair({**given.kwargs, **form}, lambda: parameters(dtype)):
        for step in range(6):
            gradients(params, step)
            optimizer.step()
        results.append(params)
    assert_alike(*results, exact=True)


@EVERY
def test_with_a_tensor_for_lr(given):
    kwargs = {**given.kwargs, "lr": torch.tensor(given.kwargs.get("lr", 1e-3))}
    results = []
    for params, optimizer in pair(kwargs):
        for step in range(4):
            gradients(params, step)
            optimizer.step()
            optimizer.param_groups[0]["lr"].mul_(0.5)
        results.append(params)
    assert_alike(*results)


@EVERY
@EACH
def test_parameter_groups_with_options_of_their_own(given, form):
    results = []
    for kind in OURS_AND_THEIRS:
        params = parameters()
        groups = [{"params": params[:3], "lr": 0.02}, {"params": params[3:5], "weight_decay": 0.3}]
        optimizer = kind(groups, **{**given.kwargs, **form})
        optimizer.add_param_group({"params": params[5:], "betas": (0.5, 0.6), "eps": 1e-3, "maximize": True})
        for step in range(4):
            gradients(params, step)
            optimizer.step()
        results.append(params)
    assert_alike(*results, exact=True)


@EVERY
@EACH
def test_empty_gradients_and_none(given, form):
    for params, optimizer in pair({**given.kwargs, **form}):
        optimizer.step()
        for p in params:
            p.grad = None
        optimizer.step()
        assert not any(optimizer.state.values())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    for params, optimizer in pair({}):
        gradients(params, 0)
        params[0].grad.requires_grad_(False)
        optimizer.zero_grad(set_to_none)
        for p in params:
            assert p.grad is None if set_to_none else not p.grad.any()


def test_a_closure():
    results = []
    for params, optimizer in pair({"lr": 0.1}):

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(4)]
        assert losses == sorted(losses, reverse=True)
        results.append(params)
    assert_alike(*results, exact=True)


@EACH
def test_a_model_learns(form):
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randn(64, 1)
    losses = []
    for kind in OURS_AND_THEIRS:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = kind(model.parameters(), lr=1e-2, **form)
        for _ in range(100):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1] < 0.7


# Errors


@pytest.mark.parametrize(
    "error",
    [e for e in INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)],
    ids=lambda error: error.optimizer_error_input.desc,
)
def test_errors_are_torchs(error):
    given = error.optimizer_error_input
    params = parameters() if given.params is None else given.params
    if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                OURS(params, **given.kwargs)
            return
        with pytest.raises(error.error_type):
            OURS(params, **given.kwargs)
    else:
        optimizer = OURS(params, **given.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()


def error_of(kind, make) -> Exception:
    with pytest.raises(Exception) as caught:
        make(kind)
    return caught.value


def sparse_step(kind, **options):
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = kind(embedding.parameters(), **options)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


WRONG = {
    "foreach and fused": lambda kind: kind(parameters(), foreach=True, fused=True),
    "an lr of two elements": lambda kind: kind(parameters(), lr=torch.tensor([1e-3, 1e-3])),
    "an lr of two elements, foreach": lambda kind: kind(parameters(), lr=torch.tensor([1e-3, 1e-3]), foreach=True),
    "a tensor lr with foreach": lambda kind: kind(parameters(), lr=torch.tensor(1e-3), foreach=True),
    "sparse gradients": sparse_step,
    "sparse gradients, foreach": lambda kind: sparse_step(kind, foreach=True),
    "sparse gradients, not foreach": lambda kind: sparse_step(kind, foreach=False),
    "sparse gradients, fused": lambda kind: sparse_step(kind, fused=True),
    "no parameters": lambda kind: kind([]),
    "a number": lambda kind: kind([1.0]),
    "not a leaf": lambda kind: kind([parameters()[0] * 2]),
    "a tensor in place of a list": lambda kind: kind(parameters()[0]),
    "the same twice": lambda kind: kind([{"params": p} for p in [parameters()[0]] * 2]),
    "a group without params": lambda kind: kind([{"lr": 1.0}]),
    "an option that there is not": lambda kind: kind(parameters(), momentum=0.9),
    "mixed tensor betas": lambda kind: kind(parameters(), betas=(torch.tensor(0.9), 0.99)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_raise_what_torchs_adamw_raises(wrong):
    ours, theirs = (error_of(kind, WRONG[wrong]) for kind in OURS_AND_THEIRS)
    assert type(ours) is type(theirs)
    plain = [re.sub(r"SalientAdamW|AdamW|Adam\b", "", str(error)).strip() for error in (ours, theirs)]
    assert plain[0] in plain[1] or plain[1] in plain[0]  # torch's may go on to recommend SparseAdam


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_it_does_not_have_is_named(name):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=name):
        OURS(parameters(), **{name: True})


# States and files


@EVERY
@EACH
@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy", "pickle"])
def test_copies_go_on_as_the_original(given, form, how):
    params = parameters()
    optimizer = OURS(params, **{**given.kwargs, **form})
    for step in range(3):
        gradients(params, step)
        optimizer.step()
    if how in ("deepcopy", "pickle"):
        copied = copy.deepcopy if how == "deepcopy" else lambda it: pickle.loads(pickle.dumps(it))
        others, other = copied((params, optimizer))
    else:
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = OURS(others, **{**given.kwargs, **form})
        saved = copy.deepcopy(optimizer.state_dict())
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other.load_state_dict(saved)
    for step in range(3, 6):
        gradients(params, step)
        gradients(others, step)
        optimizer.step()
        other.step()
    assert_alike(params, others, exact=True)
    assert other.state_dict().keys() == optimizer.state_dict().keys()


@EVERY
@EACH
def test_checkpoints_go_both_ways(given, form):
    """torch's AdamW to ours and back, in the middle of a run."""
    kwargs = {**given.kwargs, **form}
    params, plain = parameters(), parameters()
    reference = torch.optim.AdamW(plain, **kwargs)
    kinds = itertools.cycle([torch.optim.AdamW, OURS])
    optimizer = next(kinds)(params, **kwargs)
    for step in range(8):
        if step in (2, 4, 6):
            saved = optimizer.adamw_state_dict() if isinstance(optimizer, SalientAdamW) else optimizer.state_dict()
            optimizer = next(kinds)(params, **kwargs)
            optimizer.load_state_dict(copy.deepcopy(saved))
        for some, one in ((params, optimizer), (plain, reference)):
            gradients(some, step)
            one.step()
    assert_alike(params, plain, exact=True)


@EVERY
def test_state_dicts_of_older_versions(given):
    """Without the options that came later."""
    params = parameters()
    optimizer = OURS(params, **given.kwargs)
    gradients(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in ("foreach", "fused", "capturable", "maximize"):
            group.pop(name, None)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = OURS(others, **given.kwargs)
    other.load_state_dict(saved)
    gradients(others, 1)
    other.step()


def test_state_dict_hooks():
    params = parameters()
    optimizer = OURS(params)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append("load") or saved)
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["more"] == 1
    optimizer.load_state_dict({name: value for name, value in saved.items() if name != "more"})
    assert seen == ["save", "load", "loaded"]


def test_step_hooks_and_the_profilers_name():
    params = parameters()
    optimizer = OURS(params)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("own before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("own after"))
    everybodys = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    gradients(params, 0)
    with torch.profiler.profile() as profile:
        optimizer.step()
    for handle in everybodys:
        handle.remove()
    assert sorted(seen) == ["after", "before", "own after", "own before"]
    assert seen.index("own before") < seen.index("own after")
    assert "Optimizer.step#SalientAdamW.step" in {event.key for event in profile.key_averages()}


def test_named_parameters():
    model = nn.Linear(3, 2)
    optimizer = OURS(model.named_parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    other = OURS(model.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_what_it_says_of_itself():
    text = repr(OURS(parameters()))
    assert text.startswith("SalientAdamW (") and "weight_decay: 0.01" in text


# Schedulers

SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 4),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: step / 3),
    "MultiplicativeLR": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=True),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def scheduled(params, optimizer, scheduler, steps) -> list[float]:
    rates = []
    for step in steps:
        gradients(params, step)
        optimizer.step()
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_schedulers(name, tensor):
    results = []
    for params, optimizer in pair({"lr": torch.tensor(0.1) if tensor else 0.1}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "optimizer.step() has been overridden", and other surprises
            warnings.filterwarnings("ignore", message=".*epoch parameter")
            rates = scheduled(params, optimizer, SCHEDULERS[name](optimizer), range(6))
        results.append((params, rates))
    assert results[0][1] == results[1][1]
    assert_alike(results[0][0], results[1][0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduled_run_resumes(name):
    whole = parameters()
    optimizer = OURS(whole, lr=0.1)
    expected = scheduled(whole, optimizer, SCHEDULERS[name](optimizer), range(6))
    first = parameters()
    optimizer = OURS(first, lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    rates = scheduled(first, optimizer, scheduler, range(3))
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    params = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer = OURS(params, lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    rates += scheduled(params, optimizer, scheduler, range(3, 6))
    assert rates == expected
    assert_alike(params, whole, exact=True)


def test_a_scheduler_that_steps_first_is_warned_of():
    for _, optimizer in pair({}):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
            scheduler.step()


# Averages of weights


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_models(average):
    results = []
    for kind in OURS_AND_THEIRS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
        data = torch.randn(5, 8, 4)
        optimizer = kind(model.parameters(), lr=1e-2)
        averaged, scheduler = AveragedModel(model, multi_avg_fn=average), SWALR(optimizer, swa_lr=5e-3)
        for batch in data:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
            scheduler.step()
        update_bn(data, averaged)
        results.append([*averaged.parameters(), *averaged.buffers()])
    assert_alike(*results, exact=True)
