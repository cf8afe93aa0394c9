"""What a run trains on, and in which order; its arguments."""

import json
import re

import pytest
import tiny
import torch
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler

from longact_kernels import SalientAdamW
from longact_kernels.commands.train.arguments import TrainArguments, parse
from longact_kernels.commands.train.prompts import in_stages, make_prompts, read_sources
from longact_kernels.integrations.prompts import encode_prompts
from longact_kernels.sparse.config import LongActConfig, fields

TOKENIZER = tiny.tokenizer()


def config(folder, **more):
    return GRPOConfig(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_steps": 6,
            "use_cpu": True,
            "bf16": False,
            **more,
        },
    )


def made(training, **arguments):
    return make_prompts(TrainArguments(**arguments), training, TOKENIZER, lambda: None)


def tokens(row) -> int:
    return len(encode_prompts(TOKENIZER, [row["prompt"]])[0])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_stages_have_their_lengths_in_the_order_of_the_steps(tmp_path):
    training = config(tmp_path)
    rows, held_out = made(training, lengths="400,600,800", train_prompts=30, eval_prompts=5)
    # As TRL takes them: two prompts a step.
    order = list(RepeatSampler(rows, 2, 2, shuffle=training.shuffle_dataset))
    lengths = [rows[order[i]]["length"] for i in range(0, len(order), 4)]
    assert lengths == [400, 400, 600, 600, 800, 800]
    for row in rows:
        assert row["length"] - 70 < tokens(row) <= row["length"]
    assert len(held_out) == 5 and all(730 < tokens(row) <= 800 for row in held_out)
    asked = [row["prompt"][0]["content"] for row in rows]
    assert len(set(asked)) == len(asked) == 12


def test_one_length_leaves_the_order_to_the_trainer(tmp_path):
    training = config(tmp_path)
    rows, held_out = made(training, length=400, train_prompts=7, eval_prompts=3)
    assert training.shuffle_dataset and len(rows) == 7 and len(held_out) == 3
    assert rows.column_names == ["prompt", "answers"]


@pytest.mark.parametrize(
    ("more", "batches"), [({}, 7), ({"gradient_accumulation_steps": 3}, 7), ({"num_iterations": 2}, 4)]
)
def test_a_run_has_as_many_rows_as_it_takes(tmp_path, more, batches):
    training = config(tmp_path, max_steps=7, **more)
    order = in_stages([5, 2], training)
    size = training.generation_batch_size // 2
    assert len(order) == batches * size
    first = batches // 2 * size
    assert all(i < 5 for i in order[:first]) and all(5 <= i < 7 for i in order[first:])
    # All of a stage's rows come before one comes again.
    assert len(set(order[:first])) == min(5, first)


@pytest.mark.parametrize(
    ("pools", "max_steps", "message"),
    [([4, 4], -1, "max_steps -1 makes 0"), ([4, 4, 4], 2, "got 3 stages"), ([4, 0], 5, "stage 2 has no prompts")],
)
def test_stages_that_cannot_be(tmp_path, pools, max_steps, message):
    with pytest.raises(ValueError, match=message):
        in_stages(pools, config(tmp_path, max_steps=max_steps))


def test_a_data_set_of_the_users_own(tmp_path):
    rows = [{"prompt": "x" * (10 + i), "answer": str(i), "kind": i} for i in range(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    train, held_out = made(config(tmp_path), dataset=path, eval_prompts=4)
    assert len(train) == 16 and len(held_out) == 4
    assert sorted(row["kind"] for row in [*train, *held_out]) == list(range(20))
    assert all(row["answers"] == [str(row["kind"])] for row in train)
    # More held-out prompts come before the others, fewer training prompts leave out the last.
    fewer, more = made(config(tmp_path), dataset=path, eval_prompts=6, train_prompts=5)
    assert more[:4] == held_out and list(fewer) == list(train)[:5]
    short, _ = made(config(tmp_path), dataset=path, eval_prompts=4, length=20)
    assert all(tokens(row) <= 20 for row in short) and len(short) == 11 - 4
    staged, _ = made(config(tmp_path), dataset=path, eval_prompts=4, lengths="19,40")
    assert [tokens(row) <= 19 for row in staged] == [row["length"] == 19 for row in staged]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (
            [{"question": "q", "answer": "a"}],
            {},
            "dataset: row 1 of .* has question, answer; needed prompt and answer",
        ),
        ([{"prompt": "p"}], {}, "row 1 of .* has prompt; needed prompt and answer"),
        ([], {}, ".*has no rows"),
        ([{"prompt": "p", "answer": "a"}] * 5, {"eval_prompts": 5}, "5 of the 5 rows"),
        ([{"prompt": "long", "answer": "a"}] * 5, {"eval_prompts": 1, "length": 3}, "0 of the 5 rows"),
    ],
)
def test_a_data_set_that_will_not_do(tmp_path, rows, arguments, message):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        made(config(tmp_path), dataset=path, **arguments)


def test_what_is_not_there_is_looked_for_on_the_hub(tmp_path, no_network):
    with pytest.raises(ValueError, match="dataset: found no file 'no-such/rows', and could not load a data set"):
        read_sources(TrainArguments(dataset="no-such/rows"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 5, "lengths": "5,6"}, "lengths: got 5,6 and length 5"),
        ({"lengths": "5,some"}, "lengths: got 5,some, needed numbers"),
        ({"lengths": "5,-1"}, "lengths: got 5,-1, needed numbers"),
        ({"length": -5}, "length: got -5, needed at least 1"),
        ({"eval_prompts": 0}, "eval_prompts: got 0, needed at least 1"),
        ({"dynamic_sampling_rounds": -1}, "dynamic_sampling_rounds: got -1, needed at least 0"),
        ({"overlong_share": 1.5}, "overlong_share: got 1.5, needed a share"),
        ({"dataset": "x", "task": "vt"}, "task: got 'vt' and dataset x"),
        ({"task": "poetry"}, "task: got 'poetry'"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainArguments(**arguments)


def test_lengths_may_be_a_list_in_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("lengths: [5, 6]\nuse_cpu: true\n")
    assert parse(["--config", str(tmp_path / "c.yaml")])[0].stages() == [5, 6]


def test_longacts_arguments_are_the_drivers():
    arguments, _ = parse(["--use_cpu", "True", "--ema", "0.5", "--freeze_after", "7", "--strategy", "bottom"])
    assert (arguments.ema, arguments.freeze_after, arguments.strategy) == (0.5, 7, "bottom")
    assert LongActConfig(**arguments.longact_options()) == LongActConfig(ema=0.5, freeze_after=7, strategy="bottom")
    defaults, _ = parse(["--use_cpu", "True"])
    assert LongActConfig(**defaults.longact_options()) == LongActConfig()


def test_the_help_has_every_option_of_longact(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields():
        assert field.name == "seed" or f"--{field.name} " in shown
        assert field.name == "seed" or field.metadata["help"] in shown


def test_layers_may_be_named_by_an_expression_or_by_a_list_in_a_file(tmp_path):
    arguments, _ = parse(["--use_cpu", "True", "--target_modules", r".*\.q_proj"])
    assert arguments.longact_options()["target_modules"] == r".*\.q_proj"
    (tmp_path / "c.yaml").write_text("target_modules: [q_proj, k_proj]\nuse_cpu: true\n")
    arguments, _ = parse(["--config", str(tmp_path / "c.yaml")])
    assert arguments.longact_options()["target_modules"] == ["q_proj", "k_proj"]


def test_the_optimizers_arguments_are_the_drivers():
    for words, options in (
        ([], ("full", torch.float32, False)),
        (["--state", "compact", "--moments", "bfloat16", "--stochastic_rounding"], ("compact", torch.bfloat16, True)),
    ):
        arguments, _ = parse(["--use_cpu", "True", *words])
        made = SalientAdamW([torch.nn.Parameter(torch.ones(1))], **arguments.optimizer_options())
        assert ("compact" if made.compact else "full", made.moments, made.stochastic_rounding) == options
        assert made.master_weights != made.stochastic_rounding


@pytest.mark.parametrize("option", ["ema", "density", "freeze_after", "threshold"])
def test_what_is_wrong_with_longacts_options_shows_at_once(option):
    with pytest.raises(ValueError, match=re.escape(f"{option}: got -1")):
        parse(["--use_cpu", "True", f"--{option}", "-1"])


def test_a_file_may_turn_fsdp_on(tmp_path):
    (tmp_path / "c.yaml").write_text("fsdp: true\nfsdp_config: {min_num_params: 1}\nuse_cpu: true\n")
    assert parse(["--config", str(tmp_path / "c.yaml")])[1].fsdp is True


def test_densities_may_be_a_mapping_on_the_line_or_in_a_file(tmp_path):
    mapping = {"q_proj|k_proj": 0.3, "": 0.05}
    arguments, _ = parse(["--use_cpu", "True", "--density", '{q_proj|k_proj: 0.3, "": 0.05}'])
    assert arguments.longact_options()["density"] == mapping
    assert parse(["--use_cpu", "True", "--density", "5e-2"])[0].density == 0.05
    (tmp_path / "c.yaml").write_text(
        "target_modules: all-linear\ndensity: {q_proj|k_proj: 0.3, '': 0.05}\nuse_cpu: true\n"
    )
    arguments, _ = parse(["--config", str(tmp_path / "c.yaml")])
    assert arguments.longact_options() | {"density": mapping, "target_modules": "all-linear"} == (
        arguments.longact_options()
    )
    for wrong in ("many", "{", "{q: 2}", "[0.3]"):
        with pytest.raises(ValueError, match=r"^density: got .*, needed a share above 0"):
            parse(["--use_cpu", "True", "--density", wrong])
