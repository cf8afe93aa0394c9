"""Stage 4: what only a GPU can show: CUDA graphs, streams, huge tensors, training beside the CPU's."""

from bench.gpu.stage import ROOT, Stage
from bench.gpu.tests import OWN_STAGE, pytest


def run(stage: Stage) -> int:
    return pytest(stage, list((ROOT / "tests").rglob(OWN_STAGE)), "-x" if stage.dry else "--maxfail=20")
