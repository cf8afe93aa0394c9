"""LongAct in a plain PyTorch loop: python examples/plain_loop.py [Hub name, folder, smollm2, gemma3-270m]"""

import sys

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.integrations.transformers import load_model

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
try:
    model, tokenizer = load_model(name)
except ValueError as error:  # no such model, or no network: one line says it
    sys.exit(str(error))
model.train()

longact = LongAct(model, density=0.3)
optimizer = SalientAdamW(model.parameters(), lr=1e-5, longact=longact)
for step in range(5):
    batch = tokenizer(f"After {step} comes {step + 1}, and after that {step + 2}.", return_tensors="pt")
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    longact.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.3f}")

longact.plot("saliency.png")
longact.restore().save_pretrained("trained")  # an ordinary checkpoint
