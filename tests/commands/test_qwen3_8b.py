"""The configs for eight GPUs, as far as a CPU goes: parsing, the model's projections, one step of a shrunken twin."""

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from models import QWEN3_8B
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from longact_kernels import LongAct
from longact_kernels.cli import main
from longact_kernels.commands.train.arguments import parse

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "qwen3-8b").glob("*.yaml"))
REAL = Qwen3Config(**QWEN3_8B)


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request):
    return request.param


def test_parses_into_the_papers_setting(config):
    arguments, training = parse(["--config", str(config)])
    assert (training.num_generations, training.temperature, training.learning_rate) == (16, 1.0, 1e-6)
    assert arguments.length + training.max_completion_length == training.vllm_max_model_length == 32768
    assert (training.loss_type, training.epsilon_high, training.beta) == ("dapo", 0.28, 0.0)
    assert training.use_vllm and training.fsdp_plugin_args["fsdp_version"] == 2
    assert arguments.density == 0.3 and arguments.scope == "head"


def test_takes_the_projections_of_the_whole_model(config):
    arguments, _ = parse(["--config", str(config)])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(REAL, dtype=torch.bfloat16).train()
    longact = LongAct(model, **arguments.longact_options())
    assert len(longact.layers) == 72
    for name, layer in longact.layers.items():
        # 0.3 of 128 channels in each of 32 or 8 heads.
        assert layer.salient.size == 38 * (32 if "q_proj" in name else 8)


def test_a_shrunken_twin_takes_a_step(config, tmp_path, capsys):
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    vocabulary = dict(vocab_size=len(tiny.tokenizer()), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = Qwen3ForCausalLM(Qwen3Config(**small, **vocabulary, num_key_value_heads=2, max_position_embeddings=2048))
    model.save_pretrained(tmp_path / "twin")
    tiny.tokenizer().save_pretrained(tmp_path / "twin")
    # What needs eight GPUs, a network or hours is left out; all else is the file's.
    cut = {"model", "length", "max_completion_length", "num_generations", "gradient_accumulation_steps", "max_steps"}
    cut |= {"fsdp", "fsdp_config", "eval_prompts", "save_steps"}
    kept = {key: value for key, value in yaml.safe_load(config.read_text()).items() if key not in cut}
    kept = {key: value for key, value in kept.items() if "vllm" not in key}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(kept))
    options = ["--model", tmp_path / "twin", "--length", 700, "--max_completion_length", 4, "--num_generations", 2]
    options += ["--gradient_accumulation_steps", 2, "--max_steps", 1, "--eval_prompts", 2, "--train_prompts", 4]
    options += ["--output_dir", tmp_path / "run", "--use_cpu", "true"]
    assert main(["train", "--config", str(tmp_path / "config.yaml"), *map(str, options)]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").is_file()
