"""The query and key channels of a model: what they carry, and which of them are salient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longact_kernels.functional import channel_stats, select
from longact_kernels.sparse.projections import find_projections
from longact_kernels.sparse.selection import share


class Part(NamedTuple):
    """The query or the key channels of one projection.

    Attributes:
        name: path of the projection.
        kind: "q" or "k".
        module: the projection.
        rows: int64 [n], which of the projection's outputs these are.
        heads: channels of each head, in their order; they add up to n.
    """

    name: str
    kind: str
    module: nn.Module
    rows: Tensor
    heads: list[int]


class Statistics(NamedTuple):
    """What the channels of all parts carry, one part after the other; fp32 [n] each.

    Attributes:
        absmax: the largest magnitude over the tokens.
        l2: the L2 norm over the tokens of a sequence; the mean over several.
        mean: the mean over the tokens.
    """

    absmax: Tensor
    l2: Tensor
    mean: Tensor


def find_parts(model: nn.Module) -> list[Part]:
    """The parts of a model, those of the queries first; ValueError for a model without any."""
    found: dict[str, list[Part]] = {"q": [], "k": []}
    for projection in find_projections(model):
        starts = accumulate((head.size for head in projection.heads), initial=0)
        heads = [(start, *head) for start, head in zip(starts, projection.heads, strict=False)]
        for kind, parts in found.items():
            mine = [(start, size) for start, size, its in heads if its == kind]
            if mine:
                rows = torch.cat([torch.arange(start, start + size) for start, size in mine])
                parts.append(Part(projection.name, kind, projection.module, rows, [size for _, size in mine]))
    return found["q"] + found["k"]


def bounds(parts: list[Part]) -> list[tuple[int, int]]:
    """Where each part begins and ends among the channels of all."""
    return list(pairwise(accumulate((len(part.rows) for part in parts), initial=0)))


@contextmanager
def hooked(parts: list[Part], hook: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `hook(i, output)` whenever the projection of part i has run; what it returns becomes the output."""
    handles = [
        part.module.register_forward_hook(lambda module, args, output, i=i: hook(i, output))
        for i, part in enumerate(parts)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(
    model: PreTrainedModel, parts: list[Part], ids: Tensor, lengths: list[int] | None = None
) -> list[Statistics]:
    """Statistics of one sequence, after each of some lengths; of a causal model, so those of its beginnings.

    Args:
        ids: int64 [T].
        lengths: T alone if not given.

    Raises:
        FloatingPointError: NaN or Inf in an activation, naming the projection.
    """
    lengths = lengths or [len(ids)]
    found: list[list[Statistics]] = [[] for _ in parts]

    def observe(i: int, output: Tensor) -> None:
        rows = parts[i].rows.to(output.device)
        tokens = output.flatten(0, -2)
        for length in lengths:
            absmax, sumsq = channel_stats(tokens[:length])
            mean = tokens[:length].mean(0, dtype=torch.float32)
            found[i].append(Statistics(*(values[rows].cpu() for values in (absmax, sumsq[0].sqrt(), mean))))

    with hooked(parts, observe):
        # Without the head: its logits are far larger than anything that is looked at here.
        model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
    for part, stats in zip(parts, found, strict=True):
        if not stats[-1].absmax.isfinite().all():
            raise FloatingPointError(f"model: NaN or Inf in the output of {part.name}; try --dtype float32")
    return [Statistics(*map(torch.cat, zip(*at, strict=True))) for at in zip(*found, strict=True)]


def pool(statistics: list[Statistics]) -> Statistics:
    """Those of sequences of one length, taken together."""
    absmax, l2, mean = (torch.stack(values) for values in zip(*statistics, strict=True))
    return Statistics(absmax.amax(0), l2.mean(0), mean.mean(0))


def salient(saliency: Tensor, parts: list[Part], density: float) -> Tensor:
    """bool [n]: the top `density` of every head by a saliency fp32 [n]."""
    heads = [size for part in parts for size in part.heads]
    counts = [share(density, size) for size in heads]
    chosen = torch.zeros(len(saliency), dtype=torch.bool)
    chosen[select(saliency, heads, counts)] = True
    return chosen


def jaccard(sets: Tensor, parts: list[Part]) -> Tensor:
    """Overlap |A ∩ B| / |A ∪ B| of every two of the sets bool [m, n] in every part: fp32 [parts, m, m]."""
    overlaps = []
    for start, end in bounds(parts):
        part = sets[:, start:end].float()
        both = part @ part.T
        size = part.sum(1)
        overlaps.append(both / (size[:, None] + size - both))
    return torch.stack(overlaps)
