"""The trainer of `longact train`."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from longact_kernels.integrations.dynamic_sampling import DynamicSamplingMixin
from longact_kernels.integrations.prompts import encode_prompts
from longact_kernels.integrations.shared_prompts import SharedPromptsMixin
from longact_kernels.integrations.trl import LongActGRPOTrainer


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
