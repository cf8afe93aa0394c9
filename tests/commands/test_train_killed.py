"""Runs that SIGKILL ends again and again, half of the times inside a save, against runs that went through."""

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from killed import Killer, train
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_network")]

KILLS = 50
STEPS = 7
KINDS = {
    "lagged": ["--state", "compact", "--refresh_every", "3"],
    "current": ["--selection", "current", "--statistic", "l2", "--num_iterations", "2", "--save_total_limit", "1"],
}


def words(root: Path, output: Path, *more: str) -> list[str]:
    options = {"model": root / "model", "output_dir": output, "max_steps": STEPS}
    options |= {"reward": "reward_of_this_test:reward", **tiny.SHORT_RUN}
    return [str(word) for key, value in options.items() for word in (f"--{key}", value)] + list(more)


def remains(run: Path) -> dict:
    """All that a run leaves, but for times and places."""
    checkpoint = run / f"checkpoint-{STEPS}"
    timed = ("seconds", "per_second", "time", "runtime")
    return {
        "weights": load_file(run / "model" / "model.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "schedule": torch.load(checkpoint / "scheduler.pt", weights_only=True),
        "random": torch.load(checkpoint / "rng_state.pth", weights_only=False)["cpu"],
        "metrics": [
            {key: value for key, value in json.loads(line).items() if not any(word in key for word in timed)}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ],
        "before": json.loads((run / "accuracy_before.json").read_text()),
        "accuracy": json.loads((run / "summary.json").read_text())["accuracy"],
        "saliency": load_file(run / "saliency.safetensors"),
    }


def differences(a, b, where="") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [
            found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{where}[{i}]")
        ]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if a == b else [f"{where}: {a!r} != {b!r}"]


def test_killed_runs_end_with_the_bits_of_those_that_went_through(tmp_path, monkeypatch):
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    tiny.save(tmp_path / "model")
    log = tmp_path / "log"
    whole = {}
    for kind, more in KINDS.items():
        assert train(words(tmp_path, tmp_path / kind, *more), log) == 0, log.with_suffix(".out").read_text()[-2000:]
        whole[kind] = remains(tmp_path / kind)
        assert any("churn" in record for record in whole[kind]["metrics"])
    killer, turn, ended, status = Killer(log, seed=0), 0, 0, 0
    while status or ended < len(KINDS) or min(map(killer.killed, ("inside", "outside"))) < KILLS / 2:
        kind = [*KINDS][ended % len(KINDS)]
        run = tmp_path / f"{kind}-{ended}"
        begun = ["--resume"] if (run / "run.json").is_file() else []
        turn += 1
        # A run that is killed in every save comes to no end.
        kill = killer.choose(turn) if turn % 7 else None
        status = train(words(tmp_path, run, *KINDS[kind], *begun), log, kill)
        assert status in (0, -9), (status, log.read_text()[-300:], log.with_suffix(".out").read_text()[-2000:])
        if status == 0:
            assert differences(whole[kind], remains(run)) == []
            ended += 1
    print(f"{killer.killed('inside')} kills inside a save, {killer.killed('outside')} elsewhere, {ended} runs ended")
