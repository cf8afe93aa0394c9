"""What happens around the trainer's steps: progress on the screen, the files of logs, a graceful Ctrl-C."""

import json
import signal
import time
from pathlib import Path
from types import FrameType

from accelerate.utils import gather_object
from rich.console import Console
from transformers import TrainerCallback, TrainerState

from longact_kernels import LongAct
from longact_kernels.commands.console import progress_bar
from longact_kernels.commands.files import DETAILS, METRICS, append_line, read_lines, write_whole
from longact_kernels.commands.train.folder import RunFolder, in_first_process
from longact_kernels.commands.train.trainer import DriverTrainer


class LockCheck(TrainerCallback):
    """Looks at every step whether the folder is still this run's, before the step is logged and saved."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs):
        in_first_process(self.folder.check_lock)

    def on_step_end(self, args, state, control, **kwargs):
        in_first_process(self.folder.check_lock)


class LinesFile(TrainerCallback):
    """A file with a line of JSON for each log of the loss, written by the first process.

    Args:
        path: the file; what it holds of steps after `resumed_step` is dropped, since they are taken again.
        resumed_step: the step of the checkpoint that the run goes on from; 0 for a new run.

    Attributes:
        shape: of a line.
    """

    shape: dict

    def __init__(self, path: Path, resumed_step: int = 0):
        self.path, self.resumed_step = path, resumed_step

    def record(self, state: TrainerState, logs: dict) -> dict:
        """What a line has of a log, beside its step."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        in_first_process(self._drop_later)

    def _drop_later(self) -> None:
        kept = [record for record in read_lines(self.path, self.shape) if record["step"] <= self.resumed_step]
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            in_first_process(lambda: append_line(self.path, {"step": state.global_step, **self.record(state, logs)}))


class MetricsFile(LinesFile):
    """`metrics.jsonl`: all that is logged, with the seconds a step took and tokens per second.

    Steps on completions that were generated before have no reward of their own.

    Args:
        path, resumed_step: of `LinesFile`.
    """

    shape = METRICS

    def __init__(self, path: Path, resumed_step: int = 0):
        super().__init__(path, resumed_step)
        self.steps = 0
        self.seconds = 0.0
        self.tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.tokens = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.began
        self.steps += 1

    def record(self, state, logs):
        logs["seconds_per_step"] = self.seconds / self.steps
        logs["tokens_per_second"] = (state.num_input_tokens_seen - self.tokens) / self.seconds
        self.steps, self.seconds, self.tokens = 0, 0.0, state.num_input_tokens_seen
        return logs


class DetailsFile(LinesFile):
    """`details.jsonl`: the churn of each layer, and a completion of those that were generated.

    Args:
        path, resumed_step: of `LinesFile`.
        trainer: which generates.
        longact: None for a dense run.
    """

    shape = DETAILS

    def __init__(self, path: Path, resumed_step: int, trainer: DriverTrainer, longact: LongAct | None):
        super().__init__(path, resumed_step)
        self.trainer, self.longact = trainer, longact

    def record(self, state, logs):
        found: dict = {}
        if self.longact is not None and "churn" in logs:
            found["churn"] = self.longact.churn
        if "reward" in logs:
            found["sample"] = {"step": state.global_step, **self.trainer.sample()}
        return found


class TrainingProgress(TrainerCallback):
    """A progress bar that moves with every micro-batch; a line a log where there is no terminal.

    It reads the `tokens_per_second` that `MetricsFile` puts into the logs, so it comes after it.
    """

    def __init__(self, console: Console):
        self.console = console
        self.bar = progress_bar(console)

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.start()
        self.row = self.bar.add_task(
            "training",
            total=state.max_steps * args.gradient_accumulation_steps,
            completed=state.global_step * args.gradient_accumulation_steps,
            note=f"step {state.global_step}/{state.max_steps}",
        )

    def on_substep_end(self, args, state, control, **kwargs):
        self.bar.advance(self.row)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.advance(self.row)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        reward = f"reward {logs['reward']:.3f}  " if "reward" in logs else ""
        note = f"step {state.global_step}/{state.max_steps}  {reward}{logs['tokens_per_second']:,.0f} tokens/s"
        self.bar.update(self.row, note=note)
        if not self.console.is_terminal:
            self.console.print(f"{note}  {logs['seconds_per_step']:.1f} s")


class GracefulInterrupt(TrainerCallback):
    """Inside its `with` block, Ctrl-C ends training after the step under way, with a checkpoint.

    A second Ctrl-C, and the first one while no step is under way, raises `KeyboardInterrupt` at once.

    Attributes:
        asked: whether Ctrl-C came during a step.
    """

    def __init__(self, console: Console):
        self.console = console
        self.in_step = False
        self.asked = False

    def __enter__(self) -> "GracefulInterrupt":
        self.previous = signal.signal(signal.SIGINT, self.on_signal)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)

    def on_signal(self, number: int, frame: FrameType | None):
        if self.asked or not self.in_step:
            raise KeyboardInterrupt
        self.asked = True
        self.console.print("Finishing this step, then saving a checkpoint. Press Ctrl-C again to stop at once.")

    def on_step_begin(self, args, state, control, **kwargs):
        self.in_step = True

    def on_step_end(self, args, state, control, **kwargs):
        # All processes stop after the same step.
        self.asked = any(gather_object([self.asked]))
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control
