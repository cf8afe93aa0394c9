"""The plug-in of verl: with a stand-in for verl's engine, and with verl's own on CPUs where verl 0.9 is installed."""

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import verl_standin
from torch.nn import functional as F

from longact_kernels import LongAct, LongActConfig, SalientAdamW

EPS = 1e-3  # gradients of nearly nothing do not make steps of a whole learning rate
PLUGIN = "longact_kernels.integrations.verl"
SALIENT = {"optimizer": "SalientAdamW", "optimizer_impl": "longact_kernels"}


def made_model():
    """Of the tests' other ones, but with query and key gradients that show in the norm of all."""
    model = tiny.model()
    for name, p in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            p.data *= 30
    return model


def sequences(step, lengths=(5, 9, 7, 12)):
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(2, 250, (length,), generator=generator) for length in lengths]


def one_process(options, steps, optimizer=SalientAdamW, offset=0):
    """Each sequence by itself, without padding: what a packed and padded batch on several ranks must equal."""
    model = made_model()
    longact = LongAct(model, **options)
    made = optimizer(model.parameters(), lr=1e-2, eps=EPS)
    if optimizer is not SalientAdamW:
        longact.attach(made)
    norms = []
    for step in range(steps):
        batch = sequences(step)
        tokens = sum(map(len, batch)) - len(batch)
        for ids in batch:
            logits = model(input_ids=ids[None]).logits[0, :-1]
            (F.cross_entropy(logits, ids[1:], reduction="sum") / tokens).backward()
        norms.append(longact.clip_grad_norm_(model.parameters(), 1.0).item())
        made.step()
        made.zero_grad()
    return model, longact, norms


def assert_trained_alike(weights, sets, expected, longact):
    for name, index in longact.sets.items():
        assert torch.equal(index, sets[name]), name
    for name, p in expected.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# With a stand-in


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in, as the stand-in for verl imports it."""
    monkeypatch.setattr(verl_standin.EngineRegistry, "engines", {})
    for name, module in verl_standin.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    yield importlib.import_module(PLUGIN)
    sys.modules.pop(PLUGIN, None)


def test_verl_finds_the_plugin(plugin):
    entry = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert entry["verl.plugins"] == {"longact": PLUGIN}
    assert verl_standin.EngineRegistry.engines["language_model", "fsdp2", "cuda", "nvidia"] is plugin.LongActEngine


def standin_loss(logits, ids, lengths=(5, 9, 7, 12)):
    ends = torch.tensor(lengths).cumsum(0) - 1
    shifted = ids.roll(-1).index_fill(0, ends, -100)
    return F.cross_entropy(logits, shifted)


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [({}, SALIENT), ({"statistic": "l2", "selection": "current"}, SALIENT), ({"statistic": "l2"}, {})],
    ids=["salient", "the paper's options", "stock"],
)
def test_a_packed_and_padded_batch_trains_as_its_sequences_do(plugin, options, optimizer):
    config = verl_standin.FSDPOptimizerConfig(**optimizer, override_optimizer_config={"longact": options, "eps": EPS})
    engine = plugin.LongActEngine(made_model(), verl_standin.engine_config(), config, None)
    engine.initialize()
    metrics = [engine.train_batch(sequences(step), standin_loss)["metrics"] for step in range(4)]
    model, longact, norms = one_process(options, 4, SalientAdamW if optimizer else torch.optim.AdamW)
    assert [one["grad_norm"] for one in metrics] == pytest.approx(norms, rel=2e-4)
    assert metrics[-1]["longact/churn"] == pytest.approx([sum(longact.churn.values()) / len(longact.churn)])
    assert_trained_alike(dict(engine.module.named_parameters()), engine.longact.sets, model, longact)


def test_it_is_verls_engine_where_nobody_asks(plugin):
    config = verl_standin.FSDPOptimizerConfig(override_optimizer_config={"eps": 1e-6})
    trained = []
    for cls in (plugin.LongActEngine, verl_standin.FSDPEngineWithLMHead):
        engine = cls(tiny.model(), verl_standin.engine_config(), config, None)
        engine.initialize()
        assert type(engine.optimizer) is torch.optim.AdamW
        trained.append((engine.train_batch(sequences(0), standin_loss), dict(engine.module.named_parameters())))
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(p, trained[1][1][name]) for name, p in trained[0][1].items())
    # A reference policy has no optimizer.
    plugin.LongActEngine(tiny.model(), verl_standin.engine_config(forward_only=True), None, None)


@pytest.mark.parametrize(
    ("optimizer", "engine", "message"),
    [
        ({"override_optimizer_config": {"longact": {}}}, {"strategy": "fsdp"}, "^strategy: got 'fsdp'.*needed 'fsdp2'"),
        ({"override_optimizer_config": {"longact": {}}}, {"offload_policy": True}, "^offload_policy: got True"),
        ({"override_optimizer_config": {"longact": {"density": 2}}}, {}, "^density: got 2"),
        ({"override_optimizer_config": {"longact": {"densty": 0.3}}}, {}, "did you mean 'density'"),
        ({"override_optimizer_config": {"longact": True}}, {}, r"^override_optimizer_config.longact: got True"),
        (SALIENT, {}, "^override_optimizer_config: has no longact, without which SalientAdamW trains densely"),
        (SALIENT | {"override_optimizer_config": {"state": "full"}}, {"strategy": "fsdp"}, "has no longact"),
    ],
)
def test_what_does_not_go_with_longact_is_said_before_a_model_is_loaded(plugin, optimizer, engine, message):
    config = verl_standin.FSDPOptimizerConfig(**optimizer)
    with pytest.raises((ValueError, TypeError), match=message):
        plugin.LongActEngine(None, verl_standin.engine_config(**engine), config, None)


def test_an_engine_without_the_plugin_stops_at_the_optimizer():
    for options, message in (({}, "^SalientAdamW: there is no LongAct"), ({"longact": {}}, "^longact: got a dict")):
        config = verl_standin.FSDPOptimizerConfig(**SALIENT, override_optimizer_config=options)
        engine = verl_standin.FSDPEngineWithLMHead(tiny.model(), verl_standin.engine_config(), config, None)
        with pytest.raises((RuntimeError, TypeError), match=message):
            engine.initialize()
            engine.train_batch(sequences(0), standin_loss)


# With verl's own engine


def _data(step, rank, world):
    from verl.utils import tensordict_utils
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    own = sequences(step)[rank::world]
    columns = {
        "input_ids": own,
        "position_ids": [torch.arange(len(ids)) for ids in own],
        "loss_mask": [(torch.arange(len(ids)) > 0).float() for ids in own],
    }
    nested = {name: torch.nested.as_nested_tensor(parts, layout=torch.jagged) for name, parts in columns.items()}
    settings = dict(
        use_remove_padding=True, use_dynamic_bsz=False, micro_batch_size_per_gpu=1 + step % 2, temperature=1.0,
        global_batch_size=4, pad_mode=DatasetPadMode.NO_PADDING, pad_token_id=0,
    )  # fmt: skip
    return tensordict_utils.get_tensordict(nested, settings)


def _engine(folder, optimizer, cls=None, **engine):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    options = dict(strategy="fsdp2", mixed_precision={"param_dtype": "fp32"}, use_torch_compile=False)
    options |= dict(param_offload=True, optimizer_offload=True, pad_to_length=True, pad_to_length_bucket=8)
    configs = {
        "model_config": HFModelConfig(path=str(folder / "model"), override_config={"attn_implementation": "eager"}),
        "engine_config": FSDPEngineConfig(**options | engine),
        "optimizer_config": FSDPOptimizerConfig(lr=1e-2, total_training_steps=100, **optimizer),
        "checkpoint_config": CheckpointConfig(),
    }
    made = cls(**configs) if cls else EngineRegistry.new("language_model", options["strategy"], **configs)
    made.initialize()
    return made


def _train(engine, steps, rank, world=2):
    from verl.workers.utils.losses import sft_loss

    metrics = []
    for step in steps:
        with engine.train_mode():
            metrics.append(engine.train_batch(_data(step, rank, world), partial(sft_loss, None))["metrics"])
    weights = {name: p.full_tensor() for name, p in engine.module.state_dict().items()}
    return weights, (engine.longact.sets if getattr(engine, "longact", None) else None), metrics


def _load_elsewhere(optimizer, device):
    """Offloading on CPUs moves nothing: here state comes back to other addresses, as from a GPU's point of view."""
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items()})


def _example_config():
    """What verl's workers get of the options of the script for 8 GPUs."""
    import verl
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    script = Path(__file__).parents[2] / "examples" / "verl" / "qwen3_8b_dapo.sh"
    shell = f"python() {{ shift 2; printf '%s\\n' \"$@\"; }}; source {script}"
    words = subprocess.run(["bash", "-c", shell], check=True, capture_output=True, text=True).stdout.splitlines()
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=words)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    plugin = sys.modules[PLUGIN]
    longact = plugin.longact_config(actor.optim)
    plugin.check(actor.engine)
    return longact


CASES = {
    "salient": ({}, SALIENT),
    "paper": ({"statistic": "l2", "selection": "current"}, SALIENT),
    "stock": ({"statistic": "l2"}, {}),
}


def _rank(rank, folder):
    """All that is asked of verl's engine, in one process group: importing verl takes long."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    import verl.workers.engine.fsdp.transformer_impl as theirs

    from longact_kernels.integrations.verl import LongActEngine

    theirs.load_fsdp_optimizer = _load_elsewhere
    results = {}
    for name, (longact, optimizer) in CASES.items():
        engine = _engine(folder, optimizer | {"override_optimizer_config": {"longact": longact, "eps": EPS}})
        assert type(engine) is LongActEngine
        results[name] = _train(engine, range(4), rank)
    results["sent"] = [name for name, _ in engine.get_per_tensor_param()[0]]

    override = {"override_optimizer_config": {"longact": {"refresh_every": 3}}}
    engine = _engine(folder, SALIENT | override)
    _train(engine, range(2), rank)
    engine.save_checkpoint(str(folder / "checkpoint"))
    on = _train(engine, range(2, 6), rank)
    engine = _engine(folder, SALIENT | override)
    engine.load_checkpoint(str(folder / "checkpoint"))
    results["on"], results["resumed"] = on, _train(engine, range(2, 6), rank)

    plain = {"override_optimizer_config": {"eps": 1e-6}}
    results["not asked"] = _train(_engine(folder, plain), range(2), rank)
    results["verl"] = _train(_engine(folder, plain, theirs.FSDPEngineWithLMHead), range(2), rank)

    results["example"] = _example_config()

    # Sequence parallelism: each rank has half of 33 tokens and one of padding. (Attention on CPUs knows nothing of it.)
    engine = _engine(
        folder,
        SALIENT | {"override_optimizer_config": {"longact": {}}},
        ulysses_sequence_parallel_size=2,
        pad_to_length=False,
    )
    masks = []
    engine.module.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda *_: masks.append(engine.longact.call.tokens.mask)
    )
    with engine.train_mode():
        engine.module(**engine.prepare_model_inputs(_data(0, 0, 1))[0])
    results["mask"] = masks[0].tolist()
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl 0.9")
def test_verls_own_engine_on_two_processes_trains_as_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", f"verl_cpus,{PLUGIN}")
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    made_model().save_pretrained(tiny.save(tmp_path / "model"))
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name, (options, optimizer) in CASES.items():
        model, longact, norms = one_process(options, 4, SalientAdamW if optimizer else torch.optim.AdamW)
        weights, sets, metrics = first[name]
        assert [one["grad_norm"] for one in metrics] == pytest.approx(norms, rel=1e-3), name
        assert_trained_alike(weights, sets, model, longact)
    # vLLM gets the names of the checkpoint.
    assert set(first["sent"]) == set(tiny.model().state_dict())
    for one, other in (("on", "resumed"), ("not asked", "verl")):
        for name, weight in first[one][0].items():
            assert torch.equal(weight, first[other][0][name]), (one, name)
    paper = LongActConfig(density=0.3, statistic="l2", scope="head", selection="current")
    assert first["example"] == paper
    assert [first["mask"], second["mask"]] == [[[True] * 17], [[True] * 16 + [False]]]
