"""`LongActGRPOTrainer`: TRL's GRPO trainer with LongAct's optimizer, reading a group's prompt once."""

from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.integrations.generation import encode_prompts, generate, score
from longact_kernels.optim import State


class LongActGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with `SalientAdamW`, sparse or (with `longact=None`) dense.

    Where one process holds the whole model, without activation checkpointing, a group's prompt is read once, both to
    generate and to train. With LongAct, the logs also hold the layers' mean `churn`. In all else it is TRL's: the
    algorithms and options of `GRPOConfig` work, except `optim`.

    Args:
        longact: the controller of the model's salient sets; `None` trains densely with the same optimizer.
        optimizer_state: `state` of `SalientAdamW`.
        kwargs: of `GRPOTrainer`.
    """

    optimizer: Any

    def __init__(self, *, longact: LongAct | None, optimizer_state: State = "full", args: GRPOConfig, **kwargs):
        self.longact = longact
        self.optimizer_state = optimizer_state
        super().__init__(args=args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for name, p in trained if name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
            ]
            self.optimizer = SalientAdamW(
                [group for group in groups if group["params"]],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                longact=self.longact,
                state=self.optimizer_state,
                fused=True,  # as the Trainer's own default
            )
        return self.optimizer

    def _clip_grad_norm(self, model):
        # The norm that clipping sees must be that of the update: rows outside the salient sets do not count.
        if self.longact is not None:
            self.longact.mask_gradients()
        return super()._clip_grad_norm(model)

    def _tokenize_prompts(self, prompts: list):
        # TRL itself always opens a new assistant turn, also after a prompt that ends with the answer's beginning.
        if self._is_vlm or self.tools or self.environment_factories is not None:
            return super()._tokenize_prompts(prompts)
        return encode_prompts(self._tokenizer, prompts, **self.chat_template_kwargs), None, {}

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        churn = self.longact.churn if self.longact is not None else {}
        if churn and "loss" in logs:
            logs["churn"] = sum(churn.values()) / len(churn)
        super().log(logs, start_time)
