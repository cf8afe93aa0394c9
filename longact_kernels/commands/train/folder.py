"""The folder of a run: whose it is, what it remembers for resuming, where its last checkpoint lies."""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig

from longact_kernels import LongAct
from longact_kernels.commands.console import Failure
from longact_kernels.commands.files import naming, read_json, write_json, write_whole
from longact_kernels.commands.train.arguments import TrainArguments
from longact_kernels.commands.train.checkpoints import (
    RUN,
    checkpoints_in,
    completions,
    flaw,
    is_sealed,
    saving,
    step_of,
    trainer_state,
)
from longact_kernels.commands.train.evaluate import Evaluation
from longact_kernels.commands.train.resuming import (
    as_begun,
    as_of,
    changes_of,
    check_kept,
    foreign,
    options_of,
    processes_of,
    read_options,
)
from longact_kernels.warning import LongActWarning

T = TypeVar("T")
# The lock, and who holds it.
LOCK, OWNER = ".lock", ".owner.json"
# What a run has before its first checkpoint: nothing that could be gone on with.
OF_A_START = {LOCK, OWNER, RUN, "accuracy_before.json", "metrics.jsonl", "details.jsonl"}
# What else it writes at its end.
FILES = OF_A_START | {"summary.json", "report.html", "saliency.safetensors"}


class RunFolder:
    """A run's `output_dir`, which is this process's until `close`.

    Args:
        arguments, training: of the run that is about to begin or go on.

    Attributes:
        checkpoint: the last whole checkpoint, from which a resumed run goes on.
        changes: which options a resumed run has changed, each with its step.
        processes_before: how many processes it had when the checkpoint was saved.

    Raises:
        ValueError: the folder cannot be written to, is in use, holds another run, or none that could be resumed.
    """

    def __init__(self, arguments: TrainArguments, training: GRPOConfig):
        self.path = Path(training.output_dir)
        self.arguments, self.training = arguments, training
        self.metrics = self.path / "metrics.jsonl"
        self.details = self.path / "details.jsonl"
        self._lock: FileLock | None = None
        self._made: list[Path] = []
        self._held: dict = {}
        try:
            self.checkpoint, self.changes, self.processes_before = in_first_process(self._open)
        except (ValueError, OSError):
            self.close()
            raise

    def _open(self) -> tuple[Path | None, list[dict], int]:
        """Takes the folder; returns the attributes that say where to go on."""
        self._check_writable()
        self._check_kinds()
        if not self.arguments.resume:
            self._acquire()
            names = {path.name for path in self.path.iterdir()}
            if not names <= OF_A_START | {path.name for path in checkpoints_in(self.path) if not is_sealed(path)}:
                raise ValueError(
                    f"output_dir: {self.path} is not empty; go on with the run in it by --resume, or name another "
                    "output_dir"
                )
            for name in OF_A_START - {LOCK, OWNER}:  # of a run with other options
                (self.path / name).unlink(missing_ok=True)
            return None, [], self.training.world_size
        if not (self.path / RUN).is_file():
            raise ValueError(f"output_dir: {self.path} holds no run to resume")
        check_kept(self.training)
        self._acquire()
        held = self._held = self._defaults() | read_options(self.path / RUN)
        checkpoint = self._last_whole(held)
        step = step_of(checkpoint) if checkpoint else 0
        held = as_of(held, step)
        changes = changes_of(held, self._options(), step, self.path, len(self.arguments.stages()))
        before = processes_of({"processes": self.training.world_size, **held})
        if checkpoint and before != self.training.world_size and completions(checkpoint, 0).is_file():
            raise ValueError(
                f"processes: got {self.training.world_size}, but {before} have generated completions that the steps "
                f"after {checkpoint} are on; go on with {before} up to a checkpoint where they are used up"
            )
        if 0 < self.training.max_steps < step:
            raise ValueError(f"max_steps: got {self.training.max_steps}, but the run in {self.path} is at step {step}")
        return checkpoint, changes, before

    def _check_writable(self) -> None:
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if there == self.path and not there.is_dir():
            raise ValueError(f"output_dir: {self.path} is a file; name another output_dir")
        try:
            tempfile.TemporaryDirectory(dir=there).cleanup()
        except OSError as error:
            raise ValueError(
                f"output_dir: cannot write in {there} ({error.strerror}); name another output_dir"
            ) from error

    def _check_kinds(self) -> None:
        """Whether what a run writes as a file is no folder by now, and the other way round."""
        folders = [self.path / "model", *checkpoints_in(self.path)]
        for path in (*(self.path / name for name in sorted(FILES)), *folders):
            if path.exists() and path.is_dir() != (path in folders):
                is_one, needed = ("file", "folder") if path in folders else ("folder", "file")
                raise ValueError(
                    f"output_dir: {path} is a {is_one}, where a run has a {needed}; move it away, or name another "
                    "output_dir"
                )

    def _acquire(self) -> None:
        """Locks the folder. The system frees the lock of a process that is dead."""
        self._made = [path for path in (self.path, *self.path.absolute().parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            self._lock = None
            owner = read_json(self.path / OWNER)
            of = "process {process} on {host}, since {since}".format(**owner) if owner else "another process"
            raise ValueError(
                f"output_dir: {self.path} is in use by {of}; wait for it or stop it, or name another output_dir"
            ) from error
        self._inode = (self.path / LOCK).stat().st_ino

    def check_lock(self) -> None:
        """Raises Failure where the lock is not the one that this process holds: somebody has deleted it."""
        if self._lock is None:
            return
        with naming(self.path):
            self.path.stat()
        try:
            ours = (self.path / LOCK).stat().st_ino == self._inode
        except FileNotFoundError:
            ours = False
        if not ours:
            raise Failure(
                f"{self.path / LOCK} has been deleted, and another process may write to the folder by now; this one "
                "writes no more. Go on from the last checkpoint with --resume, once no other process is there"
            )

    def close(self) -> None:
        """Gives the folder back; if no run has begun in it, nothing of it is left."""
        if self._lock is None:
            return
        begun = (self.path / RUN).is_file()
        with suppress(OSError, Failure):  # by now it may be gone, read-only, or another process's
            self.check_lock()
            (self.path / OWNER).unlink(missing_ok=True)
            if not begun:
                (self.path / LOCK).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        with suppress(OSError):
            for path in [] if begun else self._made:
                path.rmdir()  # where something else lies in it, it stays

    def _options(self) -> dict:
        return {
            **self.arguments.what_is_trained(),
            "processes": self.training.world_size,
            "grpo_config": options_of(self.training),
        }

    def _defaults(self) -> dict:
        """Of our options: a run that began before there was one had what is its default now."""
        return {option.name: option.default for option in dataclasses.fields(self.arguments)}

    def _last_whole(self, held: dict) -> Path | None:
        """The last checkpoint that a run can go on from; warns of those that it cannot."""
        flaws = []
        found = None
        for checkpoint in checkpoints_in(self.path):
            wrong = flaw(checkpoint) or foreign(held, read_options(checkpoint / RUN))
            if wrong is None:
                found = checkpoint
                break
            flaws.append((checkpoint, f"{checkpoint} {wrong}"))
        if found is None and any(is_sealed(checkpoint) for checkpoint, _ in flaws):
            raise ValueError(
                f"output_dir: there is no checkpoint to go on from: {flaws[0][1]}; restore it, or name another "
                "output_dir"
            )
        for _, wrong in flaws:
            then = f"going on from {found.name}" if found else "there is none before it, so the run begins again"
            warnings.warn(f"{wrong}; {then}", LongActWarning, stacklevel=2)
        return found

    def own(self) -> None:
        """Says who has the folder."""
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(self.path / OWNER, {"process": os.getpid(), "host": platform.node(), "since": since})

    def take_prompts(self, prompts: list[dict]) -> None:
        """Keeps a hash of the prompts, which tells a resumed run whether what they are made from has changed.

        Raises:
            ValueError: they have.
        """
        text = json.dumps(prompts, sort_keys=True, default=str)
        self._prompts = hashlib.sha256(text.encode()).hexdigest()
        held = read_json(self.path / RUN).get("prompts", self._prompts) if self.arguments.resume else None
        if held not in (None, self._prompts):
            sources = ("dataset", "documents", "haystack", "task")
            name = next(name for name in sources if getattr(self.arguments, name))
            raise ValueError(
                f"{name}: {getattr(self.arguments, name)} has other prompts than the run in {self.path} was begun "
                "with; restore it, or name another output_dir"
            )

    @property
    def checkpoint_step(self) -> int:
        """The step of the checkpoint that a resumed run goes on from; 0 without one."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint by now; 0 without one."""
        return next((step_of(path) for path in checkpoints_in(self.path) if is_sealed(path)), 0)

    def is_complete(self, max_steps: int) -> bool:
        """Whether the last checkpoint is that of the run's last step; `max_steps` as in `GRPOConfig`."""
        if self.checkpoint is None:
            return False
        state = trainer_state(self.checkpoint)
        return state["global_step"] >= (max_steps if max_steps > 0 else state["max_steps"])

    def evaluation_before(self, prompts: int, compute: Callable[[], Evaluation]) -> Evaluation:
        """The evaluation before training, computed if no earlier part of the run did so. With it, a run begins."""
        path = self.path / "accuracy_before.json"
        # Of several processes, the first one's word counts: it may have written while others come to look.
        result = in_first_process(lambda: read_evaluation(path, prompts)) or compute()

        run = {**as_begun(self._options(), self._held), "prompts": self._prompts, "changes": self.changes}

        def keep() -> None:
            write_json(self.path / RUN, run)
            write_json(path, dataclasses.asdict(result))

        in_first_process(keep)
        return result

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict) -> None:
        """Saves the trained model as `model/`, an ordinary checkpoint that appears whole."""
        with tempfile.TemporaryDirectory(dir=self.path) as aside:
            model.save_pretrained(Path(aside) / "model", state_dict=weights)
            tokenizer.save_pretrained(Path(aside) / "model")
            shutil.rmtree(self.path / "model", ignore_errors=True)
            (Path(aside) / "model").rename(self.path / "model")

    def saliency(self, longact: LongAct) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer, the saliency that the set was last chosen from, and the set; kept as `saliency.safetensors`."""
        found = {}
        for name, index in longact.sets.items():
            saliency = longact.saliency(name)
            assert saliency is not None  # it has a set
            found[name] = saliency.cpu().contiguous(), index.cpu()
        tensors = {f"{name}.saliency": saliency for name, (saliency, _) in found.items()}
        tensors |= {f"{name}.rows": index for name, (_, index) in found.items()}
        path = self.path / "saliency.safetensors"
        with saving(path):
            write_whole(path, lambda unfinished: save_file(tensors, unfinished))
        return found


def read_evaluation(path: Path, prompts: int) -> Evaluation | None:
    """An evaluation of so many prompts that was kept; None if there is none, with a warning where it is damaged."""
    try:
        if not (held := read_json(path)):
            return None
        rewards, completions = held.get("rewards", []), held.get("completions", [])
        for kept, kind in ((rewards, int | float), (completions, str)):
            if not isinstance(kept, list) or len(kept) != prompts or not all(isinstance(one, kind) for one in kept):
                raise ValueError(f"{path} is damaged (needed rewards and completions of {prompts} prompts)")
        return Evaluation(rewards, completions)
    except ValueError as error:
        warnings.warn(f"{error}: the accuracy before training is measured again", LongActWarning, stacklevel=2)
        return None


def in_first_process(work: Callable[[], T]) -> T:
    """What `work` on the folder returns, or the error that it ends with, in the first process; the same in all."""
    found: list = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = work()
        except (ValueError, OSError, Failure) as error:
            found[1] = error
    value, wrong = broadcast_object_list(found)
    if wrong is not None:
        raise wrong
    return value
