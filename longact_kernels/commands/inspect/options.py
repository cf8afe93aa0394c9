"""The options of the commands that look into a model: `longact inspect` and `longact perturb`."""

from longact_kernels.commands.console import Parser, at_least
from longact_kernels.sparse.config import LongActConfig

DTYPES = ("bfloat16", "float16", "float32", "auto")
STATISTICS = ("absmax", "l2")


def model_parser(prog: str, description: str, batches: str) -> Parser:
    """A parser of the options that both take; `batches` says what the batches are for."""
    parser = Parser(prog, usage=f"{prog} MODEL [options]", description=description, allow_abbrev=False)
    parser.add_argument(
        "model", metavar="MODEL", help="Hub name, local folder, folder of a `longact train` run, or smollm2"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE_OR_FOLDER",
        help="text to read, each a domain of its own; Python's documentation and code, and needles, if not given",
    )
    parser.add_argument("--length", type=at_least(16), default=1024, help="tokens of a sequence (default 1024)")
    parser.add_argument("--batches", type=at_least(2), default=4, help=f"{batches} (default 4)")
    parser.add_argument(
        "--density",
        type=float,
        help="share of each head's channels that is salient (default: the run's where MODEL is one, else "
        f"{LongActConfig.density})",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model's repository brings")
    parser.add_argument("--output", metavar="DIR", help="folder for results, new or empty (default: under runs/)")
    return parser
