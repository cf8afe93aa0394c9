"""`LongActConfig`: every option of `LongAct`, checked. Code, command line and docs all read it here."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from longact_kernels.functional import Axis
from longact_kernels.sparse.statistics import STATISTICS

if TYPE_CHECKING:
    Statistic = str
else:
    Statistic = Literal[tuple(STATISTICS)]
Scope = Literal["head", "layer", "model"]
When = Literal["lagged", "current"]
Grad = Literal["full", "compact"]
Nonfinite = Literal["error", "skip", "off"]
Strategy = Literal["top", "bottom", "random", "threshold"]
Site = Literal["projection", "norm", "rope"]

ALL_LINEAR = "all-linear"

# Row ranges (start, stop, head size) of queries or keys.
Ranges = Iterable[tuple[int, int, int]]
TargetModules = Sequence[str] | str | Callable[[str, nn.Module], Ranges | None]


def about(help: str, experimental: bool = False) -> dict[str, Any]:
    """What is known of a field; an experimental one is for research and may change or go."""
    return {"help": help, "experimental": experimental}


@dataclass(frozen=True, kw_only=True)
class LongActConfig:
    """The options of `LongAct`. Each field's `metadata` has its `help`, and whether it is `experimental`.

    Raises:
        ValueError: a value is out of range, or two do not go together; the message names the field.
    """

    density: float | Mapping[str, float] = field(
        default=0.3,
        metadata=about(
            "The share of channels that are salient, above 0 and up to 1; or shares by regular expression, of which a "
            "layer has that of the first found in its path."
        ),
    )
    statistic: Statistic = field(
        default="absmax",
        metadata=about(
            "The magnitude of a channel: absmax, the largest absolute value over all tokens; or l2, the mean over "
            "sequences of the L2 norm over tokens (the paper's).",
        ),
    )
    scope: Scope | None = field(
        default=None,
        metadata=about(
            "Which channels compete with one another: those of a head (the paper's), of a layer, or of the whole "
            "model, where no layer gets more than twice its share. Default: head for rows, layer for columns.",
        ),
    )
    selection: When = field(
        default="lagged",
        metadata=about(
            "lagged: earlier batches choose the set of a step, so that backward computes the salient channels only; "
            "current (the paper's): the step's own batch chooses it, after a dense backward.",
        ),
    )
    axis: Axis = field(
        default="rows",
        metadata=about(
            "rows: channels are rows of the weight, output channels (the paper's); columns: input channels."
        ),
    )
    target_modules: TargetModules | None = field(
        default=None,
        metadata=about(
            "Layers to train sparsely instead of the query and key projections: name endings, a regular expression, or "
            "all-linear: those of all blocks; in code also a function of path and module.",
        ),
    )
    refresh_every: int = field(default=1, metadata=about("Choose the sets anew every so many optimizer steps."))
    grad: Grad = field(
        default="full",
        metadata=about(
            "full: gradients have the shape of the weight; compact: fp32 gradients of the salient channels only, kept "
            "outside weight.grad, for SalientAdamW.",
        ),
    )
    nonfinite: Nonfinite = field(
        default="error",
        metadata=about(
            "What to do about NaN or Inf in activations or gradients. error: the step changes nothing and raises; "
            "skip: the step changes nothing and is counted; off: nothing is checked.",
        ),
    )
    strategy: Strategy = field(
        default="top",
        metadata=about(
            "Which channels are salient: top, those of largest magnitude; bottom or random, for comparison; threshold, "
            "those of top that are above a multiple of the layer's mean.",
            experimental=True,
        ),
    )
    threshold: float = field(
        default=1.0, metadata=about("For strategy threshold: the multiple of the layer's mean.", experimental=True)
    )
    seed: int = field(default=0, metadata=about("For strategy random: the seed of the sets.", experimental=True))
    ema: float = field(
        default=0.0,
        metadata=about(
            "Moving average of magnitudes over refreshes: the weight of the past, at least 0 and below 1.",
            experimental=True,
        ),
    )
    freeze_after: int | None = field(
        default=None,
        metadata=about(
            "Keep the sets, and stop measuring, after so many optimizer steps. Default: never.", experimental=True
        ),
    )
    site: Site = field(
        default="projection",
        metadata=about(
            "Where magnitudes are measured: at the output of the projection (the paper's), after its norm, or after "
            "rope.",
            experimental=True,
        ),
    )
    pair_rope: bool = field(
        default=False,
        metadata=about("Choose the two channels of a rotary pair together.", experimental=True),
    )

    def __post_init__(self) -> None:
        for name, choices in _choices().items():
            value = getattr(self, name)
            if value not in choices:
                needed = ", ".join(repr(choice) for choice in choices if choice is not None)
                raise ValueError(f"{name}: got {value!r}, needed one of {needed}")
        for name, (fits, needed) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name == "freeze_after":
                continue
            whole = name in ("refresh_every", "freeze_after")
            values = value.values() if name == "density" and isinstance(value, Mapping) else [value]
            for one in values:
                if (
                    isinstance(one, bool)
                    or not isinstance(one, numbers.Integral if whole else numbers.Real)
                    or not fits(one)
                ):
                    raise ValueError(f"{name}: got {value!r}, needed {needed}")
        if isinstance(self.density, Mapping):
            if not self.density:
                raise ValueError(f"density: got no patterns, needed {_RANGES['density'][1]}")
            object.__setattr__(self, "density", dict(self.density))  # a copy: the options are fixed
            for pattern in self.density:
                _check_pattern("density", pattern)
        target = self.target_modules
        names = isinstance(target, Sequence) and all(isinstance(name, str) for name in target)
        if target is not None and not callable(target) and not names:
            raise ValueError(
                f"target_modules: got {target!r}, needed name endings, a regular expression, or a function of path and "
                "module"
            )
        if isinstance(target, str):
            _check_pattern("target_modules", target)
        elif callable(target):
            _check_function(target)
        elif target is not None and ALL_LINEAR in target:
            raise ValueError(f"target_modules: {ALL_LINEAR!r} names all layers, not one of a list; pass it alone")
        if self.axis == "columns" and (self.scope == "head" or self.site != "projection" or self.pair_rope):
            raise ValueError(
                "axis: 'columns' takes input channels, which have no heads, norms or rotary pairs; needed scope "
                "'layer' or 'model', site 'projection' and no pair_rope"
            )
        if self.grad == "compact" and self.selection == "current":
            raise ValueError(
                "grad: 'compact' needs the set before backward; use selection='lagged', or grad='full' with 'current'"
            )
        if self.scope is None:
            object.__setattr__(self, "scope", "head" if self.axis == "rows" else "layer")

    def densities(self, names: Sequence[str]) -> list[float]:
        """The density of each layer, given by name.

        Raises:
            ValueError: if `density` has no pattern for a layer, or one that is no layer's.
        """
        if not isinstance(self.density, Mapping):
            return [self.density] * len(names)
        patterns: list[Any] = [next((p for p in self.density if re.search(p, name)), None) for name in names]
        if None in patterns:
            raise ValueError(
                f"density: none of its patterns is found in {names[patterns.index(None)]}; got "
                f"{', '.join(map(repr, self.density))}, needed one for every layer: '' is found in all"
            )
        if unused := [p for p in self.density if p not in patterns]:
            raise ValueError(
                f"density: the pattern {unused[0]!r} is no layer's; needed one found in the path of a layer, such as "
                f"{names[0]}, before any other that is"
            )
        return [self.density[p] for p in patterns]


def _check_function(target: Any) -> None:
    try:
        inspect.signature(target).bind("path", None)
    except TypeError as error:
        raise ValueError(
            f"target_modules: the function cannot be called with a path and a module ({error}); needed f(path, module)"
        ) from None
    except ValueError:  # of what is no Python, nothing is known
        pass


def _check_pattern(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: got the pattern {pattern!r}, needed a regular expression: {error}") from error


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "density": (lambda value: 0 < value <= 1, "a share above 0 and up to 1, such as 0.3, or such shares by pattern"),
    "refresh_every": (lambda value: value >= 1, "a whole number of steps of at least 1"),
    "ema": (lambda value: 0 <= value < 1, "a weight of at least 0 and below 1"),
    "freeze_after": (lambda value: value >= 1, "a whole number of steps of at least 1, or None"),
    "threshold": (lambda value: value >= 0, "a multiple of the layer's mean of at least 0"),
}


# What a saved state means: it goes on under the same values alone. All other options may change, and hold from then on.
DEFINING = ("axis", "statistic", "scope", "site", "pair_rope", "density", "strategy", "threshold", "seed")
_ONLY_OF = {"threshold": "threshold", "seed": "random"}  # strategies


def numbers_of(config: LongActConfig) -> list[float]:
    """The options of DEFINING as numbers, as a checkpoint keeps them: of a choice its place among all of them.

    Args:
        config: with the density of one layer.
    """
    choices, numbers = _choices(), []
    for name in DEFINING:
        value = getattr(config, name)
        used = config.strategy == _ONLY_OF.get(name, config.strategy)
        numbers.append(float(choices[name].index(value) if name in choices else value) if used else 0.0)
    return numbers


def difference(config: LongActConfig, saved: list[float]) -> str | None:
    """The first option that a saved state had another value of, in words; None if there is none."""
    choices = _choices()
    for name, theirs, ours in zip(DEFINING, saved, numbers_of(config), strict=False):
        if theirs != ours:
            known = choices.get(name, ())
            value = known[int(theirs)] if 0 <= theirs < len(known) else bool(theirs) if name == "pair_rope" else theirs
            return f"{name}={value!r}, this LongAct has {name}={getattr(config, name)!r}"
    return None


@functools.cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """By field, the values that a Literal allows."""
    found = {}
    for name, hint in get_type_hints(LongActConfig).items():
        kinds = [hint, *get_args(hint)]
        if literal := next((kind for kind in kinds if get_origin(kind) is Literal), None):
            found[name] = (*get_args(literal), *([None] if type(None) in kinds else []))
    return found


def fields(experimental: bool | None = None) -> list[dataclasses.Field]:
    """The fields, in their order; only those that are experimental, or only the others, if asked."""
    every = dataclasses.fields(LongActConfig)
    return [one for one in every if experimental in (None, one.metadata["experimental"])]


def make_config(options: dict[str, Any]) -> LongActConfig:
    """A config of options by name.

    Raises:
        TypeError: for one that does not exist; the message has the nearest that does.
    """
    for name in options:
        if name not in field_names():
            near = difflib.get_close_matches(name, field_names(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"needed one of {', '.join(sorted(field_names()))}"
            raise TypeError(f"LongAct: there is no option {name!r}; {hint}")
    return LongActConfig(**options)


@functools.cache
def field_names() -> frozenset[str]:
    return frozenset(one.name for one in dataclasses.fields(LongActConfig))
