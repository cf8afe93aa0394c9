"""TRL's trainer with LongAct in it."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from longact_kernels import LongAct
from longact_kernels.integrations.trl import LongActGRPOTrainer


def share_of_letters(completions, **_):
    return [sum("a" <= c <= "z" for c in text) / 8 for text in completions]


class Log(TrainerCallback):
    def __init__(self):
        self.records = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.records.append(dict(logs))


def trainer(folder, prompts=("one", "three"), longact=True, options=None, **config):
    model = tiny.model()
    controller = LongAct(model, **(options or {})) if longact is True else None
    args = GRPOConfig(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 32,
            "num_generations": 16,
            "max_completion_length": 8,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
            **config,
        },
    )
    made = LongActGRPOTrainer(
        **({} if longact == "made by the trainer" else {"longact": controller}),
        optimizer_options={"state": "compact"},
        model=model,
        args=args,
        reward_funcs=share_of_letters,
        train_dataset=Dataset.from_dict({"prompt": list(prompts) * 200}),
        processing_class=tiny.tokenizer(chat=False),
    )
    made.remove_callback(PrinterCallback)
    return made


@pytest.mark.parametrize("longact", [True, False])
def test_the_loop_improves_the_reward(tmp_path, longact):
    log = Log()
    rl = trainer(tmp_path, longact=longact, max_steps=25)
    rl.add_callback(log)
    rl.train()
    rewards = [record["reward"] for record in log.records if "reward" in record]
    # Of 258 tokens 26 are letters: an untrained model is at 0.1.
    assert sum(rewards[:3]) / 3 < 0.2
    assert sum(rewards[-3:]) / 3 > 0.6
    assert ("churn" in log.records[3]) == longact


def test_rows_outside_the_salient_sets_stay_as_they_were(tmp_path):
    rl = trainer(tmp_path, max_steps=2, weight_decay=0.1)
    before = {name: layer.weight.detach().clone() for name, layer in rl.longact.layers.items()}
    touched = {name: set() for name in before}

    class Sets(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            for name, layer in rl.longact.layers.items():
                touched[name] |= set(layer.salient.index.tolist())

    rl.add_callback(Sets())
    rl.train()
    for name, layer in rl.longact.layers.items():
        moved = (layer.weight != before[name]).any(1).nonzero().flatten().tolist()
        assert set(moved) == touched[name]
        assert len(touched[name]) < layer.out_features


def test_the_gradient_norm_is_that_of_the_masked_gradients(tmp_path):
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for layer in rl.longact.layers.values():
                outside = torch.ones(layer.out_features, dtype=torch.bool)
                assert layer.salient.index is not None
                outside[layer.salient.index] = False
                assert not layer.weight.grad[outside].any() and layer.weight.grad.any()
            norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())

    log = Log()
    rl = trainer(tmp_path, max_steps=2, max_grad_norm=1e9)
    rl.add_callback(Norms())
    rl.add_callback(log)
    rl.train()
    assert [record["grad_norm"] for record in log.records if "reward" in record] == pytest.approx(norms, rel=1e-5)


def test_all_linear_layers_train_with_compact_gradients_as_with_whole_ones(tmp_path):
    """Of two micro-batches, clipped."""
    runs, norms = [], []
    for grad in ("compact", "full"):
        log = Log()
        options = {"target_modules": "all-linear", "density": {"mlp": 0.1, "": 0.3}, "grad": grad}
        steps = {"max_steps": 3, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
        rl = trainer(tmp_path, options=options, max_grad_norm=0.05, **steps)
        rl.add_callback(log)
        rl.train()
        runs.append(rl)
        norms.append([record["grad_norm"] for record in log.records if "reward" in record])
    compact, full = runs
    assert compact.longact.compact is not None and compact.longact.steps == 3
    assert min(norms[0]) > 0.05 and norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, index in full.longact.sets.items():
        assert torch.equal(compact.longact.sets[name], index), name
    before = dict(tiny.model().named_parameters())
    for (name, p), q in zip(compact.model.named_parameters(), full.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if name.removesuffix(".weight") in full.longact.layers:
            assert 0 < (p != before[name]).any(1).sum() < len(p), name


@pytest.mark.parametrize("longact", [True, "made by the trainer"])
def test_padding_and_generation_leave_the_statistics_alone(tmp_path, longact):
    rl = trainer(tmp_path, prompts=("a rather long prompt for its size", "b"), longact=longact, max_steps=1)
    seen = []
    loss = rl._get_per_token_logps_and_entropies

    def watched(model, input_ids, attention_mask, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.append((input_ids, attention_mask))
        return loss(model, input_ids, attention_mask, *args, **kwargs)

    rl._get_per_token_logps_and_entropies = watched
    rl.train()
    ((ids, mask),) = seen
    assert not mask.all()

    # By hand: the largest |q| over the unpadded tokens of a plain model with the weights of before the step.
    plain = tiny.model()
    name = "model.layers.0.self_attn.q_proj"
    found = []
    plain.get_submodule(name).register_forward_hook(lambda module, args, out: found.append(out))
    with torch.no_grad():
        plain(input_ids=ids, attention_mask=mask)
    expected = found[0].abs().masked_fill(mask.unsqueeze(-1) == 0, 0).amax((0, 1))
    torch.testing.assert_close(rl.longact.saliency(name), expected)


def test_without_arguments_it_has_those_of_trl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # On a machine without a GPU TRL's own defaults are refused.
    monkeypatch.setattr("trl.trainer.grpo_trainer.GRPOConfig", partial(GRPOConfig, use_cpu=True, bf16=False))
    common = {
        "reward_funcs": share_of_letters,
        "train_dataset": Dataset.from_dict({"prompt": ["one", "three"]}),
        "processing_class": tiny.tokenizer(chat=False),
    }
    ours = LongActGRPOTrainer(model=tiny.model(), **common)
    theirs = GRPOTrainer(model=tiny.model(), **common)
    assert ours.args.to_dict() == theirs.args.to_dict()
    # Whoever takes it gets LongAct.
    assert ours.longact.layers and ours.longact.model is ours.model


def sent_to_vllm(model):
    """What TRL tells a vLLM server of the weights that come, and the weights by name."""
    sent = []
    generation = object.__new__(VLLMGeneration)
    vars(generation).update(
        model=model,
        mode="server",
        accelerator=SimpleNamespace(is_main_process=True, device="cpu"),
        vllm_client=SimpleNamespace(
            update_named_params=lambda metadata, params: sent.extend((metadata, dict(params))),
            reset_prefix_cache=lambda: None,
        ),
        _weight_metadata=None,
        _dist=SimpleNamespace(
            is_fsdp=hasattr(model, "reshard"), fsdp_version=2, gather_params=lambda params: nullcontext()
        ),
    )
    generation.sync_weights()
    return sent


@pytest.mark.parametrize("sharded", [False, True])
def test_vllm_gets_the_names_and_weights_of_the_plain_model(tmp_path, sharded):
    told, weights = sent_to_vllm(tiny.model())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = tiny.model()
        longact = LongAct(model)
        model(input_ids=torch.arange(2, 12)[None], labels=torch.arange(2, 12)[None]).loss.backward()
        longact.advance()
        model.zero_grad()
        if sharded:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        ours, sent = sent_to_vllm(model)
        assert longact.sets and ours == told
        assert all(torch.equal(weights[name], weight) for name, weight in sent.items())
    finally:
        torch.distributed.destroy_process_group()
