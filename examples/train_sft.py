"""LongAct in TRL's SFTTrainer, or any Trainer: python examples/train_sft.py [Hub name, folder, smollm2, gemma3-270m]"""

import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from longact_kernels import LongAct
from longact_kernels.integrations.trainer import LongActTrainerMixin
from longact_kernels.integrations.transformers import load_model


class SparseSFTTrainer(LongActTrainerMixin, SFTTrainer):
    pass


name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
try:
    model, tokenizer = load_model(name)
except ValueError as error:  # no such model, or no network: one line says it
    sys.exit(str(error))
longact = LongAct(model, density=0.3)
trainer = SparseSFTTrainer(
    model=model,
    longact=longact,
    optimizer_options={"state": "compact"},  # moments of the salient rows only
    # The weights are bf16 already: no autocast.
    args=SFTConfig("trained", max_steps=5, learning_rate=1e-5, bf16=False, logging_steps=1, report_to="none"),
    train_dataset=Dataset.from_dict({"text": [f"After {i} comes {i + 1}." for i in range(64)]}),
    processing_class=tokenizer,
)
trainer.train()
longact.restore()
trainer.save_model()
