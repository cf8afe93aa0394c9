"""What `longact inspect` and `longact perturb` look at: a model, texts, and a folder for what is found."""

import argparse
import math
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longact_kernels.commands.console import hide_library_bars
from longact_kernels.commands.files import METRICS, read_json, read_lines, write_json
from longact_kernels.commands.inspect.channels import Part, find_parts
from longact_kernels.commands.inspect.text import Domain, load_domains, sequences
from longact_kernels.integrations.transformers import load_model
from longact_kernels.sparse.config import LongActConfig

VERSIONS = ("longact_kernels", "torch", "transformers")


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
        write_json(self.folder / name, results | about)


def load(arguments: argparse.Namespace, kind: str, console: Console) -> Subject:
    """Checks the arguments, the cheap ones first, and loads what they name.

    Args:
        kind: of analysis, which the folder is called after.

    Raises:
        ValueError: for whatever is wrong with them; nothing has been written then.
    """
    folder = Path(arguments.output or f"runs/{kind}-{Path(arguments.model).name}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"output: {folder} exists and is not an empty folder; name another --output")
    domains = load_domains(arguments.text)
    density: Any = LongActConfig.density if arguments.density is None else arguments.density
    LongActConfig(density=density)
    source, metrics = arguments.model, []
    run = Path(arguments.model)
    if (run / "run.json").is_file():
        if not (run / "model").is_dir():
            raise ValueError(f"model: the training run {run} has not finished; continue it with longact train --resume")
        source, metrics = str(run / "model"), read_lines(run / "metrics.jsonl", METRICS)
        if arguments.density is None:
            density = read_json(run / "run.json").get("density", density)
            if not isinstance(density, float):
                raise ValueError(f"density: the training run {run} has one for each pattern; give one with --density")
    hide_library_bars()
    with console.status(f"loading {escape(source)}"):
        model, tokenizer = load_model(
            source,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            device_map="auto" if torch.accelerator.is_available() else None,
        )
        model.eval()
        subject = Subject(model, tokenizer, find_parts(model), domains, {}, metrics, density, folder)
        subject.check("length", arguments.length)
        for domain in domains:
            subject.texts[domain.name] = sequences(domain, tokenizer, arguments.batches, arguments.length)
    return subject
