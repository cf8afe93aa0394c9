"""Which channels of a head a rotary embedding turns together."""

import sys
from functools import partial

import torch
from torch import nn

from longact_kernels.sparse.heads import AttentionSizes

# What modelling modules call the function that turns a head's channels by a right angle.
ROTATIONS = ("rotate_half", "rotate_every_two", "rotate_pairwise")


def rotary_pairs(attention: nn.Module, head_size: int) -> torch.Tensor:
    """The channel that a rotary embedding turns each channel of a head with, int64 [head_size].

    Asked of the modelling module's own function (`rotate_half` on 0, 1, 2, … in most). Channels that are not turned,
    beside a partial rotary embedding, go with their neighbours, two by two.

    Args:
        attention: the attention module.
        head_size: channels of one query or key, as `Head.size`.

    Raises:
        ValueError: if the module's attention has no rotary embedding of a known form, or the sizes are odd.
    """
    modelling = sys.modules[type(attention).__module__]
    config = getattr(attention, "config", None)
    start, stop = _rotary_channels(AttentionSizes(attention, None), head_size)
    channels = torch.arange(stop - start)
    turn = next((f for name in ROTATIONS if (f := getattr(modelling, name, None))), None)
    if apply := getattr(modelling, "_apply_rotary_emb", None):
        turn = partial(apply, cos=torch.tensor(0.0), sin=torch.tensor(1.0))
    # Two neighbours make a complex number, or are brought apart before they are turned.
    interleaved = hasattr(modelling, "apply_rotary_emb") or (
        hasattr(modelling, "apply_rotary_pos_emb_interleave") and getattr(config, "rope_interleave", True)
    )
    if (start % 2, stop % 2, head_size % 2) != (0, 0, 0) or not (turn or interleaved):
        raise ValueError(
            f"pair_rope: cannot tell the rotary pairs of {type(attention).__name__}, heads of {head_size} channels; "
            f"needed one of {', '.join(ROTATIONS)} or apply_rotary_emb in {modelling.__name__}, and even sizes; use "
            "pair_rope=False"
        )
    neighbours = torch.arange(head_size) ^ 1
    if interleaved:
        return neighbours
    # From 1 on: a turned channel may change its sign, which 0 has not.
    assert turn is not None
    neighbours[start:stop] = start + turn(channels + 1.0).abs().long() - 1
    return neighbours


def _rotary_channels(attention: AttentionSizes, head_size: int) -> tuple[int, int]:
    """First and last channel (exclusive) of a head that a rotary embedding turns."""
    if size := attention.number("qk_rope_head_dim"):
        # Latent attention: the last of a query's; the keys' come from elsewhere.
        whole = size + (attention.number("qk_nope_head_dim") or 0)
        return (head_size - size, head_size) if head_size == whole else (0, 0)
    size = min(head_size, attention.number("rotary_ndims", "rotary_dim") or int(head_size * _rotary_share(attention)))
    return 0, size


def _rotary_share(attention: AttentionSizes) -> float:
    parameters = getattr(attention.config, "rope_parameters", None) or {}
    # Layers of several kinds have parameters each.
    kind = getattr(attention.module, "layer_type", None)
    kinds, index = getattr(attention.config, "layer_types", None), getattr(attention.module, "layer_idx", None)
    if kind is None and kinds and index is not None:
        kind = kinds[index]
    parameters = parameters.get(kind, parameters)
    if parameters.get("rope_type") == "proportional":
        # The others turn by an angle of zero.
        return 1.0
    return parameters.get("partial_rotary_factor") or getattr(attention.config, "partial_rotary_factor", None) or 1.0
