"""`longact eval`: its arguments."""

from longact_kernels.commands.console import Parser, at_least, numbers, refusing
from longact_kernels.integrations.packaged import PACKAGED


def main(argv: list[str]) -> int:
    """Runs `longact eval`; returns the exit status: 0, or 130 after Ctrl-C.

    Raises:
        Refusal: bad input.
    """
    arguments = parser().parse_args(argv)
    from longact_kernels.commands.eval.run import run

    with refusing():
        return run(arguments)


def parser() -> Parser:
    parser = Parser(
        "longact eval",
        description="Scores a model on long-context tasks of lm-evaluation-harness. Given the folder of a training "
        "run, compares the model before and after training.",
    )
    names = f"Hub name, local folder, folder of a training run, {', or '.join(PACKAGED)}"
    parser.add_argument("model", nargs="?", help=names)
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models, or folders of earlier results")
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        default="ruler",
        help="tasks with commas between them: ruler (all 13), longbench2 (lm-eval's: likelihood of the choices), "
        "longbench2_generate (the official form: generated answers), or any task of lm-eval (default: ruler)",
    )
    parser.add_argument(
        "--lengths",
        metavar="N,N",
        type=numbers(least=1),
        default=[4096],
        help="lengths of RULER's tasks in tokens (default: 4096)",
    )
    parser.add_argument(
        "--limit", metavar="N", type=at_least(1), help="documents per task and length (default: all, 500 of RULER's)"
    )
    parser.add_argument("--batch_size", metavar="N", type=at_least(1), default=4, help="prompts at a time (default: 4)")
    parser.add_argument("--output", metavar="DIR", help="folder for the results (default: runs/eval/MODEL or RUN/eval)")
    return parser
