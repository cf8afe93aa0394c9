"""Other tiles of the kernel that scatters the rows of a product; those of columns are in `scatter_columns.py`."""

from functools import partial

import torch
from torch import Tensor

from bench.gpu.kernels import OURS, randn
from bench.gpu.models import Model
from bench.gpu.peers import random_rows
from longact_kernels.csrc_triton.salient_wgrad import SCATTER_CONFIG, scatter_grid, scatter_kernel


def inputs(model: Model, N: int, M: int, dim: int = 0) -> tuple[Tensor, Tensor, int]:
    index = random_rows(model, N)
    P = -(-len(index) // 16) * 16
    return randn(P, model.K) if dim == 0 else randn(model.K, P), index, N


def scattered(product: Tensor, index: Tensor, N: int, BLOCK_C: int, num_warps: int, dim: int = 0) -> Tensor:
    S, columns = len(index), dim == 1
    R, C = (product.shape[0], N) if columns else (N, product.shape[1])
    out = product.new_empty(R, C)
    scatter_kernel[scatter_grid(R, C, columns, BLOCK_C)](
        product, index, out, R, C, S, N, S.bit_length(), product.stride(0), C, COLUMNS=columns, COMPACT=False,
        WHOLE=False, ACCUMULATE=False, FILL=True, BLOCK_C=BLOCK_C, num_warps=num_warps,
    )  # fmt: skip
    return out


def copied(product: Tensor, index: Tensor, N: int, dim: int = 0) -> Tensor:
    shape = (product.shape[0], N) if dim else (N, product.shape[1])
    return product.new_zeros(shape).index_copy_(dim, index, product.narrow(dim, 0, len(index)))


def check(got: Tensor, *given, dim: int = 0) -> None:
    assert torch.equal(got, copied(*given, dim=dim))


PEERS = {OURS: partial(scattered, **SCATTER_CONFIG["rows"]), "zeros, index_copy_": copied}
CANDIDATES = {
    f"{c} columns, {warps} warps": partial(scattered, BLOCK_C=c, num_warps=warps)
    for c, warps in ((512, 2), (1024, 4), (2048, 8), (4096, 4), (4096, 8))
}
