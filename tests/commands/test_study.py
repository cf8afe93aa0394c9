"""`longact study`: its statistics, its small model and task, and a study from its file to its report, with a stop."""

import csv
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from longact_kernels.cli import main
from longact_kernels.commands.files import METRICS, read_lines
from longact_kernels.commands.study import recall as recall_module
from longact_kernels.commands.study.config import read_study
from longact_kernels.commands.study.estimates import compare, estimate
from longact_kernels.commands.study.figures import draw
from longact_kernels.commands.study.jobs import moved
from longact_kernels.commands.study.recall import (
    PRETRAINING,
    Recall,
    generator_of,
    make_base,
    sequences,
    tokenizer,
)
from longact_kernels.commands.study.report import rows_of
from longact_kernels.commands.study.tuning import choose_rates, line

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
TUNED = {
    "options": {key: value for key, value in STUDY["options"].items() if key != "learning_rate"},
    "learning_rates": [1e-3, 3e-3],
    "tuning_seeds": [9],
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


def test_pretraining_asks_for_long_prompts_only_near_them(monkeypatch):
    asked = []
    monkeypatch.setattr(recall_module, "accuracy", lambda *_: asked.append(1) or 0.0)
    with pytest.raises(ValueError, match=r"accuracy 0\.000 after most_steps 30"):
        recall_module.pretrain(Recall(**BASE | {"pairs": 12, "most_steps": 30}), seed=1)
    assert len(asked) == 1


def test_the_same_seed_makes_the_same_base(base):
    one, same = (AutoModelForCausalLM.from_pretrained(base / name / "model") for name in ("one", "same"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert (base / "one" / "data.jsonl").read_text() == (base / "same" / "data.jsonl").read_text()


def test_more_keys_are_a_larger_vocabulary_and_64_are_as_they_were():
    ids = sequences(Recall(pairs=100, keys=100), 50, 100, 1, generator_of(1, PRETRAINING))
    assert all(len(set(row[:-4:3])) == 100 for row in ids.tolist())
    assert ids[:, :-4:3].max() < 103 <= ids[:, 1:-4:3].min() <= ids.max() < 167
    words = tokenizer(Recall(pairs=100, keys=100))
    assert words.decode([3, 102, 103, 166]) == "k00 k99 v00 v63"
    # The first row before there were more, by its CRC.
    old = sequences(Recall(), 4, 32, 3, generator_of(1, PRETRAINING))
    assert zlib.crc32(old.numpy().tobytes()) == 3000443257


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
        ({"arms": {"dense": {}, "top": {"learning_rate": 1e-2}}}, "learning_rates chooses a rate for each"),
        ({"arms": {"dense": {}, "top": {"strategi": "top"}}}, "did you mean 'strategy'?"),
        ({"arms": {"dense": {}, "a/b": {}}}, "got the name 'a/b'"),
        ({"base": {"pairs": 3}}, "got pairs 3, needed 4 to 64"),
        ({"base": {"pairs": [4, 65]}}, "got pairs 65, needed 4 to 64, the number of keys"),
        ({"options": {"max_steps": 2, "frozen": "["}}, "frozen: got '[', needed a regular expression"),
        ({"arms": {"dense": {}, "top": {"frozen": True}}}, "frozen: got True, needed a text"),
        ({"arms": {"dense": {}, "top": {"lora_r": 2, "longact": True}}}, "arms: top: got longact and lora_r"),
        ({"arms": {"dense": {}, "top": {"lora_rank": 2}}}, "did you mean 'lora_"),
        ({"learning_rates": [1e-3], "tuning_seeds": [9]}, "learning_rates: got [0.001], needed a list of two"),
        ({"learning_rates": ["1e-3", "1e-2"], "tuning_seeds": [9]}, "YAML takes 1e-3 for a text"),
        ({"tuning_seeds": [9]}, "learning_rates: got None"),
        ({"learning_rates": [1e-3, 1e-2], "tuning_seeds": [9]}, "options: got learning_rate beside learning_rates"),
        (TUNED | {"tuning_seeds": [2]}, "tuning_seeds: got 2, a seed that the arms are compared on"),
        (TUNED | {"tuning_seeds": None}, "tuning_seeds: got None"),
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
    assert "dense" in {arm.method for arm in study.arms.values()}
    assert all(len(arm.seeds) >= 3 for arm in study.arms.values())
    assert len(study.tuning().arms) == len(study.arms) * len(study.learning_rates)


def test_rows_compare_the_seeds_that_arms_share(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"seeds": 4, "arms": {"dense": {}, "top": {}}}))
    scores = {"dense": [0.5, 0.6, 0.8], "top": [0.1, 0.3, 0.2, 0.9]}
    common = {"before": 0.25, "learning_rate": 1e-3, "trained": 9, "moved": 0.5, "state": None, "seconds_per_step": 1.0}
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


def test_each_arm_gets_its_best_rate(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | TUNED | {"learning_rates": [4e-3, 1e-3, 2e-3]}))
    study = read_study(tmp_path / "study.yaml")
    after = {
        "dense": {1e-3: [0.2, 0.4], 2e-3: [0.5, 0.3], 4e-3: [0.3, 0.3]},
        "top": {1e-3: [0.1], 2e-3: [0.5], 4e-3: [0.5]},
    }
    results = [
        {"arm": f"{name}-lr{rate:g}", "after": value}
        for name, rates in after.items()
        for rate, values in rates.items()
        for value in values
    ]
    assert choose_rates(study, results) == {"dense": 2e-3, "top": 2e-3}
    assert study.tuning().arms.keys() == {one["arm"] for one in results}
    assert study.tuning().seeds == [9]
    rated = study.with_rates({"dense": 1e-3, "top": 4e-3})
    assert [arm.options["learning_rate"] for arm in rated.arms.values()] == [1e-3, 4e-3]
    assert line(study, "dense", {1e-3: 0.3, 2e-3: 0.4})["remark"] == "-"
    assert line(study, "top", {1e-3: 0.1, 2e-3: 0.5, 4e-3: 0.5})["remark"] == "tie with 0.004"
    last = line(study, "top", {1e-3: 0.1, 4e-3: 0.5})
    assert (last["best"], last["remark"], last["0.002"]) == ("0.004", "edge of the list", "-")


def test_several_lengths_are_arms_compared_at_the_same_length(tmp_path):
    content = STUDY | {"base": BASE | {"pairs": [4, 80], "keys": 90}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    study = read_study(tmp_path / "study.yaml")
    assert list(study.arms) == ["dense-4", "dense-80", "top-4", "top-80"]
    assert [arm.base.pairs for arm in study.arms.values()] == [4, 80, 4, 80]
    scores = {"dense-4": 0.1, "dense-80": 0.2, "top-4": 0.4, "top-80": 0.7}
    rest = {"before": 0, "churn": None, "learning_rate": 1, "trained": 1, "moved": 1, "state": None}
    results = [
        {"arm": arm, "seed": seed, "score": score + seed, "after": 0, "seconds_per_step": 1, "curve": [[0, 0]], **rest}
        for arm, score in scores.items()
        for seed in (1, 2)
    ]
    rows = {row.arm: row for row in rows_of(study, results)}
    assert rows["top-4"].against["dense"].difference.mean == pytest.approx(0.3)
    assert rows["top-80"].against["dense"].difference.mean == pytest.approx(0.5)
    right = dict(draw(study, results))["lengths"].axes[1]
    (drawn,) = right.containers
    assert drawn[0].get_ydata() == pytest.approx([0.3, 0.5])


@pytest.mark.slow
def test_a_study_of_rates_and_adapters(tmp_path):
    """What trains is what was said, in every arm; a second start runs nothing again; the rates are those chosen."""
    content = STUDY | TUNED | {"seeds": 1}
    content["options"] = content["options"] | {"target_modules": "all-linear", "frozen": "embed|norm|lm_head"}
    content["arms"] = {
        "dense": {},
        "once": {"strategy": "random", "freeze_after": 1, "density": 0.25},
        "qk": {"target_modules": None, "density": 0.25},
        "lora": {"lora_r": 2, "lora_target_modules": "all-linear"},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    command = ["study", str(tmp_path / "study.yaml"), "--output", str(out)]
    assert main(command) == 0
    results = {path.stem: json.loads(path.read_text()) for path in out.glob("results/*.json")}
    # Two layers of q, o [16, 32], [32, 16]; k, v [8, 32]; gate, up [64, 32] and down [32, 64].
    linear = {"q": (16, 32), "k": (8, 32), "v": (8, 32), "o": (32, 16), "gate": (64, 32), "up": (64, 32)}
    shapes = [*linear.values(), (32, 64)]
    every = 2 * sum(n * k for n, k in shapes)
    trained = {"dense": every, "once": every // 4, "lora": 2 * sum(2 * (n + k) for n, k in shapes)}
    trained["qk"] = every - 2 * 3 * (16 + 8) * 32 // 4
    for name, count in trained.items():
        assert results[f"{name}-1"]["trained"] == count, name
    assert results["dense-1"]["moved"] == 1.0
    assert results["once-1"]["moved"] == 0.25
    kept = load_file(out / "base" / "4-pairs-seed-1" / "model" / "model.safetensors")
    for name in trained:
        found = load_file(out / "runs" / f"{name}-1" / "model" / "model.safetensors")
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[key], kept[key]) for key in kept if "proj" not in key)
    tuned = {name: one for name, one in results.items() if "-lr" in name}
    assert len(tuned) == 8 and len(results) == 12
    with (out / "tuning.csv").open() as file:
        assert {f"{row['arm']}-{row['seed']}" for row in csv.DictReader(file)} == tuned.keys()
    for row in (out / "tuning.md").read_text().splitlines()[2:]:
        name, low, high, best, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        assert float(best) == (3e-3 if float(high) > float(low) else 1e-3)
        assert results[f"{name}-1"]["learning_rate"] == float(best)
    changed = {path: path.stat().st_mtime_ns for path in out.glob("results/*.json")}
    assert main(command) == 0
    assert changed == {path: path.stat().st_mtime_ns for path in out.glob("results/*.json")}


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
    shutil.copytree(base / "one", tmp_path / "out" / "base" / "4-pairs-seed-1")
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump(STUDY | {"seeds": 1, "curve_every": 0, "options": STUDY["options"] | {"max_steps": 40}})
    )
    command = [sys.executable, "-m", "longact_kernels.cli", "study", "study.yaml", "--jobs", "1", "--output", "out"]
    run = tmp_path / "out" / "runs" / "dense-1"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        while not read_lines(run / "metrics.jsonl", METRICS) and process.poll() is None:
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
