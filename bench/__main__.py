"""`python -m bench`: runs the benchmarks, prints the table, writes JSON, CSV and pictures."""

import argparse
import sys
import tempfile
from pathlib import Path

import pytest

from bench.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more rounds and more points (an hour instead of minutes)")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: for a machine that is busy")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the results (%(default)s)")
    parser.add_argument("-k", default="", help="only the benchmarks whose names match, as in pytest")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        return run(args, Path(folder) / "pytest-benchmark.json")


def run(args: argparse.Namespace, raw: Path) -> int:
    options = ["-q", "-ra", "-o", "python_files=bench_*.py", "-o", "addopts=", "-p", "no:cacheprovider", "-k", args.k]
    options += [f"--benchmark-json={raw}", "--benchmark-columns=rounds", "--benchmark-disable-gc", "--benchmark-quiet"]
    options += ["--full"] * args.full + ["--cpu-time"] * args.cpu_time
    status = pytest.main([*options, str(Path(__file__).parent)])
    if not raw.is_file():
        print("bench: no benchmark came to its end", file=sys.stderr)
        return int(status) or 1
    write_report(raw, args.output)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
