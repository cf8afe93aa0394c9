"""The command `longact`."""

import argparse
import logging
import os
import sys
import warnings

from longact_kernels import LongActWarning, __version__

BAD_INPUT = 2
ANALYSES = {
    "inspect": "how large a model's query and key channels are, and how far its salient sets agree",
    "perturb": "what a model loses when its top, random or bottom query and key channels are clamped to a mean",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a `longact` command; returns its exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="longact", description="Saliency-guided sparse updates for LLM training.")
    parser.add_argument("--version", action="version", version=f"longact {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Everything after `train` is for TRL's parser, and the analyses read their own arguments.
    commands.add_parser(
        "train", add_help=False, help="train a model by RL on a long-context task (--help: all options)"
    )
    evaluation = commands.add_parser(
        "eval", help="long-context tasks by lm-evaluation-harness: one model, two side by side, a run before and after"
    )
    evaluation.add_argument("model", nargs="?", help="Hub name, local folder, smollm2, or the folder of a training run")
    evaluation.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models, or folders of earlier results")
    evaluation.add_argument(
        "--tasks",
        default="ruler",
        help="ruler (its 13 tasks), longbench2 (lm-eval's: likelihood of the choices), longbench2_generate (the "
        "official form: an answer is generated), or any of lm-eval, separated by commas (ruler)",
    )
    evaluation.add_argument(
        "--lengths", default="4096", help="lengths in tokens of RULER's tasks, such as 1024,4096 (4096)"
    )
    evaluation.add_argument("--limit", type=int, help="documents of each task and length (all: 500 of RULER's)")
    evaluation.add_argument("--batch_size", type=int, default=4, help="prompts at a time (4)")
    evaluation.add_argument(
        "--output", help="folder for results.json, table and picture (runs/eval/MODEL, or RUN/eval)"
    )
    kernels = commands.add_parser("kernels", help="what the compiled kernels cost, and are predicted to do, by GPU")
    kernels.add_argument("--target", help="all variants on one architecture, such as sm_90, instead of the main ones")
    kernels.add_argument("--json", action="store_true", help="print JSON in place of tables")
    for name, text in ANALYSES.items():
        commands.add_parser(name, add_help=False, help=text)
    study = commands.add_parser("study", help="arms of training against one another over several seeds, resumable")
    study.add_argument("study", metavar="STUDY.yaml", help="setting, seeds, options and arms; see configs/study")
    study.add_argument("--jobs", type=int, default=2, help="runs side by side (2)")
    study.add_argument("--output", help="folder to begin in, or to go on in (runs/study-NAME)")
    commands.add_parser("tune", help="measure linear_stats on this GPU, for the choice that it makes by itself")
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in ("train", *ANALYSES):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    quiet_libraries()
    # A command's libraries take seconds to import: only those of the command that runs are.
    try:
        if arguments.command == "kernels":
            from longact_kernels.commands.kernels import kernels_command

            return kernels_command(arguments.target, arguments.json)
        if arguments.command == "tune":
            from longact_kernels.commands.tune import tune_command

            return tune_command()
        if arguments.command == "eval":
            from longact_kernels.commands.eval.command import eval_command

            return eval_command(arguments)
        if arguments.command == "study":
            from longact_kernels.commands.study.command import study_command

            return study_command(arguments)
        if arguments.command == "inspect":
            from longact_kernels.commands.inspect.command import inspect_command

            return inspect_command(rest)
        if arguments.command == "perturb":
            from longact_kernels.commands.perturb.command import perturb_command

            return perturb_command(rest)
        from longact_kernels.commands.train.run import train

        return train(rest)
    except ModuleNotFoundError as error:
        extra = arguments.command if arguments.command in ("eval", "study") else "rl"
        print(f"longact: error: {error.name} is missing; run pip install 'longact_kernels[{extra}]'", file=sys.stderr)
        return BAD_INPUT


def quiet_libraries() -> None:
    """Keeps other libraries' warnings and dumps off the screen, and shows our own without the line that gave them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=LongActWarning)
    warnings.formatwarning = lambda message, *_, **__: f"longact: warning: {message}\n"
    logging.getLogger("trl").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
