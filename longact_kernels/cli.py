"""The command `longact`."""

import sys

from longact_kernels.commands.console import Refusal, quiet_libraries, refuse, run_command
from longact_kernels.commands.parsers import module_of, root_parser


def main(argv: list[str] | None = None) -> int:
    """Runs a `longact` command; returns its exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments, rest = root_parser().parse_known_args(words or ["--help"])
    except Refusal as refusal:
        return refuse("longact", refusal)
    quiet_libraries()
    return run_command(arguments.command, module_of(arguments.command), rest)


if __name__ == "__main__":
    sys.exit(main())
