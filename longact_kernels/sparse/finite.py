"""NaN and Inf: known on the device before an update, on the host without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longact_kernels.sparse.config import Nonfinite
from longact_kernels.sparse.sharding import Ranks, is_sharded, local


@dataclass
class _Posted:
    """Flags on their way to the host."""

    flags: Tensor
    arrived: Callable[[], bool]
    names: Callable[[int], str]
    step: int


class Watch:
    """Reads the flags of steps: at once on a CPU, and a step later on a GPU, which nobody waits for.

    Args:
        policy: "error" raises for a bad step, "skip" counts it.
    """

    def __init__(self, policy: Nonfinite):
        self.policy = policy
        self.skipped = 0
        self._posted: list[_Posted] = []

    def post(self, flags: Tensor, names: Callable[[int], str], step: int) -> None:
        """Takes a step's flags, bool [n], true where something is not finite.

        Args:
            names: of each, for the error.
            step: which one it is.

        Raises:
            FloatingPointError: on a CPU, for a bad step, if the policy is "error".
        """
        if flags.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return  # what a graph replays cannot be told on the host
            held = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._posted.append(_Posted(held, event.query, names, step))
        else:
            self._posted.append(_Posted(flags, lambda: True, names, step))
            self.look()

    def look(self, wait: bool = False) -> None:
        """Reads what has arrived.

        Args:
            wait: read all of it.

        Raises:
            FloatingPointError: for a bad step, if the policy is "error".
        """
        while self._posted and (wait or self._posted[0].arrived()):
            posted = self._posted.pop(0)
            if wait and not posted.arrived():
                torch.cuda.synchronize()
            if not posted.flags.any():
                continue
            self.skipped += 1
            if self.policy == "error":
                bad = posted.flags.nonzero().flatten().tolist()
                others = f", and in {len(bad) - 1} others," if len(bad) > 1 else ""
                raise FloatingPointError(
                    f"LongAct: NaN or Inf in {posted.names(bad[0])}{others} at step {posted.step}; that step "
                    "changed no weight. Look at the loss and the learning rate, call zero_grad() and go on, or pass "
                    "nonfinite='skip'"
                )

    def __getstate__(self) -> dict:
        return {"policy": self.policy, "skipped": self.skipped, "_posted": []}


class Numbers:
    """The numbers of the step under way: whether activations, gradients and losses are finite, and which are not.

    Args:
        policy: what to do where one is not.
        model: whose they are.
        ranks: those that sharded gradients are spread over.

    Attributes:
        bad: a flag whether any activations are; None until they have been looked at.
        watch: tells the host.
    """

    def __init__(self, policy: Nonfinite, model: nn.Module, ranks: Ranks):
        self.policy, self.model, self.ranks = policy, model, ranks
        self.watch = Watch(policy)
        self.begin()

    def begin(self) -> None:
        """Another step begins, or this one's batch was dropped."""
        self.bad: Tensor | None = None
        self._layers: Tensor | None = None  # whether those of each layer are
        self._hidden: tuple[list[str], Tensor] | None = None  # gradients that masking hides: whose, and whether bad
        self._versions: dict[int, int] = {}  # by id, since when they need not be looked at again
        self._losses: list[Tensor] = []

    def look(self, layers: Tensor, grads: Mapping[str, Tensor]) -> None:
        """Looks at what masking would hide.

        Args:
            layers: bool [layers], whether their activations are bad.
            grads: by the parameter's name.
        """
        self._layers, self.bad = layers, layers.any()
        if grads:
            self._hidden = list(grads), nonfinite(grads.values())

    def masked(self, grad: Tensor | None) -> None:
        """Says that a gradient is what was looked at, but for the channels outside its set."""
        if grad is not None and not is_sharded(grad):
            self._versions[id(grad)] = grad._version

    def look_at(self, loss: Tensor, device: torch.device) -> None:
        """Has a loss of one element looked at with the rest."""
        if self.policy != "off":
            self._losses.append(loss.detach().reshape(()).to(device, torch.float32))

    def verdict(
        self, grads: list[Tensor], name_of: Callable[[int], str], layers: Iterable[str], step: int
    ) -> Tensor | None:
        """As of `LongAct.verdict`; `layers` are the names of those that have a set."""
        if self.policy == "off":
            return None
        fresh: Sequence[int] = range(len(grads))
        looked: list[tuple[Tensor, Callable[[int], str]]] = []  # flags, and what the i-th of them is about
        if self._layers is not None:
            looked.append((self._layers, self.of_layer(layers)))
        if self._hidden is not None and grads:
            hidden, bad = self._hidden
            looked.append((bad, lambda i: f"the gradient of {hidden[i]}"))
            fresh = [i for i, grad in enumerate(grads) if self._versions.get(id(grad)) != grad._version]
        if self._losses:
            looked.append((~torch.stack(self._losses).isfinite(), lambda i: "the loss"))
        if fresh:
            bad = nonfinite([grads[i] for i in fresh])
            if any(is_sharded(grads[i]) for i in fresh):
                shared = bad.int()
                self.ranks.all_reduce(shared, "max")
                bad = shared > 0
            looked.append((bad, lambda i: self._bad_weight() or f"the gradient of {name_of(fresh[i])}"))
        if not looked:
            return None

        def name(i: int) -> str:
            for part, of in looked:
                if i < len(part):
                    return of(i)
                i -= len(part)
            raise IndexError

        flags = torch.cat([part for part, _ in looked])
        self.watch.post(flags, name, step)
        return flags.any()

    def of_layer(self, layers: Iterable[str]) -> Callable[[int], str]:
        """What is bad where the activations of the i-th of some layers are, for a message."""
        return lambda i: self._bad_weight() or f"the activations of {[*layers][i]}"

    def _bad_weight(self) -> str | None:
        """The first weight that is bad itself, which no step can mend; for a message, when numbers are bad."""
        weights = {name: local(p.detach()) for name, p in self.model.named_parameters()}
        bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
        return f"the weight {bad[0]} itself, which a checkpoint has to be loaded for," if bad else None


def nonfinite(tensors: Iterable[Tensor]) -> Tensor:
    """For each tensor whether it holds a NaN or Inf, bool [tensors]."""
    parts = [local(one) for one in tensors]
    flags = [torch.zeros((), dtype=torch.bool, device=parts[0].device)] * len(parts)  # one of no elements holds none
    for dtype in {one.dtype for one in parts}:  # those of one dtype take few launches together
        alike = [i for i, one in enumerate(parts) if one.dtype == dtype and one.numel()]
        if alike:
            extremes = _extremes([parts[i] for i in alike])
            for i, bad in zip(alike, (~extremes.isfinite()).any(1).unbind(), strict=True):
                flags[i] = bad
    return torch.stack(flags)


def _extremes(tensors: list[Tensor]) -> Tensor:
    """Of each tensor the numbers farthest from zero, [tensors, 1 or 2]; NaN where it holds one."""
    if tensors[0].is_cpu and not tensors[0].is_complex():
        # ATen's largest magnitude takes twenty times as long there.
        return torch.stack([torch.stack(torch.aminmax(one)) for one in tensors])
    return torch.stack(torch._foreach_norm(tensors, float("inf"))).unsqueeze(1)
