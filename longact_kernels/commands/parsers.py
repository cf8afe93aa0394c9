"""The subcommands of `longact`, and the parsers of all of them."""

from __future__ import annotations

import importlib

from longact_kernels import __version__
from longact_kernels.commands.console import Parser

# Where each subcommand is, and what it does.
COMMANDS = {
    "train": ("train.command", "train a model by RL on a long-context task or your own data"),
    "eval": (
        "eval.command",
        "score a model, two models or a training run on long-context tasks (lm-evaluation-harness)",
    ),
    "compare": ("compare.command", "put training runs side by side on one page"),
    "inspect": ("inspect.command", "measure a model's query and key channels, and how much its salient sets agree"),
    "perturb": ("perturb.command", "clamp query and key channels to their mean, and measure what the model loses"),
    "study": ("study.command", "train several variants over several seeds, and compare them"),
    "kernels": ("kernels", "show what the compiled kernels cost and are predicted to do on each GPU"),
    "tune": ("tune", "measure linear_stats on this GPU, so that it picks the faster implementation"),
    "completion": ("completion", "print a script that completes commands and options in your shell"),
}


def module_of(command: str) -> str:
    return f"longact_kernels.commands.{COMMANDS[command][0]}"


def root_parser(complete: bool = False) -> Parser:
    """The parser of `longact`.

    Args:
        complete: with the options of every subcommand, whose libraries take seconds; else each reads its own.
    """
    parser = Parser(prog="longact", description="Saliency-guided sparse updates (LongAct) for LLM training.")
    parser.add_argument("--version", action="version", version=f"longact {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, about) in COMMANDS.items():
        parents = [importlib.import_module(module_of(name)).parser()] if complete else []
        commands.add_parser(name, add_help=False, help=about, parents=parents)
    return parser
