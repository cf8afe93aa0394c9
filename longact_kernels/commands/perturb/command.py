"""`longact perturb`: its arguments."""

from longact_kernels.commands.console import Parser, at_least, numbers, refusing
from longact_kernels.commands.inspect.options import STATISTICS, model_parser
from longact_kernels.tasks.catalogue import TASKS

MEANS = ("global", "channel")


def main(argv: list[str]) -> int:
    """Runs `longact perturb`; returns the exit status, 0.

    Raises:
        Refusal: bad input, or a model whose activations are not finite.
    """
    arguments = parser().parse_args(argv)
    from rich.console import Console

    from longact_kernels.commands.perturb.run import Perturbation

    with refusing():
        perturbation = Perturbation(arguments, Console())
    with refusing(FloatingPointError):
        perturbation.run()
    return 0


def parser() -> Parser:
    parser = model_parser(
        "longact perturb",
        "Clamps the top, random or bottom query and key channels of every head to a mean, and measures perplexity "
        "and the accuracy at a task: what the model cannot do without, it computes with. Sets and means come from "
        "one half of the texts, perplexity from the other.",
        batches="sequences of each domain, half of them to choose channels by, half for the perplexity",
    )
    parser.add_argument(
        "--statistic", choices=STATISTICS, default="absmax", help="what channels are ranked by (default absmax)"
    )
    parser.add_argument(
        "--mean",
        choices=MEANS,
        default="global",
        help="clamp to the mean over all channels and tokens of a layer's queries or keys (global, the paper's; "
        "default), or each channel to its own mean over the tokens (channel)",
    )
    parser.add_argument(
        "--seeds", type=numbers(least=0), default=[0, 1, 2], help="of the random channels (default 0,1,2)"
    )
    # Those that need no text of the user's.
    tasks = [name for name, task in TASKS.items() if task.haystack == "noise" or task.fill == "needles"]
    parser.add_argument("--task", choices=tasks, default="niah_multikey_2", help=f"one of {', '.join(tasks)}")
    parser.add_argument("--task_length", type=at_least(16), default=256, help="tokens of a prompt (default 256)")
    parser.add_argument("--prompts", type=at_least(1), default=64, help="prompts of the task (default 64)")
    parser.add_argument("--max_completion_length", type=at_least(1), default=32, help="of an answer (default 32)")
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="prompts at a time (default 16)")
    return parser
