"""transformers' Trainer and TRL's SFTTrainer with LongAct, by the callback and by the mixin."""

import pytest
import tiny
import torch
from datasets import Dataset
from models import checkpointing_option, tiny_model, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from longact_kernels import LongAct, SalientAdamW, SalientLinear
from longact_kernels.integrations.trainer import LongActCallback, LongActTrainerMixin, check
from longact_kernels.sparse.config import LongActConfig

DATA = [{"input_ids": row, "labels": row} for row in tokens(64)]


class SparseTrainer(LongActTrainerMixin, Trainer):
    pass


class SparseSFTTrainer(LongActTrainerMixin, SFTTrainer):
    pass


class SparseGRPOTrainer(LongActTrainerMixin, GRPOTrainer):
    pass


class Log(TrainerCallback):
    """What a reporter sees: it comes before all other callbacks."""

    def __init__(self):
        self.records = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.records.append(dict(logs))


def arguments(folder, kind=TrainingArguments, **changes):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(output_dir=str(folder), **{**defaults, **changes})


def by_callback(model, longact, args, **options):
    return Trainer(model=model, args=args, train_dataset=DATA, callbacks=[LongActCallback(longact)], **options)


def by_mixin(model, longact, args, **options):
    return SparseTrainer(model=model, longact=longact, args=args, train_dataset=DATA, **options)


def sets(longact) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in longact.sets.items()}


def assert_same_weights(model, other) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def moved_rows(model):
    """Of the query and key weights, which rows are no longer those of a fresh model."""
    for (name, p), start in zip(model.named_parameters(), tiny_model().parameters(), strict=True):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            yield (p != start).any(1)


def groups(model, decay=0.1):
    """The Trainer's: no decay of norms and biases."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": decayed, "weight_decay": decay}, {"params": [p for p in model.parameters() if p.ndim < 2]}]


def plain_loop(folder, longact_options, batches=4, pieces=1):
    """What a Trainer should do, written out: masked, clipped, stepped."""
    model = tiny_model()
    longact = LongAct(model, **longact_options)
    optimizer = SalientAdamW(groups(model), lr=1e-3, weight_decay=0.0, fused=True)
    norms = []
    for step in range(4):
        batch = torch.stack([row["input_ids"] for row in DATA[4 * step : 4 * step + 4]])
        for piece in batch.chunk(pieces):
            (model(input_ids=piece, labels=piece).loss / pieces).backward()
        norms.append(longact.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return model, longact, norms


def in_order(trainer):
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(DATA)
    return trainer


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selection": "current", "statistic": "l2"},
        {"grad": "compact"},
        {"grad": "compact", "target_modules": "all-linear", "density": {"mlp": 0.1, "": 0.3}},
    ],
)
def test_the_mixin_trains_as_the_loop_written_out(tmp_path, options, pieces):
    expected, chosen, norms = plain_loop(tmp_path, options, pieces=pieces)
    model = tiny_model()
    longact = LongAct(model, **options)
    batch = {"per_device_train_batch_size": 4 // pieces, "gradient_accumulation_steps": pieces}
    constant = {"lr_scheduler_type": "constant", "max_grad_norm": 0.5}
    trainer = in_order(by_mixin(model, longact, arguments(tmp_path, **constant, **batch)))
    trainer.train()
    assert sets(longact) == sets(chosen) and longact.steps == 4
    assert [r["grad_norm"] for r in trainer.state.log_history if "loss" in r] == pytest.approx(norms, rel=1e-4)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_callback_with_our_optimizer_trains_as_the_mixin_where_nothing_is_clipped(tmp_path):
    options = {"max_grad_norm": 0.0}
    results = []
    for how in ("mixin", "optimizers", "class"):
        model = tiny_model()
        longact = LongAct(model)
        args = arguments(tmp_path, **options)
        optimizer = SalientAdamW(groups(model), lr=1e-3, weight_decay=0.0, fused=True)
        kwargs = {"lr": 1e-3, "fused": True}
        if how == "mixin":
            trainer = by_mixin(model, longact, args)
        elif how == "optimizers":
            trainer = by_callback(model, longact, args, optimizers=(optimizer, None))
        else:
            trainer = by_callback(model, longact, args, optimizer_cls_and_kwargs=(SalientAdamW, kwargs))
        trainer.train()
        assert longact.steps == 4
        assert all(rows.any() and not rows.all() for rows in moved_rows(model))
        results.append((model, sets(longact)))
    for model, chosen in results[1:]:
        assert_same_weights(model, results[0][0])
        assert chosen == results[0][1]


@pytest.mark.parametrize("how", [by_callback, by_mixin])
def test_a_stock_optimizer_is_attached_once(tmp_path, how):
    results = []
    for attached_by_hand in (False, True):
        model = tiny_model()
        longact = LongAct(model, selection="current")
        stock = torch.optim.AdamW(groups(model), lr=1e-3, weight_decay=0.0)
        if attached_by_hand:
            longact.attach(stock)
        trainer = how(model, longact, arguments(tmp_path, max_grad_norm=0.0), optimizers=(stock, None))
        trainer.train()
        trainer.train()  # a second run of the same trainer
        assert longact.steps == 8
        results.append(model)
    assert_same_weights(*results)
    # Stock AdamW decays rows outside the set; masked gradients leave their moments at zero.
    name = "model.layers.0.self_attn.q_proj"
    state = stock.state[model.get_submodule(name).weight]
    assert (~state["exp_avg_sq"].any(1)).any() and state["exp_avg_sq"].any()


@pytest.mark.parametrize(
    ("how", "optimizer", "options", "stop"),
    [
        (by_mixin, None, {"refresh_every": 2, "statistic": "l2"}, 1),
        (by_mixin, None, {"grad": "compact"}, 2),
        (by_callback, "ours", {"ema": 0.5}, 2),
        (by_callback, "stock", {"refresh_every": 2}, 1),
    ],
)
def test_resuming_from_a_checkpoint_goes_on_bit_for_bit(tmp_path, how, optimizer, options, stop):
    def fresh(**more):
        model = tiny_model().to(torch.bfloat16)
        longact = LongAct(model, **options)
        args = arguments(tmp_path, save_strategy="steps", save_steps=stop, max_grad_norm=0.0, **more)
        kind = {"ours": SalientAdamW, "stock": torch.optim.AdamW, None: None}[optimizer]
        given = {"optimizers": (kind(groups(model), lr=1e-3), None)} if kind else {}
        return model, longact, how(model, longact, args, **given)

    whole, chosen, trainer = fresh()
    trainer.train()
    model, longact, trainer = fresh()
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_same_weights(model, whole)
    assert sets(longact) == sets(chosen) and longact.steps == 4


@pytest.mark.parametrize("how", [by_callback, by_mixin])
def test_logs_have_the_mean_churn(tmp_path, how):
    model = tiny_model()
    longact = LongAct(model)
    trainer = how(model, longact, arguments(tmp_path))
    reporter, last = Log(), Log()
    trainer.callback_handler.callbacks.insert(0, reporter)
    trainer.add_callback(last)
    trainer.train()
    for records in [trainer.state.log_history, last.records] + [reporter.records] * (how is by_mixin):
        logged = [record.get("churn") for record in records if "loss" in record]
        assert logged[0] is None and all(0 < churn < 1 for churn in logged[1:])
    assert logged[-1] == pytest.approx(sum(longact.churn.values()) / len(longact.churn))


def test_the_callback_restores_at_the_end_if_asked(tmp_path):
    model = tiny_model()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=DATA,
        callbacks=[LongActCallback(LongAct(model), restore=True)],
    )
    trainer.train()
    assert not any(isinstance(module, SalientLinear) for module in model.modules())
    assert all(rows.any() for rows in moved_rows(model))
    trainer.save_model(tmp_path / "saved")


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}])
def test_mixed_precision_and_activation_checkpointing(tmp_path, precision):
    """With autocast and recomputed activations the sets are those of autocast alone."""
    results = []
    for checkpointing in (False, True):
        model = tiny_model()
        longact = LongAct(model)
        args = arguments(tmp_path, **checkpointing_option(checkpointing), **precision)
        trainer = by_mixin(model, longact, args)
        trainer.train()
        assert all(rows.any() and not rows.all() for rows in moved_rows(model))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
        results.append((sets(longact), model))
    assert results[0][0] == results[1][0]
    assert_same_weights(results[0][1], results[1][1])


def test_sft_with_packing(tmp_path):
    model = tiny.model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    longact = LongAct(model, statistic="l2")
    args = arguments(tmp_path, SFTConfig, packing=True, max_length=32, bf16=False, **checkpointing_option(False))
    data = Dataset.from_dict({"text": [f"the number {i} follows {i - 1}" for i in range(64)]})
    trainer = SparseSFTTrainer(
        model=model, longact=longact, args=args, train_dataset=data, processing_class=tiny.tokenizer()
    )
    trainer.train()
    assert longact.steps == 4
    for name in longact.layers:
        moved = (model.get_submodule(name).weight != before[f"{name}.weight"]).any(1)
        assert moved.any() and not moved.all()


def test_compact_gradients_alone_are_refused_where_the_model_will_be_wrapped(tmp_path, monkeypatch):
    model = tiny_model()
    for name, p in model.named_parameters():
        p.requires_grad_("layers" in name and p.ndim == 2)
    longact = LongAct(model, target_modules="all-linear", grad="compact")
    args = arguments(tmp_path)
    check(longact, args)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match=r"^grad: DistributedDataParallel, .* such as the norms"):
        check(longact, args)
    model.model.norm.weight.requires_grad_()
    check(longact, args)


@pytest.mark.parametrize("how", ["callback", "mixin"])
def test_grpo(tmp_path, how):
    model = tiny.model().train()
    longact = LongAct(model)
    args = arguments(
        tmp_path,
        GRPOConfig,
        max_steps=2,
        num_generations=4,
        max_completion_length=4,
        bf16=False,
        **checkpointing_option(False),
    )
    common = {
        "model": model,
        "args": args,
        "reward_funcs": lambda completions, **_: [float(len(text)) for text in completions],
        "train_dataset": Dataset.from_dict({"prompt": ["one", "three"] * 8}),
        "processing_class": tiny.tokenizer(chat=False),
    }
    if how == "mixin":
        trainer = SparseGRPOTrainer(longact=longact, **common)
    else:
        optimizer = SalientAdamW(model.parameters(), lr=1e-3)
        trainer = GRPOTrainer(callbacks=[LongActCallback(longact)], optimizers=(optimizer, None), **common)
    trainer.train()
    assert longact.steps == 2 and "churn" in [r for r in trainer.state.log_history if "loss" in r][-1]


@pytest.mark.parametrize(
    ("how", "longact_options", "training", "message"),
    [
        (by_mixin, {}, {"optim": "sgd"}, "^optim: got 'sgd'"),
        (by_mixin, {"grad": "compact"}, {"fp16": True}, "^grad: the Trainer unscales"),
        (by_callback, {"grad": "compact"}, {"fp16": True}, "^grad: the Trainer unscales"),
        (by_callback, {"grad": "compact"}, {}, "^grad: the Trainer's gradient clipping"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(tmp_path, how, longact_options, training, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        how(model, LongAct(model, **longact_options), arguments(tmp_path, **training)).train()
    assert not any(rows.any() for rows in moved_rows(model))


@pytest.mark.parametrize("how", ["callback", "mixin"])
def test_model_init_is_refused_since_it_makes_another_model(tmp_path, how):
    longact = LongAct(tiny_model())
    options = {"model_init": lambda: tiny_model(), "args": arguments(tmp_path), "train_dataset": DATA}
    if how == "mixin":
        trainer = SparseTrainer(longact=longact, **options)
    else:
        trainer = Trainer(callbacks=[LongActCallback(longact)], **options)
    with pytest.raises(ValueError, match=r"^longact: model\.layers\.0.* not in the model that is trained.*model_init"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("how", [by_callback, by_mixin])
def test_a_controller_that_would_do_nothing_is_refused(tmp_path, how):
    model, other = tiny_model(), tiny_model()
    longact, strange = LongAct(model), LongAct(other)
    with pytest.raises(ValueError, match=r"^longact: .* not in the model that is trained"):
        how(model, strange, arguments(tmp_path)).train()
    for kind in (torch.optim.AdamW, SalientAdamW):
        with pytest.raises(ValueError, match=f"^optimizer: {kind.__name__} holds none of the weights"):
            how(model, longact, arguments(tmp_path), optimizers=(kind(tiny_model().parameters()), None)).train()
    longact.restore()
    with pytest.raises(ValueError, match=r"^longact: it is on no layer any more"):
        how(model, longact, arguments(tmp_path)).train()
    assert not any(rows.any() for rows in moved_rows(model))


@pytest.mark.parametrize("options", [{}, {"longact": LongActConfig(density=0.5)}])
def test_the_mixin_makes_a_controller_if_none_is_given(tmp_path, options):
    model = tiny_model()
    trainer = SparseTrainer(model=model, args=arguments(tmp_path), train_dataset=DATA, **options)
    trainer.train()
    assert trainer.longact.steps == 4 and trainer.longact.density == (0.5 if options else 0.3)
    assert all(rows.any() and not rows.all() for rows in moved_rows(model))


@pytest.mark.parametrize("options", [{}, {"grad": "compact"}, {"selection": "current"}])
def test_a_batch_that_did_not_fit_into_memory_leaves_no_trace(tmp_path, options):
    """`auto_find_batch_size` goes on with a smaller batch; the one that failed had been through backward in part."""

    class Failing(SparseTrainer):
        failed = False

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.fails and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

    # Of two attempts the Trainer wraps one schedule twice.
    constant = {"lr_scheduler_type": "constant"}

    def trained(size, fails):
        model = tiny_model()
        args = arguments(tmp_path, per_device_train_batch_size=size, auto_find_batch_size=True, **constant)
        trainer = in_order(Failing(model=model, longact=LongAct(model, **options), args=args, train_dataset=DATA))
        trainer.fails = fails
        trainer.train()
        assert trainer.failed == fails
        return trainer

    smaller = trained(4, fails=True)
    expected = trained(smaller._train_batch_size, fails=False)
    assert smaller._train_batch_size < 4
    assert sets(smaller.longact) == sets(expected.longact) and smaller.longact.steps == expected.longact.steps == 4
    assert_same_weights(smaller.model, expected.model)
