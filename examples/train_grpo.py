"""GRPO with LongAct on a reward of your own: python examples/train_grpo.py [Hub name, folder, smollm2, gemma3-270m]"""

import sys

from datasets import Dataset
from trl import GRPOConfig

from longact_kernels import LongAct
from longact_kernels.integrations.transformers import load_model
from longact_kernels.integrations.trl import LongActGRPOTrainer


def short(completions, **_):
    return [-float(len(text)) for text in completions]


name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
try:
    model, tokenizer = load_model(name)
except ValueError as error:  # no such model, or no network: one line says it
    sys.exit(str(error))
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
    processing_class=tokenizer,
)
trainer.train()
