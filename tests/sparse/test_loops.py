"""The ways in which people write a training loop: each must train as the plainest one does."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from models import backward, tiny_model, tokens
from torch.utils.checkpoint import checkpoint

from longact_kernels import LongAct, SalientAdamW

HYPER = dict(lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def sets(longact) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in longact.sets.items()}


def salient_run(state="full", optimizer=None, **options):
    """A model, its controller and its optimizer, the same at every call."""
    model = tiny_model()
    longact = LongAct(model, **options)
    return model, longact, SalientAdamW(model.parameters(), **HYPER, longact=longact, state=state, **(optimizer or {}))


def train(model, optimizer, steps) -> None:
    for step in steps:
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()


def assert_same_weights(model, other) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


# What torch.optim.AdamW does


@pytest.mark.parametrize(
    "flags",
    [{"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}, {"lr": torch.tensor(3e-3)}],
    ids=lambda flags: next(iter(flags)),
)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_flags_mean_what_they_mean_in_torch(flags, set_to_none):
    ours, theirs = tiny_model(), tiny_model()
    LongAct(ours, density=1.0)
    for model, kind in ((ours, SalientAdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(model.parameters(), **{**HYPER, **flags})
        for step in range(4):
            backward(model, tokens(seed=step))
            optimizer.step()
            optimizer.zero_grad(set_to_none)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Each form rounds in an order of its own; salient weights have one form.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_capturable_on_a_cpu_is_refused_as_torch_refuses_it():
    for model, kind in ((salient_run()[0], SalientAdamW), (tiny_model(), torch.optim.AdamW)):
        optimizer = kind(model.parameters(), capturable=True)
        backward(model, tokens())
        with pytest.raises((AssertionError, RuntimeError), match="capturable"):
            optimizer.step()


@pytest.mark.parametrize("options", [{}, {"selection": "current"}, {"grad": "compact", "state": "compact"}])
def test_gradients_that_are_zeroed_in_place_train_the_same(options):
    model, longact, optimizer = salient_run(**options)
    for step in range(4):
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    expected = salient_run(**options)
    train(expected[0], expected[2], range(4))
    assert_same_weights(model, expected[0])
    assert sets(longact) == sets(expected[1])


def test_a_parameter_group_added_later_has_salient_weights_too():
    model = tiny_model()
    longact = LongAct(model)
    last = list(model.model.layers[1].parameters())
    ids = set(map(id, last))
    optimizer = SalientAdamW([p for p in model.parameters() if id(p) not in ids], **HYPER)
    before = [p.detach().clone() for p in last]
    train(model, optimizer, range(2))
    assert all(torch.equal(p, old) for p, old in zip(last, before, strict=True))
    optimizer.add_param_group({"params": last, "lr": 1e-2})
    model.zero_grad()
    train(model, optimizer, range(2, 4))
    weight = model.model.layers[1].self_attn.q_proj.weight
    moved = (weight != before[0]).any(1)
    assert moved.any() and not moved.all()
    assert optimizer.state[weight]["step"].max() == 2
    assert longact.steps == 4


def test_step_hooks_see_masked_gradients_and_closures_may_run_twice():
    model, longact, optimizer = salient_run(selection="current")
    seen = []
    weight = model.model.layers[0].self_attn.q_proj.weight
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append(sets(longact)))

    def closure():
        optimizer.zero_grad()
        return backward(model, tokens())

    loss = optimizer.step(closure)
    optimizer.step(closure)
    assert seen[0] == seen[2] == "before" and [type(entry) for entry in seen[1::2]] == [dict, dict]
    assert loss > 0
    rows = longact.layers["model.layers.0.self_attn.q_proj"].salient.index.tolist()
    assert weight.grad.any(1).nonzero().flatten().tolist() == rows


# Copies and files


@pytest.mark.parametrize("options", [{"state": "full"}, {"state": "compact", "grad": "compact"}, {"site": "norm"}])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_trains_on_its_own(how, options, monkeypatch):
    if "site" in options:
        monkeypatch.setattr("test_loops.tiny_model", lambda make=tiny_model: make("Qwen3"))
    model, longact, optimizer = salient_run(**options)
    train(model, optimizer, range(3))
    duplicate = copy.deepcopy if how == "deepcopy" else lambda it: pickle.loads(pickle.dumps(it))
    other, others = duplicate((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()], sets(longact), longact.steps
    train(other, others, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[0], strict=True))
    assert (sets(longact), longact.steps) == before[1:]
    train(model, optimizer, range(3, 6))
    assert_same_weights(other, model)
    copied = LongAct.of(other)
    assert copied is not longact and sets(copied) == sets(longact)


@pytest.mark.parametrize("selection", ["lagged", "current"])
def test_a_stock_optimizer_resumes_bit_for_bit(selection):
    def fresh():
        model = tiny_model().to(torch.bfloat16)
        longact = LongAct(model, selection=selection, refresh_every=2, ema=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
        return model, longact, optimizer

    whole = fresh()
    whole[1].attach(whole[2])
    train(whole[0], whole[2], range(6))

    first = fresh()
    first[1].attach(first[2])
    train(first[0], first[2], range(3))
    file = io.BytesIO()
    torch.save({"model": first[0].state_dict(), "optimizer": first[2].state_dict()}, file)
    for attach_first in (True, False):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, longact, optimizer = fresh()
        model.load_state_dict(saved["model"])
        if attach_first:
            longact.attach(optimizer)
        optimizer.load_state_dict(saved["optimizer"])
        longact.attach(optimizer)
        assert "longact" not in optimizer.param_groups[0]
        train(model, optimizer, range(3, 6))
        assert_same_weights(model, whole[0])
        assert sets(longact) == sets(whole[1]) and longact.steps == 6


def test_a_stock_optimizer_says_that_the_sets_have_another_size():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
    LongAct(model).attach(optimizer)
    train(model, optimizer, range(1))
    other = tiny_model()
    LongAct(other, density=0.5).attach(stock := torch.optim.AdamW(other.parameters()))
    with pytest.raises(ValueError, match="saved with 12 salient rows, this LongAct keeps 20"):
        stock.load_state_dict(optimizer.state_dict())


# Accelerate


def test_accelerate_accumulates_and_clips_as_a_plain_loop():
    model, longact, optimizer = salient_run()
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4))
    for step in range(3):
        for piece in tokens(4, seed=step).chunk(2):
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, piece))
                if accelerator.sync_gradients:
                    longact.mask_gradients()
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    plain, theirs, reference = salient_run()
    scheduler = torch.optim.lr_scheduler.LinearLR(reference, total_iters=4)
    for step in range(3):
        for piece in tokens(4, seed=step).chunk(2):
            (loss_of(plain, piece) / 2).backward()
        theirs.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        scheduler.step()
        reference.zero_grad()
    assert_same_weights(model, plain)
    assert sets(longact) == sets(theirs) and longact.steps == 3


def loss_of(model, ids):
    logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("grad", ["full", "compact"])
def test_autocast_and_a_gradient_scaler_skip_the_steps_that_overflow(grad):
    model, _, optimizer = salient_run(grad=grad)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    weight = model.model.layers[0].self_attn.q_proj.weight
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokens(seed=step))
        scaler.scale(loss * (float("inf") if step == 2 else 1)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert not any(moved) if step == 2 else all(moved)
    assert scaler.get_scale() == 2.0**9
    assert optimizer.state[weight]["step"].max() == 3


# What happens to a model before it trains


def test_a_compiled_model_chooses_the_same_sets_without_compiling_anew_at_each_refresh():
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = tiny_model(num_hidden_layers=1)
        longact = LongAct(model)
        optimizer = SalientAdamW(model.parameters(), **HYPER)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        losses, chosen, graphs = [], [], []
        for step in range(5):
            ids = tokens(seed=step)
            loss = run(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            chosen.append(sets(longact))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        results.append((losses, chosen))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    assert results[0][1] == results[1][1]
    assert len({str(chosen) for chosen in results[0][1]}) > 1, "the sets must change for this test to tell anything"
    # One graph before there is a set, and one with it.
    assert graphs[1:] == [graphs[1]] * 4 and graphs[1] <= graphs[0] + 1


@pytest.mark.parametrize("site", ["projection", "rope"])
def test_sdpa_and_eager_attention_choose_the_same_sets(site):
    results = []
    for attention in ("eager", "sdpa"):
        model = tiny_model(attn_implementation=attention)
        longact = LongAct(model, site=site)
        backward(model, tokens())
        longact.mask_gradients()
        results.append((sets(longact), [longact.saliency(name) for name in longact.layers]))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("site", ["projection", "rope"])
@pytest.mark.parametrize("statistic", ["absmax", "l2"])
def test_packed_sequences_choose_what_the_unpacked_batch_does(statistic, site):
    lengths = [7, 12, 4]
    sequences = [tokens(1, length, seed=length) for length in lengths]

    def packed(model):
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        logits = model(input_ids=torch.cat(sequences, 1), position_ids=positions, use_cache=False).logits
        return logits.split(lengths, 1)

    def padded(model, side):
        ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
        places = [slice(0, n) if side == "right" else slice(12 - n, 12) for n in lengths]
        for i, (place, sequence) in enumerate(zip(places, sequences, strict=True)):
            ids[i, place], mask[i, place] = sequence[0], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        return [logits[i : i + 1, place] for i, place in enumerate(places)]

    results = []
    forms = packed, lambda model: padded(model, "right"), lambda model: padded(model, "left")
    for run in forms:
        model = tiny_model(attn_implementation="sdpa")
        longact = LongAct(model, statistic=statistic, site=site)
        sum(logits.square().sum() for logits in run(model)).backward()
        longact.mask_gradients()
        grads = [layer.weight.grad for layer in longact.layers.values()]
        results.append((sets(longact), [longact.saliency(name) for name in longact.layers], grads))
    for other in results[1:]:
        assert other[0] == results[0][0]
        torch.testing.assert_close(other[1], results[0][1])
        torch.testing.assert_close(other[2], results[0][2], rtol=1e-4, atol=1e-4)


def test_tied_embeddings_stay_tied_through_training_and_files(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(tie_word_embeddings=True)
    longact = LongAct(model)
    optimizer = SalientAdamW(model.parameters(), **HYPER)
    train(model, optimizer, range(2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    longact.restore().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_weights(model, loaded)


# Two processes


def distributed_run(options, rank=None, no_sync=False):
    """Three steps on batches of 8 sequences, or on a rank's half of them: the sets, norms of gradients and weights."""
    model = tiny_model()
    if rank == 1 and options.get("grad") == "compact":
        model.model.layers[0].self_attn.q_proj.weight.data += 1  # only rank 0's weights count
    longact = LongAct(model, **options)
    optimizer = SalientAdamW(model.parameters(), **{**HYPER, "eps": 1e-2}, longact=longact)
    run = model if rank is None else torch.nn.parallel.DistributedDataParallel(model)
    norms, chosen = [], []
    for step in range(3):
        batch = tokens(8, seed=step) if rank is None else tokens(8, seed=step).chunk(2)[rank]
        *first, last = batch.chunk(2)
        for piece in first:
            if no_sync and rank is not None:
                with run.no_sync():
                    (loss_of(run, piece) / 2).backward()
            else:
                (loss_of(run, piece) / 2).backward()
        (loss_of(run, last) / 2).backward()
        norms.append(longact.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        chosen.append(sets(longact))
    return chosen, norms, [p.detach() for p in model.parameters()]


CASES = {
    "full": ({}, False),
    "full, no_sync": ({}, True),
    "current": ({"selection": "current", "statistic": "l2"}, True),
    "compact": ({"grad": "compact"}, False),
    "compact, no_sync": ({"grad": "compact", "refresh_every": 2}, True),
}


def _rank(rank, file, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.save(
        {name: distributed_run(options, rank, no_sync) for name, (options, no_sync) in CASES.items()},
        folder / f"{rank}",
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (folder / "rendezvous", folder), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_on_the_whole_batch(of_ranks, case):
    chosen, norms, weights = distributed_run(CASES[case][0])
    for rank in (0, 1):
        sets_of_rank, norms_of_rank, weights_of_rank = of_ranks[rank][case]
        assert sets_of_rank == chosen
        assert norms_of_rank == pytest.approx(norms, rel=1e-4)
        torch.testing.assert_close(weights_of_rank, weights, rtol=1e-5, atol=1e-6)
    for one, other in zip(of_ranks[0][case][2], of_ranks[1][case][2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"selection": "current"}, {"grad": "compact"}])
def test_a_batch_that_teaches_nothing_is_a_step_all_the_same(options):
    """Gradients of zeros, as in RL where all completions earn the same: clipping them is not dropping the batch."""
    model = tiny_model()
    longact = LongAct(model, **options)
    optimizer = SalientAdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        ids = tokens()
        (0 * model(input_ids=ids, labels=ids).loss).backward()
        longact.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert longact.steps == 2 and longact.sets.keys() == longact.layers.keys()


def test_a_backward_that_fails_leaves_nothing_behind(model):
    twin = copy.deepcopy(model)
    longact, plain = LongAct(model), LongAct(twin)

    def fail(grad):
        raise RuntimeError("out of memory")

    embeds = model.get_input_embeddings()(tokens(seed=1)).detach().requires_grad_()
    embeds.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        (100 * model(inputs_embeds=embeds).logits).square().sum().backward()
    model.zero_grad()
    for net, controller in ((model, longact), (twin, plain)):
        backward(net, tokens(seed=2))
        controller.refresh()
    for name in longact.layers:
        assert torch.equal(longact.saliency(name), plain.saliency(name))


# Loops that hold no optimizer of ours


def by_hand(model):
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-2 * p.grad
    model.zero_grad()


def by_copies(model):
    """Of data, which bumps no version, as loops do that keep fp32 masters of their own."""
    for p in model.parameters():
        p.data.copy_(p.detach() - 1e-2 * p.grad)
        p.grad = None


@pytest.mark.parametrize("step", [by_hand, by_copies])
def test_weights_that_change_without_a_step_that_we_know_of_are_an_error(step):
    model = tiny_model()
    LongAct(model)
    with pytest.raises(RuntimeError, match=r"changed twice without a step .* longact.attach"):
        for seed in range(3):
            backward(model, tokens(seed=seed))
            step(model)


def test_a_checkpoint_loaded_before_the_first_step_is_no_step():
    model = tiny_model()
    longact = LongAct(model)
    optimizer = SalientAdamW(model.parameters(), **HYPER)
    backward(model, tokens(seed=7))
    model.zero_grad()
    model.load_state_dict({name: value.clone() for name, value in tiny_model().state_dict().items()})
    train(model, optimizer, range(2))
    expected = salient_run()
    train(expected[0], expected[2], range(2))
    assert sets(longact) == sets(expected[1])
    assert_same_weights(model, expected[0])


def test_a_step_by_hand_with_compact_gradients_is_an_error():
    model = tiny_model()
    longact = LongAct(model, grad="compact")
    optimizer = SalientAdamW(model.parameters(), lr=1e-3, longact=longact)
    for seed in range(2):
        backward(model, tokens(seed=seed))
        optimizer.step()
        optimizer.zero_grad()
    backward(model, tokens(seed=2))
    longact.mask_gradients()
    with pytest.raises(RuntimeError, match=r"^grad: 'compact' .* use grad='full'"):
        longact.advance()
    optimizer.step()  # nothing was lost
    assert longact.steps == 3


def test_steps_by_hand_between_masking_and_advancing():
    model = tiny_model()
    longact = LongAct(model)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    seen = set()
    for seed in range(3):
        backward(model, tokens(seed=seed))
        longact.mask_gradients()
        seen |= set(longact.sets["model.layers.0.self_attn.q_proj"].tolist())
        by_hand(model)
        longact.advance()
    moved = (model.model.layers[0].self_attn.q_proj.weight != before).any(1).nonzero().flatten().tolist()
    assert longact.steps == 3 and set(moved) == seen


@pytest.mark.parametrize("generator_first", [True, False])
def test_a_model_frozen_for_a_pass_as_in_adversarial_training(generator_first):
    model, longact, optimizer = salient_run()
    generator = torch.nn.Linear(32, 32)
    for step in range(3):
        for turn in (generator_first, not generator_first):
            if not turn:
                train(model, optimizer, [step])
                continue
            model.requires_grad_(False)
            logits = model(inputs_embeds=generator(torch.randn(2, 8, 32))).logits
            logits.logsumexp(-1).mean().backward()
            model.requires_grad_(True)
            assert generator.weight.grad is not None
    expected = salient_run()
    train(expected[0], expected[2], range(3))
    assert sets(longact) == sets(expected[1])
    assert_same_weights(model, expected[0])


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_layers_called_by_hand_read_their_own_masks(checkpointing):
    """As in a pipeline's stage: nobody calls the model."""

    def logits(model, ids, mask):
        inner, length = model.model, ids.shape[1]
        hidden, positions = inner.embed_tokens(ids), torch.arange(length)[None]
        causal = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
        more = dict(
            attention_mask=torch.zeros(causal.shape).masked_fill(~causal, -1e9),
            position_embeddings=inner.rotary_emb(hidden, positions),
        )
        for layer in inner.layers:
            forward = partial(layer, **more)
            hidden = (
                forward(hidden) if checkpointing is None else checkpoint(forward, hidden, use_reentrant=checkpointing)
            )
        return model.lm_head(inner.norm(hidden))

    ids, mask = tokens(3), torch.ones(3, 12, dtype=torch.long)
    mask[0, 8:] = mask[1, 4:] = 0
    saliencies = []
    for whole in (True, False):
        model = tiny_model()
        model.get_input_embeddings().weight.data[0] *= 50
        ids[mask == 0] = 0
        longact = LongAct(model)
        out = model(input_ids=ids, attention_mask=mask).logits if whole else logits(model, ids, mask)
        out[mask.bool()].square().sum().backward()
        longact.mask_gradients()
        saliencies.append(torch.cat([longact.saliency(name) for name in longact.layers]))
    torch.testing.assert_close(*saliencies, rtol=1e-5, atol=1e-6)


def test_weights_tied_after_the_swap_are_an_error():
    model, _, optimizer = salient_run()
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.q_proj shares its weight with model\.layers\.0"):
        train(model, optimizer, range(1))


def test_a_stock_optimizer_takes_one_controller():
    actor, critic = tiny_model(), tiny_model("Qwen2")
    optimizer = torch.optim.AdamW([*actor.parameters(), *critic.parameters()])
    LongAct(actor).attach(optimizer)
    with pytest.raises(ValueError, match=r"^attach: another LongAct is attached"):
        LongAct(critic).attach(optimizer)
