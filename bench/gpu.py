"""`make gpu`: the tests and the benchmarks on this machine's GPU, and its times beside the predicted ones."""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.race import seconds
from longact_kernels import ops
from longact_kernels.budgets import GPUS, qwen3_8b

ROOT = Path(__file__).parent.parent
ROUNDS = 20


@dataclass(frozen=True)
class Shapes:
    """The q and k projections of a model; by default Qwen3-8B's, which `longact kernels` predicts for."""

    tokens: int = 32768
    K: int = 4096
    N: tuple[int, ...] = (4096, 1024)
    layers: int = 36
    head_dim: int = 128
    salient: int = 38  # of a head: 30%


def calls(shapes: Shapes, device: str) -> dict[str, Callable[[], Callable[[], object]]]:
    """By kernel, a function that makes its tensors and returns the call to time."""
    M, K, N = shapes.tokens, shapes.K, sum(shapes.N)
    sizes = [n for _ in range(shapes.layers) for n in shapes.N]

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def sets(n: int, layers: int = 1) -> torch.Tensor:
        saliency = torch.rand(n * layers, device=device)
        return ops.select(saliency, shapes.head_dim, shapes.salient)

    def channel_stats():
        y = randn(M, N)
        return lambda: ops.channel_stats(y)

    def linear_stats():
        x, weight = randn(M, K), randn(N, K)
        return lambda: ops.linear_stats(x, weight)

    def salient_wgrad():
        dy, x, rows = randn(M, N), randn(M, K), sets(N)
        return lambda: ops.salient_wgrad(dy, x, rows)

    def sparse_adamw():
        weights, grads = ([randn(n, K) for n in sizes] for _ in range(2))
        rows = [sets(n) for n in sizes]
        moments = [[torch.zeros(n, K, device=device) for n in sizes] for _ in range(2)]
        steps = [torch.zeros(n, dtype=torch.int32, device=device) for n in sizes]
        masters = [weight.float() for weight in weights]
        lr = torch.tensor(1e-6, device=device)
        scalars = (0.9, 0.999, 1e-8, 0.01)
        return lambda: ops.sparse_adamw_(weights, grads, rows, *moments, steps, masters, lr, *scalars)

    def refresh():
        saliency = torch.rand(sum(sizes), device=device)
        old, new = ([sets(n) for n in sizes] for _ in range(2))
        states = [[randn(len(rows), K, dtype=torch.float32) for _ in range(3)] for rows in old]

        def choose_and_carry():
            ops.select(saliency, shapes.head_dim, shapes.salient)
            ops.carry_(states, old, new)

        return choose_and_carry

    return {f.__name__: f for f in (channel_stats, linear_stats, salient_wgrad, sparse_adamw, refresh)}


def measure(shapes: Shapes, device: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Median microseconds of every kernel's call."""
    times = {}
    for name, make in calls(shapes, device).items():
        call = make()
        call()
        times[name] = 1e6 * statistics.median(seconds(call) for _ in range(rounds))
        del call
        if device == "cuda":
            torch.cuda.empty_cache()
    return times


def predict(device_name: str) -> dict[str, float]:
    """Predicted microseconds on a GPU of that name; empty for one that there are no predictions for."""
    gpu = next((gpu for name, gpu in GPUS.items() if name in device_name), None)
    times: Counter[str] = Counter()
    for launch, work in qwen3_8b().items() if gpu else ():
        # "salient_wgrad pack", "salient_wgrad product", ...: one call launches them all.
        times[launch.split()[0]] += 1e6 * work.seconds(gpu)
    return dict(times)


def write(folder: Path, report: dict) -> None:
    """The JSON, and the picture of measured beside predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(report, indent=1))
    kernels = list(report["measured_us"])
    figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
    for shift, which in ((-0.2, "measured_us"), (0.2, "predicted_us")):
        known = [(i + shift, report[which][name]) for i, name in enumerate(kernels) if name in report[which]]
        if known:
            bars = panel.bar(*zip(*known, strict=True), width=0.38, label=which.removesuffix("_us"))
            panel.bar_label(bars, fmt="%.0f", fontsize="small")
    panel.set(yscale="log", ylabel="µs", title=f"{report['device']}: Qwen3-8B's q and k projections, bf16")
    panel.set_xticks(range(len(kernels)), kernels)
    panel.legend()
    figure.savefig(folder / "gpu.png", dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the results (%(default)s)")
    folder = parser.parse_args(argv).output
    if not torch.cuda.is_available():
        print("make gpu: needs a CUDA or ROCm GPU, and torch sees none here; `make test` needs none", file=sys.stderr)
        return 2
    python = [sys.executable, "-m"]
    # One process: several would share the GPU's memory.
    tests = subprocess.run([*python, "pytest", "-q", "-m", "not slow", "tests"], cwd=ROOT).returncode
    benchmarks = subprocess.run([*python, "bench", "--output", str((folder / "bench").resolve())], cwd=ROOT).returncode
    name = torch.cuda.get_device_name()
    report = {
        "device": name,
        "torch": torch.__version__,
        "tests_passed": tests == 0,
        "benchmarks_passed": benchmarks == 0,
        "measured_us": measure(Shapes(), "cuda"),
        "predicted_us": predict(name),
    }
    write(folder, report)
    print(f"written: {folder / 'gpu.json'}, {folder / 'gpu.png'}, {folder / 'bench'}")
    return 0 if report["tests_passed"] and report["benchmarks_passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
