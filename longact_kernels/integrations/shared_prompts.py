"""Shared prompts in TRL's GRPO trainer."""

from typing import Any

from transformers import GenerationConfig
from trl.models import unwrap_model_for_generation

from longact_kernels.integrations.generation import generate, score


class SharedPromptsMixin:
    """Makes a `GRPOTrainer` one that reads a group's prompt once: `class Ours(SharedPromptsMixin, GRPOTrainer): ...`.

    It does so to generate where one process holds the whole model, and to train where besides there is one process, no
    activation checkpointing, and a batch is scored as one; in all else it is TRL's.

    Args:
        share_scoring: also in training. Not with what counts sequences there, as LongAct's L2 statistic does: each has
            its own copy of the prompt.
        kwargs: of the trainer.
    """

    model: Any
    model_wrapped: Any
    accelerator: Any
    args: Any
    use_vllm: bool
    use_transformers_continuous_batching: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    generation_kwargs: dict
    generation_config: GenerationConfig

    def __init__(self, *args, share_scoring: bool = True, **kwargs):
        self.share_scoring = share_scoring
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *more, **options):
        if (
            self.use_vllm
            or self.use_transformers_continuous_batching
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or multimodal_fields
        ):
            return super()._generate_single_turn(  # type: ignore[misc]
                prompt_ids, images, multimodal_fields, *more, **options
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
        if (
            not self.share_scoring
            or self.accelerator.num_processes > 1
            or self.is_deepspeed_enabled
            or self.is_fsdp_enabled
            or self.args.gradient_checkpointing
            or (batch_size or len(input_ids)) < len(input_ids)
            or any(value is not None and value is not False for value in inputs.values())
        ):
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **inputs
            )
        with self.accelerator.autocast():
            outputs = score(model, input_ids, attention_mask, logits_to_keep)
        return outputs.log_probs, outputs.entropy if compute_entropy else None, None
