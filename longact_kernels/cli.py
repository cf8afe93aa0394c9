"""The command `longact`."""

import argparse
import logging
import os
import sys
import warnings

from longact_kernels import __version__

BAD_INPUT = 2


def main(argv: list[str] | None = None) -> int:
    """Runs a `longact` command; returns its exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="longact", description="Saliency-guided sparse updates for LLM training.")
    parser.add_argument("--version", action="version", version=f"longact {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Everything after `train` is for TRL's parser.
    commands.add_parser(
        "train", add_help=False, help="train a model by RL on a long-context task (--help: all options)"
    )
    kernels = commands.add_parser("kernels", help="what the compiled kernels cost, and are predicted to do, by GPU")
    kernels.add_argument("--target", help="all variants on one architecture, such as sm_90, instead of the main ones")
    kernels.add_argument("--json", action="store_true", help="print JSON in place of tables")
    commands.add_parser("tune", help="measure linear_stats on this GPU, for the choice that it makes by itself")
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    quiet_libraries()
    # A command's libraries take seconds to import: only those of the command that runs are.
    try:
        if arguments.command == "kernels":
            from longact_kernels.budgets import kernels_command

            return kernels_command(arguments.target, arguments.json)
        if arguments.command == "tune":
            from longact_kernels.tune import tune_command

            return tune_command()
        from longact_kernels.rl.train import train

        return train(rest)
    except ModuleNotFoundError as error:
        print(f"longact: error: {error.name} is missing; run pip install 'longact_kernels[rl]'", file=sys.stderr)
        return BAD_INPUT


def quiet_libraries() -> None:
    """Keeps the libraries' warnings and dumps off the screen; what matters to a user, the driver says itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    logging.getLogger("trl").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
