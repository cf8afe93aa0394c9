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
        "How large the query and key channels of a model are, and how far the salient sets agree that are chosen "
        "by absmax and by L2, from other batches, from other texts, and from contexts of other lengths.",
        batches="sequences of each domain; each is a batch with salient sets of its own",
    )
    parser.add_argument(
        "--lengths",
        type=numbers(least=16),
        help="context lengths to compare, with commas (default: 256, 512, ..., 8192, as far as the model reads)",
    )
    return parser
