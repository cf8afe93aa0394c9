"""The statistics alone: the largest query and key channels of a model. python examples/massive_values.py [model]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longact_kernels.functional import channel_stats

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")


def show(path):
    def hook(module, args, y):
        absmax, _ = channel_stats(y)
        channel = absmax.argmax().item()
        print(f"{path:40} channel {channel:5}  {absmax[channel]:8.1f}, median {absmax.median():8.2f}")

    return hook


for path, module in model.named_modules():
    if path.endswith(("q_proj", "k_proj")):
        module.register_forward_hook(show(path))
with torch.no_grad():
    model(**tokenizer("When a model reads, a few channels of its queries and keys grow large.", return_tensors="pt"))
