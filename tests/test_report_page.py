"""The page of a run as a phone shows it: self-contained, in light and dark, nothing wider than the screen."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from matplotlib.image import imread

from longact_kernels.cli import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = 390  # CSS pixels


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    options = f"""--model {tiny.save(root / "model")} --length 420 --train_prompts 16 --eval_prompts 3 --max_steps 3
        --per_device_train_batch_size 4 --num_generations 4 --max_completion_length 6 --use_cpu true
        --output_dir {root / "run"}"""
    assert main(["train", *options.split()]) == 0
    return root / "run" / "report.html"


def test_page_needs_nothing_from_elsewhere(report):
    links = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            links.extend(value for name, value in attributes if name in ("src", "href", "srcset"))

    Links().feed(report.read_text())
    assert links and all(link.startswith("data:") for link in links)
    assert "@import" not in report.read_text() and "<script" not in report.read_text()


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
        "said.textContent = `width ${root.scrollWidth} height ${root.scrollHeight}` }</script>"
    )
    colours = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    width, height = map(int, re.search(r"width (\d+) height (\d+)", browser(colours, "--dump-dom", frame)).groups())
    assert width <= PHONE and height > 1000
    browser(colours, f"--window-size={PHONE + 20},3000", f"--screenshot={tmp_path / 'phone.png'}", frame)
    pixels = imread(tmp_path / "phone.png")[:, 10:PHONE, :3]
    background = np.median(pixels, (0, 1))
    assert (background < 0.2).all() if dark else (background > 0.95).all()
    # Words and pictures over the whole page, none of them in the colour of the background.
    written = (np.abs(pixels - background).max(2) > 0.3).any(1)
    assert written.reshape(30, -1).any(1)[: min(30, height // 100)].mean() > 0.9
