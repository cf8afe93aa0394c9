"""What a call of the model says about its tokens: which are padding, and where packed sequences begin.

It belongs to that call: each activation is measured with the tokens of the call that made it, also where activation
checkpointing makes it a second time.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves

from longact_kernels.sparse.sharding import Ranks

_MARK = "_longact_tokens"


class Tokens:
    """The tokens of a call.

    Args:
        mask: bool [B, T], False on padding; None where all tokens count. Longer than T where keys are cached.
        positions: [B, T], a number for each token that falls, or stays zero, where another sequence begins; or None.
        cu_seqlens: int [sequences + 1], the bounds of packed sequences among the call's tokens; or None.
        rows_only: the mask does not tell packed sequences apart.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rows_only: bool = False,
    ):
        self.mask, self.positions, self.cu_seqlens, self.rows_only = mask, positions, cu_seqlens, rows_only
        self.silent = mask is None and positions is None and cu_seqlens is None
        self._bounds: dict[torch.Size, Tensor] = {}

    def of(self, x: Tensor, l2: bool, name: str = "") -> tuple[Tensor | None, Tensor | None]:
        """The mask and the bounds of sequences of an activation [..., T, N], for `channel_stats`.

        With bounds, the activation is to be taken as [tokens, N], and so is the mask.

        Args:
            l2: whether sequences are to be told apart: where the largest magnitude is all that is asked, they need not.
            name: of the layer, for the error.

        Raises:
            ValueError: if the activation has other tokens than the call.
        """
        if self.silent:
            return None, None
        mask = None if self.mask is None else self._fit(self.mask, x, name, "attention_mask")
        if l2 and self.rows_only:
            raise ValueError(
                f"attention_mask: its form with a row for every query does not tell where sequences begin, which "
                f"statistic='l2' asks ({name}); pass the [batch, tokens] mask, or position_ids or cu_seq_lens_q"
            )
        bounds = self.cu_seqlens
        if bounds is not None:
            _check_bounds(bounds, x.shape[:-1].numel(), name)
        if bounds is None and l2 and self.positions is not None:
            # How many sequences there are, the host waits for: once a call, not in every layer.
            bounds = self._bounds.get(x.shape[:-1])
            if bounds is None:
                bounds = self._begins(self.positions, x, name)
                if not is_compiling():
                    self._bounds[x.shape[:-1]] = bounds
        if bounds is None and l2 and mask is not None and mask.ndim == 1 and self.mask is not None:
            bounds = torch.arange(0, len(mask) + 1, self.mask.shape[1], device=mask.device)  # rows, one behind another
        return (mask if mask is None or bounds is None else mask.flatten()), bounds

    @staticmethod
    def _begins(told: Tensor, x: Tensor, name: str) -> Tensor:
        """The bounds of the sequences that positions tell apart, for an activation."""
        positions = Tokens._fit(told, x, name, "position_ids")
        begins = torch.ones_like(positions, dtype=torch.bool)
        before, after = positions[..., :-1], positions[..., 1:]
        # Positions may stay, as grouped ones do; after a sequence of one token, zero follows zero.
        begins[..., 1:] = (after < before) | ((after == 0) & (before == 0))
        begins = begins.flatten()
        begins[:: x.shape[-2] if x.ndim > 2 else told.shape[1]] = True
        return torch.cat((begins.nonzero().flatten(), begins.new_tensor([len(begins)], dtype=torch.int64)))

    @staticmethod
    def _fit(told: Tensor, x: Tensor, name: str, what: str) -> Tensor:
        """What is told of [B, T] tokens, for an activation of as many."""
        tokens = x.shape[:-1]
        if len(tokens) == 3 and tokens[1] == 1:  # latent attention's keys, which all heads share
            return Tokens._fit(told, x.squeeze(1), name, what).unsqueeze(1)
        if len(tokens) == 2 and told.shape[1] > tokens[1]:
            told = told[:, -tokens[1] :]  # of cached keys and values too
        if len(tokens) == 2 and len(told) == 1 and tokens[0] > 1:
            told = told.expand(tokens[0], -1)  # positions that all rows share
        if len(tokens) == 1 and told.numel() == tokens[0]:
            told = told.flatten()
        if told.shape != tokens:
            raise ValueError(
                f"{what}: tells of {list(told.shape)} tokens, but {name or 'the layer'} has an activation of "
                f"{list(tokens)}; leave such a layer out with target_modules, or pass a mask that fits"
            )
        return told


def _check_bounds(bounds: Any, tokens: int, name: str) -> None:
    """Whether bounds are of an activation's tokens; where they lie on a GPU, its kernels hold them within."""
    if not isinstance(bounds, Tensor) or bounds.ndim != 1 or bounds.dtype not in (torch.int32, torch.int64):
        kind = f"{bounds.dtype} {list(bounds.shape)}" if isinstance(bounds, Tensor) else type(bounds).__name__
        raise ValueError(f"cu_seq_lens_q: got {kind}, needed an int32 or int64 tensor [sequences + 1]")
    if bounds.is_cpu and not is_compiling() and len(bounds) and bounds[-1] > tokens:
        raise ValueError(
            f"cu_seq_lens_q: tells of {int(bounds[-1])} tokens, but {name or 'the layer'} has an activation of "
            f"{tokens}; leave such a layer out with target_modules, or pass bounds that fit"
        )


class Call:
    """The model call under way, read by the layers.

    Attributes:
        tokens: what it says about its tokens.
        told: whether the model has calls that say something.
        unrecorded: whether a layer has run in it without gradients, to be repeated in backward.
        begin: called when a call with gradients on begins that is not part of another.
        idle: whether no salient weight trains.
        refuse: called when something else trains all the same, in two calls one after the other: a model may be frozen
            for a pass, as in adversarial training.
        by_hand: whether attention has been called outside of any call that says something.
        ranks: which each have a part of the tokens of every sequence; None where each has whole ones.
    """

    def __init__(self, begin: Callable[[], None], refuse: Callable[[], None], ranks: Ranks | None = None):
        self.begin, self.refuse = begin, refuse
        self.ranks = ranks
        self.idle = False
        self.idle_calls = 0
        self.by_hand = False
        self.tokens = Tokens()
        self.told = False
        self.unrecorded = False
        self.depth = 0

    def tokens_now(self) -> Tokens | None:
        """The tokens of the activation that is being made; None: it is not to be measured (again)."""
        if self.depth or is_compiling() or torch._C._current_graph_task_id() == -1:
            return self.tokens
        # Inside backward, checkpointing repeats a block. The reentrant kind measures it now, for the call that left a
        # mark on its node; the other kind has measured it.
        marked = getattr(torch._C._current_autograd_node(), _MARK, None)
        return marked if marked is not None or (self.told and not self.by_hand) else self.tokens

    def count_idle(self, outputs: Any) -> None:
        """Called at the end of a call."""
        trains = self.idle and any(tensor.requires_grad for tensor in _tensors(outputs))
        self.idle_calls = self.idle_calls + 1 if trains else 0
        if self.idle_calls > 1:
            self.refuse()


class TellingForward:
    """A model's `forward` that says what it knows of its tokens; an object, so that a copy of the model has its own."""

    def __init__(self, module: nn.Module, call: Call):
        self.module, self.call = module, call
        self.own = module.__dict__.get("forward")  # somebody else's, in place of the class's
        self.names = list(inspect.signature(self.__wrapped__).parameters)

    @property
    def __wrapped__(self) -> Callable:
        """The forward as it was: also what `inspect.signature` shows."""
        # A partial, and not a bound method: torch.compile of torch 2.11 follows it.
        return self.own or functools.partial(type(self.module).forward, self.module)

    def __call__(self, *args, **kwargs):
        call = self.call
        if not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        if call.depth == 0 and not is_compiling():
            call.begin()
        outer = call.tokens
        # Names by place, and not inspect.Signature.bind: torch.compile follows it.
        said = {**dict(zip(self.names, args, strict=False)), **kwargs}
        call.tokens = _read(said, outer)
        if outer.positions is None and call.tokens.positions is not None:
            pad = getattr(getattr(self.module, "config", None), "pad_token_id", None)
            call.tokens = _packed(call.tokens, said.get("input_ids"), pad or 0, call.ranks)
        call.depth += 1
        try:
            outputs = self.__wrapped__(*args, **kwargs)
            if call.unrecorded:
                call.unrecorded = False
                _mark(outputs, call.tokens)
            if call.depth == 1 and not is_compiling():
                call.count_idle(outputs)
        finally:
            call.depth -= 1
            call.tokens = outer
        return outputs


class TellingAttention:
    """Hooks of an attention module that is called by hand, outside of a call that says more: they read its own mask."""

    def __init__(self, module: nn.Module, call: Call):
        self.call = call
        self.names = list(inspect.signature(module.forward).parameters)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = self.call
        if call.depth or not module.training or is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:
            call.by_hand = True
        elif not call.by_hand or hasattr(torch._C._current_autograd_node(), _MARK):
            return  # checkpointing repeats it: that call has said what there is to say
        call.tokens = _read({**dict(zip(self.names, args, strict=False)), **kwargs}, Tokens())

    def after(self, module: nn.Module, args: tuple, outputs: Any) -> None:
        if not self.call.depth:
            self.call.tokens = Tokens()


def tell_masks(attentions: Iterable[nn.Module], call: Call) -> list[Callable[[], None]]:
    """Has attention modules say what their own masks tell, where nobody says more; returns what undoes it."""
    undo: list[Callable[[], None]] = []
    for module in attentions:
        if "attention_mask" in inspect.signature(module.forward).parameters:
            telling = TellingAttention(module, call)
            undo.append(module.register_forward_pre_hook(telling.before, with_kwargs=True).remove)
            undo.append(module.register_forward_hook(telling.after, always_call=True).remove)
    return undo


def tell_tokens(model: nn.Module, call: Call) -> list[Callable[[], None]]:
    """Has a language model, and the model it wraps, say what their calls know of tokens; returns what undoes it."""
    undo = []
    for module in model.modules():
        names = list(inspect.signature(module.forward).parameters)
        if "input_ids" in names and "attention_mask" in names:
            call.told = True
            telling = module.forward = TellingForward(module, call)  # type: ignore[method-assign]
            undo.append(telling)
    return [_Undo(telling) for telling in undo]


class _Undo:
    def __init__(self, telling: TellingForward):
        self.telling = telling

    def __call__(self) -> None:
        module, own = self.telling.module, self.telling.own
        if module.__dict__.get("forward") is not self.telling:
            return  # somebody has wrapped it since: it goes on to say what nobody reads
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def _read(said: Mapping[str, Any], outer: Tokens) -> Tokens:
    """The tokens of a call from its arguments, and from those of the call that it is part of."""
    positions, bounds = said.get("position_ids"), said.get("cu_seq_lens_q")
    # Positions in three dimensions are those of pictures, and tell no sequences.
    positions = positions if isinstance(positions, Tensor) and positions.ndim == 2 else outer.positions
    bounds = outer.cu_seqlens if bounds is None else bounds
    mask = said.get("attention_mask")
    if isinstance(mask, Mapping) and outer.mask is None:
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None or (not (isinstance(mask, Tensor) and mask.ndim == 2) and outer.mask is not None):
        # A wrapper has said it of the same tokens, or made another form of what it was told.
        return Tokens(outer.mask, positions, bounds, outer.rows_only)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return Tokens(mask != 0, positions, bounds)
    if isinstance(mask, Tensor) and mask.ndim in (3, 4):
        return Tokens(_of_queries(mask), positions, bounds, rows_only=positions is None and bounds is None)
    if outer.positions is not None or outer.cu_seqlens is not None or positions is not None or bounds is not None:
        return Tokens(None, positions, bounds)
    kind = f"{type(mask).__name__} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"attention_mask: got a {kind}, which does not tell LongAct which tokens are padding; needed [batch, tokens] "
        "with zeros on padding, or position_ids or cu_seq_lens_q beside it"
    )


def _packed(tokens: Tokens, ids: Any, pad: int, ranks: Ranks | None) -> Tokens:
    """The tokens of a call that told positions: without padding at the end, and whole where ranks have parts of them.

    Some pad packed rows to a length, as verl does: a sequence of nothing but padding, 0 or `pad`, ends the row.
    """
    positions, mask, bounds = tokens.positions, tokens.mask, tokens.cu_seqlens
    assert positions is not None
    whole = positions if ranks is None else ranks.gather(positions)
    begins = whole == 0
    if mask is None and bounds is None and isinstance(ids, Tensor) and ids.shape == positions.shape:
        ids = ids if ranks is None else ranks.gather(ids)
        is_pad = ((ids == 0) | (ids == pad)).int()
        at_end = is_pad.flip(-1).cumprod(-1).flip(-1).bool()
        first = begins & at_end
        first[..., 0] = False
        counts = first.int().cumsum(-1) == 0
        mask = counts if ranks is None else ranks.own(counts)
    if ranks is not None and bounds is None:
        begins[..., 0] = False
        falls = whole[..., 1:] < whole[..., :-1]
        if begins.any() and (falls & ~begins[..., 1:]).any():
            raise ValueError(
                "position_ids: ranks of the sequence_group have packed sequences in parts that do not follow one "
                "another (load balancing of context parallelism); needed parts in the order of the ranks"
            )
        begins[..., 0] = True
        numbers = begins.flatten().cumsum(0).view(begins.shape) - 1
        sequences = torch.arange(int(numbers[-1, -1]) + 2, device=numbers.device)
        bounds = torch.searchsorted(ranks.own(numbers).flatten(), sequences)
    return Tokens(mask, positions, bounds, tokens.rows_only)


def _of_queries(mask: Tensor) -> Tensor:
    """The [B, keys] mask behind one that says for every query what it attends to, [B, (1 or heads,) queries, keys]."""
    # Numbers are added to the scores: -10,000 or less where nothing is to be seen.
    attends = mask > -9000 if mask.is_floating_point() else mask != 0
    if attends.ndim == 4:
        attends = attends.any(1)
    # Queries of padding with nothing to attend to are often let attend to everything, what comes later too; the last
    # query has nothing later. Where all attend to everything, there is no padding.
    open_rows = attends.all(-1)
    open_rows[:, -1] = False
    return (attends & ~open_rows.unsqueeze(-1)).any(1)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _mark(outputs: Any, tokens: Tokens) -> None:
    """Leaves a call's tokens on the nodes of its graph that may repeat a block in backward (reentrant checkpoints)."""
    waiting: list[Any] = [tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or getattr(node, _MARK, None) is not None:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            setattr(node, _MARK, tokens)
        waiting += [following for following, _ in node.next_functions]
