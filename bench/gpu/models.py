"""The query and key projections that are measured."""

from typing import NamedTuple

DENSITY = 0.3


class Model(NamedTuple):
    """A model's query and key projections: K in_features, the out_features of q_proj and k_proj."""

    name: str
    K: int
    N: tuple[int, int]
    head_dim: int
    layers: int

    @property
    def salient(self) -> int:
        """Salient channels of a head."""
        return round(DENSITY * self.head_dim)

    @property
    def sizes(self) -> list[int]:
        """out_features of all its projections."""
        return [n for _ in range(self.layers) for n in self.N]


QWEN3_8B = Model("Qwen3-8B", 4096, (4096, 1024), 128, 36)
QWEN3_0_6B = Model("Qwen3-0.6B", 1024, (2048, 1024), 128, 28)
SMOLLM2 = Model("SmolLM2-135M", 576, (576, 192), 64, 30)
TINY = Model("tiny", 16, (16, 8), 8, 1)
MODELS = (QWEN3_8B, QWEN3_0_6B, SMOLLM2)
TOKENS = (2048, 8192, 32768)


def cases(dry: bool) -> list[tuple[Model, int]]:
    """Models and tokens; the largest first, should time run out."""
    if dry:
        return [(TINY, 20)]
    return [(model, tokens) for model in MODELS for tokens in reversed(TOKENS)]
