"""`longact inspect`: its arguments."""

from longact_kernels.commands.console import Parser, numbers, refusing
from longact_kernels.commands.inspect.options import model_parser


def main(argv: list[str]) -> int:
    """Runs `longact inspect`; returns the exit status, 0.

    Raises:
        Refusal: bad input, or a model whose activations are not finite.
    """
    arguments = parser().parse_args(argv)
    from rich.console import Console

    from longact_kernels.commands.inspect.run import Inspection

    with refusing():
        inspection = Inspection(arguments, Console())
    with refusing(FloatingPointError):
        inspection.run()
    return 0


def parser() -> Parser:
    parser = model_parser(
        "longact inspect",
        "Measures the query and key channels of a model, and how much its salient sets agree: chosen by absmax and "
        "by L2, from different batches, from different texts, and from contexts of different lengths.",
        batches="sequences per domain; each is a batch of its own",
    )
    parser.add_argument(
        "--lengths",
        metavar="N,N",
        type=numbers(least=16),
        help="context lengths to compare, with commas between them (default: 256,512,...,8192, up to the model's "
        "limit)",
    )
    return parser
