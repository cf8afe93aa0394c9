"""`python -m bench.memory`: what a training step holds at its peak, by kind, beside dense AdamW."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.table import Table

from bench.race import DEVICE, allocated
from longact_kernels import LongAct, SalientAdamW

DENSITY = 0.3
CONTENDERS = {
    "dense AdamW": None,
    "LongAct": {"state": "full", "grad": "full"},
    'state="compact"': {"state": "compact", "grad": "full"},
    'state="compact"\ngrad="compact"': {"state": "compact", "grad": "compact"},
}
KINDS = ("weights", "optimizer state", "gradients", "activations and the rest")


class Step(NamedTuple):
    """Bytes at the peak of a training step; `qk_*` of the query and key weights alone."""

    weights: int
    state: int
    gradients: int
    rest: int
    qk_state: int
    qk_gradients: int

    @property
    def peak(self) -> int:
        return self.weights + self.state + self.gradients + self.rest


def training_step(model, backward: Callable, options: dict | None) -> Step:
    """Takes two steps and measures the second.

    Args:
        model: in training mode.
        backward: runs the model forward and backward.
        options: `state` and `grad`; None trains densely.
    """
    kept: dict = {}

    def first_step():
        # Statistics, sets and step counts are counted as optimizer state.
        if options is not None:
            kept["longact"] = LongAct(model, density=DENSITY, grad=options["grad"])
        state = "full" if options is None else options["state"]
        longact = kept.get("longact", False)
        kept["optimizer"] = SalientAdamW(model.parameters(), lr=1e-6, longact=longact, state=state, fused=True)
        backward()
        kept["optimizer"].step()
        kept["optimizer"].zero_grad()
        if options is not None:
            kept["longact"].settle()

    held, _ = allocated(first_step)
    compact = kept["longact"].compact if options is not None else None
    accumulators = 0 if compact is None else compact.flat.buffer.nbytes
    left, peak = allocated(backward)
    _, updating = allocated(kept["optimizer"].step)
    gradients = left + accumulators
    at_peak = max(peak + accumulators, gradients + updating)
    if options is not None:
        kept["longact"].restore()
    weights = sum(p.nbytes for p in model.parameters())
    return Step(weights, held - accumulators, gradients, at_peak - gradients, 0, 0)


def steps(load: Callable, backward: Callable, ids: torch.Tensor) -> dict[str, Step]:
    """Measures all contenders on a model.

    Args:
        load: makes the model.
        backward: runs a model forward and backward on tokens.
        ids: the tokens.
    """
    results = {}
    for name, options in CONTENDERS.items():
        whole = training_step(model := load(), lambda model=model: backward(model, ids), options)
        # With nothing else to train, state and gradients are those of the query and key weights, for any tokens.
        model = load()
        found = LongAct(model)
        names = list(found.layers)
        found.restore()
        model.requires_grad_(False)
        for layer in names:
            model.get_submodule(layer).weight.requires_grad_()
        alone = training_step(model, lambda model=model: backward(model, ids[:, :8]), options)
        results[name] = whole._replace(qk_state=alone.state, qk_gradients=alone.gradients)
    return results


def draw(results: dict[str, Step], title: str, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from longact_kernels.sparse.figures import LIGHT

    with rc_context(LIGHT):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        alone, whole = figure.subplots(1, 2)
        names = list(results)
        panels = (
            (alone, "query and key weights alone", (None, "qk_state", "qk_gradients", None)),
            (whole, "peak of the whole step", Step._fields[:4]),
        )
        for axes, name, fields in panels:
            floor = [0.0] * len(names)
            for i, (kind, field) in enumerate(zip(KINDS, fields, strict=True)):
                if field is not None:
                    heights = [getattr(step, field) / 2**20 for step in results.values()]
                    axes.bar(names, heights, 0.62, bottom=floor, color=f"C{i}", label=kind)
                    floor = [low + height for low, height in zip(floor, heights, strict=True)]
            for x, top in enumerate(floor):
                axes.text(x, top, f"{top / floor[0]:.2f}" if x else f"{top:,.0f} MiB", ha="center", va="bottom")
            axes.set(title=name, ylabel="MiB")
            axes.tick_params(axis="x", labelsize=8.5)
            axes.margins(y=0.1)
        figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title)
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="Hub name, folder, smollm2, or gemma3-270m (%(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the step (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the results (%(default)s)")
    args = parser.parse_args()
    from longact_kernels.integrations.transformers import load_model

    ids = torch.arange(args.tokens, device=DEVICE).view(1, -1) % 1000

    def load():
        return load_model(args.model)[0].to(DEVICE).train()

    def backward(model, ids):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    results = steps(load, backward, ids)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "memory.json").write_text(json.dumps({name: step._asdict() for name, step in results.items()}))
    title = f"{args.model}, bf16 with fp32 masters, {args.tokens} tokens, density {DENSITY}"
    draw(results, title, args.output / "memory.png")
    table = Table(title=f"{title}: MiB, and as a ratio to dense")
    table.add_column("")
    dense = next(iter(results.values()))
    for field in (*Step._fields, "peak"):
        table.add_column(field.replace("_", " "), justify="right")
    for name, step in results.items():
        values = [(getattr(step, field), getattr(dense, field)) for field in (*Step._fields, "peak")]
        table.add_row(name.replace("\n", " "), *(f"{ours / 2**20:,.1f} ({ours / base:.3f})" for ours, base in values))
    Console().print(table)


if __name__ == "__main__":
    main()
