"""`longact kernels`: what the compiled kernels cost, and what they are predicted to do."""

import importlib.util
import json
import sys
from dataclasses import asdict
from typing import Any

from longact_kernels.commands.console import Parser, Refusal
from longact_kernels.compiled.budgets import Budget, budget
from longact_kernels.compiled.rooflines import qwen3_8b
from longact_kernels.compiled.targets import GPUS, KIB, TARGETS
from longact_kernels.compiled.variants import variants
from longact_kernels.csrc_triton.variant import Variant


def rows(target: str | None) -> list[tuple[Variant, str]]:
    """What `longact kernels` lists: the main variants for all targets, or all variants for one."""
    names = TARGETS if target is None else [target]
    listed = [variant for variant in variants() if variant.main or target is not None]
    return [(variant, name) for variant in listed for name in names if name in (variant.targets or TARGETS)]


def parser() -> Parser:
    parser = Parser("longact kernels", description="Compiles the kernels for every GPU architecture; needs no GPU.")
    parser.add_argument(
        "--target",
        choices=TARGETS,
        help="one architecture, with all variants of each kernel (default: all architectures, main variants)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def main(argv: list[str]) -> int:
    """Runs `longact kernels`; returns the exit status, 0.

    Raises:
        Refusal: bad input, or no triton to compile with.
    """
    arguments = parser().parse_args(argv)
    target = arguments.target
    if importlib.util.find_spec("triton") is None:
        raise Refusal("triton is not installed; run pip install triton (Linux only)")
    from rich.console import Console
    from rich.progress import track

    errors = Console(stderr=True)
    budgets = [budget(*row) for row in track(rows(target), "Compiling", console=errors, transient=True)]
    gpus = {name: gpu for name, gpu in GPUS.items() if target in (None, gpu.target)}
    predictions = [
        {
            "kernel": kernel,
            "work": work.shape,
            "gpu": name,
            "bytes_per_element": work.moved / work.elements,
            "minimum_bytes_per_element": work.minimum / work.elements,
            "predicted_us": 1e6 * work.seconds(gpu),
            "predicted_roofline_share": work.roofline(gpu),
        }
        for kernel, work in qwen3_8b().items()
        for name, gpu in gpus.items()
    ]
    if arguments.json:
        print(json.dumps({"compiled": [asdict(b) for b in budgets], "predicted": predictions}, indent=1))
    else:
        _print_tables(budgets, predictions)
    return 0


def _print_tables(budgets: list[Budget], predictions: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=140)
    compiled = Table(title="Read from the compiled code (no GPU needed); widest load and store in bits")
    for heading in ("kernel", "target", "registers", "spills", "shared", "occupancy", "load/store", "tensor core"):
        text = heading in ("kernel", "target", "tensor core")
        compiled.add_column(heading, justify="left" if text else "right", no_wrap=True)
    for b in budgets:
        numbers = (b.registers, f"{b.spills} B", f"{b.shared / KIB:.0f} KiB", f"{b.occupancy:.0%}")
        widths = f"{b.load_bits}/{b.store_bits}"
        compiled.add_row(f"{b.kernel} {b.label}", b.target, *map(str, numbers), widths, b.tensor_core)
    console.print(compiled)
    predicted = Table(title="Predicted, not measured: Qwen3-8B's q and k projections, 32,768 tokens, bf16")
    for heading in ("kernel", "work", "GPU", "bytes/element", "minimum", "time", "share of roofline"):
        text = heading in ("kernel", "work", "GPU")
        predicted.add_column(heading, justify="left" if text else "right", no_wrap=heading != "work")
    for p in predictions:
        predicted.add_row(
            p["kernel"],
            p["work"],
            p["gpu"],
            f"{p['bytes_per_element']:.3f}",
            f"{p['minimum_bytes_per_element']:.3f}",
            f"{p['predicted_us']:.0f} µs",
            f"{p['predicted_roofline_share']:.0%}",
        )
    console.print(predicted)
