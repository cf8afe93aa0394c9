"""What a study's YAML file says: a setting, the options that all runs share, and the arms, which differ in few."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig

from longact_kernels.commands.console import did_you_mean
from longact_kernels.commands.study.recall import Recall
from longact_kernels.commands.train.arguments import LONGACT

SETTINGS = ("recall", "train")
DENSE = "dense"
# All arms get the same data and compute, and differ in the method alone.
ARM_OPTIONS = [of.name for of in LONGACT] + ["longact", "frozen", "state", "algorithm"]
LORA_OPTIONS = [of.name for of in dataclasses.fields(ModelConfig) if of.name.startswith("lora_")]
SHARED_BY_ALL = ("output_dir", "seed", "resume", "config")


@dataclass(frozen=True)
class Arm:
    """One way to train, over several seeds.

    Attributes:
        method: its name in the study's file.
        options: of `longact train`, in which the arm differs.
        lora: options of LoRA adapters, as TRL's `ModelConfig` names them; with any, they alone are trained.
        seeds: of its runs.
        base: the model and the task of setting "recall".
    """

    method: str
    options: dict[str, Any]
    lora: dict[str, Any]
    seeds: list[int]
    base: Recall


@dataclass(frozen=True)
class Study:
    """A study, as its file says it.

    Attributes:
        setting: "recall", for every seed a small model pretrained here, on associative recall; or "train", whatever
            model and task the options name.
        options: of `longact train`, for all arms.
        arms: by name, which is the method's, with the number of pairs behind it where the study has several.
        reference: the method that the others are compared with, besides "dense".
        curve_every: steps between two measurements of the held-out accuracy; 0 for none but before and after.
        evaluate: options of `longact eval` (tasks, lengths, limit, batch_size), whose mean score is then the final
            one; None for the held-out accuracy.
        learning_rates: of which every arm gets the one that is best for it; none where `options` has the rate of all.
        tuning_seeds: that tell which is best.
    """

    name: str
    setting: str
    options: dict[str, Any]
    arms: dict[str, Arm]
    reference: str
    curve_every: int = 0
    evaluate: dict[str, Any] | None = None
    learning_rates: list[float] = field(default_factory=list)
    tuning_seeds: list[int] = field(default_factory=list)

    def beside(self, arm: Arm, method: str) -> str:
        """The name of the arm of a method that an arm is compared with: the one with the same base."""
        return next(name for name, other in self.arms.items() if (other.method, other.base) == (method, arm.base))

    @staticmethod
    def tuned_name(name: str, rate: float) -> str:
        """What `tuning` calls an arm with one of the learning rates."""
        return f"{name}-lr{rate:g}"

    def tuning(self) -> "Study":
        """The study that tells every arm's learning rate: an arm for each rate of each arm."""
        arms = {
            self.tuned_name(name, rate): replace(
                arm, options={**arm.options, "learning_rate": rate}, seeds=self.tuning_seeds
            )
            for name, arm in self.arms.items()
            for rate in self.learning_rates
        }
        return replace(self, arms=arms, curve_every=0, evaluate=None)

    def with_rates(self, rates: dict[str, float]) -> "Study":
        """The study with each arm's learning rate, by its name."""
        arms = {
            name: replace(arm, options={**arm.options, "learning_rate": rates[name]}) for name, arm in self.arms.items()
        }
        return replace(self, arms=arms)

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
    known = [of.name for of in dataclasses.fields(Study) if of.name != "name"] + ["seeds", "base"]
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
    bases = bases_of(mapping(content.get("base") or {}, "base"))
    arms = {}
    for name, arm in mapping(content["arms"], "arms").items():
        read = read_arm(str(name), mapping(arm or {}, f"arms: {name}"), seeds)
        for base in bases:
            arms[f"{name}-{base.pairs}" if len(bases) > 1 else str(name)] = replace(read, base=base)
    methods = [arm.method for arm in arms.values()]
    reference = content.get("reference", next((name for name in methods if name != DENSE), DENSE))
    for name in (DENSE, reference):
        if name not in methods:
            raise ValueError(f"arms: needed an arm {name!r}, which the others are compared with")
    evaluate = content.get("evaluate")
    if evaluate is not None:
        check_keys(mapping(evaluate, "evaluate"), ("tasks", "lengths", "limit", "batch_size"), "evaluate")
    curve_every = content.get("curve_every", 0)
    if not isinstance(curve_every, int) or curve_every < 0:
        raise ValueError(f"curve_every: got {curve_every!r}, needed a number of steps, or 0")
    return with_tuning(Study(path.stem, content["setting"], options, arms, reference, curve_every, evaluate), content)


def with_tuning(study: Study, content: dict) -> Study:
    """The study with the learning rates that its file has for every arm to choose from, and the seeds for that."""
    if "learning_rates" not in content and "tuning_seeds" not in content:
        return study
    rates = content.get("learning_rates")
    if not isinstance(rates, list) or len(set(rates)) < 2 or not all(type(one) is float and one > 0 for one in rates):
        raise ValueError(
            f"learning_rates: got {rates!r}, needed a list of two rates or more, such as [5.0e-4, 1.0e-3] (YAML takes "
            "1e-3 for a text)"
        )
    if "learning_rate" in study.options:
        raise ValueError(
            "options: got learning_rate beside learning_rates, of which each arm gets its best; leave it out"
        )
    seeds = seeds_of(content.get("tuning_seeds"), "tuning_seeds")
    if both := sorted({*seeds} & {*study.seeds}):
        raise ValueError(f"tuning_seeds: got {both[0]}, a seed that the arms are compared on; needed others")
    return replace(study, learning_rates=sorted(set(rates)), tuning_seeds=seeds)


def read_arm(name: str, content: dict, seeds: list[int]) -> Arm:
    """An arm, with the base of `Recall`'s defaults."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError(f"arms: got the name {name!r}, needed letters, digits, '-', '_' and '.', as in a file's name")
    options = dict(content)
    seeds = seeds_of(options.pop("seeds", seeds), f"arms: {name}: seeds")
    lora = {key: options.pop(key) for key in LORA_OPTIONS if key in options}
    remark = "arms share data and compute: see options; learning_rates chooses a rate for each"
    check_keys(options, [*ARM_OPTIONS, *LORA_OPTIONS], f"arms: {name}", remark)
    if name == DENSE or "frozen" in options or lora:
        options.setdefault("longact", False)
    if lora and options["longact"]:
        raise ValueError(f"arms: {name}: got longact and {next(iter(lora))}; leave one of them out")
    return Arm(name, options, lora, seeds, Recall())


def bases_of(content: dict) -> list[Recall]:
    """The base for each of its numbers of pairs."""
    check_keys(content, [of.name for of in dataclasses.fields(Recall)], "base")
    pairs = content.get("pairs", Recall.pairs)
    return [Recall(**content | {"pairs": one}) for one in (pairs if isinstance(pairs, list) else [pairs])]


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
