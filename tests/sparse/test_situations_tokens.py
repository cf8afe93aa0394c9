"""Which tokens count, in all the ways in which a model is called."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from situations import (
    HYPER,
    Witness,
    WrittenOut,
    assert_close_weights,
    assert_saliency,
    assert_same_weights,
    backward,
    loss_of,
    moved_rows,
    projections,
    saliencies,
    salient_run,
    sets,
    tiny_model,
    tokens,
    train,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from longact_kernels import LongAct, SalientAdamW

STATISTICS = pytest.mark.parametrize("statistic", ["absmax", "l2"])
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
T = 12


def loud_model(family="Llama", **changes):
    """A model whose token 0, the padding, would win every channel if it counted."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] *= 50
    return model


def padded(seed: int, rows: int = 2, length: int = T, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """A batch in which every row has some padding of its own."""
    ids, mask = tokens(rows, length, seed=seed).clamp(min=1), torch.ones(rows, length, dtype=torch.long)
    for i in range(rows):
        mask[i, : 2 + (3 * i + seed) % 5] = 0
    mask = mask if side == "left" else mask.flip(1)
    ids[mask == 0] = 0
    return ids, mask


def full(seed: int, rows: int = 2, length: int = T) -> tuple[torch.Tensor, None]:
    return tokens(rows, length, seed=seed).clamp(min=1), None


def forward(model, ids, mask):
    # Without a cache, which checkpoints that transformers knows nothing of would fill twice.
    return loss_of(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids, mask)


def chosen_from(model, longact):
    """Has the sets of a first step chosen, by the step itself."""
    SalientAdamW(model.parameters(), **HYPER).step()
    return sets(longact), saliencies(longact)


def witness_of(calls, model=None, **inputs) -> Witness:
    witness = Witness(loud_model() if model is None else model)
    for ids, mask in calls:
        witness.call(ids, mask=mask, **inputs)
    return witness


# Activation checkpointing

CALLS = {
    "the first padded": [padded(0), full(1)],
    "the last padded": [full(0), padded(1)],
    "both, one on the right": [padded(0), padded(1, side="right")],
    "of other shapes": [padded(0, rows=3, length=9), full(1), padded(2, rows=1, length=15)],
}


def by_transformers(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


def by_wrappers(model, reentrant):
    """As torchtitan and FSDP's recipes do it: modules that stand between the decoder and its layers."""
    model.enable_input_require_grads()
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: type(module).__name__.endswith("DecoderLayer"),
    )
    return model


def by_hand(model, reentrant):
    """As in a trainer of one's own: `checkpoint` around the layers' forward."""
    model.enable_input_require_grads()
    for layer in model.model.layers:
        # By position, since the reentrant kind takes no keywords.
        def run(hidden_states, forward=layer.forward, **kwargs):
            return checkpoint(partial(forward, **kwargs), hidden_states, use_reentrant=reentrant)

        layer.forward = run
    return model


WAYS = {"transformers": by_transformers, "wrappers": by_wrappers, "by hand": by_hand}


@REENTRANT
@pytest.mark.parametrize(("way", "statistic"), [*((way, "l2") for way in WAYS), ("transformers", "absmax")])
@pytest.mark.parametrize("calls", CALLS)
def test_several_calls_before_one_backward_under_checkpointing(calls, way, reentrant, statistic):
    model = loud_model()
    longact = LongAct(model, statistic=statistic)
    WAYS[way](model, reentrant)
    sum(forward(model, *call) for call in CALLS[calls]).backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness_of(CALLS[calls]))


@REENTRANT
@pytest.mark.parametrize("way", ["wrappers", "by hand"])
def test_checkpointing_that_was_there_before_longact(way, reentrant):
    model = WAYS[way](loud_model(), reentrant)
    longact = LongAct(model)
    sum(forward(model, *call) for call in CALLS["the first padded"]).backward()
    chosen_from(model, longact)
    expected = witness_of(CALLS["the first padded"]).saliency("absmax")
    for (name, values), expected_values in zip(saliencies(longact).items(), expected.values(), strict=True):
        torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-6, msg=name)


@REENTRANT
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_calls_whose_backwards_come_in_another_order(order, reentrant):
    calls = CALLS["of other shapes"]
    model = by_transformers(loud_model(), reentrant)
    longact = LongAct(model, statistic="l2")
    losses = [forward(model, *call) for call in calls]
    for i in order:
        losses[i].backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness_of(calls))


@REENTRANT
def test_what_comes_between_a_forward_and_its_backward_changes_nothing(reentrant):
    model = by_transformers(loud_model(), reentrant)
    longact = LongAct(model, statistic="l2")
    loss = forward(model, *padded(0))
    with torch.no_grad():
        model(*padded(7, rows=3))
    forward(model, *full(8))  # in training, but nothing comes of it
    model.eval()
    model(input_ids=tokens(seed=9))
    with torch.no_grad():
        model.generate(tokens(seed=9), max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()
    loss.backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness_of([padded(0)]))


@REENTRANT
def test_the_whole_model_in_one_checkpoint(reentrant):
    model = loud_model()
    longact = LongAct(model, statistic="l2")
    model.enable_input_require_grads()
    calls = CALLS["the first padded"]
    anchor = torch.zeros(1, requires_grad=True)  # the reentrant kind wants an input with a gradient

    def run(ids, mask, anchor):
        return model(input_ids=ids, attention_mask=mask).logits + anchor

    loss = sum(loss_of(checkpoint(run, ids, mask, anchor, use_reentrant=reentrant), ids, mask) for ids, mask in calls)
    loss.backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness_of(calls))


def packed(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Sequences packed into a batch of one: tokens, positions, and what counts as a sequence."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    return (
        tokens(1, sum(lengths), seed=seed),
        positions,
        [(0, slice(a, a + n)) for a, n in zip(starts, lengths, strict=False)],
    )


@STATISTICS
@REENTRANT
@pytest.mark.parametrize("lengths", [([7, 12, 4], [5, 3]), ([3, 9], [4, 4, 4])], ids=["other sizes", "same size"])
def test_packed_calls_under_checkpointing(lengths, reentrant, statistic):
    model = by_transformers(tiny_model(attn_implementation="sdpa"), reentrant)
    longact = LongAct(model, statistic=statistic)
    witness = Witness(tiny_model(attn_implementation="sdpa"))
    loss = 0
    for seed, of_call in enumerate(lengths):
        ids, positions, sequences = packed(of_call, seed)
        loss = loss + loss_of(model(input_ids=ids, position_ids=positions, use_cache=False).logits, ids)
        witness.call(ids, sequences, position_ids=positions, use_cache=False)
    loss.backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness)


@REENTRANT
def test_a_packed_call_and_a_padded_one_before_one_backward(reentrant):
    model = by_transformers(loud_model(attn_implementation="sdpa"), reentrant)
    longact = LongAct(model, statistic="l2")
    witness = Witness(loud_model(attn_implementation="sdpa"))
    ids, positions, sequences = packed([5, 7], 3)
    losses = [loss_of(model(input_ids=ids, position_ids=positions, use_cache=False).logits, ids)]
    witness.call(ids, sequences, position_ids=positions, use_cache=False)
    losses.append(forward(model, *padded(4)))
    witness.call(*[padded(4)[0]], mask=padded(4)[1])
    sum(losses).backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness)


@REENTRANT
@pytest.mark.parametrize("site", ["norm", "rope"])
def test_other_sites_under_checkpointing(site, reentrant):
    results = []
    for checkpointing in (False, True):
        model = loud_model("Qwen3")
        longact = LongAct(model, site=site, statistic="l2")
        if checkpointing:
            by_transformers(model, reentrant)
        sum(forward(model, *call) for call in CALLS["of other shapes"]).backward()
        results.append(chosen_from(model, longact))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)


@REENTRANT
@pytest.mark.parametrize(
    "options",
    [{}, {"selection": "current", "statistic": "l2"}, {"grad": "compact"}, {"grad": "compact", "refresh_every": 2}],
    ids=str,
)
def test_training_under_checkpointing_is_training_without(options, reentrant):
    results = []
    for checkpointing in (False, True):
        model, longact, optimizer = salient_run(loud_model(), **options)
        if checkpointing:
            by_transformers(model, reentrant)
        for step in range(4):
            (forward(model, *padded(step)) + forward(model, *full(step + 10))).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((model, sets(longact)))
    assert results[0][1] == results[1][1]
    assert_close_weights(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)


# What counts


def test_a_forward_that_no_gradient_comes_from_does_not_count():
    model, longact, optimizer = salient_run(loud_model())
    for step in range(4):
        forward(model, *full(100 + step))
        forward(model, *padded(step)).backward()
        forward(model, *full(200 + step))
        optimizer.step()
        optimizer.zero_grad()
    written = WrittenOut(loud_model())
    for step in range(4):
        written.backward(*padded(step))
        written.step()
    assert sets(longact) == written.sets
    assert_close_weights(model, written.model)


@STATISTICS
@pytest.mark.parametrize("grad", ["full", "compact"])
def test_one_model_called_twice_in_one_loss(grad, statistic):
    """As in DPO: what is preferred and what is not, one padded on the left and one on the right."""
    calls = [padded(0), padded(1, side="right")]
    reference = loud_model()
    model, longact, optimizer = salient_run(loud_model(), grad=grad, statistic=statistic)
    witness = witness_of(calls)
    for step in range(2):
        good, bad = (forward(model, *call) for call in calls)
        with torch.no_grad():
            base = forward(reference, *calls[0]) - forward(reference, *calls[1])
        nn.functional.logsigmoid((bad - good - base) * 0.1).neg().backward()
        optimizer.step()
        if step == 0:
            assert_saliency(longact, witness)
        optimizer.zero_grad()
    assert longact.steps == 2


def test_a_reference_model_that_is_a_copy_leaves_no_trace():
    model, longact, optimizer = salient_run(loud_model())
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for step in range(3):
        with torch.no_grad():
            reference(input_ids=full(50)[0], attention_mask=torch.ones(2, T))
        loss = forward(model, *padded(step))
        reference.train()
        reference(input_ids=full(51)[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain, expected, theirs = salient_run(loud_model())
    for step in range(3):
        forward(plain, *padded(step)).backward()
        theirs.step()
        theirs.zero_grad()
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


# Ways to call


class Encoder(nn.Module):
    """A model inside another that calls its forward and not itself, as sentence-transformers does."""

    def __init__(self, inner):
        super().__init__()
        self.auto_model = inner

    def forward(self, features: dict) -> torch.Tensor:
        return self.auto_model.forward(**features).logits


def by_embeddings(model, ids, mask):
    return model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits


ENTRIES = {
    "model()": lambda model, ids, mask: model(ids, mask).logits,
    "model.forward()": lambda model, ids, mask: model.forward(input_ids=ids, attention_mask=mask).logits,
    "model.forward() by position": lambda model, ids, mask: model.forward(ids, mask).logits,
    "model.model()": lambda model, ids, mask: model.lm_head(model.model(ids, attention_mask=mask)[0]),
    "model.model.forward()": lambda model, ids, mask: model.lm_head(model.model.forward(ids, attention_mask=mask)[0]),
    "get_decoder().forward()": lambda model, ids, mask: model.lm_head(
        model.get_decoder().forward(input_ids=ids, attention_mask=mask).last_hidden_state
    ),
    "inputs_embeds": by_embeddings,
    "inputs_embeds to forward()": lambda model, ids, mask: (
        model.forward(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits
    ),
    "a module around it": lambda model, ids, mask: Encoder(model)({"input_ids": ids, "attention_mask": mask}),
    "its class's forward": lambda model, ids, mask: (
        type(model).forward(model, input_ids=ids, attention_mask=mask).logits
    ),
}


@pytest.mark.parametrize(("side", "statistic"), [("left", "l2"), ("right", "absmax")])
@pytest.mark.parametrize("entry", ENTRIES)
def test_padding_counts_for_nothing_however_the_model_is_called(entry, side, statistic):
    ids, mask = padded(0, rows=3, side=side)
    model = loud_model()
    longact = LongAct(model, statistic=statistic)
    loss_of(ENTRIES[entry](model, ids, mask), ids, mask).backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness_of([(ids, mask)]))


@pytest.mark.parametrize("entry", ["model.forward()", "model.model.forward()", "inputs_embeds to forward()"])
def test_a_call_without_a_mask_after_one_with_it(entry):
    """What the call before said about its tokens is over."""
    calls = [padded(0), full(1)]
    model = loud_model()
    longact = LongAct(model, statistic="l2")
    for ids, mask in calls:
        loss_of(ENTRIES[entry](model, ids, mask), ids, mask).backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness_of(calls))


def test_longact_on_a_module_around_the_model():
    ids, mask = padded(0)
    outer = Encoder(loud_model())
    longact = LongAct(outer)
    loss_of(outer({"input_ids": ids, "attention_mask": mask}), ids, mask).backward()
    chosen_from(outer, longact)
    expected = witness_of([(ids, mask)]).saliency("absmax")
    for (name, values), expected_values in zip(saliencies(longact).items(), expected.values(), strict=True):
        torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-6, msg=name)


def test_longact_on_the_decoder_alone():
    ids, mask = padded(0)
    model = loud_model()
    longact = LongAct(model.model)
    loss_of(model(input_ids=ids, attention_mask=mask).logits, ids, mask).backward()
    chosen_from(model, longact)
    expected = witness_of([(ids, mask)]).saliency("absmax")
    for (name, values), expected_values in zip(saliencies(longact).items(), expected.values(), strict=True):
        torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-6, msg=name)


def test_restore_gives_the_model_its_own_forward_back():
    model = loud_model()
    before = {name: module.forward.__func__ for name, module in model.named_modules()}
    LongAct(model).restore()
    assert {name: module.forward.__func__ for name, module in model.named_modules()} == before
    assert not any("forward" in vars(module) for module in model.modules())
    forward(model, *padded(0)).backward()


# Masks of other kinds


def allowed(mask: torch.Tensor) -> torch.Tensor:
    """Which tokens see which, bool [B, 1, T, T]: those before them and themselves, but no padding."""
    T = mask.shape[1]
    return torch.ones(T, T, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]


def additive(mask: torch.Tensor, low: float) -> torch.Tensor:
    return torch.zeros(allowed(mask).shape).masked_fill(~allowed(mask), low)


MASKS = {
    "long": lambda mask: mask,
    "bool": lambda mask: mask.bool(),
    "int32": lambda mask: mask.int(),
    "float": lambda mask: mask.float(),
    "bf16": lambda mask: mask.bfloat16(),
    "4-D bool": allowed,
    "4-D additive, lowest": lambda mask: additive(mask, torch.finfo(torch.float32).min),
    "4-D additive, infinite": lambda mask: additive(mask, float("-inf")),
    "4-D additive, a head each": lambda mask: additive(mask, -1e9).expand(-1, 4, -1, -1),
    "4-D for all queries": lambda mask: mask.bool()[:, None, None, :],
    "by kinds of layers": lambda mask: {"full_attention": allowed(mask), "sliding_attention": allowed(mask)},
}


def attempt(run) -> bool:
    """Whether a call was taken; otherwise its error must say what it cannot read, and what to do."""
    try:
        run()
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        if "LongAct" not in str(error) and not str(error).startswith("attention_mask"):
            raise
        assert "attention_mask" in str(error), error
        return False
    return True


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("side", "statistic"), [("left", "l2"), ("right", "absmax")])
def test_masks_of_every_kind_are_read_or_refused(side, kind, statistic):
    if kind == "4-D additive, infinite" and side == "left":
        pytest.skip("padding that sees nothing is NaN, and so is all that sees it")
    # Of the small models only some take a mask for each kind of layer.
    make = partial(loud_model, "Qwen3" if kind == "by kinds of layers" else "Llama", attn_implementation="sdpa")
    ids, mask = padded(0, rows=3, side=side)
    model = make()
    longact = LongAct(model, statistic=statistic)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = MASKS[kind](mask)

    def run():
        loss_of(model(input_ids=ids, attention_mask=given, position_ids=positions).logits, ids, mask).backward()

    taken = attempt(run)
    assert taken or kind not in ("long", "bool", "int32", "float", "bf16"), "an ordinary mask"
    if taken:
        chosen_from(model, longact)
        # Attention sees what the mask's own form says: all queries of one that has a single row see what comes later.
        witness = Witness(make())
        sequences = [(i, kept.bool()) for i, kept in enumerate(mask)]
        witness.call(ids, sequences, attention_mask=given, position_ids=positions)
        assert_saliency(longact, witness)


class Opaque(SimpleNamespace):
    """Like torch's BlockMask: shape and indices, and no values to read."""

    shape = (2, 1, T, T)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 2, 10
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(20, 20) for _ in range(3))

    def forward(self, x):
        return torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)


class Model(nn.Module):
    """A model of one's own, which takes any mask and looks at none; token 0 would win every channel."""

    def __init__(self, layout=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention, self.layout = nn.Embedding(64, 20), Attention(), layout
        with torch.no_grad():
            self.embed.weight[0] *= 50

    def forward(self, input_ids, attention_mask=None):
        return self.attention(self.layout(self.embed(input_ids)))


@pytest.mark.parametrize(
    "given",
    [Opaque(), (torch.ones(2, T),), "causal"],
    ids=["BlockMask", "tuple", "a word"],
)
def test_a_mask_that_cannot_be_read_is_an_error_that_says_what_to_do(given):
    model = Model()
    longact = LongAct(model)
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact)
    with pytest.raises((ValueError, TypeError), match=r"attention_mask.*(pass|give|tokens)"):
        model(tokens(), attention_mask=given).sum().backward()
        optimizer.step()


def test_a_three_dimensional_bool_mask_could_be_read():
    """[B, T, T], which tokens see which: read as what it is or refused, but never all tokens in silence."""
    ids, mask = padded(0)
    model = Model()
    witness = Witness(model)
    longact = LongAct(model)
    if attempt(lambda: model(ids, attention_mask=allowed(mask)[:, 0]).sum().backward()):
        chosen_from(model, longact)
        witness.call(ids, mask=mask)
        assert_saliency(longact, witness)


LAYOUTS = {"flat": lambda x: x.flatten(0, 1), "time first": lambda x: x.transpose(0, 1)}


@STATISTICS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_counts_for_nothing_in_activations_of_another_layout(layout, statistic):
    """Tokens one after the other as [B·T, C], or [T, B, C]: read as what they are or refused."""
    ids, mask = padded(0)
    witness = Witness(Model())
    model = Model(LAYOUTS[layout])
    longact = LongAct(model, statistic=statistic)
    if attempt(lambda: model(ids, attention_mask=mask).sum().backward()):
        chosen_from(model, longact)
        witness.call(ids, mask=mask)
        assert_saliency(longact, witness)


def test_a_mask_that_fits_no_activation_is_not_dropped_in_silence():
    """As with a prefix that is put before the embeddings inside the model: the mask is one of other tokens."""
    ids, mask = padded(0)
    model = Model()
    longact = LongAct(model)
    with pytest.raises((ValueError, RuntimeError), match="attention_mask"):
        model(ids, attention_mask=mask[:1, : T // 2]).sum().backward()
        chosen_from(model, longact)


# Packed rows


def rows_of(lengths: list[list[int]]) -> tuple[torch.Tensor, list]:
    """Positions [B, T] of rows that hold several sequences each, and what counts as a sequence."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    sequences = []
    for i, row in enumerate(lengths):
        starts = torch.tensor([0, *row]).cumsum(0).tolist()
        sequences += [(i, slice(a, a + n)) for a, n in zip(starts, row, strict=False)]
    return positions, sequences


@STATISTICS
@pytest.mark.parametrize("ones", [False, True], ids=["no mask", "a mask of ones"])
@pytest.mark.parametrize(
    "lengths",
    [[[5, 7]], [[5, 7], [3, 9]], [[12], [4, 4, 4]], [[1, 2, 3, 6], [6, 6], [11, 1]]],
    ids=str,
)
def test_packed_rows_count_as_their_sequences(lengths, ones, statistic):
    positions, sequences = rows_of(lengths)
    ids = tokens(len(lengths), T, seed=3)
    model = tiny_model(attn_implementation="sdpa")
    longact = LongAct(model, statistic=statistic)
    inputs = {"position_ids": positions, "use_cache": False}
    if ones:
        inputs["attention_mask"] = torch.ones(len(lengths), T, dtype=torch.long)
    loss_of(model(input_ids=ids, **inputs).logits, ids).backward()
    witness = Witness(tiny_model(attn_implementation="sdpa"))
    witness.call(ids, sequences, **inputs)
    chosen_from(model, longact)
    assert_saliency(longact, witness)


@STATISTICS
def test_packed_rows_with_padding_behind_them(statistic):
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0, 1]])
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, 9:] = 0
    ids = tokens(seed=3).clamp(min=1).masked_fill(mask == 0, 0)
    model = loud_model(attn_implementation="sdpa")
    longact = LongAct(model, statistic=statistic)
    inputs = {"position_ids": positions, "attention_mask": mask}
    loss_of(model(input_ids=ids, **inputs).logits, ids, mask).backward()
    witness = Witness(loud_model(attn_implementation="sdpa"))
    kept = [(0, slice(0, 5)), (0, slice(5, 9)), (1, slice(0, 3)), (1, slice(3, 10)), (1, slice(10, 12))]
    witness.call(ids, kept, **inputs)
    chosen_from(model, longact)
    assert_saliency(longact, witness)


@STATISTICS
@pytest.mark.parametrize("filler", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padding_are_no_sequences(side, filler, statistic):
    """transformers counts positions from the first real token on and fills up with 0 or 1."""
    ids, mask = padded(0, rows=3, side=side)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
    model = loud_model()
    longact = LongAct(model, statistic=statistic)
    loss_of(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits, ids, mask).backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness_of([(ids, mask)], position_ids=positions))


@pytest.mark.parametrize("ones", [False, True], ids=["no mask", "a mask of ones"])
@pytest.mark.parametrize("positions", [[12], [5, 7]], ids=str)
def test_one_row_of_positions_for_a_whole_batch(positions, ones):
    row, _ = rows_of([positions])
    _, sequences = rows_of([positions] * 3)
    ids = tokens(3, T, seed=3)
    model = tiny_model()
    longact = LongAct(model, statistic="l2")
    inputs = {"position_ids": row, "use_cache": False}
    if ones:
        inputs["attention_mask"] = torch.ones(3, T, dtype=torch.long)
    loss_of(model(input_ids=ids, **inputs).logits, ids).backward()
    witness = Witness(tiny_model())
    witness.call(ids, sequences, **inputs)
    chosen_from(model, longact)
    assert_saliency(longact, witness)


@pytest.mark.parametrize("ones", [False, True], ids=["no mask", "a mask of ones"])
def test_bounds_of_packed_sequences_as_the_flattening_collators_give_them(ones):
    lengths = [5, 3, 4]
    ids, positions, sequences = packed(lengths, 3)
    bounds = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
    inputs = {"position_ids": positions, "use_cache": False}
    more = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=5, max_length_k=5)
    if ones:
        more["attention_mask"] = torch.ones(1, T, dtype=torch.long)
    model = tiny_model(attn_implementation="sdpa")
    longact = LongAct(model, statistic="l2")
    loss_of(model(input_ids=ids, **inputs, **more).logits, ids).backward()
    witness = Witness(tiny_model(attn_implementation="sdpa"))
    # With a mask, attention itself does not keep the sequences apart.
    witness.call(ids, sequences, **inputs, **({"attention_mask": more["attention_mask"]} if ones else {}))
    chosen_from(model, longact)
    assert_saliency(longact, witness)


@STATISTICS
def test_a_mask_of_ones_is_no_mask(statistic):
    results = []
    for mask in (None, torch.ones(2, T, dtype=torch.long)):
        model, longact, optimizer = salient_run(statistic=statistic)
        for step in range(3):
            backward(model, tokens(seed=step), **({} if mask is None else {"attention_mask": mask}))
            optimizer.step()
            optimizer.zero_grad()
        results.append((sets(longact), saliencies(longact)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)


def test_rows_of_nothing_but_padding_are_no_sequences():
    ids, mask = padded(0, rows=3)
    mask[1] = 0
    model = loud_model()
    longact = LongAct(model, statistic="l2")
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss_of(logits, ids, mask).backward()
    chosen_from(model, longact)
    assert_saliency(longact, witness_of([(ids, mask)]))


# Layers that a call leaves out


def drop(model, dropped: tuple[int, ...]) -> None:
    """Has some layers hand on what they get, as layerdrop does, and the others work again."""
    for i, layer in enumerate(model.model.layers):
        vars(layer).pop("forward", None)
        if i in dropped:
            layer.forward = lambda hidden_states, **_: hidden_states


@pytest.mark.parametrize("options", [{}, {"selection": "current"}, {"grad": "compact"}, {"statistic": "l2"}], ids=str)
def test_layers_that_a_batch_does_not_reach_keep_their_sets(options):
    """Layerdrop, written so that both runs drop the same layers: a dropped layer hands on what it gets."""
    drops = [(), (1,), (0,), (0, 1), (), (1,)]
    model, longact, optimizer = salient_run(**options)
    plain = WrittenOut(tiny_model(), **{k: v for k, v in options.items() if k != "grad"})
    for step, dropped in enumerate(drops):
        for run in (model, plain.model):
            drop(run, dropped)
        plain.backward(tokens(seed=step))
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
        assert sets(longact) == plain.sets, step
    assert_close_weights(model, plain.model)


@pytest.mark.parametrize("options", [{}, {"grad": "compact"}, {"selection": "current"}], ids=str)
def test_a_layer_that_no_batch_reached_at_first(options):
    """It has no set until a step reaches it, which then is its first."""
    model, longact, optimizer = salient_run(**options)
    start = tiny_model()
    plain = WrittenOut(tiny_model(), **{k: v for k, v in options.items() if k != "grad"})
    for step, dropped in enumerate([(1,), (1,), (), ()]):
        for run in (model, plain.model):
            drop(run, dropped)
        plain.backward(tokens(seed=step))
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
        if step < 2:
            assert not any(rows for name, rows in moved_rows(model, start).items() if "layers.1." in name)
    assert sets(longact) == plain.sets
    assert_close_weights(model, plain.model)


@pytest.mark.parametrize("grad", ["full", "compact"])
def test_layerdrop_of_transformers(grad):
    options = dict(ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5, dropout=0.0, num_hidden_layers=4)
    model, longact, optimizer = salient_run(tiny_model("OPT", **options), grad=grad)
    reached: set[str] = set()
    for name, module in projections(model).items():
        module.register_forward_hook(lambda *_, name=name: reached.add(name))
    torch.manual_seed(3)
    kept = 0
    for step in range(6):
        reached.clear()
        before = sets(longact)
        train(model, optimizer, [step])
        after = sets(longact)
        for name in before.keys() - reached:
            assert after[name] == before[name], f"{name} was not reached in step {step}"
            kept += 1
    assert kept, "some layer must be left out for this test to tell anything"


def test_saliencies_are_not_chosen_from_zeros():
    """Of a layer that no batch reached, `saliency` is that of the batch before."""
    model, longact, optimizer = salient_run()
    train(model, optimizer, range(1))
    before = {name: values.clone() for name, values in saliencies(longact).items()}
    drop(model, (1,))
    train(model, optimizer, range(1, 3))
    for name, values in saliencies(longact).items():
        assert torch.equal(values, before[name]) == ("layers.1." in name), name
