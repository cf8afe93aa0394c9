"""What the reports of `longact train` and `longact compare` say, whatever the data look like."""

import json
import re
import shutil

import pytest
import tiny

from longact_kernels.cli import main
from longact_kernels.commands.compare.report import differences, read_runs
from longact_kernels.commands.files import DETAILS, METRICS, read_lines
from longact_kernels.commands.page import kept, value_of
from longact_kernels.commands.train.evaluate import Evaluation
from longact_kernels.commands.train.figures import CURVES, churn_figure, curves_figure, reward_figure
from longact_kernels.integrations.prompts import question_of
from longact_kernels.tasks.rewards import string_match_any
from longact_kernels.warning import LongActWarning

pytestmark = pytest.mark.usefixtures("no_network")

REWARDS = "def length(completions, **_):\n    return [50.0 + len(one[0]['content']) for one in completions]\n"
CHATS = [
    [{"role": "system", "content": "Only say <b>yes</b>."}],
    [{"role": "user", "content": "first"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "last"}],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "some text\nthe question?\n"}],
]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("a text\nthe question?\n\n", "the question?"),
        ("", ""),
        ([], ""),
        (CHATS[0], "Only say <b>yes</b>."),
        (CHATS[1], "last"),
        (CHATS[2], ""),
        (CHATS[3], "the question?"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}], "What is it?"),
        ([{"role": "user", "content": [{"type": "image"}]}], ""),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "The"}], ""),
        ([{"role": "user"}], ""),
    ],
)
def test_question_of_any_prompt(prompt, question):
    assert question_of(prompt) == question


def test_rewards_read_any_message():
    said = [[{"role": "assistant", "content": [{"type": "text", "text": "it is 7"}]}], [{"role": "assistant"}]]
    assert string_match_any(said, [["7"], ["7"]]) == [1.0, 0.0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on chats with a reward of the user's own."""
    place = tmp_path_factory.mktemp("place")
    (place / "my_rewards.py").write_text(REWARDS)
    (place / "chats.jsonl").write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in CHATS * 3))
    options = f"""--model {tiny.save(place / "model")} --dataset chats.jsonl --reward my_rewards:length --eval_prompts 4
        --max_steps 3 --per_device_train_batch_size 4 --num_generations 4 --max_completion_length 4 --use_cpu true
        --output_dir run --algorithm grpo --beta 0 --learning_rate 1e-3"""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", *options.split()]) == 0
    return place / "run"


def test_report_of_chats_and_a_reward_of_the_users_own(run):
    page = (run / "report.html").read_text()
    assert "held-out reward, 4 prompts" in page and "accuracy" not in page.partition("<h2>Configuration")[0]
    assert "<b>yes</b>" not in page
    assert json.loads((run / "summary.json").read_text())["measure"] == "reward"
    assert all((run / f"{name}.png").is_file() for name in ("reward", "training", "churn", "saliency"))


def test_details_hold_the_churn_of_layers_and_completions(run):
    details = [json.loads(line) for line in (run / "details.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in details] == [record["step"] for record in metrics] == [1, 2, 3]
    for record, logged in zip(details, metrics, strict=True):
        assert record["sample"]["reward"] == 50 + len(record["sample"]["completion"])
        if "churn" in logged:
            assert len(record["churn"]) == 4
            assert sum(record["churn"].values()) / 4 == pytest.approx(logged["churn"])
    assert "churn" in details[-1]
    table = (
        (run / "report.html").read_text().partition("Completions sampled while training")[2].partition("</table>")[0]
    )
    assert table.count("<tr>") == 4


def test_axes_fit_the_rewards():
    metrics = [{"step": i, "reward": 60.0 + i} for i in range(1, 4)]
    ends = [Evaluation([50.0, 52.0], ["", ""]), Evaluation([61.0, 62.0], ["", ""])]
    low, high = reward_figure(metrics, *ends, "reward").axes[0].get_ylim()
    assert 45 < low < 51 and 62 < high < 67
    assert reward_figure([{"step": 1, "reward": 0.2}], *[Evaluation([0.5], [""])] * 2, "accuracy").axes[
        0
    ].get_ylim() == (
        0,
        1.02,
    )


def test_curves_have_the_panels_that_are_logged():
    logs = {
        "a": [{"step": 1, "loss": 0.1, "entropy": None}],
        "b": [{"step": 1, "grad_norm": 1.0}, {"step": 2, "loss": 2.0}],
    }
    shown = [axes for axes in curves_figure(logs, CURVES).axes if axes.axison]
    assert [axes.get_title() for axes in shown] == ["loss", "gradient norm"]
    assert [list(line.get_ydata()) for line in shown[0].lines] == [[0.1], [2.0]]


def test_churn_of_layers():
    details = [{"step": 2, "churn": {"0.q_proj": 0.1, "1.q_proj": 0.3, "0.k_proj": 0.2}}, {"step": 5, "churn": {}}]
    details.append({"step": 4, "churn": {"0.q_proj": 0.2, "1.q_proj": 0.4, "0.k_proj": 0.5}})
    figure = churn_figure([{"step": 2, "churn": 0.2}], sorted(details, key=lambda one: one["step"]))
    assert figure.axes[0].get_ylim()[1] > 0.22  # room for the marker of the highest point
    maps = {axes.get_title(): axes.collections[0].get_array().tolist() for axes in figure.axes if axes.get_title()}
    assert maps == {"q_proj": [[0.1, 0.2], [0.3, 0.4]], "k_proj": [[0.2, 0.5]]}


def test_numbers_are_not_broken():
    assert re.findall(r"<span class=number>(.*?)</span>", kept("0.5 ± 0.1 → 0.7 ± 0.1")) == ["0.5 ± 0.1", "→ 0.7 ± 0.1"]
    parts = re.findall(r"<span class=number>(.*?)</span>", kept("4.7 MB, 0.3 of AdamW 15.9 MB"))
    assert parts == ["4.7 MB,", "0.3", "of AdamW", "15.9 MB"]
    assert value_of(0.0005) == "<span class=number>0.0005</span>" and value_of("x" * 40) == "x" * 40


def test_options_in_which_runs_differ(run, tmp_path):
    options = json.loads((run / "run.json").read_text())
    other = options | {
        "density": 0.5,
        "grpo_config": options["grpo_config"] | {"learning_rate": 1.0, "output_dir": "x"},
    }
    (tmp_path / "run.json").write_text(json.dumps(other))
    found = differences(read_runs([str(run), str(tmp_path)]))
    assert {name: found.pop(name) for name in ("density", "learning_rate")} == {
        "density": [0.3, 0.5],
        "learning_rate": [1e-3, 1.0],
    }
    # Versions of a run that has not finished are not known.
    assert {*found} == {*json.loads((run / "summary.json").read_text())["versions"]}


@pytest.mark.parametrize("damage", ["[]", "7", "{}", '{"step": "2"}', '{"step": null}', f'{{"step": {10**400}}}'])
@pytest.mark.parametrize("name", ["metrics", "details"])
def test_lines_of_another_shape_are_named_and_left_out(run, tmp_path, recwarn, name, damage):
    shape = {"metrics": METRICS, "details": DETAILS}[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_text(f"{damage}\n" + (run / f"{name}.jsonl").read_text())
    assert read_lines(path, shape) == [json.loads(line) for line in path.read_text().splitlines()[1:]]
    (warning,) = [str(one.message) for one in recwarn if one.category is LongActWarning]
    assert warning.startswith(f"{path}: line 1 is damaged (")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *(("metrics", key, value) for key in ("reward", "loss", "churn", "tokens_per_second") for value in ("x", [1])),
        *(("details", "churn", value) for value in (3, {"model.layers.0.self_attn.q_proj": "x"})),
        *(
            ("details", "sample", value)
            for value in ("x", {}, {"step": 1, "reward": "1", "question": "", "completion": ""})
        ),
    ],
)
def test_a_line_with_a_value_of_another_type_is_named_and_the_page_is_written(run, tmp_path, recwarn, name, key, value):
    copied = shutil.copytree(run, tmp_path / "run")
    path = copied / f"{name}.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {key: value}), *others, ""]))
    kept = read_lines(path, {"metrics": METRICS, "details": DETAILS}[name])
    assert len(kept) == len(others)
    told = f"{path}: line 1 is damaged ("
    assert [str(one.message).startswith(told) for one in recwarn if one.category is LongActWarning] == [True]


@pytest.mark.parametrize(
    "content",
    [
        *[{"a": 1}, {"accuracy": 3}, {"accuracy": {"before": "x"}}, {"reward": []}],
        *({"salient_state_bytes": {"longact": 1, **dense}} for dense in ({}, {"dense_adamw": 0}, {"dense_adamw": -1})),
    ],
)
def test_a_summary_of_another_shape_is_named(run, tmp_path, refused, content):
    copied = shutil.copytree(run, tmp_path / "run")
    held = json.loads((copied / "summary.json").read_text()) if "a" not in content else {}
    (copied / "summary.json").write_text(json.dumps(held | content))
    assert f"{copied / 'summary.json'} is damaged" in refused("compare", copied)


def test_compare_takes_runs_only(run, tmp_path, refused):
    assert "holds no training run: it has no run.json" in refused("compare", run, tmp_path)
    assert "twice" in refused("compare", run, f"{run}/")
    assert f"output: {tmp_path} is a folder" in refused("compare", run, "--output", tmp_path)
