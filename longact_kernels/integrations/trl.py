"""`LongActGRPOTrainer`: TRL's GRPO trainer with LongAct's optimizer, reading a group's prompt once."""

from collections.abc import Iterator

from torch.utils.data import Sampler
from trl.models import unwrap_model_for_generation

from longact_kernels.integrations.dynamic_sampling import DynamicSamplingTrainer
from longact_kernels.integrations.generation import encode_prompts, generate, score
from longact_kernels.integrations.trainer import LongActTrainerMixin


class LongActGRPOTrainer(LongActTrainerMixin, DynamicSamplingTrainer):
    """TRL's `GRPOTrainer` with `SalientAdamW`, sparse or (with `longact=None`) dense, and with dynamic sampling.

    Where one process holds the whole model, without activation checkpointing, a group's prompt is read once, both to
    generate and to train. In all else it is TRL's: the algorithms and options of `GRPOConfig` work, except `optim`.

    Args:
        kwargs: of `LongActTrainerMixin` and of `DynamicSamplingTrainer`.
    """

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

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if (
            self.use_vllm
            or self.use_transformers_continuous_batching
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or multimodal_fields
        ):
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            return generate(model, prompt_ids, self.generation_config), None

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **inputs
    ):
        # The paper's L2 statistic is a mean over sequences, each with its own copy of the prompt.
        if (
            self.accelerator.num_processes > 1
            or self.is_deepspeed_enabled
            or self.is_fsdp_enabled
            or self.args.gradient_checkpointing
            or (batch_size or len(input_ids)) < len(input_ids)
            or any(value is not None and value is not False for value in inputs.values())
            or (self.longact is not None and self.longact.statistic != "absmax")
        ):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **inputs
            )
        with self.accelerator.autocast():
            outputs = score(model, input_ids, attention_mask, logits_to_keep)
        return outputs.log_probs, outputs.entropy if compute_entropy else None, None

    def create_model_card(self, *args, **kwargs) -> None:
        """None: the run's folder has its own report."""


class ResumingSampler(Sampler):
    """TRL's sampler, which orders the prompts anew for each epoch: in a resumed run, from the epoch on that it is in.

    transformers itself skips the batches of that epoch, but leaves the orders of those before undrawn.
    """

    def __init__(self, sampler: Sampler, trainer: LongActGRPOTrainer):
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
