"""The command `longact`."""

import os
import signal
import sys
from types import FrameType

from longact_kernels.commands.console import FAILED, INTERRUPTED, Refusal, quiet_libraries, refuse, run_command
from longact_kernels.commands.parsers import module_of, root_parser


def main(argv: list[str] | None = None) -> int:
    """Runs a `longact` command; returns its exit status: 0, 1 for a failure, 2 for bad input, 130 after Ctrl-C."""
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments, rest = root_parser().parse_known_args(words or ["--help"])
        quiet_libraries()
        status = run_command(arguments.command, module_of(arguments.command), rest)
        sys.stdout.flush()
        return status
    except Refusal as refusal:
        return refuse("longact", refusal)
    except BrokenPipeError:  # whoever reads what it prints has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def interrupt(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does: it ends the process where that is quiet, while something is imported and once `main` is over.

    Libraries make other errors of an interrupt while they are imported.

    Raises:
        KeyboardInterrupt: anywhere else.
    """
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        if frame.f_code is main.__code__:
            raise KeyboardInterrupt
        frame = frame.f_back
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
