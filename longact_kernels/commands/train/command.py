"""`longact train`: how it begins and ends."""

import shlex
import sys

from longact_kernels.commands.console import INTERRUPTED, Parser, refusing


def parser() -> Parser:
    from longact_kernels.commands.train.arguments import TrainParser

    return TrainParser()


def main(argv: list[str]) -> int:
    """Runs `longact train`; returns the exit status: 0, or 130 after Ctrl-C.

    Raises:
        Refusal: bad input; no run has been touched then, unless a reward function showed only in training that its
            values are none.
    """
    hides_peft = {"-h", "--help", "--help-all"} & {*argv} and "peft" not in sys.modules
    if hides_peft:
        # transformers imports it where it is installed, which takes as long as all else that the help needs.
        sys.modules["peft"] = None  # type: ignore[assignment]
    try:
        from longact_kernels.commands.train.arguments import parse

        if hides_peft:
            parse(argv)  # says its help, and ends
    finally:
        if hides_peft:
            del sys.modules["peft"]

    with refusing():
        arguments, training = parse(argv)
        from rich.console import Console

        from longact_kernels.commands.train.run import Run
        from longact_kernels.integrations.rewards import BadReward

        run = Run(arguments, training, Console(quiet=training.process_index > 0))
    try:
        with refusing(BadReward):
            with run.interrupt:
                before = run.train()
            if not run.interrupt.asked:
                run.finish(before, run.evaluate("after"))
                return 0
    except KeyboardInterrupt:
        pass
    finally:
        run.folder.close()
    command = shlex.join(["longact", "train", *(word for word in argv if word != "--resume"), "--resume"])
    run.console.print(f"Stopped. The last checkpoint is from step {run.folder.saved_step}. To continue:")
    run.console.print(command, soft_wrap=True, markup=False, highlight=False)
    return INTERRUPTED
