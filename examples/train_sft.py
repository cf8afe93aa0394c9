"""LongAct in TRL's SFTTrainer, or any other Trainer: python examples/train_sft.py [model name or folder]"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from longact_kernels import LongAct
from longact_kernels.integrations.trainer import LongActTrainerMixin


class SparseSFTTrainer(LongActTrainerMixin, SFTTrainer):
    pass


name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
longact = LongAct(model, density=0.3)
trainer = SparseSFTTrainer(
    model=model,
    longact=longact,
    optimizer_options={"state": "compact"},  # moments of the salient rows only
    # The weights are bf16 already: no autocast.
    args=SFTConfig("trained", max_steps=5, learning_rate=1e-5, bf16=False, logging_steps=1, report_to="none"),
    train_dataset=Dataset.from_dict({"text": [f"After {i} comes {i + 1}." for i in range(64)]}),
)
trainer.train()
longact.restore()
trainer.save_model()
