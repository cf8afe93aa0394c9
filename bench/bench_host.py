"""What a step costs the host where a GPU does the work: launches are stubbed, and all that is timed is Python."""

import copy
from contextlib import contextmanager

import pytest
import torch

from longact_kernels import LongAct, functional, ops
from longact_kernels.ops import dispatch
from longact_kernels.ops import sparse_adamw as adamw_op
from longact_kernels.sparse import batch

# q and k of 36 layers, as Qwen3-8B and Qwen3-4B have them; of small matrices, whose work nobody does.
MATRICES = [shape for _ in range(36) for shape in ((64, 64), (16, 64))]


class NoLaunch:
    """Stands for a `triton.jit` function."""

    def __getitem__(self, grid):
        return _nothing


def _nothing(*args, **kwargs):
    pass


@contextmanager
def launches_stubbed():
    kernels = pytest.importorskip("longact_kernels.csrc_triton.sparse_adamw")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of tiny tensors, which no second thread makes quicker
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "sparse_adamw", NoLaunch())
        patch.setattr(adamw_op, "runs_triton", lambda tensor: True)
        yield
    torch.set_num_threads(threads)


def test_optimizer_call(race):
    """The first bar is a quarter of what the list form took while it kept its table from call to call, 0.77 of now."""
    weights, grads, masters = (
        [torch.randn(shape).to(d) for shape in MATRICES] for d in (torch.bfloat16,) * 2 + (torch.float32,)
    )
    index = [torch.arange(0, len(weight), 3) for weight in weights]
    exp_avgs, exp_avg_sqs = ([torch.zeros(shape) for shape in MATRICES] for _ in range(2))
    steps = [torch.zeros(len(weight), dtype=torch.int32) for weight in weights]
    numbers = (torch.tensor(1e-6), 0.9, 0.999, 1e-8, 0.01)
    with launches_stubbed():
        held = weights, index, exp_avgs, exp_avg_sqs, steps, masters
        plan = ops.AdamWPlan(*held)
        # Gradients are new tensors at every step, mostly at the addresses of the ones before.
        again = [[grad.view(grad.shape) for grad in grads] for _ in range(2)]
        moving = [grads, [grad.clone() for grad in grads]]

        def planned(turns):
            def step():
                assert plan.fits(*held)
                turns.append(turns.pop(0))
                plan.step(turns[0], *numbers)

            return step

        race(
            "optimizer call, host",
            "72 matrices",
            {
                "ours": planned(again),
                "ours, gradients that move": planned(moving),
                "list form": lambda: ops.sparse_adamw_(weights, grads, *held[1:], *numbers),
            },
            peer="list form",
            check=lambda: None,
            bars={"ours": 0.19, "ours, gradients that move": 0.25},
            rounds=(50, 300),
        )


@contextmanager
def projection_stubbed():
    """No launch of the kernels that a projection takes part in."""
    kernels = {
        "channel_stats": ("channel_stats_partial", "channel_stats_merge"),
        "salient_wgrad": ("pack_kernel", "scatter_kernel"),
    }
    with launches_stubbed(), pytest.MonkeyPatch.context() as patch:
        for module, names in kernels.items():
            for name in names:
                patch.setattr(f"longact_kernels.csrc_triton.{module}.{name}", NoLaunch())
        patch.setattr(dispatch, "runs_triton", lambda tensor: True)
        yield


@pytest.mark.parametrize("compact", [False, True])
def test_projection(race, compact):
    """Forward and backward of `salient_linear`."""
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((1, 8, 64), (64, 64)))
    rows, dy = torch.arange(0, 64, 3), torch.randn(1, 8, 64)
    absmax = functional.RunningStats(torch.zeros(64))
    both = functional.RunningStats(torch.zeros(64), torch.zeros(64), torch.zeros(()))
    grad = torch.zeros(len(rows), 64) if compact else None

    def ours(stats):
        functional.salient_linear(x, weight, None, rows, stats, grad=grad).backward(dy)
        x.grad = weight.grad = None

    def linear():
        torch.nn.functional.linear(x, weight).backward(dy)
        x.grad = weight.grad = None

    with projection_stubbed():
        race(
            "projection with absmax, host",
            "compact gradient" if compact else "whole gradient",
            {"ours": lambda: ours(absmax), "ours, absmax and L2": lambda: ours(both), "F.linear": linear},
            peer="F.linear",
            check=lambda: None,
            bars={"ours": 1.6},
            rounds=(100, 1000),
        )


def test_layers(race, monkeypatch):
    """The same for all projections of a model, as `LongAct` has them with its defaults, beside `nn.Linear`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=36)
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1))
    sparse = copy.deepcopy(dense)
    longact = LongAct(sparse)
    monkeypatch.setattr(batch, "SMALL", 0)  # real weights are too large to be looked at
    x = torch.randn(1, 8, 64, requires_grad=True)

    def passes(model):
        layers = [module for name, module in model.named_modules() if name.endswith(("q_proj", "k_proj"))]
        dys = [torch.randn(1, 8, layer.out_features) for layer in layers]

        def run():
            torch.autograd.backward([layer(x) for layer in layers], dys)
            x.grad = None
            for layer in layers:
                layer.weight.grad = None

        return run

    ours, linear = passes(sparse), passes(dense)
    ours()
    longact.refresh()
    longact.advance()  # before the first step more is looked at
    with projection_stubbed():
        race(
            "projections of a model, host",
            "72 layers",
            {"ours": ours, "nn.Linear": linear},
            peer="nn.Linear",
            check=lambda: None,
            bars={"ours": 1.6},
            rounds=(20, 200),
        )
