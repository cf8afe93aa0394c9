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
        "and accuracy on a task, to see which channels the model needs. Channels are chosen on one half of the texts, "
        "perplexity is measured on the other.",
        batches="sequences per domain, half to choose the channels, half for the perplexity",
    )
    parser.add_argument(
        "--statistic", choices=STATISTICS, default="absmax", help="how channels are ranked (default: absmax)"
    )
    parser.add_argument(
        "--mean",
        choices=MEANS,
        default="global",
        help="global: clamp to the mean over all channels and tokens of a layer's queries or keys, as in the paper; "
        "channel: clamp each channel to its own mean over the tokens (default: global)",
    )
    parser.add_argument(
        "--seeds",
        metavar="N,N",
        type=numbers(least=0),
        default=[0, 1, 2],
        help="seeds for the random channels, with commas between them (default: 0,1,2)",
    )
    # Those that need no text of the user's.
    tasks = [name for name, task in TASKS.items() if task.haystack == "noise" or task.fill == "needles"]
    parser.add_argument(
        "--task",
        choices=tasks,
        default="niah_multikey_2",
        metavar="NAME",
        help=f"one of {', '.join(tasks)} (default: niah_multikey_2)",
    )
    parser.add_argument(
        "--task_length",
        metavar="N",
        type=at_least(16),
        default=256,
        help="maximum prompt length in tokens (default: 256)",
    )
    parser.add_argument(
        "--prompts", metavar="N", type=at_least(1), default=64, help="number of prompts of the task (default: 64)"
    )
    parser.add_argument(
        "--max_completion_length",
        metavar="N",
        type=at_least(1),
        default=32,
        help="maximum length of an answer (default: 32)",
    )
    parser.add_argument(
        "--batch_size", metavar="N", type=at_least(1), default=16, help="prompts at a time (default: 16)"
    )
    return parser
