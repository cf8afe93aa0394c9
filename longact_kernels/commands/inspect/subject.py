"""What the commands of the analyses have in common: arguments, model, folder, and how they fail."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from longact_kernels.commands.inspect.channels import Part, find_parts
from longact_kernels.commands.inspect.text import Domain, load_domains, sequences
from longact_kernels.commands.train.callbacks import read_metrics
from longact_kernels.integrations.transformers import load_model

BAD_INPUT = 2
INTERRUPTED = 130
DTYPES = ("bfloat16", "float16", "float32", "auto")
VERSIONS = ("longact_kernels", "torch", "transformers")


class Parser(argparse.ArgumentParser):
    """A parser with errors as exceptions, and with the arguments that every analysis takes."""

    def __init__(self, prog: str, description: str, batches: str):
        super().__init__(usage=f"{prog} MODEL [options]", description=description, allow_abbrev=False)
        self.add_argument(
            "model", metavar="MODEL", help="Hub name, local folder, folder of a `longact train` run, or smollm2"
        )
        self.add_argument(
            "--text",
            nargs="+",
            default=[],
            metavar="FILE_OR_FOLDER",
            help="text to read, each a domain of its own; Python's documentation and code, and needles, if not given",
        )
        self.add_argument("--length", type=at_least(16), default=1024, help="tokens of a sequence (default 1024)")
        self.add_argument("--batches", type=at_least(2), default=4, help=f"{batches} (default 4)")
        self.add_argument(
            "--density",
            type=share,
            help="share of each head's channels that is salient (default: the run's where MODEL is one, else 0.3)",
        )
        self.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
        self.add_argument(
            "--trust_remote_code", action="store_true", help="run code that the model's repository brings"
        )
        self.add_argument("--output", metavar="DIR", help="folder for results, new or empty (default: under runs/)")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, needed a whole number of at least {least}")
        return int(text)

    return parse


def numbers(least: int) -> Callable[[str], list[int]]:
    """Reads whole numbers with commas between them."""
    return lambda text: [at_least(least)(one) for one in text.split(",")]


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, needed a share above 0 and up to 1, such as 0.3")
    return value


@dataclass
class Subject:
    """What an analysis looks at: a model, the texts that it reads, and the folder for what is found.

    Attributes:
        parts: the model's query and key channels.
        texts: of each domain, int64 [batches, length].
        metrics: of the run that trained the model; empty for a model of no run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parts: list[Part]
    domains: list[Domain]
    texts: dict[str, Tensor]
    metrics: list[dict]
    density: float
    folder: Path

    @property
    def context(self) -> float:
        """The most tokens that the model was made for; infinite if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def check(self, argument: str, length: int) -> None:
        """ValueError if the model does not read as many tokens."""
        if length > self.context:
            raise ValueError(f"{argument}: got {length}, but the model reads {self.context} tokens at most")

    def write(self, name: str, results: dict) -> None:
        """Writes results as JSON, with what is needed to repeat them."""
        about = {
            "density": self.density,
            "domains": {domain.name: domain.source for domain in self.domains},
            "versions": {package: version(package) for package in VERSIONS} | {"python": sys.version.split()[0]},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(json.dumps(results | about, indent=2) + "\n")


def load(arguments: argparse.Namespace, kind: str, console: Console) -> Subject:
    """Checks the arguments, the cheap ones first, and loads what they name.

    Args:
        kind: of analysis, which the folder is called after.

    Raises:
        ValueError: for whatever is wrong with them; nothing has been written then.
    """
    folder = Path(arguments.output or f"runs/{kind}-{Path(arguments.model).name}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"output: {folder} is there already and not an empty folder; name another --output")
    domains = load_domains(arguments.text)
    source, density, metrics = arguments.model, 0.3, []
    run = Path(arguments.model)
    if (run / "run.json").is_file():
        if not (run / "model").is_dir():
            raise ValueError(f"model: the run in {run} has not finished; go on with it by longact train --resume")
        source, metrics = str(run / "model"), read_metrics(run / "metrics.jsonl")
        density = json.loads((run / "run.json").read_text()).get("density", density)
    logging.disable_progress_bar()
    with console.status(f"loading {source}"):
        model, tokenizer = load_model(
            source,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            device_map="auto" if torch.accelerator.is_available() else None,
        )
        model.eval()
        subject = Subject(
            model, tokenizer, find_parts(model), domains, {}, metrics, arguments.density or density, folder
        )
        subject.check("length", arguments.length)
        for domain in domains:
            subject.texts[domain.name] = sequences(domain, tokenizer, arguments.batches, arguments.length)
    return subject


class Analysis(Protocol):
    """Checks and loads when it is made, and raises ValueError for bad input; then runs."""

    def __init__(self, argv: list[str], console: Console): ...

    def run(self) -> None: ...


def run_command(prog: str, analysis: type[Analysis], argv: list[str]) -> int:
    """Runs a command; returns its exit status: 0, 2 for bad input (told in one line), 130 after Ctrl-C."""
    try:
        try:
            found = analysis(argv, Console())
        except ValueError as error:
            return bad_input(prog, error)
        found.run()
    except FloatingPointError as error:
        return bad_input(prog, error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def bad_input(prog: str, error: Exception) -> int:
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
