"""Inputs that nobody means: a right answer or an error of our own, in one line; no crash, no traceback from the depths.

`make test` takes a slice of each kind; the slow suite, with tests/test_memory_safety.py, more than 10,000 in all.
"""

import copy
import dataclasses
import math
import random
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from situations import HYPER, train

from longact_kernels import LongAct, LongActConfig, SalientAdamW, functional, ops
from longact_kernels.functional import RunningStats
from longact_kernels.tasks.rows import read_rows

ROOT = str(Path(__file__).parent.parent)
JUNK = [
    None, 0, 1, -1, 2**40, -(2**63), 0.5, math.nan, math.inf, "", "x", "rows", b"x", [], [1], [None], {}, (), True,
    object(), torch.float32, torch.zeros(()), torch.zeros(0), torch.zeros(1), torch.zeros(3), torch.zeros(2, 3, 4),
    torch.zeros(5, 8), torch.zeros(5, 8, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.complex64),
    torch.zeros(5, 8, dtype=torch.int8), torch.zeros(5, dtype=torch.bool), torch.tensor([0, 5]),
    torch.tensor([-7, 2**62]),
    torch.tensor([3, 1]), torch.tensor([2, 2]), torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0]),
    torch.zeros(5, 8).to_sparse(), torch.zeros(1, 8).expand(5, 8), torch.zeros(8, 5).t(), torch.full((5, 8), math.nan),
]  # fmt: skip


def ours(error: Exception, others: Sequence[str] = ()) -> None:
    """Whether an error was raised by our code, and says in one line what it is about.

    Args:
        others: packages that may raise it too.
    """
    where = traceback.extract_tb(error.__traceback__)[-1]
    assert isinstance(error, ValueError | TypeError | IndexError), f"{error!r} at {where}"
    assert where.filename.startswith(ROOT + "/longact_kernels") or any(
        f"/{name}/" in where.filename for name in others
    ), where
    assert "\n" not in str(error) or "tensor(" in str(error), error  # a tensor in an option's place shows itself


def calls():
    """Right arguments of every public function."""
    y, w, rows = torch.randn(5, 8), torch.randn(6, 8), torch.tensor([1, 3])
    lists = dict(weights=[torch.randn(5, 8)], grads=[torch.randn(5, 8)], index=[rows], exp_avgs=[torch.zeros(5, 8)],
                 exp_avg_sqs=[torch.zeros(5, 8)], steps=[torch.zeros(5, dtype=torch.int32)], masters=[])  # fmt: skip
    numbers = dict(lr=torch.tensor(0.1), beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    held = {name: tensors for name, tensors in lists.items() if name != "grads"}
    stats = RunningStats(torch.zeros(6), torch.zeros(6), torch.zeros(()))
    yield ops.channel_stats, dict(y=y, mask=torch.ones(5, dtype=torch.bool), cu_seqlens=torch.tensor([0, 2, 5]))
    yield ops.linear_stats, dict(x=y, weight=w, bias=torch.zeros(6), mask=None, cu_seqlens=None, impl="auto")
    yield ops.salient_wgrad, dict(dy=torch.randn(5, 6), x=y, rows=rows, axis="rows", out=None)
    yield ops.sparse_adamw_, dict(**lists, **numbers, axis="rows", grad_scale=None, found_inf=None, seed=None)
    yield ops.AdamWPlan, dict(**held, axis="rows")
    yield ops.AdamWPlan(**held).step, dict(grads=lists["grads"], **numbers, seed=None)
    yield ops.select, dict(saliency=torch.randn(12), group=4, count=2)
    yield ops.carry_, dict(states=[[torch.randn(2, 3)]], old=[rows], new=[torch.tensor([3, 4])], axis="rows")
    yield functional.observe, dict(y=y, stats=RunningStats(torch.zeros(8)), mask=None, cu_seqlens=None, channels=None)
    yield (
        functional.salient_linear,
        dict(x=y, weight=w, bias=None, rows=rows, stats=stats, mask=None, cu_seqlens=None, axis="rows", grad=None),
    )


def fuzz_functions(seed: int, _) -> None:
    rng = random.Random(seed)
    options = list(calls())
    call, arguments = options[seed % len(options)]
    for name in rng.sample(sorted(arguments), rng.choice([1, 1, 2])):
        value = rng.choice(JUNK)
        if isinstance(arguments[name], list) and rng.random() < 0.7:
            value = [value] * rng.choice([1, 1, 2])
        arguments[name] = value
    try:
        with torch.set_grad_enabled(rng.random() < 0.3):
            call(**arguments)
    except Exception as error:
        ours(error)


def fuzz_options(seed: int, _) -> None:
    rng = random.Random(seed)
    fields = [field.name for field in dataclasses.fields(LongActConfig)]
    words = [
        "l2",
        "absmax",
        "head",
        "layer",
        "model",
        "columns",
        "current",
        "compact",
        "skip",
        "random",
        "rope",
        3,
        0.9,
    ]
    chosen = {name: rng.choice([*JUNK, *words]) for name in rng.sample(fields, rng.choice([1, 1, 2, 3]))}
    try:
        config = LongActConfig(**chosen)
    except Exception as error:
        ours(error)
        assert any(name in str(error) for name in chosen), error
    else:
        assert 0 < config.density <= 1 and config.refresh_every >= 1
    numbers = {name: rng.choice(JUNK) for name in rng.sample(["state", "moments", "longact", "stochastic_rounding"], 1)}
    try:
        SalientAdamW([torch.nn.Parameter(torch.zeros(3))], **numbers)
    except Exception as error:
        ours(error)


@pytest.fixture(scope="module")
def runs():
    """Runs to load into, and what others saved."""
    made = []
    for options, state in [({}, "full"), (dict(axis="columns"), "full"), (dict(statistic="l2"), "compact")]:
        model = tiny_model()
        longact = LongAct(model, **options)
        optimizer = SalientAdamW(model.parameters(), **HYPER, state=state)
        train(model, optimizer, range(2))
        made.append((model, longact, optimizer, copy.deepcopy(optimizer.state_dict())))
    return made


def fuzz_states(seed: int, runs) -> None:
    rng = random.Random(seed)
    _, longact, optimizer, own = rng.choice(runs)
    saved = copy.deepcopy(rng.choice(runs)[3] if rng.random() < 0.2 else own)
    for _ in range(rng.choice([0, 1, 1, 1, 3])):
        state = saved["state"][rng.choice(sorted(saved["state"]))]
        name = rng.choice(sorted(state))
        held = state[name]
        change = rng.choice(["drop", "junk", "shape", "dtype", "values"])
        if change == "drop":
            del state[name]
        elif change == "junk":
            state[name] = rng.choice(JUNK)
        elif change == "shape" and isinstance(held, torch.Tensor):
            state[name] = rng.choice([held.flatten()[:-1], held.unsqueeze(0), held.reshape(-1)])
        elif change == "dtype" and isinstance(held, torch.Tensor):
            state[name] = held.to(rng.choice([torch.float16, torch.float64, torch.int32, torch.bool]))
        elif isinstance(held, torch.Tensor) and held.dtype in (torch.int32, torch.int64) and held.numel():
            state[name] = held.clone().flatten().random_(-5, 50).view(held.shape).to(held.dtype)
    before = copy.deepcopy(optimizer.state_dict())
    try:
        optimizer.load_state_dict(saved)
    except Exception as error:
        ours(error)
        after = optimizer.state_dict()
        for i, state in before["state"].items():
            for name, value in state.items():
                assert torch.equal(value, after["state"][i][name]), f"half loaded: {name}, {error}"
    for channels, layer in zip(longact.sets.values(), longact.layers.values(), strict=True):
        within = layer.weight.shape[layer.salient.dim]
        assert all(0 <= channel < within for channel in channels.tolist())
    optimizer.load_state_dict(copy.deepcopy(own))


LINES = ['{"prompt": "a", "answer": "b"}', '{"prompt": ["a"], "answers": []}', "[1, 2]", "null", "{", "", "prompt",
         '{"prompt": "' + "a" * 99 + '"}', "\x00", "a,b", '{"prompt": NaN}', '{"answer": 1}', "\ufeff{}"]  # fmt: skip


def fuzz_files(seed: int, folder: Path) -> None:
    from longact_kernels.commands.train.prompts import own_rows

    rng = random.Random(seed)
    path = folder / f"{seed}{rng.choice(['.jsonl', '.json', '.csv', '.parquet', '.txt', ''])}"
    content = "\n".join(rng.choices(LINES, k=rng.randint(0, 5))).encode()
    if rng.random() < 0.3 and content:
        place = rng.randrange(len(content))
        content = content[:place] + bytes([rng.randrange(256)]) + content[place + rng.choice([0, 1]) :]
    path.write_bytes(content)
    try:
        rows = read_rows(str(path), "dataset")
        assert all(isinstance(row, dict) for row in rows)
        own_rows(SimpleNamespace(dataset=str(path), reward=None))
    except Exception as error:
        ours(error)


def fuzz_configs(seed: int, folder: Path) -> None:
    from longact_kernels.commands.train.arguments import GRPOConfig, TrainArguments, parse

    rng = random.Random(seed)
    names = [field.name for of in (TrainArguments, GRPOConfig) for field in dataclasses.fields(of)]
    options = [*names, "no_such"]
    values = [
        "1",
        "0.5",
        "-1",
        "nan",
        "[1, 2]",
        "{a: 1}",
        "null",
        "x",
        "true",
        "1e999",
        "'['",
        "2024-01-01",
        "!!python/x",
        "[]",
        "{}",
        "'{'",
        "''",
        "1" + "0" * 400,
    ]
    lines = [f"{name}: {rng.choice(values)}" for name in rng.sample(options, rng.randint(0, 4))]
    if rng.random() < 0.3:
        lines.insert(
            rng.randint(0, len(lines)), rng.choice(["{", "- a", "\t:", "a: b: c", "&x *x", "\x00", "é", "..."])
        )
    path = folder / f"{seed}.yaml"
    path.write_text("\n".join(lines))
    try:
        parse(["--config", str(path), "--output_dir", str(folder / "out"), "--use_cpu", "true"])
    except SystemExit as error:
        assert error.code == 2
    except Exception as error:
        ours(error, others=("trl", "transformers"))


KINDS = {  # inputs in `make test`, and in the slow suite
    fuzz_functions: (250, 3000),
    fuzz_options: (250, 3000),
    fuzz_states: (40, 1000),
    fuzz_files: (100, 1000),
    fuzz_configs: (25, 400),
}


def run(kind, seeds, runs, folder: Path, capsys) -> None:
    failures = []
    for seed in seeds:
        try:
            kind(seed, runs if kind is fuzz_states else folder)
        except Exception as error:
            failures.append(f"seed {seed}: {error}")
    assert not failures, f"{len(failures)} failed, such as " + "\n".join(failures[:20])
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_slice(kind, runs, tmp_path, capsys):
    run(kind, range(KINDS[kind][0]), runs, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_many(kind, runs, tmp_path, capsys):
    run(kind, range(10_000, 10_000 + KINDS[kind][1]), runs, tmp_path, capsys)
