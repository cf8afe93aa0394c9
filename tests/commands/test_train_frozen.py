"""`longact train --frozen`: what it finds stays as it is, and takes no part in training."""

import json
import sys
import types

import pytest
import tiny
import torch
from safetensors.torch import load_file

from longact_kernels.commands.train import command
from longact_kernels.commands.train.arguments import parse

pytestmark = pytest.mark.usefixtures("no_network")

COMPACT = {"target_modules": "all-linear", "grad": "compact", "state": "compact"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    """1 where the first byte of a completion is even, so that there is something to learn."""

    def of(completions, **_):
        return [
            float(len(text) and ord(text[0]) % 2 == 0) for ((message),) in completions for text in [message["content"]]
        ]

    monkeypatch.setitem(sys.modules, "reward_of_this_test", types.SimpleNamespace(reward=of))


def words(folder, output, *more, **options):
    options = tiny.SHORT_RUN | {"model": folder, "output_dir": output, "reward": "reward_of_this_test:reward"} | options
    options |= {"lr_scheduler_type": "constant"}
    return [str(word) for key, value in options.items() for word in (f"--{key}", value)] + list(more)


def test_it_takes_no_part_in_training_nor_in_a_resumed_one(folder, tmp_path):
    # The embeddings are tied to the head: either name does.
    options = COMPACT | {"frozen": "lm_head|norm"}
    assert command.main(words(folder, tmp_path / "whole", **options, max_steps=2)) == 0
    assert command.main(words(folder, tmp_path / "parts", **options, max_steps=1)) == 0
    assert command.main(words(folder, tmp_path / "parts", "--resume", **options, max_steps=2)) == 0

    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for name, weight in after.items():
        assert torch.equal(weight, before[name].to(weight.dtype)) == ("embed" in name or "norm" in name), name
    assert "model.embed_tokens.weight" in after
    resumed = load_file(tmp_path / "parts" / "model" / "model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in after.items())

    state = torch.load(tmp_path / "whole" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"]) == 2 * 7
    for written in ("run.json", "summary.json"):
        held = json.loads((tmp_path / "whole" / written).read_text())
        assert held.get("arguments", held)["frozen"] == "lm_head|norm"
    assert "lm_head|norm" in (tmp_path / "whole" / "report.html").read_text()


def test_dense_training_leaves_it_too_and_a_resumed_run_cannot_change_it(folder, tmp_path, refused):
    run = words(folder, tmp_path, "--no-longact", max_steps=1)
    assert command.main([*run, "--frozen", "q_proj"]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "model"))
    same = {name for name, weight in after.items() if torch.equal(weight, before[name].to(weight.dtype))}
    queries = {name for name in after if "q_proj" in name}
    assert queries <= same and len(queries) == 2 and "model.embed_tokens.weight" not in same
    for other in ([], ["--frozen", "k_proj"]):
        assert "another run, with frozen 'q_proj' instead of" in refused("train", *run, *other, "--resume")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "no_such_layer",
            "found in no name of a parameter; needed a part of one, such as of model.embed_tokens.weight",
        ),
        ("", "leaves nothing to train"),
        ("layers|norm|lm_head", "leaves nothing to train"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--no-longact"]])
def test_what_freezes_nothing_or_all_is_refused(folder, tmp_path, refused, pattern, message, more):
    said = refused("train", *words(folder, tmp_path / "run", *more, max_steps=1, frozen=pattern))
    assert f"frozen: got {pattern!r}, which" in said and message in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", ["[", "(a"])
def test_what_is_no_regular_expression_is_refused_before_a_model_is_looked_for(refused, pattern):
    said = refused("train", "--model", "no/such", "--use_cpu", "true", "--frozen", pattern)
    assert f"frozen: got {pattern!r}, needed a regular expression: " in said


@pytest.mark.parametrize("value", ["true", "3", "[a]"])
def test_a_file_has_it_as_a_text(tmp_path, value):
    (tmp_path / "run.yaml").write_text(f"frozen: {value}")
    with pytest.raises(ValueError, match=r"frozen: got .*, needed a text"):
        parse(["--config", str(tmp_path / "run.yaml"), "--use_cpu", "true"])
