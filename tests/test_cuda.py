"""What only a GPU can show of the ops, the layers and the optimizer.

Each test runs on the GPU where there is one. Without one they run too, as far as they can and in small sizes, so that
none of them fails for the first time on a borrowed machine: a captured graph is then the call itself, and a stream
none.
"""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import exact_interpreter  # noqa: F401
import pytest
import torch
from models import backward, checkpoint_activations, tiny_model, tokens
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import linear

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.functional import (
    RunningStats,
    carry_,
    channel_stats,
    linear_stats,
    salient_linear,
    salient_wgrad,
    select,
    sparse_adamw_,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_FUSED = ON_GPU or INTERPRETED
REPLAYS = 1 if INTERPRETED else 3
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="takes the interpreter minutes")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
HYPER = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
SCALARS = (*HYPER["betas"], HYPER["eps"], HYPER["weight_decay"])


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def chosen(channels, count):
    """A random set of channels."""
    return torch.randperm(channels, device=DEVICE)[:count].sort().values


def assert_same_bits(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        # NaN is equal to itself here.
        assert a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# Memory that nobody has written


@contextlib.contextmanager
def poisoned():
    """New tensors hold NaN, or the largest integer, until something is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(4, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def calls():
    """By name, a call that returns everything it made or changed."""
    M, N, K, S = 150, 72, 40, 21
    x, dy, y = randn(M, K), randn(M, N), randn(3, M // 3, N)
    weight, bias = randn(N, K), randn(N)
    bounds = torch.tensor([0, 7, 7, 101, M], device=DEVICE)
    mask = torch.rand(3, M // 3, device=DEVICE) > 0.3
    rows, columns, saliency = chosen(N, S), chosen(K, S), torch.rand(N * 4, device=DEVICE)
    sets = {"rows": rows, "columns": columns}

    found = {
        "channel_stats": lambda: channel_stats(y, mask),
        "channel_stats packed": lambda: channel_stats(dy, cu_seqlens=bounds),
        "linear_stats": lambda: linear_stats(x, weight, bias, cu_seqlens=bounds),
        "select heads": lambda: [select(saliency, N // 3, 7)],
        "select model": lambda: [select(saliency, len(saliency), 61)],
    }
    if HAS_FUSED:
        found["linear_stats fused"] = lambda: linear_stats(x, weight, bias, cu_seqlens=bounds, impl="fused")
        found["linear_stats fused, sequences"] = lambda: linear_stats(x.view(3, -1, K), weight, impl="fused")
    for axis, index in sets.items():
        found |= {
            f"salient_wgrad {axis}": lambda axis=axis, index=index: [salient_wgrad(dy, x, index, axis)],
            f"salient_wgrad {axis} compact": lambda axis=axis, index=index: [
                salient_wgrad(dy, x, index, axis, compact=True)
            ],
            f"carry_ {axis}": lambda axis=axis, index=index: carried(axis, index, (N, K)[axis == "columns"]),
        }
        for moments in (torch.float32, torch.bfloat16):
            for compact in (False, True):
                found[f"sparse_adamw_ {axis} {moments} {compact}"] = (
                    lambda axis=axis, moments=moments, compact=compact: stepped(axis, moments, compact)
                )

    def carried(axis, index, channels):
        shape = (S, 24) if axis == "rows" else (24, S)
        start = torch.arange(S * 24, device=DEVICE, dtype=torch.float32).view(shape)
        states = [start.clone(), start[:, 0].int().clone() if axis == "rows" else start[0].int().clone()]
        later = channels - 1 - index.flip(0)
        return [*states, *carry_([states], [index], [later], axis)]

    def stepped(axis, moments, compact):
        shape = ((S, K) if axis == "rows" else (N, S)) if compact else (N, K)
        held = [t.clone() for t in (weight, torch.ones(shape, device=DEVICE).to(moments))]
        held += [held[1].clone(), torch.ones(shape[axis == "columns"], dtype=torch.int32, device=DEVICE)]
        target, exp_avg, exp_avg_sq, steps = held
        sparse_adamw_(
            [target], [(dy.t() @ x)], [sets[axis]], [exp_avg], [exp_avg_sq], [steps], [],
            torch.tensor(1e-2, device=DEVICE), *SCALARS, compact=compact, axis=axis, seed=3,
        )  # fmt: skip
        return held

    return found


@pytest.mark.parametrize("name", calls())
def test_same_bits_twice_whatever_memory_held_before(name):
    torch.manual_seed(1)
    call = calls()[name]
    once = [tensor.clone() for tensor in call()]
    with poisoned():
        again = call()
    assert_same_bits(once, again)
    assert all(tensor.isfinite().all() for tensor in once)


# CUDA graphs and streams


class Captured:
    """A call in a CUDA graph, run twice before to warm up."""

    def __init__(self, call):
        self.replay = call
        if not ON_GPU:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        self.replay = graph.replay


class Held:
    """Weights of three layers with what their step needs, in tensors that stay where they are."""

    NAMES = ("weights", "grads", "rows", "exp_avgs", "exp_avg_sqs", "steps", "masters")

    def __init__(self, seed, layers=3, N=24, K=64, S=7):
        torch.manual_seed(seed)
        self.shape = (N, K, S)
        self.lr = torch.tensor(1e-2, device=DEVICE)
        made = [self.layer() for _ in range(layers)]
        for name, tensors in zip(self.NAMES, zip(*made, strict=True), strict=True):
            setattr(self, name, list(tensors))

    def layer(self):
        N, K, S = self.shape
        weight = randn(N, K)
        moments = [torch.rand(N, K, device=DEVICE) for _ in range(2)]
        steps = torch.randint(1, 9, (N,), device=DEVICE, dtype=torch.int32)
        return weight, randn(N, K), chosen(N, S), *moments, steps, weight.float()

    def tensors(self):
        return [tensor for name in self.NAMES for tensor in getattr(self, name)]

    def copy(self):
        other = object.__new__(Held)
        other.shape, other.lr = self.shape, self.lr
        for name in self.NAMES:
            setattr(other, name, [tensor.clone() for tensor in getattr(self, name)])
        return other

    def renew(self):
        """New values everywhere, the sets among them, at the same addresses."""
        for i in range(len(self.weights)):
            for name, tensor in zip(self.NAMES, self.layer(), strict=True):
                getattr(self, name)[i].copy_(tensor)

    def step(self, found_inf=None):
        sparse_adamw_(
            self.weights, self.grads, self.rows, self.exp_avgs, self.exp_avg_sqs, self.steps, self.masters,
            self.lr, *SCALARS, found_inf=found_inf,
        )  # fmt: skip


def test_a_captured_step_follows_gradients_and_sets():
    held, second = Held(0, layers=1 if INTERPRETED else 3), Held(1, layers=2)
    captured, captured_second = Captured(held.step), Captured(second.step)
    for _ in range(REPLAYS):
        for own, graph in ((held, captured), (second, captured_second)):
            own.renew()
            wanted = own.copy()
            wanted.step()
            graph.replay()
            assert_same_bits(own.tensors(), wanted.tensors())
            # An eager call on the very tensors that the graph has.
            wanted.step()
            own.step()
            assert_same_bits(own.tensors(), wanted.tensors())
        for i in range(1 if INTERPRETED else 70):  # more plans than any cache keeps
            Held(i, layers=1, N=8, K=8, S=2).step()


def test_captured_ops_follow_their_inputs():
    M, N, K, S = 96, 48, 32, 14
    x, dy, weight, rows, later = randn(M, K), randn(M, N), randn(N, K), chosen(N, S), chosen(N, S)
    saliency, state, moved = (
        torch.rand(N, device=DEVICE),
        randn(S, K, dtype=torch.float32),
        torch.zeros(S, K, device=DEVICE),
    )
    outs = {}

    def call():
        outs["linear_stats"] = linear_stats(x, weight)
        outs["channel_stats"] = channel_stats(dy)
        outs["salient_wgrad"] = (salient_wgrad(dy, x, rows), salient_wgrad(dy, x, rows, compact=True))
        outs["select"] = (select(saliency, 16, 5), select(saliency, N, 13))
        moved.copy_(state)
        outs["carry_"] = (moved, *carry_([[moved]], [rows], [later]))

    captured = Captured(call)
    if ON_GPU:
        kept = {name: list(tensors) for name, tensors in outs.items()}
    for seed in range(REPLAYS):
        torch.manual_seed(seed)
        fresh = (randn(M, K), randn(M, N), randn(N, K), chosen(N, S), chosen(N, S), torch.rand(N, device=DEVICE))
        for tensor, value in zip((x, dy, weight, rows, later, saliency), fresh, strict=True):
            tensor.copy_(value)
        captured.replay()
        got = {name: [t.clone() for t in tensors] for name, tensors in (kept if ON_GPU else outs).items()}
        call()
        for name, tensors in outs.items():
            assert_same_bits(got[name], tensors)


class Attention(torch.nn.Module):
    """An attention layer without a framework around it."""

    head_dim, heads = 16, 4

    def __init__(self, size=64):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, torch.nn.Linear(size, size, bias=False))

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (q @ k.transpose(-1, -2) / self.head_dim**0.5).softmax(-1)
        return x + self.o_proj((weights @ v).transpose(1, 2).flatten(2))


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(Attention(), Attention()).to(DEVICE).train()


@not_interpreted
@pytest.mark.parametrize("state", ["full", "compact"])
def test_a_captured_training_step_equals_an_eager_one(state):
    torch.manual_seed(5)
    batches = [randn(2, 12, 64, dtype=torch.float32) for _ in range(6)]
    results = []
    for replayed in (False, True):
        net, x = two_layers(), batches[0].clone()
        longact = LongAct(net, density=0.3, nonfinite="skip")
        optimizer = SalientAdamW(net.parameters(), **HYPER, longact=longact, state=state, capturable=ON_GPU)

        def step(net=net, x=x, optimizer=optimizer):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        if replayed and ON_GPU:
            # Two calls warm up on the first batch; the eager run takes as many on it.
            captured = Captured(step)
            batches_left = batches[2:]
        else:
            captured = SimpleNamespace(replay=step)
            batches_left = [batches[0]] * 2 * ON_GPU + batches[2 * ON_GPU :]
        for batch in batches_left:
            x.copy_(batch)
            captured.replay()
        results.append([p.detach().clone() for p in net.parameters()])
    for eager, captured in zip(*results, strict=True):
        torch.testing.assert_close(captured, eager, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_a_plan_made_on_one_stream_is_ready_on_another():
    held = Held(3)
    wanted = held.copy()
    wanted.step()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    found_inf = torch.ones((), device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        # Whatever the first call copies to the device waits behind this; it changes nothing, for it was told of an Inf.
        torch.cuda._sleep(200_000_000)
        held.step(found_inf)
    with torch.cuda.stream(second):
        held.step()
    torch.cuda.synchronize()
    assert_same_bits(held.tensors(), wanted.tensors())


# torch.compile


@pytest.mark.parametrize(
    "how",
    [
        {"backend": "aot_eager"},
        pytest.param({}, marks=needs_gpu),
        pytest.param({"mode": "reduce-overhead"}, marks=needs_gpu),
    ],
    ids=["aot_eager", "inductor", "reduce-overhead"],
)
@pytest.mark.skipif(INTERPRETED, reason="the compiler would follow the calls into the interpreter")
def test_compiled_layer_equals_the_eager_one(how):
    torch._dynamo.reset()
    N, K = 48, 32
    rows, weight = chosen(N, 14), randn(N, K, dtype=torch.float32)

    def layer(x, weight, stats):
        return salient_linear(x, weight, rows=rows, stats=RunningStats(*stats)).square().sum()

    compiled = torch.compile(layer, **how)
    for seed in range(4):
        torch.manual_seed(seed)
        x = randn(2, 20, K, dtype=torch.float32)
        got = []
        for run in (layer, compiled):
            own = weight.clone().requires_grad_()
            stats = [torch.zeros(N, device=DEVICE), torch.zeros(N, device=DEVICE), torch.zeros((), device=DEVICE)]
            run(x, own, stats).backward()
            got.append([own.grad.clone(), *(s.clone() for s in stats)])
        for eager, other in zip(*got, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-5)


# Sizes that only a GPU's memory holds: more than 2^31 elements


@pytest.fixture(autouse=True)
def memory_given_back():
    """Other tests run on the same GPU."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


TALL = 2**21 + 8 if ON_GPU else 24
WIDE = 1024 if ON_GPU else 16


def magnitudes(y):
    """Channels' maxima and sums of squares, a piece of the tensor at a time."""
    pieces = [piece.float() for piece in y.split(2**18)]
    return torch.stack([p.abs().amax(0) for p in pieces]).amax(0), torch.stack([p.square().sum(0) for p in pieces]).sum(
        0
    )


def test_statistics_of_more_than_2_to_the_31_elements():
    y = randn(TALL, WIDE)
    y[-1, 5] = 1000.0
    absmax, sumsq = channel_stats(y)
    wanted = magnitudes(y)
    assert torch.equal(absmax, wanted[0]) and absmax[5] == 1000
    torch.testing.assert_close(sumsq[0], wanted[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "impl", ["separate", pytest.param("fused", marks=pytest.mark.skipif(not HAS_FUSED, reason="no kernel"))]
)
def test_projection_to_more_than_2_to_the_31_elements(impl):
    x, weight = randn(TALL, 16), randn(WIDE, 16)
    x[-1] *= 50
    y, absmax, sumsq = linear_stats(x, weight, impl=impl)
    torch.testing.assert_close(y[-64:], linear(x[-64:], weight))
    wanted = magnitudes(y)
    torch.testing.assert_close(absmax.bfloat16().float(), wanted[0], rtol=2**-7, atol=0)
    torch.testing.assert_close(sumsq[0], wanted[1], rtol=2**-6, atol=0)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_weight_gradient_from_more_than_2_to_the_31_elements(axis):
    long, short = randn(TALL, WIDE), randn(TALL, 16)
    index = torch.cat([chosen(WIDE - 2, 6), torch.tensor([WIDE - 1], device=DEVICE)])
    dy, x = (long, short) if axis == "rows" else (short, long)
    got = salient_wgrad(dy, x, index, axis, compact=True)
    wanted = sum(
        a[:, index].float().t() @ b.float() for a, b in zip(long.split(2**18), short.split(2**18), strict=True)
    )
    error = (got if axis == "rows" else got.t()) - wanted
    assert error.abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.skipif(INTERPRETED, reason="on a CPU tests/test_salient_wgrad.py has it")
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_packing_of_rows_more_than_2_to_the_31_elements_apart(axis):
    """In a process of its own: an illegal access would spoil the tests that come after it."""
    code = f"""
import torch
from longact_kernels.functional import salient_wgrad
far = torch.empty_strided((3, 16), (2**30, 1), dtype=torch.bfloat16, device={DEVICE!r})
far.copy_(torch.arange(48).view(3, 16))
near, chosen = torch.ones(3, 8, dtype=torch.bfloat16, device=far.device), torch.tensor([1, 4, 15], device=far.device)
pair = (far, near) if {axis!r} == "rows" else (near, far)
got = salient_wgrad(*pair, chosen, {axis!r}, compact=True)
sums = got[:, 0] if {axis!r} == "rows" else got[0]
assert sums.tolist() == [51.0, 60.0, 93.0], sums
"""
    packs = "import longact_kernels.csrc_triton.salient_wgrad as kernels\nkernels.pays = lambda *sizes: True"
    done = subprocess.run(
        [sys.executable, "-c", packs * ON_GPU + code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_weight_gradient_of_more_than_2_to_the_31_elements():
    N, K = (2**17 + 8, 2**14) if ON_GPU else (40, 16)
    dy, x = randn(16, N), randn(16, K)
    index = torch.cat([chosen(N - 2, 30), torch.tensor([N - 1], device=DEVICE)])
    dw = salient_wgrad(dy, x, index)
    wanted = dy[:, index].float().t() @ x.float()
    torch.testing.assert_close(dw[index].float(), wanted, rtol=2**-7, atol=1e-2)
    assert int(sum(rows.count_nonzero(1).gt(0).sum() for rows in dw.split(2**14))) == len(index)


@pytest.mark.parametrize("compact", [False, True])
def test_step_of_more_than_2_to_the_31_elements(compact):
    N, K = (2**18 + 8, 2**13) if ON_GPU else (40, 16)
    index = torch.tensor([0, N - 2, N - 1], device=DEVICE)
    weight, grad = (
        torch.ones(N, K, dtype=torch.bfloat16, device=DEVICE),
        torch.empty(N, K, dtype=torch.bfloat16, device=DEVICE),
    )
    grad[index] = randn(3, K)
    rows = 3 if compact else N
    moments = [torch.zeros(rows, K, device=DEVICE) for _ in range(2)]
    steps = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    lr = torch.tensor(0.1, device=DEVICE)
    own = weight[index].clone(), grad[index].clone(), torch.arange(3, device=DEVICE)
    small = [torch.zeros(3, K, device=DEVICE) for _ in range(2)], torch.zeros(3, dtype=torch.int32, device=DEVICE)
    sparse_adamw_([own[0]], [own[1]], [own[2]], [small[0][0]], [small[0][1]], [small[1]], [], lr, *SCALARS)
    sparse_adamw_([weight], [grad], [index], [moments[0]], [moments[1]], [steps], [], lr, *SCALARS, compact=compact)
    assert torch.equal(weight[index], own[0]) and bool((own[0] != 1).any())
    assert torch.equal(moments[1] if compact else moments[1][index], small[0][1])
    assert bool((weight[1 : N - 2] == 1).all())


def test_carrying_more_than_2_to_the_31_elements():
    S, K = (2**18 + 8, 2**13) if ON_GPU else (40, 16)
    state = torch.arange(S, device=DEVICE, dtype=torch.float32).unsqueeze(1).repeat(1, K)
    old = torch.arange(S, device=DEVICE)
    (kept,) = carry_([[state]], [old], [old + 1])
    # Slot s now has what belonged to channel s + 1, and the last slot a channel that came in.
    assert kept[:-1].all() and not kept[-1]
    assert torch.equal(state[-3:, -1].cpu(), torch.tensor([S - 2.0, S - 1.0, 0.0]))
    assert torch.equal(state[:, 0], torch.cat([old[1:], old[:1]]).float())


# Lists and grids longer than one block of them


@not_interpreted
def test_more_than_128_packed_sequences():
    lengths = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    M = int(bounds[-1])
    x, weight = randn(M, 32), randn(48, 32)
    y = linear(x, weight)
    wanted = torch.stack([part.float().square().sum(0) for part in y.split(lengths.tolist())])
    torch.testing.assert_close(channel_stats(y, cu_seqlens=bounds)[1], wanted, rtol=1e-5, atol=0)
    for impl in ("separate", "fused")[: 1 + HAS_FUSED]:
        torch.testing.assert_close(
            linear_stats(x, weight, cu_seqlens=bounds, impl=impl)[2], wanted, rtol=2**-6, atol=1e-3
        )


def test_products_of_more_than_eight_rows_of_tiles():
    M, N, K = (2600, 2600, 2600) if ON_GPU else (600, 40, 16)
    x, weight, dy = randn(M, K), randn(N, K) / K**0.5, randn(M, N)
    impls = ("separate", "fused")[: 1 + HAS_FUSED]
    wanted = linear(x.float(), weight.float())
    for impl in impls:
        y, absmax, _ = linear_stats(x, weight, impl=impl)
        torch.testing.assert_close(y.float(), wanted, rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(absmax, wanted.abs().amax(0), rtol=2**-7, atol=0)
    for axis, index in (("rows", chosen(N, N - 3)), ("columns", chosen(K, K - 3))):
        got = salient_wgrad(dy, x, index, axis)
        whole = dy.float().t() @ x.float()
        outside = torch.ones(whole.shape[axis == "columns"], dtype=torch.bool, device=DEVICE)
        outside[index] = False
        whole[(slice(None), outside) if axis == "columns" else outside] = 0
        torch.testing.assert_close(got.float(), whole, rtol=2**-7, atol=2**-7 * M**0.5)


# Training


def train(device, steps=5, state="full", before=lambda model: None, **longact_options):
    """Losses and weights of a tiny Qwen3."""
    model = tiny_model("Qwen3").to(device)
    before(model)
    longact = LongAct(model, density=0.3, **longact_options)
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact, state=state)
    losses = []
    for step in range(steps):
        losses.append(backward(model, tokens(seed=step).to(device)).cpu())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), [p.detach().cpu() for p in model.parameters()]


def assert_trained_alike(one, other, lr=HYPER["lr"], steps=5):
    """Up to rounding: an element whose gradient is all rounding may go another way, by a learning rate a step."""
    torch.testing.assert_close(one[0], other[0], rtol=1e-3, atol=0)
    for a, b in zip(one[1], other[1], strict=True):
        error = (a - b).abs()
        assert error.max() <= 2.2 * lr * steps
        assert (error > 1e-5).float().mean() < 0.01


@not_interpreted
@pytest.mark.parametrize(("state", "grad"), [("full", "full"), ("compact", "full"), ("compact", "compact")])
def test_trains_as_on_a_cpu(state, grad):
    assert_trained_alike(train(DEVICE, state=state, grad=grad), train("cpu", state=state, grad=grad))


@not_interpreted
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    plain = train(DEVICE)
    checkpointed = train(DEVICE, before=lambda model: checkpoint_activations(model, use_reentrant))
    if ON_GPU:
        assert_trained_alike(plain, checkpointed)
    else:
        assert_same_bits(plain[1], checkpointed[1])


@not_interpreted
@pytest.mark.parametrize("state", ["full", "compact"])
def test_grad_scaler(state):
    """A scaled step is the unscaled one; one with an Inf in its gradients changes nothing, and the next one goes on."""
    results = []
    for scaled in (False, True):
        model = tiny_model("Qwen3").to(DEVICE)
        longact = LongAct(model, density=0.3)
        optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact, state=state)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8, enabled=scaled)

        def step(seed, factor=1.0, model=model, optimizer=optimizer, scaler=scaler):
            ids = tokens(seed=seed).to(DEVICE)
            loss = model(input_ids=ids, labels=ids).loss * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        for seed in range(3):
            step(seed)
        results.append([p.detach().clone() for p in model.parameters()])
    for plain, other in zip(*results, strict=True):
        assert ((plain - other).abs() > 1e-5).float().mean() < 0.01
    before = [p.detach().clone() for p in model.parameters()]
    step(3, factor=1e38)  # times the scale: Inf in every gradient
    assert_same_bits(before, [p.detach() for p in model.parameters()])
    assert scaler.get_scale() == 2.0**7
    step(4)
    assert all(p.isfinite().all() for p in model.parameters())
    assert any((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_is_the_current_one():
    with torch.cuda.device(1):
        elsewhere = train("cuda:0")
    assert_trained_alike(elsewhere, train("cuda:0"))


# Offloading between steps, as verl does it


def trained_sharded(offload, dtype):
    model = tiny_model("Qwen2").to(DEVICE, dtype)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    longact = LongAct(model, refresh_every=2)
    optimizer = SalientAdamW(model.parameters(), lr=3e-2)
    for step in range(5):
        backward(model, tokens(seed=step).to(DEVICE))
        longact.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if offload:
            for device in ("cpu", DEVICE):
                model.to(device, non_blocking=True)
                for state in optimizer.state.values():
                    # Where there is no GPU, to another address.
                    moved = {name: (held if ON_GPU else held.clone()).to(device) for name, held in state.items()}
                    state.update(moved)
    return [p.full_tensor() for p in model.parameters()], longact.sets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_state_may_be_elsewhere_between_steps(dtype, tmp_path):
    torch.distributed.init_process_group(
        "nccl" if ON_GPU else "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        (weights, sets), (expected, expected_sets) = (trained_sharded(offload, dtype) for offload in (True, False))
    finally:
        torch.distributed.destroy_process_group()
    assert_same_bits(weights, expected)
    assert_same_bits(list(sets.values()), list(expected_sets.values()))
