"""Other tiles of the kernel that packs salient channels."""

from functools import partial

import torch
from torch import Tensor

from bench.gpu.kernels import OURS, randn
from bench.gpu.models import Model
from bench.gpu.peers import random_rows
from longact_kernels.csrc_triton.salient_wgrad import PACK_CONFIG, pack_kernel


def inputs(model: Model, N: int, M: int) -> tuple[Tensor, Tensor]:
    return randn(M, N), random_rows(model, N)


def packed(x: Tensor, index: Tensor, BLOCK_M: int, BLOCK_S: int, num_warps: int) -> Tensor:
    (M, N), S = x.shape, len(index)
    P = -(-S // 16) * 16
    out = x.new_empty(M, P)
    grid = -(-M // BLOCK_M) * -(-P // BLOCK_S)
    pack_kernel[(grid,)](x, index, out, M, N, S, P, N, BLOCK_M=BLOCK_M, BLOCK_S=BLOCK_S, num_warps=num_warps)
    return out[:, :S]


def check(got: Tensor, x: Tensor, index: Tensor) -> None:
    assert torch.equal(got, x[:, index])


PEERS = {OURS: partial(packed, **PACK_CONFIG), "index_select": lambda x, index: x.index_select(1, index)}
CANDIDATES = {
    f"{m} rows x {s} slots": partial(packed, BLOCK_M=m, BLOCK_S=s, num_warps=s // 32)
    for m, s in ((8, 128), (32, 128), (16, 64), (32, 64), (16, 256), (8, 256))
}
