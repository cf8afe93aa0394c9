"""GRPO with LongAct on a reward of your own: python examples/train_grpo.py [model name or folder]"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from longact_kernels import LongAct
from longact_kernels.integrations.trl import LongActGRPOTrainer


def short(completions, **_):
    return [-float(len(text)) for text in completions]


name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
trainer = LongActGRPOTrainer(
    model=model,
    longact=LongAct(model, density=0.3),
    args=GRPOConfig(
        "trained",
        max_steps=3,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,
        bf16=False,  # the weights are bf16 already: no autocast
        logging_steps=1,
        report_to="none",
    ),
    reward_funcs=short,
    train_dataset=Dataset.from_dict({"prompt": [f"What comes after {i}?" for i in range(64)]}),
)
trainer.train()
