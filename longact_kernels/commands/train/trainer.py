"""The trainer of `longact train`."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import set_seed

from longact_kernels.commands.console import Failure
from longact_kernels.commands.train.checkpoints import (
    RUN,
    checkpoints_in,
    completions,
    is_sealed,
    random_states,
    saving,
    seal,
)
from longact_kernels.integrations.dynamic_sampling import DynamicSamplingMixin
from longact_kernels.integrations.prompts import encode_prompts, question_of
from longact_kernels.integrations.shared_prompts import SharedPromptsMixin
from longact_kernels.integrations.trl import LongActGRPOTrainer
from longact_kernels.tasks.rewards import completion_text


class DriverTrainer(SharedPromptsMixin, DynamicSamplingMixin, LongActGRPOTrainer):
    """TRL's trainer with LongAct, shared prompts and dynamic sampling; prompts may begin the answer."""

    def _get_train_sampler(self, dataset=None):
        return ResumingSampler(super()._get_train_sampler(dataset), self)

    def _tokenize_prompts(self, prompts: list):
        # TRL itself always opens a new assistant turn, also after a prompt that ends with the answer's beginning.
        if self._is_vlm or self.tools or self.environment_factories is not None:
            return super()._tokenize_prompts(prompts)
        ids = encode_prompts(self._tokenizer, prompts, **self.chat_template_kwargs)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["prompts/mean_length"].append(sum(map(len, ids)) / len(ids))
        return ids, None, {}

    def _save_checkpoint(self, model, trial):
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        # Nothing older goes before the manifest has come.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(checkpoint):
                super()._save_checkpoint(model, trial)
                if not self.args.save_only_model:
                    self._save_completions(checkpoint)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    shutil.copy(checkpoint.parent / RUN, checkpoint)
                    seal(checkpoint)
        except Failure:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            for old in [path for path in checkpoints_in(checkpoint.parent) if is_sealed(path)][limit:]:
                shutil.rmtree(old)

    def _load_optimizer_and_scheduler(self, checkpoint):
        given = [{name: of for name, of in group.items() if name != "params"} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled:
            return
        # The options are those that this part of the run was given, not those that the checkpoint was made with.
        for group, options in zip(self.optimizer.param_groups, given, strict=True):
            group |= {**options, "lr": group["lr"]}
        schedule = self.lr_scheduler
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = [options["initial_lr"] for options in given]
            factors = [of(schedule.last_epoch) for of in schedule.lr_lambdas]
            schedule._last_lr = [lr * factor for lr, factor in zip(schedule.base_lrs, factors, strict=True)]
            for group, lr in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = lr
        self.state.compute_steps(self.args, self.state.max_steps)
        self._load_completions(Path(checkpoint))

    def _load_rng_state(self, checkpoint):
        if checkpoint is None or len(states := random_states(Path(checkpoint))) == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        # Another number of processes saved it: each of ours takes the state of its place, or begins one.
        process = self.args.process_index
        set_seed(random.Random(f"{self.args.seed}/{self.state.global_step}/{process}").getrandbits(31))
        if process < len(states):
            saved = torch.load(states[process], map_location="cpu", weights_only=False)
            random.setstate(saved["python"])
            numpy.random.set_state(saved["numpy"])
            torch.set_rng_state(saved["cpu"])
            if torch.cuda.is_available() and "cuda" in saved:  # of one process that device's, of many all of a machine
                devices = [saved["cuda"]] if isinstance(saved["cuda"], torch.Tensor) else saved["cuda"]
                torch.cuda.set_rng_state(devices[process % len(devices)], self.accelerator.device)

    def _save_completions(self, checkpoint: Path) -> None:
        """Keeps the completions that further steps will be on, if there are such."""
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            torch.save(self._buffered_inputs, completions(checkpoint, self.args.process_index))

    def _load_completions(self, checkpoint: Path) -> None:
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if (file := completions(checkpoint, self.args.process_index)).is_file():
            self._buffered_inputs = torch.load(file, map_location=self.accelerator.device, weights_only=True)

    def sample(self) -> dict:
        """A prompt of the last batch that was generated: its question, its completion and the reward."""
        rewards = [values[0] for values in self._logs["rewards"].values() if values and values[0] is not None]
        return {
            "question": question_of(self._logs["prompt"][0]),
            "completion": completion_text(self._logs["completion"][0]),
            "reward": sum(rewards),
        }

    def create_model_card(self, *args, **kwargs) -> None:
        """None: the run's folder has its own report."""


class ResumingSampler(Sampler):
    """TRL's sampler, which orders the prompts anew for each epoch: in a resumed run, from the epoch on that it is in.

    transformers itself skips the batches of that epoch, but leaves the orders of those before undrawn.
    """

    def __init__(self, sampler: Sampler, trainer: DriverTrainer):
        self.sampler, self.trainer = sampler, trainer
        self.begun = False

    def __iter__(self) -> Iterator[int]:
        if not self.begun:
            for _ in range(int(self.trainer.state.epoch or 0)):
                next(iter(self.sampler))
        self.begun = True
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]
