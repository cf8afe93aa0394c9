"""Other tiles of the kernel that scatters the columns of a product."""

from functools import partial

from bench.gpu.kernels import OURS
from bench.gpu.trials import scatter
from longact_kernels.csrc_triton.salient_wgrad import SCATTER_CONFIG

inputs, check = partial(scatter.inputs, dim=1), partial(scatter.check, dim=1)
PEERS = {
    OURS: partial(scatter.scattered, **SCATTER_CONFIG["columns"], dim=1),
    "zeros, index_copy_": partial(scatter.copied, dim=1),
}
CANDIDATES = {
    f"{c} columns, {warps} warps": partial(scatter.scattered, BLOCK_C=c, num_warps=warps, dim=1)
    for c, warps in ((128, 4), (256, 2), (512, 4), (2048, 8))
}
