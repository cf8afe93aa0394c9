"""The command `longact`."""

import argparse
import importlib
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
    commands.add_parser(
        "train", add_help=False, help="train a model by RL on a long-context task (--help: all options)"
    )
    _, rest = parser.parse_known_args(argv)
    quiet_libraries()
    try:
        train = importlib.import_module("longact_kernels.rl.train").train
    except ModuleNotFoundError as error:
        print(f"longact: error: {error.name} is missing; run pip install 'longact_kernels[rl]'", file=sys.stderr)
        return BAD_INPUT
    return train(rest)


def quiet_libraries() -> None:
    """Keeps the libraries' warnings and dumps off the screen; what matters to a user, the driver says itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    logging.getLogger("trl").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
