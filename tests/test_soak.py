"""2,000 steps with a refresh at every one: memory, tensors and file handles stay flat, the loss is the reference's."""

import gc
import os

import pytest
import torch
from models import tiny_model, tokens
from situations import loss_of, projections, top

from longact_kernels import LongAct, SalientAdamW

STEPS, WARM = 2000, 200
# A small rate: at a large one training is chaotic, and what two orders of a sum differ by grows to other sets.
HYPER = dict(lr=3e-4, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)


def held() -> tuple[int, int, int]:
    """Resident memory in bytes, living tensors, open files."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    return pages * os.sysconf("SC_PAGE_SIZE"), tensors, len(os.listdir("/proc/self/fd"))


class Reference:
    """LongAct's equations in plain torch: sets of the batch before, AdamW with a step count for every row."""

    def __init__(self, model):
        self.model = model
        self.salient = {id(module.weight): name for name, module in projections(model).items()}
        self.measured, self.sets = {}, {}
        for name, module in projections(model).items():
            module.register_forward_hook(
                lambda m, args, y, name=name: self.measured.update({name: y.detach().abs().flatten(0, -2).amax(0)})
            )
        self.state = {p: [torch.zeros_like(p), torch.zeros_like(p), torch.zeros(len(p))] for p in model.parameters()}

    @torch.no_grad()
    def step(self):
        lr, (beta1, beta2), eps, decay = HYPER.values()
        chosen = {name: top(saliency) for name, saliency in self.measured.items()}
        self.sets = self.sets or chosen  # a first step takes its own batch's
        for p, (m, v, tau) in self.state.items():
            rows = torch.tensor(self.sets[self.salient[id(p)]]) if id(p) in self.salient else torch.arange(len(p))
            g = p.grad[rows]
            tau[rows] += 1
            m[rows] = beta1 * m[rows] + (1 - beta1) * g
            v[rows] = beta2 * v[rows] + (1 - beta2) * g * g
            t = tau[rows].view(-1, *[1] * (p.ndim - 1)).double()
            c1, c2 = (1 - beta1**t).float(), (1 - beta2**t).float()
            p[rows] = p[rows] * (1 - lr * decay) - lr * (m[rows] / c1) / ((v[rows] / c2).sqrt() + eps)
        self.sets = chosen
        self.model.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("state", ["full", "compact"])
def test_nothing_grows_and_the_loss_is_the_references(state):
    model, plain = tiny_model(), tiny_model()
    # The set of a step is what the batch before chose.
    optimizer = SalientAdamW(model.parameters(), longact=LongAct(model), state=state, **HYPER)
    reference = Reference(plain) if state == "full" else None
    losses, expected, sizes = [], [], []
    for step in range(STEPS):
        ids = tokens(seed=step % 16)
        loss = loss_of(model(input_ids=ids).logits, ids) / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if reference is not None:
            loss = loss_of(plain(input_ids=ids).logits, ids) / ids.numel()
            loss.backward()
            reference.step()
            expected.append(loss.item())
        del loss
        if step % WARM == WARM - 1:
            sizes.append(held())
    memory, tensors, files = zip(*sizes, strict=True)
    assert max(memory[2:]) - memory[1] < 8 << 20, memory
    assert len(set(tensors[1:])) == 1 and len(set(files)) == 1, (tensors, files)
    if reference is not None:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(torch.tensor(losses[:50]), torch.tensor(expected[:50]), rtol=1e-4, atol=1e-5)
    assert sum(losses[-16:]) < 0.7 * sum(losses[:16])
