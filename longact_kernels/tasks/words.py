"""What the tasks draw their keys, values and words from."""

import random
import uuid

ADJECTIVES = (  # noqa: SIM905
    "amber ancient bitter blank blue bold brave breezy bright broad calm careful cheerful clever cloudy cold "
    "curious damp dapper deep distant dizzy eager early faded fancy fierce fluffy frosty gentle glossy golden "
    "graceful grand green handy happy hasty heavy hidden hollow humble icy jolly keen kind late lazy lively "
    "lonely loud lucky mellow misty modest narrow nimble noisy odd orange pale patient plain polite proud purple "
    "quick quiet rapid rare rough round royal rusty salty sandy shiny silent silver sleepy slim smooth soft solid "
    "spare steady stormy sturdy sunny swift tall tame tart tidy tiny tough vast velvet warm wild wise witty "
    "wooden yellow young zesty "
).split()
NOUNS = (  # noqa: SIM905
    "acorn anchor apple arrow badge banjo basket beach bell berry bridge broom bucket cabin camel candle canoe "
    "canyon carpet castle cedar cello chair cherry circle cliff clock cloud comet coral cottage cradle cricket "
    "crown desert diamond dragon drum eagle engine falcon feather fiddle forest fossil fountain garden garlic "
    "glacier goose guitar hammer harbor hazel hedge helmet heron honey island ivory jacket jungle kettle kitten "
    "ladder lantern lemon lily lizard maple marble meadow mirror monkey moth mountain needle oasis ocean olive "
    "orchard otter paddle palace panda parrot pebble pencil pepper pigeon pillow planet pocket pony prairie "
    "pumpkin rabbit raven ribbon river rocket saddle salmon shadow shovel spider spoon squirrel stable statue "
    "summit teapot temple thunder ticket tiger tunnel turtle valley violin walnut whistle willow window wizard "
).split()
NAMES = len(ADJECTIVES) * len(NOUNS)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def name(i: int) -> str:
    """The adjective-noun pair of that number below `NAMES`."""
    return f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}"


def names(rng: random.Random, count: int) -> list[str]:
    """Different adjective-noun pairs."""
    return [name(i) for i in rng.sample(range(NAMES), count)]


def number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def uuid4(rng: random.Random) -> str:
    """A random UUID, version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def codes(rng: random.Random, count: int, size: int) -> list[str]:
    """Different strings of `size` random small letters."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(LETTERS, k=size))] = None
    return list(drawn)
