"""What every command shows and returns: progress, one line for what is wrong, exit codes."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import itertools
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import requires
from typing import TYPE_CHECKING, NoReturn

from longact_kernels.warning import LongActWarning

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
PACKAGES = {"yaml": "pyyaml"}  # which are called otherwise than their modules
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


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about a word that is not known: the nearest that is, or else `otherwise`."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; {otherwise}" if otherwise else ""


class Parser(argparse.ArgumentParser):
    """A command's parser: what is wrong with its arguments is a refusal, not a page of usage.

    Options are written out: a short form would mean another option once there is one more that begins like it.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"allow_abbrev": False})

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):  # type: ignore[override]
        """As argparse's, but a misspelt option is told first, with the nearest that there is."""
        words = sys.argv[1:] if args is None else args
        known = [name for action in self._actions for name in action.option_strings]
        for name in (word.partition("=")[0] for word in words if word.startswith("--") and word != "--"):
            if name not in known:
                self.error(f"there is no option {name!r}{did_you_mean(name, known, f'see {self.prog} --help')}")
        arguments, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(
                f"got {rest[0]!r}, which belongs to no option; put commas between the values of an option, as in "
                "1024,4096"
            )
        return arguments

    def _check_value(self, action: argparse.Action, value) -> None:
        choices = action.choices
        if choices is not None and value not in choices:
            names = [str(choice) for choice in choices]
            needed = f"got {value!r}, needed one of {', '.join(names)}"
            raise argparse.ArgumentError(action, needed + did_you_mean(str(value), names))

    def error(self, message: str) -> NoReturn:
        raise Refusal(message.removeprefix("argument "))


def run_command(name: str, module: str, argv: list[str]) -> int:
    """Runs a command: `main(argv)` of its module, which is imported only now, since its libraries take seconds.

    Returns:
        The exit status: what `main` returned, 2 after a refusal, 1 after a failure.
    """
    try:
        return importlib.import_module(module).main(argv)
    except Refusal as refusal:
        return refuse(f"longact {name}", refusal)
    except Failure as failure:
        return refuse(f"longact {name}", failure, FAILED)
    except OSError as failure:
        if failure.errno == errno.ENAMETOOLONG and failure.filename:
            return refuse(f"longact {name}", too_long(str(failure.filename), argv))
        if failure.filename is None and failure.errno not in FULL_OR_BROKEN:
            raise
        where = f"cannot read or write {failure.filename or 'a file'}"
        return refuse(f"longact {name}", f"{where} ({failure.strerror})", FAILED)
    except (ImportError, RuntimeError) as error:  # libraries that import late make others of the first
        if (missing := missing_module(error)) is None:
            raise
        needed = requirements(EXTRAS.get(name, "rl"))
        if PACKAGES.get(missing, missing) not in (re.split(r"[^\w-]", one)[0].replace("-", "_") for one in needed):
            needed = [missing]
        return refuse(f"longact {name}", f"{missing} is not installed; run pip install {shlex.join(needed)}")


def refuse(who: str, error: object, status: int = BAD_INPUT) -> int:
    """Says in one line what is wrong; returns the exit status."""
    # Of several processes one says it.
    if os.environ.get("RANK", "0") == "0":
        print(f"{who}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def too_long(path: str, argv: Sequence[str]) -> str:
    """What is wrong with a path that no file can have, by the option that names it on the command line."""
    words = ["", *(part for word in argv for part in word.split("=", 1))]
    option = max(itertools.pairwise(words), key=lambda one: len(one[1]) * (one[1] in path))[0]
    named = f"{option.removeprefix('--')}: " * option.startswith("--")
    return f"{named}got {path[:40]!r}…, a path of {len(path)} characters, which no file can have; needed shorter names"


def missing_module(error: BaseException | None) -> str | None:
    """The top-level module whose absence is behind an error; None if it is something else."""
    name = None
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            name = error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return name


def requirements(extra: str) -> list[str]:
    """What an extra of this package asks for: the packages, so that an index that has not this one will do."""
    found = []
    for line in requires("longact_kernels") or []:
        package, _, marker = (part.strip() for part in line.partition(";"))
        if f'extra == "{extra}"' in marker.replace("'", '"'):
            name, _, others = package.rstrip("]").partition("[")
            own = name.replace("-", "_") == "longact_kernels"
            found += [one for other in others.split(",") for one in requirements(other)] if own else [package]
    return found


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
