"""`longact eval`: its arguments."""

from longact_kernels.commands.console import Parser, refusing


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
    parser = Parser("longact eval", description="Evaluates a model on long-context tasks, by lm-evaluation-harness.")
    parser.add_argument("model", nargs="?", help="Hub name, local folder, smollm2, or the folder of a training run")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models, or folders of earlier results")
    parser.add_argument(
        "--tasks",
        default="ruler",
        help="ruler (its 13 tasks), longbench2 (lm-eval's: likelihood of the choices), longbench2_generate (the "
        "official form: an answer is generated), or any of lm-eval, separated by commas (ruler)",
    )
    parser.add_argument(
        "--lengths", default="4096", help="lengths in tokens of RULER's tasks, such as 1024,4096 (4096)"
    )
    parser.add_argument("--limit", type=int, help="documents of each task and length (all: 500 of RULER's)")
    parser.add_argument("--batch_size", type=int, default=4, help="prompts at a time (4)")
    parser.add_argument("--output", help="folder for results.json, table and picture (runs/eval/MODEL, or RUN/eval)")
    return parser
