"""The options of the commands that look into a model: `longact inspect` and `longact perturb`."""

from longact_kernels.commands.console import Parser, at_least
from longact_kernels.integrations.packaged import PACKAGED
from longact_kernels.sparse.config import LongActConfig

DTYPES = ("bfloat16", "float16", "float32", "auto")
STATISTICS = ("absmax", "l2")


def model_parser(prog: str, description: str, batches: str) -> Parser:
    """A parser of the options that both take; `batches` says what the batches are for."""
    parser = Parser(prog, description=description)
    names = f"Hub name, local folder, folder of a training run, {', or '.join(PACKAGED)}"
    parser.add_argument("model", metavar="MODEL", help=names)
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE_OR_FOLDER",
        help="texts to read, each a domain of its own (default: Python's documentation, its code, and needles)",
    )
    parser.add_argument(
        "--length", metavar="N", type=at_least(16), default=1024, help="tokens per sequence (default: 1024)"
    )
    parser.add_argument("--batches", metavar="N", type=at_least(2), default=4, help=f"{batches} (default: 4)")
    parser.add_argument(
        "--density",
        metavar="X",
        type=float,
        help=f"share of each head's channels that is salient (default: the training run's, else "
        f"{LongActConfig.density})",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="data type of the weights (default: bfloat16)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="allow running code from the model's repository"
    )
    parser.add_argument("--output", metavar="DIR", help="new or empty folder for the results (default: under runs/)")
    return parser
