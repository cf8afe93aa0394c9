"""`longact study`: its arguments."""

from longact_kernels.commands.console import Parser, at_least


def parser() -> Parser:
    parser = Parser(
        "longact study",
        description="Trains every arm (variant) of a study with several seeds, and compares them. The same command "
        "resumes a study that was stopped.",
    )
    parser.add_argument("study", metavar="STUDY.yaml", help="setting, seeds, options and arms; see configs/study")
    parser.add_argument("--jobs", metavar="N", type=at_least(1), default=2, help="runs at the same time (default: 2)")
    parser.add_argument("--output", metavar="DIR", help="folder for the study (default: runs/study-NAME)")
    return parser


def main(argv: list[str]) -> int:
    """Runs `longact study`; returns the exit status: 0, 1 if a run failed, 130 after Ctrl-C.

    Raises:
        Refusal: bad input.
    """
    arguments = parser().parse_args(argv)
    from longact_kernels.commands.study.run import run

    return run(arguments)
