"""A run of `longact train`: it checks everything, then evaluates, trains, evaluates again and writes the report."""

import re
from functools import partial
from importlib.util import find_spec

import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import GRPOConfig
from trl.rewards import get_soft_overlong_punishment

from longact_kernels import LongAct
from longact_kernels.commands.console import did_you_mean, hide_library_bars, progress_bar
from longact_kernels.commands.files import DETAILS, METRICS, read_lines
from longact_kernels.commands.train.arguments import TrainArguments
from longact_kernels.commands.train.callbacks import (
    DetailsFile,
    GracefulInterrupt,
    LockCheck,
    MetricsFile,
    TrainingProgress,
)
from longact_kernels.commands.train.checkpoints import saving
from longact_kernels.commands.train.evaluate import Evaluation, evaluate
from longact_kernels.commands.train.folder import RunFolder, in_first_process
from longact_kernels.commands.train.prompts import make_prompts, read_sources
from longact_kernels.commands.train.report import summarize, summary_table, write_report
from longact_kernels.commands.train.resuming import what_stays
from longact_kernels.commands.train.trainer import DriverTrainer
from longact_kernels.integrations.transformers import load_config, load_model, longest_input
from longact_kernels.tasks import TASKS
from longact_kernels.tasks.rewards import Reward, load_reward, string_match_any


class Run:
    """One run of the driver: a model, its trainer, its folder; one in each process, of which the first one writes.

    Args:
        arguments, training: of `parse`.
        console: where the user looks.

    Raises:
        ValueError: anything that is wrong with the arguments; no run has been touched then.
    """

    def __init__(self, arguments: TrainArguments, training: GRPOConfig, console: Console):
        self.arguments, self.training, self.console = arguments, training, console
        self.folder = RunFolder(arguments, training)
        try:
            self._prepare()
        except BaseException:
            self.folder.close()
            raise

    def _prepare(self) -> None:
        arguments, training, console = self.arguments, self.training, self.console
        if (before := self.folder.processes_before) != training.world_size:
            console.print(what_stays(before, training))
        check_packages(training)
        self.reward = reward_of(arguments)
        prompts = read_sources(arguments)
        check_lengths(arguments, training)
        self.interrupt = GracefulInterrupt(console)
        self.progress = TrainingProgress(console)
        hide_library_bars()
        with console.status(f"loading {escape(arguments.model)}"):
            self.model, self.tokenizer = load_model(
                arguments.model,
                trust_remote_code=training.trust_remote_code,
                **(training.model_init_kwargs or {}),
            )
            if arguments.stochastic_rounding and self.model.dtype == torch.float32:
                raise ValueError(
                    "stochastic_rounding: got True, but the weights are float32, which need none; leave it out, or set "
                    "a 16-bit dtype in model_init_kwargs"
                )
            if arguments.frozen is not None:
                freeze(self.model, arguments.frozen)
            self.longact = None
            if arguments.longact:
                self.longact = LongAct(self.model, **arguments.longact_options(), seed=training.seed)
        with progress_bar(console) as bar:
            advance = partial(bar.advance, bar.add_task("prompts", total=prompts, note=arguments.subject))
            train_dataset, self.held_out = make_prompts(arguments, training, self.tokenizer, advance)
        self.folder.take_prompts([*train_dataset, *self.held_out])
        punishment = int(arguments.overlong_share * training.max_completion_length)
        overlong = [get_soft_overlong_punishment(training.max_completion_length, punishment)] if punishment else []
        self.trainer = DriverTrainer(
            longact=self.longact,
            optimizer_options=arguments.optimizer_options(),
            dynamic_sampling_rounds=arguments.dynamic_sampling_rounds,
            share_scoring=self.longact is None or self.longact.statistic == "absmax",
            model=self.model,
            args=training,
            reward_funcs=[self.reward, *overlong],
            train_dataset=train_dataset,
            processing_class=self.tokenizer,
        )
        self._check_form()
        # By now every process has seen the folder as it was.
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.remove_callback(ProgressCallback)
        in_first_process(self.folder.own)
        # The first one: with it, a run begins.
        self.trainer.callback_handler.callbacks.insert(0, EvaluationBefore(self))
        for callback in (
            LockCheck(self.folder),
            MetricsFile(self.folder.metrics, self.folder.checkpoint_step),
            DetailsFile(self.folder.details, self.folder.checkpoint_step, self.trainer, self.longact),
            *([self.progress] if training.process_index == 0 else []),
            self.interrupt,
        ):
            self.trainer.add_callback(callback)

    def _check_form(self) -> None:
        """Raises ValueError for FSDP's shards where they cannot be loaded, and for any other checkpoint with FSDP."""
        checkpoint, trainer = self.folder.checkpoint, self.trainer
        if checkpoint is None or trainer.is_deepspeed_enabled:
            return
        if (checkpoint / "optimizer.pt").is_file() == trainer.is_fsdp_enabled:
            saved, now = ("without", "with") if trainer.is_fsdp_enabled else ("with", "without")
            raise ValueError(
                f"fsdp: {checkpoint} was saved {saved} FSDP, and the processes are started {now} it; start them as "
                "before (torchrun, or accelerate launch with the same --config_file), in any number"
            )
        if trainer.is_fsdp_enabled and self.folder.is_complete(self.training.max_steps):
            raise ValueError(
                f"max_steps: {checkpoint} is of the last step, and FSDP's shards are loaded by taking steps; delete it "
                "to take the last steps again, or raise max_steps"
            )

    def evaluate(self, when: str) -> Evaluation:
        """Answers the held-out prompts, which the processes share out among them."""
        count, rank, processes = len(self.held_out), self.training.process_index, self.training.world_size
        # As many for each: the processes of a sharded model take every step together.
        own = [self.held_out[i % count] for i in range(rank, -(-count // processes) * processes, processes)]
        with progress_bar(self.console) as bar:
            row = bar.add_task(f"{self.arguments.measure} {when}", total=len(own), note=f"{count} prompts")
            found = evaluate(
                self.model,
                self.tokenizer,
                own,
                self.reward,
                max_completion_length=self.training.max_completion_length,
                eos_token_id=self.trainer.eos_token_ids,
                batch_size=self.training.per_device_eval_batch_size,
                advance=lambda count: bar.advance(row, count),
            )
        parts = gather_object([found])
        result = Evaluation(
            [parts[i % processes].rewards[i // processes] for i in range(count)],
            [parts[i % processes].completions[i // processes] for i in range(count)],
        )
        self.console.print(
            f"held-out {self.arguments.measure} {when}: {result.accuracy:.3f} ± {result.standard_error:.3f}"
        )
        return result

    def before(self) -> Evaluation:
        """The evaluation before training, made only once a run."""
        return self.folder.evaluation_before(len(self.held_out), lambda: self.evaluate("before"))

    def train(self) -> Evaluation:
        """Evaluates, if that has not been done, and trains from the last checkpoint to the end; returns the former."""
        checkpoint = self.folder.checkpoint
        if checkpoint:
            self.before()  # as long as the weights are those before training
        if checkpoint and self.folder.is_complete(self.training.max_steps):
            # The trainer would take one more step.
            self.trainer._load_from_checkpoint(str(checkpoint))
            state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
            self.trainer.create_optimizer().load_state_dict(state)
            return self.before()
        try:
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.progress.bar.stop()
        return self.before()

    def finish(self, before: Evaluation, after: Evaluation) -> None:
        """Saves the model as an ordinary checkpoint, and writes and shows the report."""
        # Gathered from all processes; the rest is the first one's.
        weights = self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped)
        if self.training.process_index > 0:
            return
        self.folder.check_lock()
        saliency = {}
        state_bytes = None
        if self.longact is not None:
            saliency = self.folder.saliency(self.longact)
            # Accelerate wraps the optimizer of a run that has trained.
            optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
            state_bytes = optimizer.salient_state_bytes()
            self.longact.restore()
        with saving(self.folder.path / "model"):
            self.folder.save_model(self.model, self.tokenizer, weights)
        metrics = read_lines(self.folder.metrics, METRICS)
        summary = summarize(self.arguments, self.training, self.model, metrics, before, after, state_bytes)
        summary["changes"] = self.folder.changes
        details = read_lines(self.folder.details, DETAILS)
        write_report(self.folder.path, summary, metrics, details, saliency, self.held_out, before, after)
        self.console.print(summary_table(summary))
        for name in ("report.html", "model"):
            self.console.print(self.folder.path / name, soft_wrap=True, markup=False)


class EvaluationBefore(TrainerCallback):
    """Evaluates before training, once the trainer has put the model where it trains."""

    def __init__(self, run: Run):
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        self.run.before()


def freeze(model: nn.Module, pattern: str) -> None:
    """Freezes the parameters that a regular expression is found in a name of; tied weights have several names.

    Raises:
        ValueError: there is none, or no other that trains.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    found = [p for name, p in named.items() if re.search(pattern, name)]
    if not found:
        raise ValueError(
            f"frozen: got {pattern!r}, which is found in no name of a parameter; needed a part of one, such as of "
            f"{next(iter(named))}"
        )
    for p in found:
        p.requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise ValueError(f"frozen: got {pattern!r}, which leaves nothing to train; needed a narrower one")


def reward_of(arguments: TrainArguments) -> Reward:
    """The user's reward, or else the task's."""
    if arguments.reward:
        return load_reward(arguments.reward)
    return TASKS[arguments.task].reward if arguments.task else string_match_any


def check_lengths(arguments: TrainArguments, training: GRPOConfig) -> None:
    """Whether prompts and their completions are as long as the model reads.

    Raises:
        ValueError: they may be longer, or there is no such model.
    """
    limit = longest_input(load_config(arguments.model, training.trust_remote_code))
    length = max(length or 0 for length in arguments.stages())
    if limit is not None and length + training.max_completion_length > limit:
        raise ValueError(
            f"length: got {length}, with {training.max_completion_length} for a completion, but {arguments.model} "
            f"reads {limit} tokens; needed at most {limit - training.max_completion_length}"
        )


def check_packages(training: GRPOConfig) -> None:
    """Whether what the options need is known and installed.

    Raises:
        ValueError: it is not.
    """
    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to: got {name!r}, needed some of {known}, with commas between them{hint}")
    needed = {name: "report_to" for name in training.report_to if name in ("tensorboard", "wandb", "trackio")}
    if training.use_vllm:
        needed["vllm"] = "use_vllm"
    for package, option in needed.items():
        if find_spec(package) is None:
            raise ValueError(f"{option}: {package} is not installed; run pip install {package}")
