"""What a study's YAML file says: a setting, the options that all runs share, and the arms, which differ in few."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longact_kernels.commands.console import did_you_mean
from longact_kernels.commands.study.recall import Recall
from longact_kernels.commands.train.arguments import LONGACT

SETTINGS = ("recall", "train")
DENSE = "dense"
# All arms get the same data, compute and learning rate, and differ in the method alone.
ARM_OPTIONS = [of.name for of in LONGACT] + ["longact", "state", "algorithm"]
SHARED_BY_ALL = ("output_dir", "seed", "resume", "config")


@dataclass(frozen=True)
class Arm:
    """One way to train, over several seeds.

    Attributes:
        options: of `longact train`, in which the arm differs.
        frozen: the query and key weights stay as they are, all else trains: what there is to gain without them.
        seeds: of its runs.
    """

    name: str
    options: dict[str, Any]
    frozen: bool
    seeds: list[int]


@dataclass(frozen=True)
class Study:
    """A study, as its file says it.

    Attributes:
        setting: "recall", for every seed a small model pretrained here, on associative recall; or "train", whatever
            model and task the options name.
        options: of `longact train`, for all arms.
        arms: by name; one is called "dense".
        reference: the arm that the others are compared with, besides "dense".
        base: the model and the task of setting "recall".
        curve_every: steps between two measurements of the held-out accuracy; 0 for none but before and after.
        evaluate: options of `longact eval` (tasks, lengths, limit, batch_size), whose mean score is then the final
            one; None for the held-out accuracy.
    """

    name: str
    setting: str
    options: dict[str, Any]
    arms: dict[str, Arm]
    reference: str
    base: Recall = field(default_factory=Recall)
    curve_every: int = 0
    evaluate: dict[str, Any] | None = None

    @property
    def seeds(self) -> list[int]:
        """Those of all arms."""
        return sorted({seed for arm in self.arms.values() for seed in arm.seeds})


def read_study(path: Path) -> Study:
    """Reads a study from its file.

    Raises:
        ValueError: what is wrong with it, in one line.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: needed a mapping with setting, seeds, options and arms")
    known = ("setting", "seeds", "options", "arms", "reference", "base", "curve_every", "evaluate")
    check_keys(content, known, str(path))
    for key in ("setting", "seeds", "options", "arms"):
        if not content.get(key):
            raise ValueError(f"{path}: there is no {key}")
    if content["setting"] not in SETTINGS:
        raise ValueError(f"setting: got {content['setting']!r}, needed one of {', '.join(SETTINGS)}")
    options = mapping(content["options"], "options")
    for key in SHARED_BY_ALL:
        if key in options:
            raise ValueError(f"options: the study itself sets {key}; leave it out")
    if not isinstance(options.get("max_steps"), int) or options["max_steps"] < 1:
        raise ValueError(f"options: got max_steps {options.get('max_steps')}, needed the number of steps of every run")
    if content["setting"] == "recall":
        for key in ("model", "task", "dataset", "max_completion_length"):
            if key in options:
                raise ValueError(f"options: setting recall sets {key} itself; set its size under base, or leave it out")
    elif "base" in content:
        raise ValueError("base: belongs to setting recall only; set the model and the task under options")
    seeds = seeds_of(content["seeds"], "seeds")
    arms = {
        str(name): read_arm(str(name), mapping(arm or {}, f"arms: {name}"), seeds)
        for name, arm in mapping(content["arms"], "arms").items()
    }
    reference = content.get("reference", next((name for name in arms if name != DENSE), DENSE))
    for name in (DENSE, reference):
        if name not in arms:
            raise ValueError(f"arms: needed an arm {name!r}, which the others are compared with")
    evaluate = content.get("evaluate")
    if evaluate is not None:
        check_keys(mapping(evaluate, "evaluate"), ("tasks", "lengths", "limit", "batch_size"), "evaluate")
    base = mapping(content.get("base") or {}, "base")
    check_keys(base, [one.name for one in dataclasses.fields(Recall)], "base")
    curve_every = content.get("curve_every", 0)
    if not isinstance(curve_every, int) or curve_every < 0:
        raise ValueError(f"curve_every: got {curve_every!r}, needed a number of steps, or 0")
    return Study(path.stem, content["setting"], options, arms, reference, Recall(**base), curve_every, evaluate)


def read_arm(name: str, content: dict, seeds: list[int]) -> Arm:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError(f"arms: got the name {name!r}, needed letters, digits, '-', '_' and '.', as in a file's name")
    options = dict(content)
    seeds = seeds_of(options.pop("seeds", seeds), f"arms: {name}: seeds")
    frozen = options.pop("frozen", False)
    check_keys(options, ARM_OPTIONS, f"arms: {name}", "arms share data, compute and learning rate: see options")
    if name == DENSE or frozen:
        options.setdefault("longact", False)
    return Arm(name, options, frozen, seeds)


def mapping(content: Any, where: str) -> dict:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: got {content!r}, needed a mapping of names to values")
    return content


def seeds_of(content: Any, where: str) -> list[int]:
    """Seeds from a list of them, or from their number: 1, 2, ..."""
    seeds = list(range(1, content + 1)) if type(content) is int else content
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"{where}: got {content!r}, needed a number of seeds, or a list of seeds")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: got {content!r}, which has a seed twice")
    return seeds


def check_keys(content: dict, known: Iterable[str], where: str, remark: str = "") -> None:
    for key in content:
        if key not in (names := list(known)):
            raise ValueError(f"{where}: there is no {key!r}{did_you_mean(str(key), names, remark)}")
