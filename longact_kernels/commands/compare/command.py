"""`longact compare`: its arguments."""

from pathlib import Path

from longact_kernels.commands.console import Parser, Refusal, refusing


def main(argv: list[str]) -> int:
    """Runs `longact compare`; returns the exit status, 0.

    Raises:
        Refusal: bad input.
    """
    arguments = parser().parse_args(argv)
    if arguments.output and Path(arguments.output).is_dir():
        raise Refusal(f"output: {arguments.output} is a folder; name a file, such as compare.html")
    from longact_kernels.commands.compare.report import read_runs, write_comparison

    with refusing():
        runs = read_runs(arguments.runs)
    print(write_comparison(runs, arguments.output))
    return 0


def parser() -> Parser:
    parser = Parser(
        "longact compare",
        description="Puts training runs side by side on one page: curves, results, and the options in which they "
        "differ. Runs may still be training.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument("--output", metavar="FILE.html", help="the page (default: runs/compare-RUN-RUN.html)")
    return parser
