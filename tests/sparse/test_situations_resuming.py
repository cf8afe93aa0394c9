"""Resuming, changing the controller in between, and models that are made, moved or built in unusual ways."""

import copy
import io
from pathlib import Path

import pytest
import torch
from situations import (
    HYPER,
    Witness,
    assert_close_weights,
    assert_same_weights,
    backward,
    loss_of,
    projections,
    salient_run,
    sets,
    stock_run,
    tiny_model,
    tokens,
    train,
)
from torch import nn

from longact_kernels import LongAct, SalientAdamW

Q = "model.layers.0.self_attn.q_proj"


def through_a_file(it):
    file = io.BytesIO()
    torch.save(it, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed_is_unbroken(make, batch=None, stop=3, steps=7):
    """Trains in one go, and in two with a file in between; `make` gives a model, its controller and its optimizers."""

    def run(model, optimizers, steps):
        for step in steps:
            (batch or (lambda model, step: backward(model, tokens(seed=step))))(model, step)
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()

    def made():
        model, longact, *optimizers = make()
        return model, longact, optimizers

    whole, expected, theirs = made()
    run(whole, theirs, range(steps))
    first, _, optimizers = made()
    run(first, optimizers, range(stop))
    saved = through_a_file([first.state_dict(), *[one.state_dict() for one in optimizers]])
    model, longact, optimizers = made()
    model.load_state_dict(saved[0])
    for one, state in zip(optimizers, saved[1:], strict=True):
        one.load_state_dict(state)
    run(model, optimizers, range(stop, steps))
    assert sets(longact) == sets(expected)
    assert longact.steps == expected.steps == steps
    assert_same_weights(model, whole)


SCHEDULES = [
    {},
    {"selection": "current", "statistic": "l2"},
    {"refresh_every": 2},
    {"refresh_every": 5, "statistic": "l2"},
    {"grad": "compact"},
    {"grad": "compact", "refresh_every": 2},
    {"ema": 0.5, "refresh_every": 2},
    {"freeze_after": 2},
    {"scope": "model"},
    {"strategy": "random"},
]


FROZEN = [(Q, options, "full") for options in SCHEDULES]
FROZEN += [(Q, options, "compact") for options in ({}, {"refresh_every": 2}, {"grad": "compact"})]
FROZEN += [(which, options, "full") for which in ("q_proj", "layers.1") for options in ({}, {"refresh_every": 2})]
FROZEN += [("nothing", {"grad": "compact", "refresh_every": 2}, "compact")]


@pytest.mark.parametrize(("frozen", "options", "state"), FROZEN)
def test_with_some_projections_frozen(frozen, options, state):
    def make():
        model = tiny_model()
        for name, module in projections(model).items():
            module.weight.requires_grad_(frozen not in name)
        return salient_run(model, state=state, **options)

    resumed_is_unbroken(make)


@pytest.mark.parametrize("kind", ["given to the optimizer", "left out"])
def test_frozen_weights_that_the_optimizer_does_or_does_not_hold(kind):
    def make():
        model = tiny_model()
        model.get_parameter(f"{Q}.weight").requires_grad_(False)
        longact = LongAct(model, refresh_every=2)
        params = [p for p in model.parameters() if p.requires_grad or kind != "left out"]
        return model, longact, SalientAdamW(params, **HYPER)

    resumed_is_unbroken(make)


@pytest.mark.parametrize("options", [{}, {"refresh_every": 2}, {"selection": "current"}], ids=str)
def test_a_stock_optimizer_with_a_frozen_projection(options):
    def make():
        model = tiny_model()
        model.get_parameter(f"{Q}.weight").requires_grad_(False)
        return stock_run(model, **options)

    resumed_is_unbroken(make)


def test_weights_frozen_in_the_middle():
    """Frozen when the run is saved, but not when it began."""

    def batch(model, step):
        model.get_parameter(f"{Q}.weight").requires_grad_(step < 2)
        backward(model, tokens(seed=step))

    for grad in ("full", "compact"):
        resumed_is_unbroken(lambda grad=grad: salient_run(grad=grad, refresh_every=2), batch)


@pytest.mark.parametrize("options", [{}, {"grad": "compact"}, {"refresh_every": 2}], ids=str)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_with_layers_dropped(options, stop):
    """Saved when the last batch left a layer out, and before one was ever reached."""
    drops = [(1,), (1,), (), (0,), (), (0, 1), ()]

    def batch(model, step):
        for i, layer in enumerate(model.model.layers):
            vars(layer).pop("forward", None)
            if i in drops[step]:
                layer.forward = lambda hidden_states, **_: hidden_states
        backward(model, tokens(seed=step))

    resumed_is_unbroken(lambda: salient_run(**options), batch, stop)


@pytest.mark.parametrize("stop", range(1, 6))
@pytest.mark.parametrize("statistic", ["absmax", "l2"])
def test_anywhere_in_a_refresh_period(stop, statistic):
    resumed_is_unbroken(lambda: salient_run(refresh_every=3, statistic=statistic), stop=stop)


def test_before_the_first_step():
    resumed_is_unbroken(salient_run, stop=0)


@pytest.mark.parametrize("state", ["full", "compact"])
def test_with_several_parameter_groups(state):
    def make():
        model = tiny_model()
        longact = LongAct(model, refresh_every=2)
        q = [module.weight for name, module in projections(model).items() if "q_proj" in name]
        k = [module.weight for name, module in projections(model).items() if "k_proj" in name]
        ids = set(map(id, q + k))
        rest = [p for p in model.parameters() if id(p) not in ids]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": k, "lr": 1e-3}, {"params": q, "betas": (0.8, 0.9)}]
        return model, longact, SalientAdamW(groups, **HYPER, state=state)

    resumed_is_unbroken(make)


@pytest.mark.parametrize("grad", ["full", "compact"])
def test_with_weights_shared_out_to_two_optimizers(grad):
    def make():
        model = tiny_model()
        longact = LongAct(model, grad=grad, refresh_every=2)
        ids = {id(module.weight) for name, module in projections(model).items() if "q_proj" in name}
        one = SalientAdamW([p for p in model.parameters() if id(p) in ids], **HYPER)
        return model, longact, one, SalientAdamW([p for p in model.parameters() if id(p) not in ids], **HYPER)

    resumed_is_unbroken(make)


def test_after_a_batch_was_dropped():
    def batch(model, step):
        if step in (2, 4):
            backward(model, torch.full((2, 12), 63))
            model.zero_grad()
        backward(model, tokens(seed=step))

    for grad in ("full", "compact"):
        resumed_is_unbroken(lambda grad=grad: salient_run(grad=grad), batch)


def test_a_batch_that_was_dropped_just_before_saving_is_in_no_file():
    model, _, optimizer = salient_run(grad="compact")
    plain, _, theirs = salient_run(grad="compact")
    train(model, optimizer, range(2))
    train(plain, theirs, range(2))
    backward(model, torch.full((2, 12), 63))
    model.zero_grad()
    for i, state in theirs.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer.state_dict()["state"][i][name])), name


# Another controller on the same weights


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.5},
        {"density": 0.1},
        {"density": 1.0},
        {"statistic": "l2"},
        {},
        {"axis": "columns"},
        {"scope": "model"},
        {"grad": "compact"},
    ],
    ids=str,
)
def test_restore_and_a_longact_with_other_options_under_the_same_optimizer(options, state):
    """Moments are carried over to the channels that are salient now, or the optimizer says that it cannot."""
    model, first, optimizer = salient_run(state=state)
    train(model, optimizer, range(3))
    first.restore()
    longact = LongAct(model, **options)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        train(model, optimizer, range(3, 6))
    except (ValueError, RuntimeError) as error:
        assert "new optimizer" in str(error) or "SalientAdamW" in str(error), error
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        return
    assert longact.steps == 3
    size = {name: len(rows) for name, rows in sets(longact).items()}
    if options.get("scope") != "model" and options.get("axis") != "columns":
        assert size == {name: round(options.get("density", 0.3) * m.out_features) for name, m in longact.layers.items()}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("state", ["full", "compact"])
def test_the_same_options_again_carry_the_moments_over(state):
    """With the sets of a new controller chosen from the next batch, as in a first step, and the moments kept."""
    model, first, optimizer = salient_run(state=state)
    train(model, optimizer, range(3))
    weight = model.get_parameter(f"{Q}.weight")
    counts = optimizer.state[weight]["step"].clone()
    kept = sets(first)[Q]
    first.restore()
    longact = LongAct(model)
    train(model, optimizer, [3])
    after = optimizer.state[weight]["step"]
    if state == "full":
        outside = [i for i in range(len(weight)) if i not in sets(longact)[Q]]
        assert torch.equal(after[outside], counts[outside])
        assert after.sum() == counts.sum() + 12
    else:
        stay = [i for i, row in enumerate(sets(longact)[Q]) if row in kept]
        assert stay and all(after[i] >= 2 for i in stay)


# Checkpoints of others


@pytest.mark.parametrize("number", [int, float, torch.tensor, lambda n: torch.tensor(float(n), dtype=torch.float64)])
@pytest.mark.parametrize("state", ["full", "compact"])
def test_a_checkpoint_of_adamw_whose_step_is_a_number(number, state):
    """As files of older versions of torch have it, and those of converters."""
    dense = tiny_model()
    theirs = torch.optim.AdamW(dense.parameters(), **HYPER)
    train(dense, theirs, range(3))
    saved = theirs.state_dict()
    results = []
    for kind in (lambda step: step, lambda step: number(int(step))):
        state_dict = {
            "state": {i: {**s, "step": kind(s["step"])} for i, s in saved["state"].items()},
            "param_groups": saved["param_groups"],
        }
        model, longact, optimizer = salient_run(state=state)
        model.load_state_dict(dense.state_dict())
        optimizer.load_state_dict(copy.deepcopy(state_dict))  # else training would write into it, as torch's does
        train(model, optimizer, range(3, 6))
        results.append((model, sets(longact)))
    assert results[0][1] == results[1][1]
    assert_same_weights(results[1][0], results[0][0])


def test_a_checkpoint_of_adamw_goes_on_as_adamw_where_all_rows_are_salient():
    dense = tiny_model()
    theirs = torch.optim.AdamW(dense.parameters(), **HYPER)
    train(dense, theirs, range(3))
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    model, _, optimizer = salient_run(density=1.0)
    model.load_state_dict(dense.state_dict())
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    train(dense, theirs, range(3, 6))
    assert_close_weights(model, dense, rtol=1e-5, atol=1e-6)


# Made by 0.1: three steps of a small model with `old_run`, its files, and what three more steps make of it.
OLD = torch.load(Path(__file__).with_name("checkpoints_0_1.pt"), weights_only=True)
OLD_RUNS = {
    "a period": {"refresh_every": 2, "statistic": "l2", "ema": 0.5},
    "compact": {"grad": "compact", "state": "compact"},
    "current": {"selection": "current", "stock": True},
    "bf16": {"dtype": torch.bfloat16},
}
SMALL = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=10)
SMALL |= dict(num_attention_heads=2, num_key_value_heads=1)


def old_run(name):
    options = dict(OLD_RUNS[name])
    make = stock_run if options.pop("stock", False) else salient_run
    return make(tiny_model(**SMALL).to(options.pop("dtype", torch.float32)), **options)


def old_train(model, optimizer, steps) -> None:
    for step in steps:
        backward(model, tokens(seed=step) % 16)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OLD_RUNS)
def test_checkpoints_of_version_0_1_go_on(name):
    saved = OLD[name]
    model, longact, optimizer = old_run(name)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    old_train(model, optimizer, range(3, 6))
    assert sets(longact) == saved["sets"] and longact.steps == 6
    for (key, value), expected in zip(model.state_dict().items(), saved["after"].values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


# Dense parameters of other layouts

LAYOUTS = {
    "channels last": lambda: torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last),
    "channels last, 3-D": lambda: torch.randn(3, 2, 2, 2, 2).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(5, 8).t(),
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "a part": lambda: torch.randn(6, 16)[:, :8],
    "a scalar": lambda: torch.randn(()),
    "a vector": lambda: torch.randn(7),
    "every second of a vector": lambda: torch.randn(14)[::2],
    "empty": lambda: torch.randn(0, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same", [True, False], ids=["gradient alike", "gradient contiguous"])
def test_dense_parameters_of_any_layout_train_as_with_adamw(layout, moments, same):
    skips = moments == torch.bfloat16 and layout in ("a part", "every second of a vector")  # memory: may be refused
    torch.manual_seed(0)
    start = LAYOUTS[layout]()
    ours, theirs = (nn.Parameter(torch.empty_strided(start.shape, start.stride()).copy_(start)) for _ in range(2))
    optimizers = [
        SalientAdamW([ours], **HYPER, longact=False, moments=moments),
        torch.optim.AdamW([theirs], **HYPER),
    ]
    for _ in range(5):
        grad = torch.randn(start.shape)
        for p in (ours, theirs):
            p.grad = torch.empty_strided(p.shape, p.stride()).copy_(grad) if same else grad.clone()
        try:
            optimizers[0].step()
        except ValueError as error:
            assert skips and "contiguous" in str(error)
            return
        optimizers[1].step()
    assert ours.stride() == theirs.stride()
    tolerance = dict(rtol=1e-5, atol=1e-6) if moments == torch.float32 else dict(rtol=0, atol=5 * HYPER["lr"] * 2e-2)
    torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bit_parameters_of_any_layout_train_as_their_fp32_copies(layout):
    torch.manual_seed(0)
    start = LAYOUTS[layout]().bfloat16()
    ours = nn.Parameter(torch.empty_strided(start.shape, start.stride(), dtype=torch.bfloat16).copy_(start))
    theirs = nn.Parameter(start.float().clone())
    optimizers = [SalientAdamW([ours], **HYPER, longact=False), torch.optim.AdamW([theirs], **HYPER)]
    for _ in range(5):
        grad = torch.randn(start.shape).bfloat16()
        ours.grad, theirs.grad = grad.clone(), grad.float()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs.bfloat16(), rtol=0, atol=0)


# Models without memory yet


@pytest.mark.parametrize("options", [{}, {"grad": "compact"}, {"statistic": "l2", "selection": "current"}], ids=str)
@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_a_model_on_the_meta_device(options, how):
    plain, expected, theirs = salient_run(**options)
    with torch.device("meta"):
        model = tiny_model()
    longact = LongAct(model, **options)
    source = tiny_model()
    if how == "to_empty":
        model.to_empty(device="cpu")
    else:
        model.load_state_dict(source.state_dict(), assign=True)
        for name, module in model.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, key, source.get_submodule(name).get_buffer(key).clone())
    with torch.no_grad():
        for kind in ("named_parameters", "named_buffers"):
            for (_, ours), (_, given) in zip(getattr(model, kind)(), getattr(source, kind)(), strict=True):
                ours.copy_(given)
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer = SalientAdamW(model.parameters(), **HYPER)
    train(model, optimizer, range(4))
    train(plain, theirs, range(4))
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


# Encoders and decoders


class EncoderDecoder:
    """What a model's projections put out, and which tokens of it count, by the name of their module."""

    def __init__(self, model, masks):
        self.outputs, self.masks = {}, masks
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda m, i, out, name=name: self.outputs.__setitem__(name, out.detach()))

    def saliency(self, name) -> torch.Tensor:
        y = self.outputs[name].float()
        cross = any(word in name for word in ("encoder_attn", "EncDecAttention", "cross"))
        decoder = ("decoder" in name and not cross) or (cross and name.rsplit(".", 1)[1].startswith("q"))
        mask = self.masks["decoder" if decoder else "encoder"]
        return y[mask.bool()].abs().amax(0) if mask is not None else y.flatten(0, 1).abs().amax(0)


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    config = BartConfig(vocab_size=64, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, pad_token_id=0, **sizes)
    return BartForConditionalGeneration(config)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0)
    return T5ForConditionalGeneration(config)


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        max_source_positions=6,
        max_target_positions=16,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
    )
    return WhisperForConditionalGeneration(config)


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(8,),
        conv_stride=(4,),
        conv_kernel=(4,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    return Wav2Vec2ForCTC(config)


def decoder_loss(model, **inputs):
    ids, mask = tokens(2, 9, seed=1).clamp(min=3), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    logits = model(decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False, **inputs).logits
    return loss_of(logits, ids, mask), mask


def text(model):
    ids, mask = tokens(2, 12).clamp(min=3), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    loss, decoder = decoder_loss(model, input_ids=ids, attention_mask=mask)
    return loss, {"encoder": mask, "decoder": decoder}


def sound(model):
    loss, decoder = decoder_loss(model, input_features=torch.randn(2, 8, 12))
    return loss, {"encoder": None, "decoder": decoder}


def wave(model):
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[1, 24:] = 0
    frames = torch.ones(2, 12, dtype=torch.long)
    frames[1, 6:] = 0
    logits = model(torch.randn(2, 48) * mask, attention_mask=mask).logits
    return (logits * frames[..., None]).square().sum(), {"encoder": frames, "decoder": None}


MODELS = {"bart": (bart, text), "t5": (t5, text), "whisper": (whisper, sound), "wav2vec2": (wav2vec2, wave)}


@pytest.mark.parametrize("named", [False, True], ids=["found", "named"])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_encoders_are_taken_right_or_refused(name, named):
    make, run = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    targets = (["q", "k"] if name == "t5" else ["q_proj", "k_proj"]) if named else None
    try:
        longact = LongAct(model, target_modules=targets)
        torch.manual_seed(1)
        seen = EncoderDecoder(model, None)
        loss, seen.masks = run(model)
        loss.backward()
        SalientAdamW(model.parameters(), **HYPER).step()
    except (ValueError, NotImplementedError) as error:
        assert any(word in str(error) for word in ("model:", "encoder", "attention_mask", "target_modules")), error
        return
    for layer in longact.layers:
        torch.testing.assert_close(longact.saliency(layer), seen.saliency(layer), msg=layer)


def test_an_encoder_alone_is_taken():
    """BERT: one attention, one mask."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForMaskedLM(config).train()
    longact = LongAct(model)
    ids, mask = tokens(2, 12).clamp(min=1), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    seen = EncoderDecoder(model, {"encoder": mask, "decoder": None})
    loss_of(model(input_ids=ids, attention_mask=mask).logits, ids, mask).backward()
    SalientAdamW(model.parameters(), **HYPER).step()
    for layer in longact.layers:
        torch.testing.assert_close(longact.saliency(layer), seen.saliency(layer), msg=layer)


def test_saliencies_of_a_resumed_run_are_those_of_its_file():
    model, longact, optimizer = salient_run()
    train(model, optimizer, range(2))
    other, again, theirs = salient_run()
    other.load_state_dict(model.state_dict())
    theirs.load_state_dict(through_a_file(optimizer.state_dict()))
    assert sets(again) == sets(longact)
    for name in longact.layers:
        assert torch.equal(again.saliency(name), longact.saliency(name))
    witness = Witness(other)
    witness.call(tokens(seed=5))
    train(other, theirs, [5])
    for name, values in witness.saliency("absmax").items():
        torch.testing.assert_close(again.saliency(name), values, rtol=1e-5, atol=1e-6)
