"""How large the query and key channels of a model are, and how far its salient sets agree."""

import argparse
from itertools import combinations, product
from pathlib import Path

import torch
from matplotlib import rc_context
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from longact_kernels.commands.console import progress_bar
from longact_kernels.commands.inspect import figures
from longact_kernels.commands.inspect.channels import (
    Part,
    Statistics,
    bounds,
    jaccard,
    measure,
    pool,
    salient,
)
from longact_kernels.commands.inspect.options import STATISTICS
from longact_kernels.commands.inspect.subject import load
from longact_kernels.commands.inspect.text import sequences
from longact_kernels.commands.page import png
from longact_kernels.commands.train.figures import churn_figure
from longact_kernels.sparse.figures import LIGHT

LENGTHS = [256, 512, 1024, 2048, 4096, 8192]


class Inspection:
    """Statistics of every batch of every domain, and of the beginnings of a long text of each."""

    def __init__(self, arguments: argparse.Namespace, console: Console):
        self.console = console
        self.name = arguments.model
        self.subject = load(arguments, "inspect", console)
        context = self.subject.context
        self.lengths = sorted(arguments.lengths or [length for length in LENGTHS if length <= context])
        for length in self.lengths:
            self.subject.check("lengths", length)
        self.long = {
            domain.name: sequences(domain, self.subject.tokenizer, 1, self.lengths[-1])[0]
            for domain in self.subject.domains
            if self.lengths
        }

    def run(self) -> None:
        subject = self.subject
        batches: dict[str, list[Statistics]] = {name: [] for name in subject.texts}
        contexts: dict[str, list[Statistics]] = {}
        tokens = sum(ids.numel() for ids in subject.texts.values()) + sum(map(len, self.long.values()))
        with progress_bar(self.console) as bar:
            row = bar.add_task("reading", total=tokens, note=f"{tokens:,} tokens")
            for name, text in subject.texts.items():
                for ids in text:
                    batches[name] += measure(subject.model, subject.parts, ids)
                    bar.advance(row, len(ids))
            for name, ids in self.long.items():
                contexts[name] = measure(subject.model, subject.parts, ids, self.lengths)
                bar.advance(row, len(ids))

        everything = pool([stats for found in batches.values() for stats in found])
        results = {
            "model": self.name,
            "length": next(iter(subject.texts.values())).shape[1],
            "batches": len(next(iter(batches.values()))),
            "overlap": overlaps(batches, subject.parts, subject.density),
            "context": {
                name: by_length(stats, self.lengths, subject.parts, subject.density) for name, stats in contexts.items()
            },
            "projections": by_projection(everything, subject.parts, subject.density),
            "churn": [
                {"step": record["step"], "churn": record["churn"]}
                for record in subject.metrics
                if record.get("churn") is not None
            ],
        }
        subject.write("inspect.json", results)
        save_magnitudes(subject.folder / "magnitudes.safetensors", everything, subject.parts)
        self.draw(everything, results)
        self.console.print(summary(results))
        self.console.print(subject.folder, soft_wrap=True, markup=False)

    def draw(self, everything: Statistics, results: dict) -> None:
        with rc_context(LIGHT):
            pictures = {
                "magnitudes": figures.magnitudes(everything, self.subject.parts),
                "overlap": figures.overlap_by_layer(results["overlap"]),
                "domains": figures.domains(results["overlap"]),
            }
            if len(self.lengths) > 1:
                pictures["context"] = figures.context(results["context"], results["overlap"]["chance"])
            if results["churn"]:
                pictures["churn"] = churn_figure(results["churn"])
            for name, figure in pictures.items():
                (self.subject.folder / f"{name}.png").write_bytes(png(figure))


def overlaps(batches: dict[str, list[Statistics]], parts: list[Part], density: float) -> dict:
    """How far the sets of single batches agree: Jaccard overlaps, means over pairs of batches and over projections.

    `domains[statistic][a][b]` is that of a batch of domain a with another batch, of domain b. `chance` is what sets
    drawn at random come to.
    """
    flat = [stats for found in batches.values() for stats in found]
    owner = [name for name, found in batches.items() for _ in found]
    m = len(flat)
    sets = [salient(getattr(stats, statistic), parts, density) for statistic in STATISTICS for stats in flat]
    overlap = jaccard(torch.stack(sets), parts)

    def between(a: str, b: str, first: int) -> Tensor:
        """By projection, of statistic number `first`."""
        pairs = [(i, j) for i, j in product(range(m), repeat=2) if i != j and (owner[i], owner[j]) == (a, b)]
        return torch.stack([overlap[:, first * m + i, first * m + j] for i, j in pairs]).mean(0)

    statistics = list(enumerate(STATISTICS))
    domains = {s: {a: {b: between(a, b, n).mean().item() for b in batches} for a in batches} for n, s in statistics}
    across = torch.stack([overlap[:, i, m + i] for i in range(m)]).mean(0)
    within = {s: torch.stack([between(a, a, n) for a in batches]).mean(0) for n, s in statistics}
    by_layer = {
        kind: {
            "absmax with l2": across[mine].tolist(),
            **{f"{s} between batches": values[mine].tolist() for s, values in within.items()},
        }
        for kind in ("q", "k")
        if (mine := torch.tensor([part.kind == kind for part in parts])).any()
    }
    return {
        "absmax with l2": across.mean().item(),
        "between batches": {s: values.mean().item() for s, values in within.items()},
        "between domains": {
            s: sum(domains[s][a][b] for a, b in pairs) / len(pairs)
            for s in STATISTICS
            if (pairs := list(combinations(batches, 2)))
        },
        "domains": domains,
        "by layer": by_layer,
        "chance": density / (2 - density),
    }


def by_length(statistics: list[Statistics], lengths: list[int], parts: list[Part], density: float) -> dict:
    """How the beginnings of one text compare with the whole of it; lists are by length."""
    m = len(lengths)
    sets = [salient(getattr(stats, statistic), parts, density) for statistic in STATISTICS for stats in statistics]
    overlap = jaccard(torch.stack(sets), parts).mean(0)
    return {
        "lengths": lengths,
        "overlap with the longest": {
            "absmax": overlap[:m, m - 1].tolist(),
            "l2": overlap[m:, -1].tolist(),
        },
        "absmax with l2": [overlap[i, m + i].item() for i in range(m)],
        "mean absmax": [stats.absmax.mean().item() for stats in statistics],
        "mean root mean square": [
            (stats.l2 / length**0.5).mean().item() for stats, length in zip(statistics, lengths, strict=True)
        ],
    }


def by_projection(stats: Statistics, parts: list[Part], density: float) -> list[dict]:
    """How uneven the magnitudes of each projection are."""
    chosen = salient(stats.l2, parts, density)
    return [
        {
            "name": part.name,
            "kind": part.kind,
            "heads": len(part.heads),
            "absmax of the largest channel": stats.absmax[start:end].max().item(),
            "absmax of the median channel": stats.absmax[start:end].median().item(),
            "share of the sum of squares in the l2 set": (
                (stats.l2[start:end] * chosen[start:end]).square().sum() / stats.l2[start:end].square().sum()
            ).item(),
        }
        for part, (start, end) in zip(parts, bounds(parts), strict=True)
    ]


def save_magnitudes(path: Path, stats: Statistics, parts: list[Part]) -> None:
    """All channels: `<projection>.<q or k>.<statistic>`, fp32 [n] in the order of the projection's outputs."""
    save_file(
        {
            f"{part.name}.{part.kind}.{statistic}": getattr(stats, statistic)[start:end].clone()
            for part, (start, end) in zip(parts, bounds(parts), strict=True)
            for statistic in STATISTICS
        },
        path,
    )


def summary(results: dict) -> Table:
    """The headline figures, for the terminal."""
    overlap = results["overlap"]
    table = Table(title=f"{results['model']}: overlap (Jaccard) of salient sets", title_justify="left")
    for column in ("", *STATISTICS):
        table.add_column(column)
    table.add_row(
        f"of two batches of {results['length']:,} tokens", *map("{:.2f}".format, overlap["between batches"].values())
    )
    if overlap["between domains"]:
        table.add_row("of batches of two domains", *map("{:.2f}".format, overlap["between domains"].values()))
    for name, found in results["context"].items():
        first, last = found["lengths"][0], found["lengths"][-1]
        values = (f"{found['overlap with the longest'][s][0]:.2f}" for s in STATISTICS)
        table.add_row(f"of {first:,} and {last:,} tokens of {name}", *values)
    table.add_row("of absmax and l2, same batch", *[f"{overlap['absmax with l2']:.2f}"] * 2)
    table.add_row("of random sets", *[f"{overlap['chance']:.2f}"] * 2)
    if results["churn"]:
        mean = sum(record["churn"] for record in results["churn"]) / len(results["churn"])
        table.add_row("of a set and the one before, while training", f"{1 - mean:.2f}", "")
    return table
