"""The folder of a run: whose it is, what it remembers for resuming, where its last checkpoint lies."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor

from longact_kernels import LongAct
from longact_kernels.commands.train.arguments import TrainArguments
from longact_kernels.commands.train.evaluate import Evaluation


class RunFolder:
    """A run's `output_dir`.

    Args:
        path: need not exist; nothing is written before `begin`.
        arguments: of the run that is about to begin or go on.

    Raises:
        ValueError: the folder holds another run, or none where one is to be resumed.
    """

    def __init__(self, path: str, arguments: TrainArguments):
        self.path = Path(path)
        self.arguments = arguments
        self.metrics = self.path / "metrics.jsonl"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir: {path} is a file; name another output_dir")
        if not arguments.resume:
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(
                    f"output_dir: {path} is not empty; go on with the run in it by --resume, or name another output_dir"
                )
            return
        try:
            # A run that began before there was an option had what is its default now.
            defaults = {option.name: option.default for option in dataclasses.fields(arguments)}
            held = defaults | json.loads((self.path / "run.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"output_dir: {path} holds no run to resume") from error
        for key, wanted in arguments.what_is_trained().items():
            if held.get(key) != wanted:
                raise ValueError(
                    f"output_dir: {path} holds another run, with {key} {held.get(key)!r} instead of {wanted!r}; "
                    "resume with the same settings, or name another output_dir"
                )

    def begin(self) -> None:
        """Makes the folder this run's."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "run.json").write_text(json.dumps(self.arguments.what_is_trained(), indent=2))

    @property
    def checkpoint(self) -> Path | None:
        """The last complete checkpoint; the trainer writes its state into it last of all."""
        complete = (state.parent for state in self.path.glob("checkpoint-*/trainer_state.json"))
        return max(complete, key=lambda folder: int(folder.name.partition("-")[2]), default=None)

    @property
    def checkpoint_step(self) -> int:
        """The step of the last complete checkpoint; 0 without one."""
        return int(self.checkpoint.name.partition("-")[2]) if self.checkpoint else 0

    def is_complete(self, max_steps: int) -> bool:
        """Whether the last checkpoint is that of the run's last step; `max_steps` as in `GRPOConfig`."""
        if self.checkpoint is None:
            return False
        state = self.trainer_state(self.checkpoint)
        return state["global_step"] >= (max_steps if max_steps > 0 else state["max_steps"])

    def check_stages(self, max_steps: int) -> None:
        """Whether the stages of `lengths` lie where they did when the run began.

        Raises:
            ValueError: they do not; the order of the prompts would be another one.
        """
        if self.checkpoint is None or len(self.arguments.stages()) == 1:
            return
        if max_steps != (planned := self.trainer_state(self.checkpoint)["max_steps"]):
            raise ValueError(
                f"max_steps: got {max_steps}, but the run in {self.path} shares {planned} steps out among its lengths "
                f"{self.arguments.lengths}; resume with max_steps {planned}, or name another output_dir"
            )

    @staticmethod
    def trainer_state(checkpoint: Path) -> dict:
        return json.loads((checkpoint / "trainer_state.json").read_text())

    def evaluation(self, when: str, compute: Callable[[], Evaluation]) -> Evaluation:
        """The evaluation of that name, computed and kept if an earlier part of the run did not do so."""
        path = self.path / f"accuracy_{when}.json"
        # Of several processes, the first one's word counts: it may have written while others come to look.
        [kept] = broadcast_object_list([json.loads(path.read_text()) if path.is_file() else None])
        if kept is not None:
            return Evaluation(**kept)
        result = compute()
        if PartialState().is_main_process:
            path.write_text(json.dumps({"rewards": result.rewards, "completions": result.completions}))
        return result

    def saliency(self, longact: LongAct) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer, the saliency that the set was last chosen from, and the set; kept for a run resumed at its end."""
        path = self.path / "saliency.safetensors"
        found = {}
        for name, index in longact.sets.items():
            saliency = longact.saliency(name)
            assert saliency is not None  # it has a set
            found[f"{name}.saliency"] = saliency.cpu().contiguous()
            found[f"{name}.rows"] = index.cpu()
        if found:
            save_file(found, path)
        kept = load_file(path) if path.is_file() else {}
        names = [key.removesuffix(".saliency") for key in kept if key.endswith(".saliency")]
        return {name: (kept[f"{name}.saliency"], kept[f"{name}.rows"]) for name in longact.layers if name in names}
