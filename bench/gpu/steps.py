"""Stage 7: whole training steps of randomly initialised Qwen3 models in bf16."""

import gc
import gzip
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.peers import HYPER
from bench.gpu.stage import Stage
from bench.race import DEVICE
from longact_kernels import LongAct, SalientAdamW

STEPS = 6
TRACE_BYTES = 16 * 2**20  # the most that a file of results may have
SHAPE = dict(vocab_size=151936, head_dim=128, num_key_value_heads=8, max_position_embeddings=40960)


class Case(NamedTuple):
    """A model and the tokens of a step."""

    name: str
    tokens: int
    shape: dict


def cases(dry: bool) -> list[Case]:
    if dry:
        tiny = dict(vocab_size=64, head_dim=16, num_key_value_heads=1, hidden_size=32, intermediate_size=48)
        return [Case("tiny", 40, {**tiny, "num_attention_heads": 2, "num_hidden_layers": 2})]
    tied = {**SHAPE, "tie_word_embeddings": True}
    size_0_6b = dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_hidden_layers=28)
    size_1_7b = dict(hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_hidden_layers=28)
    size_8b = dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32)
    # Dense AdamW with masters takes 20 bytes a weight: a layer has 193M, the tied embeddings 0.62B. Logits take 16 GB.
    layers = int((0.8 * torch.cuda.mem_get_info()[0] - 20 * 0.62e9 - 20e9) / (20 * 193e6))
    layers = max(1, min(36, layers))
    return [
        Case("Qwen3-0.6B", 8192, tied | size_0_6b),
        Case("Qwen3-1.7B", 8192, tied | size_1_7b),
        Case(f"{layers} layers of Qwen3-8B", 8192, tied | size_8b | {"num_hidden_layers": layers}),
    ]


def run(stage: Stage) -> int:
    failed = 0
    for i, case in enumerate(cases(stage.dry)):
        # Dense once more at the end: what it then differs by is the machine's, not a contender's.
        for name, prepare in [*CONTENDERS.items(), ("dense, masters (again)", CONTENDERS["dense, masters"])]:
            try:
                stage.row("step", model=case.name, tokens=case.tokens, contender=name, **measure(case, prepare))
            except Exception as error:
                failed += 1
                stage.row("error", model=case.name, contender=name, error=f"{type(error).__name__}: {error}"[:500])
            collect()
        if i == 0:  # before the large ones, should time run out
            trace(case, stage.folder / "trace.json.gz")
            collect()
    return int(failed > 0)


def collect() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def model_of(case: Case) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**case.shape), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def dense_with_masters(model: torch.nn.Module) -> Callable[[], None]:
    weights = [p.data for p in model.parameters()]
    masters = [torch.nn.Parameter(weight.float()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, **HYPER, fused=True)

    def update():
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.float()
        model.zero_grad()
        optimizer.step()
        torch._foreach_copy_(weights, [master.data for master in masters])
        optimizer.zero_grad()

    return update


def dense(model: torch.nn.Module) -> Callable[[], None]:
    return of_optimizer(torch.optim.AdamW(model.parameters(), **HYPER, fused=True))


def literal(model: torch.nn.Module) -> Callable[[], None]:
    """The paper's form: dense gradients, masked by the batch's own set, and a stock optimizer."""
    longact = LongAct(model, density=0.3, selection="current")
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER, fused=True)
    longact.attach(optimizer)
    return of_optimizer(optimizer)


def full(model: torch.nn.Module) -> Callable[[], None]:
    longact = LongAct(model, density=0.3)
    return of_optimizer(SalientAdamW(model.parameters(), **HYPER, longact=longact, fused=True))


def compact(model: torch.nn.Module) -> Callable[[], None]:
    longact = LongAct(model, density=0.3, grad="compact")
    return of_optimizer(SalientAdamW(model.parameters(), **HYPER, longact=longact, state="compact", fused=True))


def of_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def update():
        optimizer.step()
        optimizer.zero_grad()

    return update


CONTENDERS = {
    "dense, masters": dense_with_masters,
    "LongAct, full": full,
    "LongAct, compact": compact,
    "dense, no masters": dense,
    "literal, no masters": literal,
}


def measure(case: Case, prepare: Callable) -> dict[str, float]:
    """Median milliseconds of a step and of its update, and the peak of memory, after two steps to warm up."""
    model = model_of(case)
    update = prepare(model)
    ids = torch.randint(0, case.shape["vocab_size"], (1, case.tokens), device=DEVICE)
    whole, updates = [], []
    for step in range(2 + (1 if DEVICE == "cpu" else STEPS)):
        if step == 2 and DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = now()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        middle = now()
        update()
        ended = now()
        whole.append(ended - began)
        updates.append(ended - middle)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    medians = (1e3 * statistics.median(times[2:]) for times in (whole, updates))
    return dict(zip(("ms", "update_ms"), medians, strict=True)) | {"peak_bytes": peak}


def now() -> float:
    """The time once the device has done everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def trace(case: Case, path: Path) -> None:
    """The profiler's trace of one step with LongAct, and its table in the log."""
    model = model_of(case)
    update = full(model)
    ids = torch.randint(0, case.shape["vocab_size"], (1, case.tokens), device=DEVICE)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        update()

    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (DEVICE == "cuda")]
    with profile(activities=activities) as profiler:
        step()
        now()
    print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=40))
    plain = path.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    packed = gzip.compress(plain.read_bytes())
    plain.unlink()
    if len(packed) <= TRACE_BYTES:
        path.write_bytes(packed)
    else:
        print(f"trace: {len(packed)} bytes, more than a file of results may have; left out")
