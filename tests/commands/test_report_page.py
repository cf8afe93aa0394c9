"""All pages as a phone shows them: self-contained, light and dark, none wider than it."""

import re
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from matplotlib.image import imread
from rich.console import Console

from longact_kernels.cli import main
from longact_kernels.commands.eval.compare import compare
from longact_kernels.commands.eval.report import comparison_rows, draw_scores, write_page
from longact_kernels.commands.eval.results import Cell
from longact_kernels.commands.study.config import read_study
from longact_kernels.commands.study.report import write_results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = 375  # CSS pixels
STUDY = Path(__file__).parents[2] / "configs" / "study" / "recall.yaml"


def report_of_a_run(root: Path) -> Path:
    options = f"""--model {tiny.save(root / "model")} --length 420 --train_prompts 16 --eval_prompts 3 --max_steps 3
        --per_device_train_batch_size 4 --num_generations 4 --max_completion_length 6 --use_cpu true
        --output_dir {root / "run"}"""
    assert main(["train", *options.split()]) == 0
    return root / "run" / "report.html"


def report_of_a_study(root: Path) -> Path:
    """That of the recall study, with made-up results: three seeds of every arm."""
    study, rng = read_study(STUDY), np.random.default_rng(0)
    results = []
    for name in study.arms:
        for seed in (1, 2, 3):
            before, middle, after = np.cumsum(rng.uniform(0, 0.3, 3)).tolist()
            found = {"arm": name, "seed": seed, "before": before, "after": after, "score": after, "reward": after}
            found |= {"curve": [[0, before], [50, middle], [100, after]], "moved": 0.3, "state": 1.0}
            found |= {"learning_rate": 5e-4, "trained": 90_000}
            found |= {"churn": 0.1, "seconds_per_step": 0.5, "versions": {"torch": f"{seed}.0"}}
            results.append(found)
    write_results(study, root, results, Console(quiet=True))
    return root / "report.html"


def report_of_an_evaluation(root: Path) -> Path:
    tasks, rng = [f"task_{i}" for i in range(6)], np.random.default_rng(0)
    cells = [
        Cell(task, length, "m", [{"document": str(i), "score": float(rng.random() < 0.4)} for i in range(20)])
        for task in tasks
        for length in (1024, 4096)
    ]
    rows = comparison_rows(compare(cells, cells))
    return write_page(root, "scores", "a <model>", "scores", rows, ["a note"], partial(draw_scores, "a", cells))[0]


def report_of_runs(root: Path) -> Path:
    """Two runs side by side, one of which has not finished."""
    run = report_of_a_run(root).parent
    shutil.copytree(run, root / "other")
    (root / "other" / "summary.json").unlink()
    (root / "other" / "run.json").write_text((run / "run.json").read_text().replace('"density": 0.3', '"density": 0.5'))
    assert main(["compare", str(run), str(root / "other"), "--output", str(root / "compare.html")]) == 0
    return root / "compare.html"


@pytest.fixture(scope="module", params=[report_of_a_run, report_of_a_study, report_of_an_evaluation, report_of_runs])
def report(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("page"))


def test_page_needs_nothing_from_elsewhere(report):
    links = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            links.extend(value for name, value in attributes if name in ("src", "href", "srcset"))

    Links().feed(report.read_text())
    assert links and all(link.startswith("data:") for link in links)
    assert "@import" not in report.read_text() and "<script" not in report.read_text()


def test_a_study_says_all_that_its_runs_share(tmp_path):
    page = report_of_a_study(tmp_path).read_text()
    # Pretraining has a learning rate of its own.
    for option, value in (("learning_rate", 0.0005), ("base: learning_rate", 0.005), ("torch", "1.0, 2.0, 3.0")):
        assert f"<td>{option}</td><td><span class=number>{value}</span></td>" in page


def browser(*arguments: object) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=5000", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_page_on_a_phone(report, dark, tmp_path):
    # A frame as wide as a phone: the browser's own window cannot be that narrow.
    frame = tmp_path / "phone.html"
    frame.write_text(
        f"<iframe id=phone width={PHONE} height=3000 style='border:0' src='{report.as_uri()}'></iframe><p id=said></p>"
        "<script>phone.onload = () => { const root = phone.contentDocument.documentElement;"
        "const all = (selector, size) => [...root.querySelectorAll(selector)].map(one => one[size]);"
        "const picture = Math.min(999, ...all('.wide img', 'offsetWidth'));"
        "const number = Math.max(0, ...all('.numbers td', 'offsetHeight'));"
        "const height = root.querySelector('body').offsetHeight;"
        "said.textContent = `said ${root.scrollWidth} ${height} ${picture} ${number}.` }</script>"
    )
    colours = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    said = re.search(r"said (\d+) (\d+) (\d+) (\d+)\.", browser(colours, "--dump-dom", frame))
    width, height, picture, number = map(int, said.groups())
    assert width <= PHONE and height > 500
    # Pictures of a study are 8 inches wide: at this width letters of 11 points are 11 pixels high.
    assert picture >= 8 * 72
    # Numbers stand on a single line.
    assert number < 40
    browser(colours, f"--window-size={PHONE + 20},3000", f"--screenshot={tmp_path / 'phone.png'}", frame)
    pixels = imread(tmp_path / "phone.png")[:, 10:PHONE, :3]
    background = np.median(pixels, (0, 1))
    assert (background < 0.2).all() if dark else (background > 0.95).all()
    # Words and pictures over the whole page, none of them in the colour of the background.
    written = (np.abs(pixels - background).max(2) > 0.3).any(1)
    assert written.reshape(30, -1).any(1)[: min(30, height // 100)].mean() > 0.9
