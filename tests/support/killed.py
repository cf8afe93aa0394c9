"""`longact train` in processes that are killed: forked from one that has imported everything, but computed nothing."""

import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
import types
from pathlib import Path

import numba  # noqa: F401

from longact_kernels.cli import main
from longact_kernels.commands.train import report, run  # noqa: F401  for each fork to have it
from longact_kernels.commands.train.trainer import DriverTrainer

# Each fork has it, and does not copy it to look for garbage.
gc.freeze()


def reward(completions, **_):
    texts = [completion[0]["content"] for completion in completions]
    return [float(sum(ord(c) % 2 == 0 for c in text) > len(text) / 2) for text in texts]


def train(words: list[str], log: Path, kill: tuple[str, float] | None = None) -> int:
    """Runs `longact train` in a fork; returns its exit status, or minus the signal that ended it.

    Args:
        words: its arguments.
        log: gets a line at each beginning and end of a save, with the time since training began to load.
        kill: ("save", s): s seconds after the beginning of a save, one that is over again is let go; ("run", s): s
            seconds after the fork.
    """
    if (child := os.fork()) == 0:
        try:
            os._exit(_train(words, log, kill))
        except BaseException as error:
            log.open("a").write(f"error {error!r}\n")
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _train(words: list[str], log: Path, kill: tuple[str, float] | None) -> int:
    sys.modules["reward_of_this_test"] = types.SimpleNamespace(reward=reward)  # type: ignore[assignment]
    quiet = os.open(log.with_suffix(".out"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    report.both_styles = lambda draw: {}  # its pictures take longer than all else
    began = time.perf_counter()
    inside = threading.Event()
    save = DriverTrainer._save_checkpoint

    def say(what: str) -> None:
        with log.open("a") as file:
            file.write(f"{what} {time.perf_counter() - began:.4f}\n")

    def end(after: float, only_inside: bool) -> None:
        time.sleep(after)
        if inside.is_set() or not only_inside:
            say("killed inside" if inside.is_set() else "killed outside")
            os.kill(os.getpid(), signal.SIGKILL)

    def saving(*args):
        say("save")
        inside.set()
        if kill is not None and kill[0] == "save":
            threading.Thread(target=end, args=(kill[1], True), daemon=True).start()
        save(*args)
        inside.clear()
        say("saved")

    DriverTrainer._save_checkpoint = saving
    if kill is not None and kill[0] == "run":
        threading.Thread(target=end, args=(kill[1], False), daemon=True).start()
    return main(["train", *words])


class Killer:
    """Chooses when to kill: half of the times inside a save, at any time of it.

    Args:
        log: as of `train`; from it the durations of saves and of whole runs are known.
    """

    def __init__(self, log: Path, seed: int):
        self.log, self.rng = log, random.Random(seed)

    def choose(self, turn: int) -> tuple[str, float]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        begun = [float(line[1]) for line in lines if line[0] == "save"]
        saves = [
            float(saved[1]) - float(save[1])
            for save, saved in itertools.pairwise(lines)
            if (save[0], saved[0]) == ("save", "saved")
        ]
        if turn % 2:
            return "save", self.rng.uniform(0, min(saves[-10:]))
        # From before training begins to some steps into it.
        return "run", self.rng.uniform(0.3, 1.5) * sorted(begun)[len(begun) // 2]

    def killed(self, where: str) -> int:
        return self.log.read_text().count(f"killed {where}")
