"""Stage 6: the ops beside what else does the same work, on the query and key projections of real models in bf16."""

import gc
from collections.abc import Callable

import torch
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

from bench.gpu import roofline
from bench.gpu.models import Model, cases
from bench.gpu.peers import HYPER, Weights, compiled_masked, dense, gathered, random_rows
from bench.gpu.stage import Stage
from bench.race import DEVICE, Turns
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

ROUNDS = 10
OURS = "ours"
Contenders = dict[str, Callable[[], object]]
Works = dict[str, Callable[[], Contenders]]


def run(stage: Stage) -> int:
    torch.manual_seed(0)
    seen, failed = set(), 0
    gpu = roofline.gpu("H100" if stage.dry else torch.cuda.get_device_name())
    for model, tokens in cases(stage.dry):
        works = of_activations(model, tokens)
        if model not in seen:
            works |= of_weights(model, "eager" if stage.dry else "inductor", compiled=not seen)
        seen.add(model)
        failed += races(stage, model, tokens, works, roofline.predicted(gpu, model, tokens))
    return int(failed > 0)


def races(stage: Stage, model: Model, tokens: int, works: Works, predicted: dict[str, float]) -> int:
    """Races the contenders of all works; how many works failed, of which each is a row."""
    failed = 0
    for work, make in works.items():
        case = {"work": work, "model": model.name, "tokens": tokens}
        try:
            race(stage, case, make(), predicted.get(work))
        except Exception as error:
            failed += 1
            stage.row("error", **case, error=f"{type(error).__name__}: {error}"[:500])
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return failed


def race(stage: Stage, case: dict, contenders: Contenders, predicted: float | None) -> None:
    """A row for each contender; ratios are taken to the first. `predicted` is the time of ours, in seconds."""
    turns = Turns(contenders)
    if not stage.dry:
        turns.rounds_in(0, 1, 1)  # warms up
    for _ in range(1 if stage.dry else ROUNDS):
        turns()
    peer = next(iter(contenders))
    for name, call in contenders.items():
        figures = {"device_us": 1e6 * turns.median(name), "host_us": 1e6 * turns.host_median(name)}
        if name == OURS and predicted is not None:
            figures["predicted_us"] = 1e6 * predicted
        if case["work"] == "optimizer step":
            figures |= asked_of_device(call)
        stage.row("timing", **case, contender=name, **figures, ratio=turns.ratio(name, peer))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def of_activations(model: Model, M: int) -> Works:
    """What works on the activations of one layer: each call does the query, then the key projection."""
    K, Ns = model.K, model.N

    def both(f: Callable, *lists: list) -> Callable[[], object]:
        pairs = list(zip(*lists, strict=True))
        return lambda: [f(*tensors) for tensors in pairs]

    def statistics():
        ys = [randn(M, N) for N in Ns]
        return {
            "y.abs().amax(0)": both(lambda y: y.abs().amax(0), ys),
            "amax, -amin": both(lambda y: torch.maximum(y.amax(0), -y.amin(0)), ys),
            "vector_norm": both(lambda y: torch.linalg.vector_norm(y, float("inf"), 0), ys),
            OURS: both(channel_stats, ys),
            "ours, absmax alone": both(lambda y: channel_stats(y, l2=False), ys),
        }

    def projection_with_statistics():
        x, weights = randn(M, K), [randn(N, K) for N in Ns]

        def hooked(weight):
            y = linear(x, weight)
            return y, y.abs().amax(0)

        ways = {"F.linear": both(lambda w: linear(x, w), weights), "F.linear, amax": both(hooked, weights)}
        ways[OURS] = both(lambda w: linear_stats(x, w), weights)
        for impl in ("separate", "fused"):
            ways[f"ours, {impl}"] = both(lambda w, impl=impl: linear_stats(x, w, impl=impl), weights)
        return ways

    def weight_gradient():
        x, dys, sets = randn(M, K), [randn(M, N) for N in Ns], [random_rows(model, N) for N in Ns]
        packed = [dy[:, rows] for dy, rows in zip(dys, sets, strict=True)]
        outs = [torch.zeros(len(rows), K, device=DEVICE) for rows in sets]

        def pack_and_mm(dy, rows):
            dw = torch.zeros(dy.shape[1], K, device=DEVICE, dtype=dy.dtype)
            return dw.index_copy_(0, rows, torch.mm(dy.index_select(1, rows).t(), x))

        def added(dy, rows, out):
            return salient_wgrad(dy, x, rows, compact=True, out=out, accumulate=True)

        return {
            "dy.T @ x": both(lambda dy: dy.t() @ x, dys),
            "dy[:, rows].T @ x": both(lambda dy, rows: dy[:, rows].t() @ x, dys, sets),
            "pack, torch.mm, scatter": both(pack_and_mm, dys, sets),
            "product of packed rows alone": both(lambda dy: dy.t() @ x, packed),
            OURS: both(lambda dy, rows: salient_wgrad(dy, x, rows), dys, sets),
            "ours, compact, added": both(added, dys, sets, outs),
        }

    def forward_and_backward():
        """Forward and backward as layers do it; at few tokens the host's time is what counts."""
        x = randn(M, K).requires_grad_()
        weights = [randn(N, K).requires_grad_() for N in Ns]
        sets, dys = [random_rows(model, N) for N in Ns], [randn(M, N) for N in Ns]
        stats = [RunningStats(torch.zeros(N, device=DEVICE)) for N in Ns]

        def plain(weight, dy):
            torch.autograd.grad(linear(x, weight), (x, weight), dy)

        def ours(weight, dy, rows, running):
            torch.autograd.grad(salient_linear(x, weight, rows=rows, stats=running), (x, weight), dy)

        return {
            "F.linear": both(plain, weights, dys),
            OURS: both(ours, weights, dys, sets, stats),
        }

    return {
        "channel_stats": statistics,
        "linear_stats": projection_with_statistics,
        "salient_wgrad": weight_gradient,
        "forward and backward": forward_and_backward,
    }


def of_weights(model: Model, backend: str, compiled: bool) -> Works:
    """What works on all layers' weights at once; beside `compiled`, whose compilation takes half a minute."""

    def adamw():
        held = Weights(model)
        lr = torch.tensor(HYPER["lr"], device=DEVICE)
        states = (held.exp_avgs, held.exp_avg_sqs, held.steps, held.masters)
        scalars = (*HYPER["betas"], HYPER["eps"], HYPER["weight_decay"])
        ours = (held.weights, held.grads, held.rows, *states, lr, *scalars)
        contenders = {
            "AdamW(fused=True)": dense(held, fused=True),
            "AdamW(foreach=True)": dense(held, foreach=True),
            "AdamW(fused=True), gathered": gathered(held, fused=True),
            "AdamW(foreach=True), gathered": gathered(held, foreach=True),
            OURS: lambda: sparse_adamw_(*ours),
        }
        return contenders | ({"compiled masked AdamW": compiled_masked(held, backend)} if compiled else {})

    def optimizer_step():
        plain, full, compact = projections(model), projections(model), projections(model)
        with_masters = {"fused": True, **HYPER}
        return {
            "AdamW(fused=True), no masters": stepped(plain, torch.optim.AdamW(plain.parameters(), **with_masters)),
            OURS: ours_stepped(full, state="full"),
            "ours, compact": ours_stepped(compact, state="compact"),
        }

    def refresh():
        heads = sum(model.sizes) // model.head_dim
        saliency = torch.rand(heads * model.head_dim, device=DEVICE)
        old, new = ([random_rows(model, n) for n in model.sizes] for _ in range(2))
        states = [[randn(len(rows), model.K, dtype=torch.float32) for _ in range(3)] for rows in old]
        share = round(len(saliency) * model.salient / model.head_dim)
        return {
            "topk, sort": lambda: saliency.view(heads, -1).topk(model.salient).indices.sort(1),
            OURS: lambda: select(saliency, model.head_dim, model.salient),
            "topk, sort, over the model": lambda: saliency.topk(share).indices.sort(),
            "ours, over the model": lambda: select(saliency, len(saliency), share),
            "carry_, most rows move": lambda: carry_(states, old, new),
            "carry_, no row moves": lambda: carry_(states, old, old),
        }

    return {"sparse_adamw": adamw, "optimizer step": optimizer_step, "refresh": refresh}


def projections(model: Model) -> torch.nn.Module:
    """A module with a model's query and key projections and nothing else."""
    net = torch.nn.Module()
    net.layers = torch.nn.ModuleList()
    for _ in range(model.layers):
        attention = torch.nn.Module()
        attention.head_dim = model.head_dim
        for name, n in zip(("q_proj", "k_proj"), model.N, strict=True):
            layer = torch.nn.Linear(model.K, n, bias=False, device=DEVICE, dtype=torch.bfloat16)
            attention.add_module(name, layer)
        layer = torch.nn.Module()
        layer.self_attn = attention
        net.layers.append(layer)
    return net.train()


def stepped(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable:
    """The optimizer's step, after a backward that leaves it gradients."""
    x = torch.randn(1, 64, net.layers[0].self_attn.q_proj.weight.shape[1], device=DEVICE, dtype=torch.bfloat16)
    sum(p(x).float().square().mean() for layer in net.layers for p in layer.self_attn.children()).backward()
    return optimizer.step


def ours_stepped(net: torch.nn.Module, state: str) -> Callable:
    longact = LongAct(net, density=0.3)
    return stepped(net, SalientAdamW(net.parameters(), **HYPER, longact=longact, state=state))


def asked_of_device(step: Callable) -> dict[str, int]:
    """What one call asks of the device: launches, and copies from the host, which a step should not need."""
    if DEVICE == "cpu":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    return {
        "launches": sum("LaunchKernel" in name for name in names),
        "host_copies": sum("Memcpy HtoD" in name for name in names),
        "waits": sum("cudaStreamSynchronize" in name or "Memcpy DtoH" in name for name in names),
    }
