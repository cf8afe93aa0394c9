"""What every command shows and returns: progress, one line for what is wrong, exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from longact_kernels.warning import LongActWarning

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
EXTRAS = {"eval": "eval", "study": "study"}  # all others need the extra `rl`


class Refusal(ValueError):
    """What the user gave cannot be taken; the message names it and says what to do."""


class Failure(RuntimeError):
    """What a command cannot do, though all that it was given is right, as on a full disk; the message is one line."""


@contextmanager
def refusing(errors: type[Exception] = ValueError) -> Iterator[None]:
    """Turns errors into a refusal: inside, they are about what the user gave."""
    try:
        yield
    except errors as error:
        raise Refusal(str(error)) from error


class Parser(argparse.ArgumentParser):
    """A command's parser: what is wrong with its arguments is a refusal, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise Refusal(message)


def run_command(name: str, module: str, argv: list[str]) -> int:
    """Runs a command: `main(argv)` of its module, which is imported only now, since its libraries take seconds.

    Returns:
        The exit status: what `main` returned, 2 after a refusal, 1 after a failure, 130 after Ctrl-C.
    """
    status = BAD_INPUT
    try:
        return importlib.import_module(module).main(argv)
    except Refusal as refusal:
        error = str(refusal)
    except Failure as failure:
        status, error = FAILED, str(failure)
    except OSError as failure:
        if failure.errno not in FULL_OR_READ_ONLY:
            raise
        status, error = FAILED, f"cannot write {failure.filename or ''} ({failure.strerror})"
    except ModuleNotFoundError as missing:
        error = f"{missing.name} is missing; run pip install 'longact_kernels[{EXTRAS.get(name, 'rl')}]'"
    except KeyboardInterrupt:
        return INTERRUPTED
    # Of several processes one says it.
    if os.environ.get("RANK", "0") == "0":
        print(f"longact {name}: error: {' '.join(error.split())}", file=sys.stderr)
    return status


def quiet_libraries() -> None:
    """Keeps other libraries' warnings and dumps off the screen, and shows our own without the line that gave them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=LongActWarning)
    warnings.formatwarning = lambda message, *_, **__: f"longact: warning: {message}\n"
    logging.getLogger("trl").setLevel(logging.ERROR)


def hide_library_bars() -> None:
    """Turns off the bars of other libraries, which would break ours."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def progress_bar(console: Console) -> Progress:
    """A bar with elapsed and remaining time, and the task's `note` field behind its name."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        # Steps are long: an estimate from the last 30 seconds, rich's default, would see one of them or none.
        speed_estimate_period=3600,
        disable=not console.is_terminal,
    )


def at_least(least: int):
    """A type of option: whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, needed a whole number of at least {least}")
        return int(text)

    return parse


def numbers(least: int):
    """A type of option: whole numbers from `least` on, with commas between them."""
    return lambda text: [at_least(least)(one) for one in text.split(",")]
