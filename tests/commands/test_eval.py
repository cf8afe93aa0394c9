"""`longact eval`: lm-eval's scores, kept and compared, on a tiny model and without a network."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from scipy.stats import binom

lm_eval = pytest.importorskip("lm_eval", reason="longact eval needs the extra `eval`")

from lm_eval.tasks import TaskManager  # noqa: E402

from longact_kernels.cli import main  # noqa: E402
from longact_kernels.commands.eval import data, evaluate, tasks  # noqa: E402
from longact_kernels.commands.eval.compare import compare, interval  # noqa: E402
from longact_kernels.commands.eval.longbench2 import cut, extract  # noqa: E402
from longact_kernels.commands.eval.results import Cell, ResultFolder  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data.online.cache_clear()
    # What RULER fetches is not installed, also where it is.
    monkeypatch.setattr(data, "installed", lambda package, path: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def oracle(monkeypatch):
    """A model that finds every needle but those whose value is divisible by three; the prompts that it was asked."""
    asked = []

    def answer(reader, requests, disable_tqdm=True):
        answers = []
        for request in requests:
            prompt, _ = request.args
            asked.append(prompt)
            key = re.search(
                r"all the special magic numbers? for (\S+) mentioned|special magic number for (\S+) m", prompt
            )
            value = re.search(rf"for {(key[1] or key[2])} is: (\d+)", prompt)[1]
            answers.append("I do not know" if int(value) % 3 == 0 else f"It is {value}.")
            reader.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    monkeypatch.setattr(evaluate.Reader, "generate_until", answer)
    return asked


def longact_eval(*words) -> int:
    return main(["eval", *map(str, words)])


def results(folder) -> dict:
    listed = json.loads((folder / "results.json").read_text())["cells"]
    return {(cell["task"], cell["length"]): cell for cell in listed}


def test_scores_and_pictures(model, oracle, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--tasks", "niah_single_1,niah_multikey_2", "--lengths", "1024,1536", "--limit", "12", "--output", out)
    assert longact_eval(model, *words) == 0
    found = results(out)
    assert len(found) == 4
    for (task, length), cell in found.items():
        kept = ResultFolder(out).read(task, length).samples
        right = [int(sample["target"][0]) % 3 != 0 for sample in kept]
        assert [sample["score"] for sample in kept] == right and len(kept) == 12
        assert cell["score"] == pytest.approx(np.mean(right))
        assert cell["standard_error"] == pytest.approx(np.std(right, ddof=1) / 12**0.5)
        assert 0 < cell["score"] < 1
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert f"{100 * found['niah_single_1', 1024]['score']:.1f}" in shown and "take 200 or more" in shown


def test_what_lm_eval_finds_by_itself(model, tmp_path):
    """The same documents, answers and scores as `lm_eval.simple_evaluate` in its own way."""
    words = ("--tasks", "ruler_cwe,niah_single_1", "--lengths", "1024", "--limit", "3", "--output", tmp_path / "out")
    assert longact_eval(model, *words) == 0
    metadata = {"max_seq_lengths": [1024], "tokenizer": str(model)}
    ruler = Path(next(iter(lm_eval.tasks.__path__))) / "ruler"
    # Whatever was drawn before.
    random.seed(99)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "bfloat16"},
        device="cpu",
        batch_size=4,
        tasks=["niah_single_1"],
        task_manager=TaskManager(include_defaults=False, include_path=ruler, metadata=metadata),
        apply_chat_template=True,
        limit=3,
        bootstrap_iters=0,
    )
    theirs = found["samples"]["niah_single_1"]
    ours = ResultFolder(tmp_path / "out").read("niah_single_1", 1024).samples
    assert [sample["document"] for sample in ours] == [sample["doc_hash"] for sample in theirs]
    assert [sample["answer"] for sample in ours] == [sample["filtered_resps"][0] for sample in theirs]
    assert [sample["score"] for sample in ours] == [sample["1024"] for sample in theirs]


def test_documents_do_not_depend_on_what_was_made_before(model):
    tokenizer = tiny.tokenizer()

    def documents(task):
        loaded = tasks.build(task, 2048, tokenizer, model, 4096)["tasks"][task]
        return list(loaded.eval_docs)[:20]

    first = documents("ruler_cwe")
    other = documents("niah_single_1")
    assert documents("ruler_cwe") == first
    assert documents("niah_single_1") == other


def test_what_is_finished_is_not_repeated(model, oracle, tmp_path, monkeypatch):
    words = (model, "--tasks", "niah_single_1", "--lengths", "1024", "--output", tmp_path / "out")
    assert longact_eval(*words, "--limit", "2") == 0
    assert len(oracle) == 2
    assert longact_eval(*words, "--limit", "5") == 0
    assert len(oracle) == 5
    before = (tmp_path / "out" / "results.json").read_text()
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("loaded"))
    assert longact_eval(*words, "--limit", "5") == 0
    assert len(oracle) == 5
    assert (tmp_path / "out" / "results.json").read_text() == before


def test_ctrl_c_keeps_the_answers(model, oracle, tmp_path, monkeypatch, capsys):
    words = (model, "--tasks", "niah_single_1", "--lengths", "1024", "--limit", "4", "--output", tmp_path / "out")
    answer = evaluate.Reader.generate_until

    def interrupted(reader, requests, disable_tqdm=True):
        answer(reader, requests[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.Reader, "generate_until", interrupted)
    assert longact_eval(*words) == 130
    assert "Run the same command again to continue" in capsys.readouterr().out
    monkeypatch.setattr(evaluate.Reader, "generate_until", answer)
    with (tmp_path / "out" / "answers.jsonl").open("ab") as file:
        file.write(b'{"prompt": "cut o\xff')
    assert longact_eval(*words) == 0
    assert len(oracle) == 4 == len(set(oracle))


MODEL = {"name": "a", "state": "b"}
SAMPLES = [{"document": str(i), "score": float(i), "target": "", "answer": ""} for i in range(3)]


@pytest.mark.parametrize(
    "content",
    [
        *[{"cells": []}, {"model": 3, "cells": []}, {"model": MODEL}],
        *({"model": MODEL, "cells": cells} for cells in ({}, [3], [{}], [{"task": 3}], [{"task": "t", "length": "8"}])),
    ],
)
def test_damaged_results_are_named(tmp_path, refused, content):
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert "results.json is damaged" in refused("eval", "--compare", tmp_path, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *[{"samples": 3}, {"samples": []}, {"samples": [3]}, {"samples": [{"document": "0"}]}],
        *({"samples": [*SAMPLES, {**SAMPLES[0], **wrong}]} for wrong in ({"score": "1"}, {"document": [1]})),
        *[{"notes": 3}, {"length": "8"}, {"task": None}, {"more": 1}],
    ],
)
def test_a_damaged_cell_is_named(tmp_path, refused, content):
    folder = ResultFolder(tmp_path, MODEL)
    folder.write([folder.cell("t", 8, {}, lambda: Cell("t", 8, "m", SAMPLES))])
    path = tmp_path / "samples" / "t-8.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    message = refused("eval", "--compare", tmp_path, tmp_path)
    assert f"{path} is " in message and "damaged" in message


def test_answers_are_kept_as_they_were(tmp_path):
    answers = evaluate.Answers(tmp_path / "answers.jsonl")
    given = {"a": "text\n", "b": (-1.5, True), "c": (float("-inf"), False)}
    for prompt, answer in given.items():
        answers[prompt] = answer
    assert evaluate.Answers(tmp_path / "answers.jsonl") == given


def test_what_cannot_be_had_is_said_in_a_line_and_the_rest_runs(model, oracle, tmp_path, capsys):
    names = "ruler_vt,niah_single_2,ruler_qa_squad,longbench2,longbench2_generate,niah_single_1"
    out = tmp_path / "out"
    assert longact_eval(model, "--tasks", names, "--lengths", "1024,4096", "--limit", 2, "--output", out) == 0
    found = results(out)
    assert "samples" in found["niah_single_1", 1024]
    assert found["niah_single_1", 4096]["skipped"] == "the model reads 2,048 tokens at most"
    assert "would not come to an end" in found["ruler_vt", 1024]["skipped"]
    assert "punkt_tab" in found["niah_single_2", 1024]["skipped"]
    assert "SQuAD" in found["ruler_qa_squad", 1024]["skipped"]
    assert "needs recursal/longbench-v2 from the Hub" in found["longbench2", None]["skipped"]
    assert "needs THUDM/LongBench-v2 from the Hub" in found["longbench2_generate", None]["skipped"]
    assert all("\n" not in cell.get("skipped", "") for cell in found.values())


def test_common_words_need_room_for_answers(model):
    loaded = tasks.build("ruler_cwe", 512, tiny.tokenizer(), model, 4096)
    assert tasks.documents_lack_answers(loaded["tasks"])
    loaded = tasks.build("ruler_cwe", 2048, tiny.tokenizer(), model, 4096)
    assert not tasks.documents_lack_answers(loaded["tasks"])


def test_a_run_before_and_after(model, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"model": str(model)}))
    tiny.save(run / "model")
    assert longact_eval(run, "--tasks", "niah_single_1", "--lengths", "1024", "--limit", "3") == 0
    content = json.loads((run / "eval" / "comparison.json").read_text())
    # The same weights give the same answers.
    (row,) = content["differences"]
    assert (row["difference"], row["low"], row["high"], row["samples"]) == (0, 0, 0, 3)
    assert (run / "eval" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "B - A" in capsys.readouterr().out
    # Earlier results stand for their models.
    words = ("--compare", run / "eval" / "before", run / "eval" / "after", "--output", tmp_path / "again")
    assert longact_eval(*words) == 0
    assert json.loads((tmp_path / "again" / "comparison.json").read_text())["differences"] == content["differences"]


def test_two_models_answer_the_same_documents(model, oracle, tmp_path):
    """Also where the second one's tokenizer takes fewer tokens, so that it would get longer documents of its own."""
    shorter = tiny.save(tmp_path / "shorter")
    content = json.loads((shorter / "tokenizer.json").read_text())
    for left, right in [("i", "s"), ("Ġ", "is"), ("T", "h"), ("Th", "e"), ("Ġ", "g"), ("e", "e")]:
        content["model"]["merges"].append([left, right])
        content["model"]["vocab"].setdefault(left + right, len(content["model"]["vocab"]))
    (shorter / "tokenizer.json").write_text(json.dumps(content))
    words = ("--tasks", "niah_single_1", "--lengths", "1536", "--limit", "2", "--output", tmp_path / "out")
    assert longact_eval("--compare", model, shorter, *words) == 0
    first, second = oracle[:2], oracle[2:]
    assert first == second
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["differences"][0]["samples"] == 2
    assert longact_eval(shorter, *words[:-1], tmp_path / "alone") == 0
    assert len(oracle[4]) > len(first[0])


LONGBENCH = [
    {
        "_id": str(i),
        "question": "Which letter?",
        **{f"choice_{letter}": f"{letter} it is" for letter in "ABCD"},
        "choices": [f"{letter} it is" for letter in "ABCD"],
        "answer": "ABCD"[i % 4],
        "context": "word " * 900,
    }
    for i in range(4)
]


@pytest.fixture
def longbench(tmp_path, monkeypatch):
    """Folders in the working directory that stand in for both data sets on the Hub."""
    official = tmp_path / "THUDM" / "LongBench-v2"
    official.mkdir(parents=True)
    (official / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LONGBENCH))
    split = tmp_path / "recursal" / "longbench-v2"
    split.mkdir(parents=True)
    (split / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LONGBENCH))
    index = tasks.manager(["longbench2"]).task_index
    names = {entry.cfg["dataset_name"] for entry in index.values() if entry.cfg and "dataset_name" in entry.cfg}
    configs = "".join(f"- config_name: {name}\n  data_files: train.jsonl\n" for name in sorted(names - {""}))
    (split / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)


def test_longbench_in_both_forms(model, longbench, monkeypatch):
    def generate(reader, requests, disable_tqdm=True):
        return ["The correct answer is **(B)**." for _ in requests]

    monkeypatch.setattr(evaluate.Reader, "generate_until", generate)
    assert longact_eval(model, "--tasks", "longbench2,longbench2_generate", "--output", "out") == 0
    found = ResultFolder(Path("out"))
    official = found.read("longbench2_generate", None)
    assert official.scores == [0, 1, 0, 0] and official.metric == "acc"
    assert "official form" in official.notes[0]
    likelihood = found.read("longbench2", None)
    assert len(likelihood.samples) == 4 * 20 and "likelihoods" in likelihood.notes[0]
    # The text is longer than the model reads: lm-eval drops its beginning, and the official form its middle.
    assert any("lost their beginning" in note for note in likelihood.notes)
    assert not any("lost their beginning" in note for note in official.notes)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (C).", "C"),
        ("**The correct answer is (D)**", "D"),
        ("The correct answer is A", "A"),
        ("The correct answer is B? No. The correct answer is (C)", "C"),
        ("(C)", None),
        ("The correct answer is (E)", None),
    ],
)
def test_official_extraction(answer, letter):
    assert extract(answer) == letter


def test_long_prompts_lose_their_middle():
    tokenizer = tiny.tokenizer()
    prompt = "begin " + "x" * 300 + " end"
    assert cut(tokenizer, prompt, 400) == prompt
    assert cut(tokenizer, prompt, 20) == prompt[:10] + prompt[-10:]


def test_bootstrap_of_yes_and_no_is_binomial():
    """Resampling n differences of which k are 1 gives Binomial(n, k / n) ones."""
    differences = np.repeat([1.0, 0.0], [30, 170])
    low, high = interval([differences])
    assert (low * 200, high * 200) == pytest.approx(binom.ppf([0.025, 0.975], 200, 0.15), abs=1)


def test_bootstrap_keeps_pairs_together():
    """Scores that vary a lot, with a difference that does not vary: a certain difference."""
    a = [{"document": str(i), "score": float(i % 2), "target": "", "answer": ""} for i in range(50)]
    b = [{**sample, "score": sample["score"] + 0.25} for sample in reversed(a)]
    (row,) = compare([Cell("t", 8, samples=a)], [Cell("t", 8, samples=b)])
    assert (row.a, row.b, row.low, row.high, row.samples) == (0.5, 0.75, 0.25, 0.25, 50)


def test_bootstrap_of_a_mean_over_tasks_resamples_each_task():
    rng = np.random.default_rng(3)
    tasks_ = [rng.normal(0.2, 1.0, 400), rng.normal(-0.1, 3.0, 100), rng.normal(0.0, 0.5, 50)]
    low, high = interval(tasks_)
    # Of independent means, by the normal approximation, which these sizes allow.
    error = np.sqrt(sum(values.var() / len(values) for values in tasks_)) / 3
    center = np.mean([values.mean() for values in tasks_])
    assert (low, high) == pytest.approx((center - 1.96 * error, center + 1.96 * error), abs=0.1 * error)


def test_a_single_document_has_no_interval():
    assert np.isnan(interval([np.array([1.0])])).all()


def test_only_shared_documents_are_compared():
    def cell(scores):
        samples = [{"document": name, "score": score, "target": "", "answer": ""} for name, score in scores.items()]
        return Cell("t", 8, samples=samples)

    (row,) = compare([cell({"a": 1.0, "b": 0.0, "c": 0.0})], [cell({"c": 1.0, "a": 1.0, "d": 0.0})])
    assert (row.a, row.b, row.samples) == (0.5, 1.0, 2)
    with pytest.raises(ValueError, match="answered different documents of t at 8"):
        compare([cell({"a": 1.0})], [cell({"b": 1.0})])
    with pytest.raises(ValueError, match="no task and length in common"):
        compare([cell({"a": 1.0})], [Cell("t", 16, samples=[])])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needed either one MODEL or --compare A B"),
        (["MODEL", "--compare", "a", "b"], "needed either one MODEL or --compare A B"),
        (["MODEL", "--lengths", "1k"], "lengths: got '1k', needed a whole number of at least 1"),
        (["MODEL", "--lengths", "0"], "lengths: got '0'"),
        (["MODEL", "--limit", "0"], "limit: got '0', needed a whole number of at least 1"),
        (["MODEL", "--batch_size", "-1"], "batch_size: got '-1'"),
        (["MODEL", "--tasks", ","], "tasks: none given"),
        # lm-eval reads thousands of files before it knows that it has no such task.
        pytest.param(
            ["MODEL", "--tasks", "longbench2_generat"],
            "lm-eval has no 'longbench2_generat'; did you mean 'longbench2_generate'?",
            marks=pytest.mark.slow,
        ),
        (["no-such-user/no-such-model", "--tasks", "niah_single_1"], "could not load 'no-such-user/no-such-model'"),
        (
            ["no/such/folder", "--tasks", "niah_single_1"],
            "could not load 'no/such/folder': found no folder of that name",
        ),
        (
            ["MODEL", "--tasks", "niah_single_1", "--output", "MODEL"],
            "holds something else than results of longact eval; name another --output",
        ),
    ],
)
def test_bad_input_gets_one_line(model, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert longact_eval(*(model if word == "MODEL" else word for word in words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_run_without_a_model_yet(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"model": "smollm2"}')
    assert longact_eval(tmp_path, "--tasks", "niah_single_1") == 2
    assert "has not finished; continue it with longact train --resume" in capsys.readouterr().err


def test_results_of_other_weights_are_left_alone(model, oracle, tmp_path, capsys):
    mine = tiny.save(tmp_path / "mine")
    words = (mine, "--tasks", "niah_single_1", "--lengths", "1024", "--limit", "2", "--output", tmp_path / "out")
    assert longact_eval(*words) == 0
    held = (tmp_path / "out" / "results.json").read_bytes()
    tiny.model(seed=1).save_pretrained(mine)
    assert longact_eval(*words) == 2
    assert "holds results of another state of" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_bytes() == held
