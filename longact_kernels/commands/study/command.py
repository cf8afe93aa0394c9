"""`longact study`: its arguments."""

from longact_kernels.commands.console import Parser, at_least


def main(argv: list[str]) -> int:
    """Runs `longact study`; returns the exit status: 0, 1 if a run failed, 130 after Ctrl-C.

    Raises:
        Refusal: bad input.
    """
    parser = Parser("longact study", description="Trains the arms of a study over several seeds, and compares them.")
    parser.add_argument("study", metavar="STUDY.yaml", help="setting, seeds, options and arms; see configs/study")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="runs side by side (2)")
    parser.add_argument("--output", help="folder to begin in, or to go on in (runs/study-NAME)")
    arguments = parser.parse_args(argv)
    from longact_kernels.commands.study.run import run

    return run(arguments)
