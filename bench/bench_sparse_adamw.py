"""The optimizer step on salient rows and columns, beside dense AdamW and other ways to a sparse step."""

import copy

import pytest
import torch

from bench.race import DEVICE, ours, update
from longact_kernels import ops
from longact_kernels.cpu.sparse_adamw import blocks
from longact_kernels.reference.sparse_adamw import AdamWCall
from longact_kernels.reference.sparse_adamw import sparse_adamw_ as reference

HYPER = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
SCALARS = (*HYPER["betas"], HYPER["eps"], HYPER["weight_decay"])
# All q/k projections of SmolLM2-135M.
SMOLLM2 = [shape for _ in range(30) for shape in ((576, 576), (192, 576))]
HEAD_DIM = 64


def salient_sets(shapes, density, axis):
    """The top `density` of every head of 64 channels, at random places."""
    sets = []
    for shape in shapes:
        channels = shape[axis == "columns"]
        order = torch.rand(channels // HEAD_DIM, HEAD_DIM, device=DEVICE).argsort(1)[:, : round(density * HEAD_DIM)]
        first = torch.arange(0, channels, HEAD_DIM, device=DEVICE).unsqueeze(1)
        sets.append((order + first).flatten().sort().values)
    return sets


class Problem:
    """Weights with gradients and moments, all contenders' common property."""

    def __init__(self, shapes, density, axis="rows", dtype=torch.float32):
        self.axis, self.dtype, self.density, self.holds_salient = axis, dtype, density, False
        self.masters = [torch.randn(shape, device=DEVICE) for shape in shapes] if dtype != torch.float32 else []
        self.weights = [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]
        self.grads = [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]
        self.exp_avgs = [torch.zeros(shape, device=DEVICE) for shape in shapes]
        self.exp_avg_sqs = [torch.zeros(shape, device=DEVICE) for shape in shapes]
        self.index = salient_sets(shapes, density, axis)
        # As in mid-training: every channel has been salient a number of times of its own.
        self.steps = [
            torch.randint(0, 1000, (shape[axis == "columns"],), dtype=torch.int32, device=DEVICE) for shape in shapes
        ]
        self.lr = torch.tensor(HYPER["lr"], dtype=torch.float64, device=DEVICE)

    def compact(self):
        """Leaves gradients and states of the salient channels only."""
        self.holds_salient = True
        dim = int(self.axis == "columns")
        for tensors in (self.grads, self.exp_avgs, self.exp_avg_sqs, self.masters, self.steps):
            for i, tensor in enumerate(tensors):
                tensors[i] = tensor.index_select(min(dim, tensor.ndim - 1), self.index[i])

    def lists(self):
        states = (self.exp_avgs, self.exp_avg_sqs, self.steps, self.masters)
        return self.weights, self.grads, self.index, *states

    def ours(self):
        """A step as the optimizer takes it: by a plan, which is looked at for whether it still fits."""
        weights, grads, *rest = self.lists()
        plan = ops.AdamWPlan(weights, *rest, compact=self.holds_salient, axis=self.axis)

        def step():
            assert plan.fits(weights, *rest)
            plan.step(grads, self.lr, *SCALARS)

        return step

    def check(self):
        """The first weight, through our op and through the reference."""
        first = [lists[:1] for lists in self.lists()]
        got, wanted = copy.deepcopy(first), copy.deepcopy(first)
        ops.sparse_adamw_(*got, self.lr, *SCALARS, self.holds_salient, axis=self.axis)
        reference(AdamWCall(*wanted, self.lr, *SCALARS, self.holds_salient, axis=self.axis))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if self.dtype == torch.float32 else 2**-7, atol=1e-9)

    def dense(self, **how):
        """torch.optim.AdamW on the same weights: on fp32 masters, and a copy to 16 bits, where they are 16-bit."""
        targets = [torch.nn.Parameter(t, requires_grad=False) for t in self.masters or self.weights]
        optimizer = torch.optim.AdamW(targets, **HYPER, **how)
        for target, grad in zip(targets, self.grads, strict=True):
            target.grad = grad.float()

        def step():
            if self.masters:
                torch._foreach_copy_([target.grad for target in targets], self.grads)
            optimizer.step()
            if self.masters:
                torch._foreach_copy_(self.weights, [target.data for target in targets])

        return step

    def literal(self):
        """The paper's literal form: the gradient masked, then dense AdamW."""
        step = self.dense(fused=True)
        outside = []
        for weight, rows in zip(self.weights, self.index, strict=True):
            mask = torch.ones(len(weight), 1, dtype=torch.bool, device=DEVICE)
            mask[rows] = False
            outside.append(mask)

        def masked_step():
            for grad, mask in zip(self.grads, outside, strict=True):
                grad.masked_fill_(mask, 0)
            step()

        return masked_step

    def sparse_adam(self):
        """torch.optim.SparseAdam on row-sparse gradients; it has no weight decay, and one step count for all rows."""
        weights = [torch.nn.Parameter(w, requires_grad=False) for w in self.weights]
        for weight, grad, rows in zip(weights, self.grads, self.index, strict=True):
            weight.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), grad[rows], weight.shape, is_coalesced=True)
        return torch.optim.SparseAdam(weights, lr=HYPER["lr"]).step

    def optimi(self):
        optimi = pytest.importorskip("optimi", reason="pip install torch-optimi")
        weights = [torch.nn.Parameter(w) for w in self.weights]
        for weight, grad in zip(weights, self.grads, strict=True):
            weight.grad = grad
        return optimi.AdamW(weights, **HYPER).step

    def moves(self):
        """Salient elements read into blocks and written back, nothing computed: the moves of our form without numba."""
        scratch = torch.empty(4, 1 << 18)
        dim = int(self.axis == "columns")

        def step():
            for weight, grad, exp_avg, exp_avg_sq, rows in zip(
                self.weights, self.grads, self.exp_avgs, self.exp_avg_sqs, self.index, strict=True
            ):
                for block in blocks(weight, rows, dim):
                    buffers = [numbers[: block.shape.numel()].view(block.shape) for numbers in scratch]
                    for tensor, buffer in zip((weight, exp_avg, exp_avg_sq, grad), buffers, strict=True):
                        block.take(tensor, False, buffer)
                    for tensor, buffer in zip((weight, exp_avg, exp_avg_sq), buffers, strict=False):
                        block.put(tensor, False, buffer)

        return {} if DEVICE == "cuda" else {"ATen's gather and scatter alone": step}

    def least_bytes(self):
        """A salient element reads weight (or master), gradient and moments and writes all but the gradient: 28 bytes in
        fp32, and as many in bf16 with a master, whose 16-bit copy is written but not read."""
        elements = sum(
            w.numel() * len(r) / w.shape[self.axis == "columns"] for w, r in zip(self.weights, self.index, strict=True)
        )
        # Along columns whole cache lines travel: 16 numbers of which at least one is salient.
        in_lines = elements * (1 - (1 - self.density) ** 16) / self.density if self.axis == "columns" else elements
        return 8 * in_lines + 20 * (elements if self.holds_salient else in_lines)


LARGE = [(4096, 4096)] * 4


@pytest.mark.parametrize(("density", "bars"), [(0.30, (0.32, 0.8)), (0.05, (0.07, 0.2))], ids=["0.30", "0.05"])
def test_rows_fp32(race, density, bars):
    problem = Problem(LARGE, density)
    contenders = {**ours(problem.ours()), "AdamW(fused=True)": problem.dense(fused=True), **problem.moves()}
    if density == 0.30:
        contenders |= {"AdamW(foreach=True)": problem.dense(foreach=True), "masked gradient + AdamW": problem.literal()}
    race(
        "row AdamW",
        f"fp32 4 x 4096², {density:.2f}",
        contenders,
        peer="AdamW(fused=True)",
        check=problem.check,
        roof=update(problem.least_bytes()),
        bars=dict(zip(("ours", "ours, no numba"), bars, strict=True)),
    )


@pytest.mark.parametrize(("density", "bars"), [(0.30, (0.30, 0.8)), (0.05, (0.06, 0.8))], ids=["0.30", "0.05"])
def test_rows_bf16_with_master(race, density, bars):
    problem = Problem(LARGE, density, dtype=torch.bfloat16)
    race(
        "row AdamW, fp32 master",
        f"bf16 4 x 4096², {density:.2f}",
        {**ours(problem.ours()), "AdamW(fused=True) + copy": problem.dense(fused=True)},
        peer="AdamW(fused=True) + copy",
        check=problem.check,
        roof=update(problem.least_bytes()),
        bars=dict(zip(("ours", "ours, no numba"), bars, strict=True)),
    )


def test_rows_of_smollm2(race):
    problem = Problem(SMOLLM2, 0.3)
    race(
        "row AdamW, q/k of SmolLM2",
        "fp32 60 matrices, 0.30",
        {
            **ours(problem.ours()),
            "AdamW(fused=True)": problem.dense(fused=True),
            "AdamW(foreach=True)": problem.dense(foreach=True),
            "masked gradient + AdamW": problem.literal(),
            "SparseAdam": problem.sparse_adam(),
            "optimi AdamW": problem.optimi(),
            **problem.moves(),
        },
        peer="AdamW(fused=True)",
        check=problem.check,
        roof=update(problem.least_bytes()),
        bars={"ours": 0.36, "ours, no numba": 0.8},
    )


@pytest.mark.parametrize(("density", "bars"), [(0.30, (1.00, 2.2)), (0.05, (1.00, 1.4))], ids=["0.30", "0.05"])
def test_columns(race, density, bars):
    problem = Problem(LARGE[:2], density, axis="columns")
    race(
        "column AdamW",
        f"fp32 2 x 4096², {density:.2f}",
        {**ours(problem.ours()), "AdamW(fused=True)": problem.dense(fused=True), **problem.moves()},
        peer="AdamW(fused=True)",
        check=problem.check,
        roof=update(problem.least_bytes()),
        bars=dict(zip(("ours", "ours, no numba"), bars, strict=True)),
    )


@pytest.mark.parametrize(("density", "bar"), [(0.30, 0.5), (0.05, 0.3)], ids=["0.30", "0.05"])
def test_compact_columns(race, density, bar):
    """Of all that is whole only the weight's lines travel."""
    problem = Problem(LARGE[:2], density, axis="columns")
    dense = problem.dense(fused=True)
    problem.compact()
    race(
        "column AdamW, compact",
        f"fp32 2 x 4096², {density:.2f}",
        {"ours": problem.ours(), "AdamW(fused=True)": dense},
        peer="AdamW(fused=True)",
        check=problem.check,
        roof=update(problem.least_bytes()),
        bars={"ours": bar},
    )


def growth(race, problem, variant, curve):
    race(
        "row AdamW, growth",
        variant,
        {**ours(problem.ours()), "AdamW(fused=True)": problem.dense(fused=True)},
        peer="AdamW(fused=True)",
        check=problem.check,
        curve=curve,
        budget=1.0,
    )


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7])
def test_growth_with_density(race, density):
    growth(
        race, Problem([(2048, 2048)] * 2, density), f"fp32 2 x 2048², {density:.2f}", ("AdamW step", "density", density)
    )


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_growth_with_size(race, size):
    problem = Problem([(size, size)], 0.3)
    growth(race, problem, f"fp32 {size}², 0.30", ("AdamW step", "weights (N·K)", size * size))


@pytest.mark.parametrize("layers", [2, 8, 30, 60])
def test_growth_with_layers(race, layers):
    problem = Problem(SMOLLM2[:2] * layers, 0.3)
    growth(race, problem, f"fp32 {layers} layers of SmolLM2, 0.30", ("AdamW step", "layers", layers))
