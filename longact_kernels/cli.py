"""The command `longact`."""

import argparse
import sys

from longact_kernels import __version__
from longact_kernels.commands.console import quiet_libraries, run_command

# Where the `main` of each subcommand is, and what it does.
COMMANDS = {
    "train": ("train.command", "train a model by RL on a long-context task (--help: all options)"),
    "eval": (
        "eval.command",
        "long-context tasks by lm-evaluation-harness: one model, two side by side, a run before and after",
    ),
    "kernels": ("kernels", "what the compiled kernels cost, and are predicted to do, by GPU"),
    "inspect": (
        "inspect.command",
        "how large a model's query and key channels are, and how far its salient sets agree",
    ),
    "perturb": (
        "perturb.command",
        "what a model loses when its top, random or bottom query and key channels are clamped to a mean",
    ),
    "study": ("study.command", "arms of training against one another over several seeds, resumable"),
    "tune": ("tune", "measure linear_stats on this GPU, for the choice that it makes by itself"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a `longact` command; returns its exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="longact", description="Saliency-guided sparse updates for LLM training.")
    parser.add_argument("--version", action="version", version=f"longact {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, about) in COMMANDS.items():
        # Each command reads its own arguments.
        commands.add_parser(name, add_help=False, help=about)
    arguments, rest = parser.parse_known_args(argv)
    quiet_libraries()
    return run_command(arguments.command, f"longact_kernels.commands.{COMMANDS[arguments.command][0]}", rest)


if __name__ == "__main__":
    sys.exit(main())
