"""`longact study`: its statistics, its small model and task, and a study from its file to its report, with a stop."""

import csv
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from longact_kernels.cli import main
from longact_kernels.commands.files import read_metrics
from longact_kernels.commands.study.config import read_study
from longact_kernels.commands.study.estimates import compare, estimate
from longact_kernels.commands.study.jobs import moved
from longact_kernels.commands.study.recall import PRETRAINING, Recall, generator_of, make_base, sequences
from longact_kernels.commands.study.report import rows_of

STUDIES = Path(__file__).parents[2] / "configs" / "study"
BASE = dict(pairs=4, value_tokens=1, hidden_size=32, heads=2, key_value_heads=1, head_dim=8, stop_at=0.1, prompts=32)
STUDY = {
    "setting": "recall",
    "seeds": 2,
    "curve_every": 1,
    "base": BASE,
    "options": {
        "max_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,  # moves what trains, also where no completion earned anything
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "eval_prompts": 8,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
        "use_cpu": True,
    },
    "arms": {"dense": {}, "top": {"density": 0.25}},
}

# Hours of sleep that two drugs gave ten patients (Student, 1908): t = -4.0621 with 9 degrees of freedom.
DEXTRO = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
LAEVO = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_students_sleep_data():
    found = compare(DEXTRO, LAEVO)
    assert found.difference.mean == pytest.approx(-1.58)
    assert found.p_t == pytest.approx(0.002833, abs=5e-7)
    assert found.difference.half_width == pytest.approx(0.8798858, abs=5e-8)
    # All differences but the zero have one sign: 2 of the 2^9 ways to give them signs reach as far.
    assert found.p_sign_flip == pytest.approx(2 / 2**9)


def test_estimate_of_few():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.count) == (2.5, 4)
    assert found.half_width == pytest.approx(3.182446 * (5 / 12) ** 0.5, rel=1e-6)
    assert np.isnan(estimate([0.5]).half_width)
    assert np.isnan(compare([1.0], [0.5]).p_t)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=7))
def test_sign_flip_is_exact(differences):
    flips = [np.mean(np.multiply(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    wanted = np.mean(np.abs(flips) >= abs(np.mean(differences)) - 1e-9)
    assert compare(differences, [0] * len(differences)).p_sign_flip == pytest.approx(wanted)


def test_sequences_ask_for_what_they_say():
    recall = Recall(pairs=9, value_tokens=2)
    for row in sequences(recall, 20, 9, 5, generator_of(1, PRETRAINING)).tolist():
        known = {row[i]: row[i + 1 : i + 3] for i in range(0, 27, 3)}
        assert len(known) == 9
        asked = [row[i : i + 4] for i in range(27, len(row), 4)]
        assert len({key for _, key, *_ in asked}) == len(asked) == 5
        assert all(known[key] == value for _, key, *value in asked)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    recall = Recall(**BASE)
    make_base(folder / "one", recall, seed=3)
    make_base(folder / "same", recall, seed=3)
    return folder


def test_a_base_model_knows_as_much_as_was_asked_for(base):
    model = AutoModelForCausalLM.from_pretrained(base / "one" / "model")
    tokenizer = AutoTokenizer.from_pretrained(base / "one" / "model")
    rows = [json.loads(line) for line in (base / "one" / "data.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == BASE["prompts"]
    ids = tokenizer([row["prompt"] for row in rows], return_tensors="pt")
    answers = tokenizer.batch_decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[:, -1:])
    right = np.mean([answer == row["answer"] for answer, row in zip(answers, rows, strict=True)])
    log = [json.loads(line) for line in (base / "one" / "pretraining.jsonl").read_text().splitlines()]
    assert log[-1]["accuracy"] >= BASE["stop_at"]
    assert all(record["accuracy"] < BASE["stop_at"] for record in log[:-1])
    # 32 prompts, where pretraining looked at 512: three standard errors.
    assert right >= log[-1]["accuracy"] - 3 * (0.25 / 32) ** 0.5
    assert right > 0


def test_pretraining_that_gets_nowhere(tmp_path):
    with pytest.raises(ValueError, match=r"after most_steps 20, needed stop_at 0\.9"):
        make_base(tmp_path / "base", Recall(**BASE | {"stop_at": 0.9, "most_steps": 20}), seed=1)
    assert not (tmp_path / "base").exists()


def test_the_same_seed_makes_the_same_base(base):
    one, same = (AutoModelForCausalLM.from_pretrained(base / name / "model") for name in ("one", "same"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert (base / "one" / "data.jsonl").read_text() == (base / "same" / "data.jsonl").read_text()


def test_moved_counts_weights():
    before = [torch.zeros(2, 3), torch.ones(4)]
    after = [torch.tensor([[0.0, 1, 0], [0, 0, 0]]), torch.ones(4)]
    assert moved(before, after) == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setting": "recal"}, "setting: got 'recal'"),
        ({"seeds": [1, 1]}, "seeds: got [1, 1], which has a seed twice"),
        ({"seeds": "five"}, "seeds: got 'five'"),
        ({"seed": 3}, "did you mean 'seeds'?"),
        ({"arms": {"top": {}}}, "needed an arm 'dense'"),
        ({"reference": "bottom"}, "needed an arm 'bottom'"),
        ({"arms": {"dense": {}, "top": {"learning_rate": 1e-2}}}, "arms share data, compute and learning rate"),
        ({"arms": {"dense": {}, "top": {"strategi": "top"}}}, "did you mean 'strategy'?"),
        ({"arms": {"dense": {}, "a/b": {}}}, "got the name 'a/b'"),
        ({"base": {"pairs": 3}}, "got pairs 3, needed 4 to 64"),
        ({"options": {"learning_rate": 1e-3}}, "got max_steps None"),
        ({"options": {"max_steps": 2, "seed": 4}}, "the study itself sets seed"),
        ({"options": {"max_steps": 2, "task": "vt"}}, "setting recall sets task itself"),
        ({"options": {"max_steps": 2, "lerning_rate": 1}}, "did you mean 'learning_rate'?"),
        ({"arms": {"dense": {}, "top": {"strategy": "tops"}}}, "strategy"),
        ({"curve_every": -1}, "curve_every: got -1"),
    ],
)
def test_bad_studies_get_one_line(tmp_path, monkeypatch, refused, change, message):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(STUDY | change))
    assert message in refused("study", "study.yaml")


def test_a_study_that_is_not_there(refused):
    assert "cannot read nowhere.yaml: No such file" in refused("study", "nowhere.yaml")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_that_come_along(path):
    study = read_study(path)
    assert {"dense", "top", "random"} <= study.arms.keys()
    assert len(study.arms["dense"].seeds) >= 3


def test_rows_compare_the_seeds_that_arms_share(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"seeds": 4, "arms": {"dense": {}, "top": {}}}))
    scores = {"dense": [0.5, 0.6, 0.8], "top": [0.1, 0.3, 0.2, 0.9]}
    common = {"before": 0.25, "moved": 0.5, "state": 1.0, "seconds_per_step": 1.0}
    results = [
        common | {"arm": arm, "seed": seed, "score": score, "after": score + 0.1, "churn": churn}
        for arm, churn in (("top", 0.5), ("dense", None))
        for seed, score in enumerate(scores[arm], start=1)
    ]
    dense, top = rows_of(read_study(tmp_path / "study.yaml"), results)
    assert (dense.arm, top.arm) == ("dense", "top") and (dense.churn, top.churn) == (None, 0.5)
    assert top.score.mean == pytest.approx(0.375) and top.gain.mean == pytest.approx(0.225)
    assert dense.against.keys() == top.against.keys() == {"dense", "top"}
    assert dense.against["dense"] is None and top.against["top"] is None
    for row, sign in ((dense, 1), (top, -1)):
        found = next(one for one in row.against.values() if one)
        wanted = stats.ttest_rel(scores["dense"], scores["top"][:3])
        assert found.difference.count == 3
        assert found.difference.mean == pytest.approx(sign * 1.3 / 3)
        assert found.p_t == pytest.approx(wanted.pvalue)


def _take_sigint():
    """A background job of a shell ignores Ctrl-C, and so does what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A study that got Ctrl-C once a run was finished, and then was started again."""
    place = tmp_path_factory.mktemp("study")
    (place / "study.yaml").write_text(yaml.safe_dump(STUDY))
    command = [sys.executable, "-m", "longact_kernels.cli", "study", "study.yaml", "--jobs", "1", "--output", "out"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True, preexec_fn=_take_sigint) as process:
        while not list(place.glob("out/results/*.json")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[0]
    first = {path: path.stat().st_mtime_ns for path in place.glob("out/results/*.json")}
    again = subprocess.run(command, cwd=place, capture_output=True, text=True)
    return place / "out", process.returncode, said, first, again


@pytest.mark.slow
def test_ctrl_c_is_clean_and_the_study_goes_on(stopped):
    folder, status, said, first, again = stopped
    assert status == 130
    assert "Run the same command again to continue." in said
    assert again.returncode == 0, again.stdout + again.stderr
    names = {path.stem for path in folder.glob("results/*.json")}
    assert names == {"dense-1", "dense-2", "top-1", "top-2"}
    assert 1 <= len(first) < 4
    assert all(path.stat().st_mtime_ns == changed for path, changed in first.items())


@pytest.mark.slow
def test_what_a_study_finds(stopped):
    folder = stopped[0]
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob("results/*.json")}
    for seed in (1, 2):
        dense, top = results[f"dense-{seed}"], results[f"top-{seed}"]
        # The same model and the same held-out prompts.
        assert dense["before"] == top["before"]
        assert [step for step, _ in top["curve"]] == [0, 1, 2]
        assert top["curve"][-1][1] == top["after"] == top["score"]
        assert dense["churn"] is None and 0 <= top["churn"] <= 1
        assert dense["moved"] == 1.0
        # Two of eight channels a step, for two steps.
        assert 0.25 <= top["moved"] <= 0.5
    with (folder / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {f"{line['arm']}-{line['seed']}" for line in lines} == results.keys()
    assert all(float(line["score"]) == results[f"{line['arm']}-{line['seed']}"]["score"] for line in lines)
    rows = {row["arm"]: row for row in json.loads((folder / "study.json").read_text())["arms"]}
    differences = [results[f"top-{seed}"]["score"] - results[f"dense-{seed}"]["score"] for seed in (1, 2)]
    assert rows["top"]["against"]["dense"]["difference"]["mean"] == pytest.approx(np.mean(differences))
    for name in ("scores", "curves"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "minus dense" in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_a_killed_study_takes_its_runs_along(base, tmp_path):
    shutil.copytree(base / "one", tmp_path / "out" / "base" / "seed-1")
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump(STUDY | {"seeds": 1, "curve_every": 0, "options": STUDY["options"] | {"max_steps": 40}})
    )
    command = [sys.executable, "-m", "longact_kernels.cli", "study", "study.yaml", "--jobs", "1", "--output", "out"]
    run = tmp_path / "out" / "runs" / "dense-1"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        while not read_metrics(run / "metrics.jsonl") and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    # What trains is neither this process's child nor known to it: the checkpoint says that it has ended.
    while not (kept := list(run.glob("checkpoint-*/trainer_state.json"))):
        time.sleep(0.05)
    assert json.loads(kept[0].read_text())["global_step"] < 40


@pytest.mark.slow
def test_results_of_other_options_are_not_taken_over(stopped, refused):
    folder = stopped[0]
    other = folder.parent / "other.yaml"
    other.write_text(yaml.safe_dump(STUDY | {"arms": {"dense": {}, "top": {"density": 0.5}}}))
    assert "has a run" in refused("study", other, "--output", folder)


@pytest.mark.slow
def test_a_slice_of_the_recall_study(tmp_path):
    """RL improves a model that half knows the task, and the arms move as much of the weights as they should."""
    content = yaml.safe_load((STUDIES / "recall.yaml").read_text())
    arms = {name: content["arms"][name] | {"seeds": 2} for name in ("dense", "frozen", "top", "bottom")}
    content |= {"arms": arms, "options": content["options"] | {"max_steps": 30}}
    (tmp_path / "slice.yaml").write_text(yaml.safe_dump(content))
    assert main(["study", str(tmp_path / "slice.yaml"), "--output", str(tmp_path / "out")]) == 0
    rows = {row["arm"]: row for row in json.loads((tmp_path / "out" / "study.json").read_text())["arms"]}
    assert rows["dense"]["gain"]["mean"] > 0
    assert rows["dense"]["moved"] == 1.0
    assert rows["frozen"]["moved"] == 0.0
    assert 0.3 <= rows["top"]["moved"] < 1.0


@pytest.mark.slow
def test_a_step_of_the_smollm2_study_with_a_stand_in(tmp_path):
    pytest.importorskip("lm_eval")
    content = yaml.safe_load((STUDIES / "smollm2.yaml").read_text())
    model = tiny.save(tmp_path / "model")
    small = {"model": str(model), "max_steps": 1, "train_prompts": 8, "eval_prompts": 2, "max_completion_length": 4}
    content |= {
        "options": content["options"] | small | {"per_device_train_batch_size": 8, "num_generations": 4},
        # In bytes, not one of multikey_3's needles fits.
        "evaluate": content["evaluate"] | {"tasks": "niah_multikey_2", "limit": 2},
        "arms": {name: content["arms"][name] | {"seeds": 1} for name in ("dense", "top")},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    assert main(["study", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out")]) == 0
    for name in ("dense-1", "top-1"):
        result = json.loads((tmp_path / "out" / "results" / f"{name}.json").read_text())
        assert result["eval"].keys() == {"niah_multikey_2-512"}
        assert 0 <= result["score"] <= 1
