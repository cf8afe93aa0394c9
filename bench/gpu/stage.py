"""What a stage is given, and the process that runs one: `python -m bench.gpu.stage NAME ...`."""

import argparse
import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stage:
    """A stage's process.

    Args:
        name: of the stage, and of its module in this package.
        folder: where results go.
        dry: tiny shapes on a CPU, to try the script itself.
        seconds: its limit.
    """

    name: str
    folder: Path
    dry: bool
    seconds: float

    def row(self, what: str, **figures) -> None:
        """Adds a line to the results at once, so that a stage that is stopped keeps what it had."""
        line = json.dumps({"stage": self.name, "what": what, **figures})
        print(line)
        with open(results(self.folder), "a") as file:
            file.write(line + "\n")


def results(folder: Path) -> Path:
    """The file of all rows, one JSON object a line."""
    return folder / "results.jsonl"


def prepare_interpreter() -> None:
    """Where Triton's interpreter stands in for a GPU, makes it compute as the tests have it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.path.append(str(ROOT / "tests" / "support"))
        importlib.import_module("exact_interpreter")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.stage", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    prepare_interpreter()
    stage = Stage(args.name, args.folder, args.dry_run, args.seconds)
    return importlib.import_module(f"bench.gpu.{args.name}").run(stage) or 0


if __name__ == "__main__":
    sys.exit(main())
