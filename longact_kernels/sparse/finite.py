"""NaN and Inf: known on the device before an update, on the host without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longact_kernels.sparse.config import Nonfinite


@dataclass
class Found:
    """What has been looked at in the step under way, before its gradients were masked: flags on the device.

    Attributes:
        layers: bool [layers], whether their activations are bad.
        bad: whether those of any are.
        grads: bool [gradients], whether those that masking would hide are bad; None if there are none.
        names: of those, the parameters'.
        versions: of those, by id, since when they need not be looked at again.
    """

    layers: Tensor
    bad: Tensor
    grads: Tensor | None = None
    names: list[str] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=dict)


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
