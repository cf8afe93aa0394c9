"""Help, misspelt options and completion, in every subcommand."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import tiny
from trl import GRPOConfig

from longact_kernels.cli import main
from longact_kernels.commands.console import requirements
from longact_kernels.commands.parsers import COMMANDS
from longact_kernels.commands.train.arguments import TrainArguments

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("place") / "model")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("eval", ["model", "--limt", "3"], "there is no option '--limt'; did you mean '--limit'?"),
        ("eval", ["--batch-size=3", "model"], "there is no option '--batch-size'; did you mean '--batch_size'?"),
        ("eval", ["model", "--lengths", "1024", "4096"], "got '4096', which belongs to no option; put commas"),
        ("eval", ["model", "--limit", "0"], "--limit: got '0', needed a whole number of at least 1"),
        ("inspect", ["--lenghts", "256"], "there is no option '--lenghts'; did you mean '--lengths'?"),
        ("perturb", ["model", "--prompt", "3"], "there is no option '--prompt'; did you mean '--prompts'?"),
        ("perturb", ["model", "--mean", "globl"], "got 'globl', needed one of global, channel; did you mean 'global'?"),
        ("study", ["--job", "3", "a.yaml"], "there is no option '--job'; did you mean '--jobs'?"),
        ("kernels", ["--taget", "sm_90"], "there is no option '--taget'; did you mean '--target'?"),
        ("tune", ["--fast"], "there is no option '--fast'; see longact tune --help"),
        ("completion", ["bahs"], "shell: got 'bahs', needed one of bash, zsh, tcsh; did you mean 'bash'?"),
        ("train", ["--max-stpes", "3"], "there is no option '--max-stpes'; did you mean '--max_steps'?"),
    ],
)
def test_misspelt_options(refused, command, words, message):
    assert message in refused(command, *words)


@pytest.mark.parametrize(
    ("command", "words", "option"),
    [
        ("train", ["--output_dir", "LONG"], "output_dir: "),
        ("train", ["--task", "niah_single_1", "--output_dir=runs/LONG"], "output_dir: "),
        ("train", ["--resume", "--output_dir", "LONG"], "output_dir: "),
        ("train", ["--model", "LONG"], "model: "),
        ("train", ["--dataset", "LONG.jsonl"], "dataset: "),
        ("inspect", ["LONG"], ""),
        ("eval", ["model", "--output", "LONG"], "output: "),
        ("perturb", ["LONG"], ""),
        ("compare", ["LONG"], ""),
    ],
)
def test_a_path_that_no_file_can_have(refused, tmp_path, monkeypatch, model, command, words, option):
    monkeypatch.chdir(model.parent)
    long = "x" * 300
    message = refused(command, *(word.replace("LONG", long) for word in words))
    assert message.startswith(f"longact {command}: error: {option}got '"), message
    assert "needed shorter names" in message


def test_a_reader_that_goes_is_quiet():
    command = f"{sys.executable} -m longact_kernels.cli completion bash | head -1"
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stderr == ""


def test_a_misspelt_command(capsys):
    assert main(["trian"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("longact: error: COMMAND: got 'trian'") and line.endswith("did you mean 'train'?")


def shown_by(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def names(text: str) -> list[str]:
    """The options that the lines of a help begin with."""
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    return [line.removeprefix("--").removeprefix("no-") for line in lines]


def test_help_of_train_has_our_options_and_help_all_those_of_trl(capsys):
    ours = {field.name for field in dataclasses.fields(TrainArguments)}
    theirs = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    short, full = (names(shown_by(capsys, "train", word)) for word in ("--help", "--help-all"))
    assert ours <= {*short} and {*short} - ours <= theirs and len(short) < 60
    assert {*full} == ours | theirs
    for listed in (short, full):
        assert len(listed) == len({*listed})


def test_help_is_what_longact_alone_shows(capsys):
    assert shown_by(capsys) == shown_by(capsys, "--help")


def test_completion(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "longact.sh").write_text(capsys.readouterr().out)
    for line, word, wanted in [
        ("longact", "stu", ["study"]),
        ("longact train", "--densi", ["--density"]),
        ("longact train --statistic", "", ["absmax", "l2"]),
        ("longact perturb --mean", "g", ["global"]),
    ]:
        before = line.rpartition(" ")[2]
        code = f"source longact.sh; COMP_WORDS=({line} '{word}'); COMP_CWORD={len(line.split())}; "
        code += f"_shtab_longact longact '{word}' {before}; echo ${{COMPREPLY[@]}}"
        done = subprocess.run([shutil.which("bash"), "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.split() == wanted, done.stderr
    for shell in ("zsh", "tcsh"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(name in script for name in COMMANDS)


def test_what_is_missing_is_named_by_its_packages():
    needed = requirements("eval")
    assert any(one.startswith("lm_eval") for one in needed) and any(one.startswith("trl") for one in needed)
    assert not any("longact" in one for one in needed)


@pytest.mark.parametrize(("rows", "words", "held_out"), [(40, [], 8), (3, [], 1), (12, ["--eval_prompts", "10"], 10)])
def test_a_small_data_set_trains(model, tmp_path, rows, words, held_out):
    lines = (json.dumps({"prompt": f"{i} plus 1 is", "answer": str(i + 1)}) for i in range(rows))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = f"""--model {model} --dataset {tmp_path / "data.jsonl"} --max_steps 1
        --per_device_train_batch_size 4 --num_generations 4 --max_completion_length 4 --use_cpu true
        --output_dir {tmp_path / "run"}"""
    assert main(["train", *options.split(), *words]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"]["prompts"] == held_out


def test_a_data_set_of_which_nothing_is_left(model, tmp_path, refused):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "1 plus 1 is", "answer": "2"}))
    words = ["--model", model, "--dataset", tmp_path / "data.jsonl", "--use_cpu", "true"]
    message = refused("train", *words, "--output_dir", tmp_path / "run")
    assert "1 of the 1 rows of" in message and "1 would be held out" in message and "inf" not in message


def test_the_option_of_a_prompt_that_is_too_short(model, tmp_path, refused):
    words = [model, "--task_length", "20", "--length", "16", "--output", tmp_path / "out"]
    message = refused("perturb", *words)
    assert "task_length: got 20, but the shortest prompt of this task takes" in message
    assert message.endswith("raise task_length")
    words = ["--model", model, "--use_cpu", "true", "--output_dir", tmp_path / "run"]
    assert "raise lengths or lower needles" in refused("train", *words, "--lengths", "20,40", "--needles", "1")


def test_names_of_reports_with_commas_or_spaces(tmp_path):
    (tmp_path / "a.yaml").write_text("report_to: [wandb, tensorboard]")
    given = (["--report_to", "wandb,tensorboard"], ["--config", str(tmp_path / "a.yaml")])
    from longact_kernels.commands.train.arguments import parse

    assert [parse([*words, "--use_cpu", "true"])[1].report_to for words in given] == [["wandb", "tensorboard"]] * 2
