"""LongAct in a plain PyTorch loop: python examples/plain_loop.py [model name or folder]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from longact_kernels import LongAct, SalientAdamW

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16").train()

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
