"""What the tests of situations share: LongAct written out in plain torch, and small models with their optimizers."""

import copy

import torch
from models import backward, tiny_model, tokens
from torch.nn.functional import cross_entropy

from longact_kernels import LongAct, SalientAdamW

HYPER = dict(lr=3e-3, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)


def sets(longact: LongAct) -> dict[str, list[int]]:
    """The salient channels of every layer."""
    return {name: channels.tolist() for name, channels in longact.sets.items()}


def saliencies(longact: LongAct) -> dict[str, torch.Tensor]:
    return {name: longact.saliency(name) for name in longact.layers}


def projections(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The query and key projections by their names, found without LongAct."""
    return {name: module for name, module in model.named_modules() if name.endswith(("q_proj", "k_proj"))}


def top(saliency: torch.Tensor, head_dim: int = 10, count: int = 3) -> list[int]:
    """The `count` largest channels of every head, the lower index first among equals."""
    heads = saliency.view(-1, head_dim).tolist()
    best = [sorted(range(head_dim), key=lambda i, head=head: (-head[i], i))[:count] for head in heads]
    return [head_dim * h + i for h, chosen in enumerate(best) for i in sorted(chosen)]


def loss_of(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A sum over the tokens, so that losses of micro-batches add up to the batch's."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.sum() if mask is None else (losses * mask[:, 1:].flatten()).sum()


class Witness:
    """The statistics of a plain model's projections, taken by forward hooks.

    Nothing of the package is in it: `call` runs a copy of a model made before LongAct and says which tokens count.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = copy.deepcopy(model)
        self.forget()
        self.outputs: dict[str, torch.Tensor] = {}
        for name, module in projections(self.model).items():
            module.register_forward_hook(lambda m, i, out, name=name: self.outputs.update({name: out.detach()}))

    def forget(self) -> None:
        self.norms: dict[str, list[torch.Tensor]] = {}
        self.largest: dict[str, list[torch.Tensor]] = {}

    def call(self, ids, sequences=None, mask=None, **inputs):
        """Runs the model; `sequences` are index pairs (row, tokens) that each count as one sequence."""
        if mask is not None:
            inputs["attention_mask"] = mask
        self.outputs.clear()
        result = self.model(input_ids=ids, **inputs)
        self.take(sequences or [(i, slice(None) if mask is None else mask[i].bool()) for i in range(len(ids))])
        return result

    def take(self, sequences) -> None:
        for name, y in self.outputs.items():
            for row, kept in sequences:
                part = y[row][kept].float()
                if len(part):
                    self.norms.setdefault(name, []).append(part.square().sum(0).sqrt())
                    self.largest.setdefault(name, []).append(part.abs().amax(0))

    def saliency(self, statistic: str) -> dict[str, torch.Tensor]:
        if statistic == "absmax":
            return {name: torch.stack(parts).amax(0) for name, parts in self.largest.items()}
        return {name: torch.stack(parts).mean(0) for name, parts in self.norms.items()}


def assert_saliency(longact: LongAct, witness: Witness) -> None:
    """What the sets were last chosen from is what the hooks have seen."""
    expected = witness.saliency(longact.statistic)
    assert expected.keys() == longact.layers.keys()
    for name, values in expected.items():
        torch.testing.assert_close(
            longact.saliency(name), values, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


class WrittenOut:
    """LongAct's training of a tiny model, written out: masked gradients, and an AdamW whose rows count their steps.

    A layer that no batch reached keeps its set; a layer without one takes its first from the step's own batch.
    """

    def __init__(self, model: torch.nn.Module, statistic="absmax", selection="lagged", refresh_every=1):
        self.witness = Witness(model)
        self.model = self.witness.model
        self.statistic, self.selection, self.refresh_every = statistic, selection, refresh_every
        self.sets: dict[str, list[int]] = {}
        self.steps = 0
        self.state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}

    def backward(self, ids, mask=None, **inputs) -> None:
        logits = self.witness.call(ids, mask=mask, **inputs).logits
        loss_of(logits, ids, mask).backward()

    def drop(self) -> None:
        """A batch that is dropped: neither its gradient nor its statistics count."""
        self.model.zero_grad()
        self.witness.forget()

    @torch.no_grad()
    def step(self, lr=3e-3, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1) -> None:
        chosen = {name: top(values) for name, values in self.witness.saliency(self.statistic).items()}
        due = self.selection == "current" and self.steps % self.refresh_every == 0
        for name, new in chosen.items():
            if due or name not in self.sets:
                self.sets[name] = new
                self.witness.largest.pop(name)
                self.witness.norms.pop(name)
        masked = {module.weight: self.sets.get(name, []) for name, module in projections(self.model).items()}
        for p in self.model.parameters():
            if p.grad is None:
                continue
            rows = torch.tensor(masked[p]) if p in masked else torch.arange(len(p))
            if p not in self.state:
                self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "t": torch.zeros(len(p))}
            m, v, t = self.state[p].values()
            t[rows] += 1
            g, count = p.grad[rows], t[rows].view(-1, *[1] * (p.ndim - 1))
            m[rows] = betas[0] * m[rows] + (1 - betas[0]) * g
            v[rows] = betas[1] * v[rows] + (1 - betas[1]) * g * g
            moved = (m[rows] / (1 - betas[0] ** count)) / ((v[rows] / (1 - betas[1] ** count)).sqrt() + eps)
            p[rows] = (1 - lr * weight_decay) * p[rows] - lr * moved
        self.steps += 1
        if self.selection == "lagged" and self.steps % self.refresh_every == 0:
            self.sets.update({name: new for name, new in chosen.items() if name in self.witness.largest})
        if self.steps % self.refresh_every == 0 or self.selection == "current":
            self.witness.forget()
        self.model.zero_grad()


def salient_run(model=None, state="full", optimizer=None, **options):
    """A model, its controller and its optimizer, the same at every call."""
    model = tiny_model() if model is None else model
    longact = LongAct(model, **options)
    return model, longact, SalientAdamW(model.parameters(), **HYPER, state=state, **(optimizer or {}))


def stock_run(model=None, kind=torch.optim.AdamW, **options):
    """The same with a stock optimizer that the controller is attached to."""
    model = tiny_model() if model is None else model
    longact = LongAct(model, **options)
    optimizer = kind(model.parameters(), **(HYPER if kind is torch.optim.AdamW else {"lr": 1e-2}))
    longact.attach(optimizer)
    return model, longact, optimizer


def train(model, optimizer, steps) -> None:
    for step in steps:
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_unchanged(model, before) -> None:
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p, old), f"{name} has moved"


def assert_same_weights(model, other) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), f"{name}: off by {(p - q).abs().max():.2g}"


def assert_close_weights(model, other, rtol=1e-4, atol=2e-6) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def moved_rows(model, start) -> dict[str, list[int]]:
    """Which rows of the query and key weights differ from those of `start`."""
    before = projections(start)
    return {
        name: (module.weight != before[name].weight).any(1).nonzero().flatten().tolist()
        for name, module in projections(model).items()
    }
