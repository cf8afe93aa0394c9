"""A run's folder that is damaged, full or in use; options that a resumed run may change, and those it may not."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from longact_kernels import LongActWarning
from longact_kernels.cli import main
from longact_kernels.commands.files import METRICS, read_lines, write_json
from longact_kernels.commands.train.arguments import parse
from longact_kernels.commands.train.callbacks import MetricsFile
from longact_kernels.commands.train.checkpoints import MANIFEST, flaw, seal, step_of
from longact_kernels.commands.train.folder import FILES, RunFolder, read_evaluation
from longact_kernels.commands.train.resuming import (
    MAY_CHANGE,
    SHARE,
    as_begun,
    as_of,
    completions_of,
    share_out,
)
from longact_kernels.commands.train.run import Run
from longact_kernels.tasks.rows import read_rows

pytestmark = pytest.mark.usefixtures("no_network")

STEPS = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, and a finished run of two steps, each with its checkpoint."""
    root = tmp_path_factory.mktemp("place")
    tiny.save(root / "model")
    assert main(["train", *words(root, root / "run")]) == 0
    return root


def words(root: Path, output: Path, *more) -> list[str]:
    options = {"model": root / "model", "output_dir": output, "max_steps": STEPS, "lr_scheduler_type": "constant"}
    options |= tiny.SHORT_RUN
    given = [str(word) for word in more]
    return [f"--{key}={value}" for key, value in options.items() if f"--{key}" not in given] + given


@pytest.fixture
def run(place, tmp_path):
    """A copy of the run, to be damaged."""
    shutil.copytree(place / "run", tmp_path / "run")
    return tmp_path / "run"


def opened(place: Path, run: Path, *more) -> RunFolder:
    """The folder as a command that resumes takes it; it is given back at once."""
    folder = RunFolder(*parse(words(place, run, "--resume", *more)))
    folder.close()
    return folder


def begun_with(run: Path, **options) -> None:
    """Makes a run one that was begun with other options, which its checkpoints have a copy of."""
    for folder in (run, *run.glob("checkpoint-*")):
        write_json(folder / "run.json", json.loads((run / "run.json").read_text()) | options)
        if folder != run:
            seal(folder)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [empty, halve, flip, Path.unlink])
@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth", MANIFEST])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(place, run, name, damage):
    damage(run / "checkpoint-2" / name)
    # A manifest that can be read blames another file.
    named = "is damaged" if (name, damage) == (MANIFEST, flip) else name
    with pytest.warns(LongActWarning, match=f"checkpoint-2 .*{named}.*; going on from checkpoint-1"):
        assert opened(place, run).checkpoint == run / "checkpoint-1"


def test_a_whole_checkpoint_has_no_flaw_and_other_folders_are_none(place, run, recwarn):
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-4.bak")
    (run / "checkpoint-x").mkdir()
    assert opened(place, run).checkpoint == run / "checkpoint-2"
    assert not [warning for warning in recwarn if issubclass(warning.category, LongActWarning)]
    # Each file counts.
    held = json.loads((run / "checkpoint-2" / MANIFEST).read_text())
    assert held.keys() == {path.name for path in (run / "checkpoint-2").iterdir()} - {MANIFEST}


def test_no_whole_checkpoint_is_an_error_but_one_that_was_never_saved_is_not(place, run, refused):
    for number in (1, 2):
        flip(run / f"checkpoint-{number}" / "optimizer.pt")
    message = refused("train", *words(place, run, "--resume"))
    assert "there is no checkpoint to go on from" in message and "checkpoint-2 is damaged: optimizer.pt" in message
    for number in (1, 2):
        (run / f"checkpoint-{number}" / MANIFEST).unlink()
    with pytest.warns(LongActWarning, match="its saving was interrupted; there is none before it"):
        assert opened(place, run).checkpoint is None


@pytest.mark.parametrize(
    ("gone", "what"),
    [
        ("optimizer.pt", "optimizer state"),
        ("scheduler.pt", "learning rate schedule"),
        ("rng_state.pth", "random state"),
        ("model.safetensors", "weights"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_refused(place, run, refused, gone, what):
    shutil.rmtree(run / "checkpoint-1")
    held = json.loads((run / "checkpoint-2" / MANIFEST).read_text())
    del held[gone]
    (run / "checkpoint-2" / gone).unlink()
    (run / "checkpoint-2" / MANIFEST).write_text(json.dumps(held))
    assert f"checkpoint-2 has no {what}" in refused("train", *words(place, run, "--resume"))


@pytest.mark.parametrize("damage", [empty, halve])
def test_a_damaged_run_json_is_named(place, run, refused, damage):
    damage(run / "run.json")
    assert "run.json is damaged" in refused("train", *words(place, run, "--resume"))


def test_a_bad_byte_in_the_metrics_costs_its_line(run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0].replace(b"loss", b"lo\xffs") + lines[1] + b'{"step": 3, "lo')
    with pytest.warns(LongActWarning, match="line 1 is damaged") as warned:
        assert [record["step"] for record in read_lines(run / "metrics.jsonl", METRICS)] == [2]
    assert len(warned) == 1  # a line without an end is what an interruption leaves


@pytest.mark.parametrize("damage", [empty, halve, Path.unlink])
def test_a_lost_accuracy_is_measured_again_from_the_weights_before(place, run, damage):
    held = json.loads((run / "accuracy_before.json").read_text())
    damage(run / "accuracy_before.json")
    (run / "metrics.jsonl").write_bytes(b"\xff\n" + (run / "metrics.jsonl").read_bytes())
    with pytest.warns(LongActWarning) if damage is not Path.unlink else pytest.warns(LongActWarning, match="line 1"):
        assert main(["train", *words(place, run, "--resume")]) == 0
    assert json.loads((run / "accuracy_before.json").read_text()) == held
    assert [record["step"] for record in read_lines(run / "metrics.jsonl", METRICS)] == [1, 2]


@pytest.mark.parametrize(
    "content",
    [
        *({"rewards": rewards, "completions": ["a", "b"]} for rewards in (None, 3, [1.0], ["1", "2"], [1.0] * 3)),
        *({"rewards": [1.0, 0.0], "completions": completions} for completions in (None, ["a"], [1, 2], "ab")),
    ],
)
def test_an_accuracy_of_another_form_is_none(tmp_path, content):
    write_json(tmp_path / "accuracy_before.json", content)
    with pytest.warns(LongActWarning, match="needed rewards and completions of 2 prompts"):
        assert read_evaluation(tmp_path / "accuracy_before.json", 2) is None


# Options


def test_what_may_change_does_and_the_report_says_from_when(place, run):
    changed = {
        "learning_rate": 5e-4,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-7,
        "weight_decay": 0.25,
        "save_steps": 2,
        "max_steps": 4,
        "temperature": 0.5,
    }
    more = [str(word) for name, value in changed.items() for word in (f"--{name}", value)]
    assert main(["train", *words(place, run, "--resume", *more)]) == 0
    assert not (run / "checkpoint-3").exists()
    groups = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    for group in groups:
        assert (group["lr"], group["initial_lr"], *group["betas"], group["eps"]) == (5e-4, 5e-4, 0.8, 0.99, 1e-7)
    assert 0.25 in {group["weight_decay"] for group in groups}
    logged = [record["learning_rate"] for record in read_lines(run / "metrics.jsonl", METRICS)]
    assert logged == [1e-3, 1e-3, 5e-4, 5e-4]
    summary = json.loads((run / "summary.json").read_text())
    assert {change["option"]: change["to"] for change in summary["changes"]} == changed
    assert {change["step"] for change in summary["changes"]} == {2}
    assert {change["option"]: change["from"] for change in summary["changes"]}["learning_rate"] == 1e-3
    assert "0.0005 (0.001 up to step 2)" in (run / "report.html").read_text()
    # An earlier checkpoint is of the run before the change.
    held = json.loads((run / "run.json").read_text())
    assert held["grpo_config"]["learning_rate"] == 5e-4
    assert as_of(held, 1)["grpo_config"]["learning_rate"] == 1e-3 and not as_of(held, 1)["changes"]
    assert as_of(held, 4)["grpo_config"]["learning_rate"] == 5e-4


def test_another_schedule_is_that_of_the_whole_run_from_there_on(place, run):
    more = ["--lr_scheduler_type", "linear", "--max_steps", "4"]
    assert main(["train", *words(place, run, "--resume", *more)]) == 0
    logged = [record["learning_rate"] for record in read_lines(run / "metrics.jsonl", METRICS)]
    assert logged == pytest.approx([1e-3, 1e-3, 1e-3 * 2 / 4, 1e-3 * 1 / 4])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", 7),
        ("num_generations", 2),
        ("per_device_train_batch_size", 8),
        ("gradient_accumulation_steps", 2),
        ("max_completion_length", 7),
        ("loss_type", "grpo"),
        ("num_iterations", 2),
        ("bf16", True),
        ("model_init_kwargs", '{"dtype": "float32"}'),
        ("density", 0.5),
        ("statistic", "l2"),
        ("eval_prompts", 3),
        ("state", "compact"),
    ],
)
def test_what_makes_another_run_is_refused_by_name(place, run, option, value):
    held = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"output_dir: .* holds another run, with {option} "):
        opened(place, run, f"--{option}", value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == held


def begun_by(processes, size, steps, generations=None):
    generations = generations or steps
    batch = processes * size * generations
    of = {SHARE[0]: size, SHARE[1]: steps, "steps_per_generation": generations, "generation_batch_size": batch}
    return {"processes": processes, "grpo_config": of}


@pytest.mark.parametrize(
    ("held", "processes", "shares"),
    [
        ((1, 4, 2), 2, (4, 1, None)),
        ((2, 4, 1), 1, (4, 2, None)),
        ((1, 8, 1), 2, (4, 1, None)),
        ((8, 4, 3), 6, (4, 4, None)),
        ((2, 6, 1), 3, (4, 1, None)),
        ((2, 4, 2, 4), 1, (4, 4, 8)),
        ((3, 4, 2, 1), 2, (3, 4, 2)),  # parts of 4 would share 24 out, but not the 12 that are generated together
        ((1, 4, 2), 1, (4, 2, None)),
    ],
)
def test_another_number_of_processes_shares_a_step_out(held, processes, shares):
    run = begun_by(*held)
    steps = held[3] if len(held) > 3 else None
    options = {SHARE[0]: held[1], SHARE[1]: held[2], "steps_per_generation": steps}
    share_out(options, run, processes)
    assert tuple(options.values()) == shares
    now = begun_by(processes, *shares)
    assert completions_of(now) == completions_of(run)
    assert now["grpo_config"]["generation_batch_size"] == run["grpo_config"]["generation_batch_size"]
    assert as_begun(now, run) == run


def test_processes_that_cannot_share_a_step_equally_are_refused():
    with pytest.raises(ValueError, match=r"^processes: got 3, but a step of the run takes 8 completions"):
        share_out({SHARE[0]: 4, SHARE[1]: 1}, begun_by(2, 4, 1), 3)


def test_another_number_of_processes_with_shares_of_the_users(place, run, refused):
    held = json.loads((run / "run.json").read_text())["grpo_config"]
    size, steps = (held[name] for name in SHARE)
    begun_with(run, processes=2, grpo_config=held | {SHARE[0]: size // 2})
    folder = opened(place, run)  # as many for the one as those two had
    assert [getattr(folder.training, name) for name in SHARE] == [size, steps]
    assert folder.changes == [{"option": "processes", "from": 2, "to": 1, "step": 2}]
    message = refused("train", *words(place, run, "--resume", f"--{SHARE[1]}", 2))
    assert f"{SHARE[0]}: a step would take {2 * size * steps} completions on 1 processes" in message
    (run / "checkpoint-2" / "completions_0.pt").write_bytes(b"")
    assert "processes: got 1, but 2 have generated completions that" in refused("train", *words(place, run, "--resume"))


def test_a_checkpoint_of_shards_needs_fsdp(place, run, refused):
    shutil.rmtree(run / "checkpoint-1")
    (run / "checkpoint-2" / "optimizer.pt").rename(run / "checkpoint-2" / "optimizer.bin")
    seal(run / "checkpoint-2")
    message = refused("train", *words(place, run, "--resume"))
    assert "fsdp: " in message and "checkpoint-2 was saved with FSDP, and the processes are started without" in message
    # With it, there is nothing left of the run that the trainer could load them by.
    folder, fsdp = opened(place, run), SimpleNamespace(is_fsdp_enabled=True, is_deepspeed_enabled=False)
    with pytest.raises(ValueError, match=r"^max_steps: .*checkpoint-2 is of the last step"):
        Run._check_form(SimpleNamespace(folder=folder, trainer=fsdp, training=folder.training))


def test_steps_that_have_been_taken_are_not_taken_back(place, run):
    with pytest.raises(ValueError, match=r"max_steps: got 1, but the run in .* is at step 2"):
        opened(place, run, "--max_steps", 1)


def test_stages_stay_where_they_were(place, run):
    begun_with(run, length=None, lengths="420,500")
    given = [word for word in words(place, run, "--resume", "--lengths", "420,500") if "--length=" not in word]
    with pytest.raises(ValueError, match="with max_steps 2 instead of 4"):
        RunFolder(*parse([*given, "--max_steps", "4"]))


@pytest.mark.parametrize("option", ["sync_ref_model", "use_adaptive_entropy"])
def test_what_no_checkpoint_holds_is_refused(place, run, option):
    with pytest.raises(ValueError, match=f"{option}: what it has done so far is in no checkpoint"):
        opened(place, run, f"--{option}", "true", "--beta", 0.1)


def test_every_option_that_may_change_is_one():
    assert {*MAY_CHANGE} <= vars(parse(["--use_cpu", "true"])[1]).keys()


def test_a_run_from_before_an_option_has_its_default(place, run):
    held = json.loads((run / "run.json").read_text())
    del held["moments"], held["grpo_config"]["top_k"], held["grpo_config"]["seed"]
    write_json(run / "run.json", held)
    opened(place, run)
    with pytest.raises(ValueError, match="moments 'float32' instead of 'bfloat16'"):
        opened(place, run, "--moments", "bfloat16")
    with pytest.raises(ValueError, match="with seed 42 instead of 7"):
        opened(place, run, "--seed", 7)


def test_weights_alone_are_saved_if_asked_and_cannot_be_gone_on_with(place, tmp_path, refused):
    assert main(["train", *words(place, tmp_path / "run", "--save_only_model", "true", "--save_total_limit", 1)]) == 0
    assert [path.name for path in tmp_path.glob("run/checkpoint-*")] == ["checkpoint-2"]
    message = refused("train", *words(place, tmp_path / "run", "--resume", "--save_total_limit", 1))
    assert (
        "checkpoint-2 has no optimizer state, learning rate schedule, random state, as with save_only_model" in message
    )


def test_completions_that_further_steps_are_on_are_kept(place, tmp_path):
    more = ["--num_iterations", 2, "--max_steps", 4]
    assert main(["train", *words(place, tmp_path / "whole", *more)]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for number in (2, 3, 4):
        shutil.rmtree(tmp_path / "again" / f"checkpoint-{number}")
    assert main(["train", *words(place, tmp_path / "again", "--resume", *more)]) == 0
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# One run, one folder


HOLD = """
import sys, time
from longact_kernels.commands.train.arguments import parse
from longact_kernels.commands.train.folder import FILES, RunFolder, read_evaluation
folder = RunFolder(*parse(sys.argv[1:]))
folder.own()
print("holds", flush=True)
time.sleep(600)
"""


def test_a_folder_in_use_is_refused_and_taken_over_from_a_dead_process(place, run, refused):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, *words(place, run, "--resume")], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "holds\n"
        message = refused("train", *words(place, run, "--resume"))
        assert f"is in use by process {holder.pid} on {os.uname().nodename}, since 20" in message
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert opened(place, run).checkpoint == run / "checkpoint-2"


@pytest.mark.parametrize("taken", [False, True])
def test_a_run_whose_lock_was_deleted_writes_no_more(place, run, capsys, monkeypatch, taken):
    others = []

    def delete(*_, **__):
        (run / ".lock").unlink()
        if taken:
            others.append(RunFolder(*parse(words(place, run, "--resume", "--max_steps", "4"))))
            others[0].own()

    monkeypatch.setattr(MetricsFile, "on_optimizer_step", delete)
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "details.jsonl", "summary.json")}
    assert main(["train", *words(place, run, "--resume", "--max_steps", "4")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"longact train: error: {run / '.lock'} has been deleted")
    assert {name: (run / name).read_bytes() for name in before} == before
    assert flaw(run / "checkpoint-2") is None and not (run / "checkpoint-3").exists()
    assert (run / ".owner.json").exists()
    for other in others:
        other.close()


def test_two_runs_cannot_begin_in_one_folder(place, tmp_path, refused):
    first = RunFolder(*parse(words(place, tmp_path / "run")))
    assert "is in use by another process" in refused("train", *words(place, tmp_path / "run"))
    first.close()
    assert not (tmp_path / "run").exists()


def test_a_run_that_came_to_no_checkpoint_gives_way_to_another(place, run):
    shutil.rmtree(run / "checkpoint-1")
    with pytest.raises(ValueError, match="is not empty"):
        RunFolder(*parse(words(place, run)))
    (run / "checkpoint-2" / MANIFEST).unlink()
    for path in run.iterdir():
        if path.name not in ("run.json", "accuracy_before.json", "metrics.jsonl", ".lock", "checkpoint-2"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    RunFolder(*parse(words(place, run, "--density", 0.5))).close()
    # Its accuracy was of other options.
    assert not (run / "accuracy_before.json").exists() and not (run / "run.json").exists()


# Full disks


def in_little_room(run: Path, place: Path, largest: int, *more) -> subprocess.CompletedProcess:
    """Runs a command whose files may not be larger: the system answers as it does when a disk is full."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    return subprocess.run(
        [sys.executable, "-m", "longact_kernels.cli", "train", *words(place, run, *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NUMBA_CACHE_DIR": str(place / "numba")},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("largest", [100_000, 300])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(place, run, largest):
    done = in_little_room(run, place, largest, "--resume", "--max_steps", 4)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("longact train: error: cannot "), done.stderr
    assert not (run / "checkpoint-3").exists()
    assert flaw(run / "checkpoint-2") is None
    assert step_of(opened(place, run).checkpoint) == STEPS
    assert not [path for path in run.iterdir() if path.name.startswith("tmp") or str(os.getpid()) in path.name]


def test_a_checkpoint_under_another_name_or_of_another_run_is_not_gone_on_from(place, run):
    (run / "checkpoint-2").rename(run / "checkpoint-7")
    with pytest.warns(LongActWarning, match=r"checkpoint-7 .* saved at step 2.*going on from checkpoint-1"):
        assert opened(place, run).checkpoint_step == 1
    (run / "checkpoint-7").rename(run / "checkpoint-2")
    assert opened(place, run).checkpoint_step == 2
    held = json.loads((run / "run.json").read_text())
    for change in ({"task_seed": 5}, {"grpo_config": held["grpo_config"] | {"seed": 5}}):
        write_json(run / "checkpoint-2" / "run.json", held | change)
        seal(run / "checkpoint-2")
        with pytest.warns(LongActWarning, match=r"checkpoint-2 is of another run, with (task_)?seed 5 instead of"):
            assert opened(place, run).checkpoint_step == 1


@pytest.mark.parametrize("content", ["[]", "null", "3", "[" * 100_000], ids=lambda content: content[:4])
def test_a_run_json_that_holds_no_options_is_damaged(place, run, content):
    (run / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged .(needed an object|maximum recursion)"):
        opened(place, run)


CHANGE = {"option": "max_steps", "from": 1, "to": 2, "step": 1}


@pytest.mark.parametrize(
    "content",
    [
        *({"changes": of} for of in (3, None, {}, "x", [3], [{}], [CHANGE | {"step": "1"}], [CHANGE | {"option": []}])),
        *({"grpo_config": of} for of in (3, None, [])),
    ],
)
def test_a_run_json_with_parts_of_another_kind_is_damaged(place, run, refused, content):
    write_json(run / "run.json", json.loads((run / "run.json").read_text()) | content)
    assert "run.json is damaged (grpo_config or changes)" in refused("train", *words(place, run, "--resume"))


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_where_a_file_belongs_is_refused_at_once(place, run, tmp_path, refused, name, resumed):
    where = run if resumed else tmp_path / "new"
    (where / name).unlink(missing_ok=True)
    (where / name).mkdir(parents=True)
    said = refused("train", *words(place, where, *["--resume"] * resumed, "--model", "/nowhere"))
    assert f"output_dir: {where / name} is a folder, where a run has a file" in said


@pytest.mark.parametrize("name", ["model", "checkpoint-3"])
def test_a_file_where_a_folder_belongs_is_refused_at_once(place, run, refused, name):
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).touch()
    said = refused("train", *words(place, run, "--resume", "--model", "/nowhere"))
    assert f"output_dir: {run / name} is a file, where a run has a folder" in said


def test_other_prompts_under_the_same_name_are_refused(place, tmp_path, refused):
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(6)]

    def write(rows):
        data.write_text("\n".join(map(json.dumps, rows)))
        read_rows.cache_clear()  # each command is a process of its own

    write(rows)
    more = ["--dataset", data, "--max_steps", 1]
    assert main(["train", *words(place, run, *more)]) == 0
    resumed = words(place, run, *more, "--resume")
    for changed in (rows[::-1], [*rows[:-1], {"prompt": "What is 9 + 1?", "answer": "10"}], [*rows[:-1], rows[0]]):
        write(changed)
        said = refused("train", *resumed)
        assert f"dataset: {data} has other prompts than the run in {run} was begun with" in said
    write(rows)
    assert main(["train", *resumed]) == 0
    held = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {name: of for name, of in held.items() if name != "prompts"})
    assert main(["train", *resumed]) == 0  # of a run from before the hash
