"""The statistics alone, the largest query and key channels of a model.

python examples/massive_values.py [Hub name, folder, smollm2, gemma3-270m]
"""

import sys

import torch

from longact_kernels.functional import channel_stats
from longact_kernels.integrations.transformers import load_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
try:
    model, tokenizer = load_model(name)
except ValueError as error:  # no such model, or no network: one line says it
    sys.exit(str(error))


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
