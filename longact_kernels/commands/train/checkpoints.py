"""Checkpoints that can be trusted: a manifest of what each holds, written last, and what is wrong with one."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from longact_kernels.commands.console import Failure
from longact_kernels.commands.files import read_json, write_json

MANIFEST = "manifest.json"
RUN = "run.json"  # the options of a run, which each of its checkpoints has a copy of
# What going on needs, by the beginnings of the names that transformers and accelerate save it under.
PARTS = {
    "weights": ("model", "pytorch_model", "adapter_model"),
    "optimizer state": ("optimizer", "global_step"),
    "learning rate schedule": ("scheduler", "global_step"),
    "trainer state": ("trainer_state.json",),
    "random state": ("rng_state",),
}


def random_states(checkpoint: Path) -> list[Path]:
    """The files with the random states of the processes that saved a checkpoint, in their order."""
    return sorted(
        checkpoint.glob("rng_state*.pth"), key=lambda path: int(path.stem.rpartition("_")[2].replace("state", "0"))
    )


def completions(checkpoint: Path, process: int) -> Path:
    """The file with the completions that a process has generated, and has further steps to take on."""
    return checkpoint / f"completions_{process}.pt"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, from the last to the first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def seal(checkpoint: Path) -> None:
    """Writes the manifest of a checkpoint that is complete and on the disk: only then it is one."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(checkpoint / MANIFEST, files)


def is_sealed(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST).is_file()


def flaw(checkpoint: Path) -> str | None:
    """Why a run cannot go on from a checkpoint; None if it can."""
    if not is_sealed(checkpoint):
        return f"has no {MANIFEST}: its saving was interrupted"
    try:
        files = {name: (of["bytes"], of["sha256"]) for name, of in read_json(checkpoint / MANIFEST).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"is damaged: {MANIFEST} cannot be read"
    for name, (size, checksum) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"is damaged: {name} is missing"
        if path.stat().st_size != size:
            return f"is damaged: {name} has {path.stat().st_size} bytes, {size} were saved"
        if sha256(path) != checksum:
            return f"is damaged: {name} has other bytes than were saved"
    if "trainer_state.json" in files and (step := trainer_state(checkpoint)["global_step"]) != step_of(checkpoint):
        return f"is damaged: it was saved at step {step}, under another name"
    missing = [what for what, names in PARTS.items() if not any(name.startswith(names) for name in files)]
    return f"has no {', '.join(missing)}, as with save_only_model: nothing can go on from it" if missing else None


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns what torch and safetensors make of a full disk into a failure of one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        if "inline_container" in reason:  # torch says no more than where in its code it was
            reason = "torch could not write all of a file: is the disk full?"
        raise Failure(f"cannot save {path} ({reason})") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trainer_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())
