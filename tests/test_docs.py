"""The documentation builds without a warning, its links lead somewhere, and the messages it quotes exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_site_builds_without_a_warning(tmp_path):
    """Sphinx checks links between pages, down to their headings, and that every page is in the navigation."""
    for module in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(module, reason="needs the extra `docs`")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "clip_grad_norm_" in (tmp_path / "api.html").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_messages_that_the_page_on_troubleshooting_quotes_exist():
    source = "".join(path.read_text() for path in (ROOT / "longact_kernels").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # one message, written over several lines
    quoted = re.findall(r"\*\*(?:A warning: )?`([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text())
    quoted = [message.replace("\n", " ") for message in quoted if " " in message]
    assert len(quoted) > 15
    for message in quoted:
        for part in message.removeprefix("FloatingPointError: ").split("…"):
            assert part in source, message
