"""What there is to know of a controller's layers: salient sets, churn, overlap."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longact_kernels.sparse.salient_set import SalientSet


def jaccard(one: Tensor, other: Tensor) -> float:
    """The overlap of two sets, empty slots left out; of empty sets 1."""
    first, second = ({channel for channel in index.tolist() if channel >= 0} for index in (one, other))
    return len(first & second) / len(first | second) if first | second else 1.0


def layer_report(
    salient: SalientSet, saliency: Tensor, index: Tensor, before: Tensor | None, first: Tensor
) -> dict[str, Any]:
    """What `LongAct.report()` says of a layer.

    Args:
        salient: of the layer.
        saliency: of its channels.
        index: its set.
        before: the set before it, if there was one.
        first: its first set.
    """
    return {
        "saliency": saliency.numpy(),
        "salient": index[index >= 0].numpy(),
        "heads": salient.heads,
        "churn": float("nan") if before is None else 1 - jaccard(index, before),
        "overlap": jaccard(index, first),
    }
