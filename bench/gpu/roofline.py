"""What a kernel is predicted to take: the one place here that asks `longact_kernels` for it."""

from bench.gpu.models import Model
from longact_kernels.compiled import rooflines
from longact_kernels.compiled.targets import GPUS, Gpu


def gpu(name: str) -> Gpu | None:
    """The GPU of a device name such as "NVIDIA H100 80GB HBM3"; None for one without predictions."""
    return next((gpu for known, gpu in GPUS.items() if known in name), None)


def predicted(gpu: Gpu | None, model: Model, tokens: int) -> dict[str, float]:
    """Predicted seconds: by op, of one layer's query and key projections in bf16, and of all layers' AdamW."""
    if gpu is None:
        return {}
    share = model.salient / model.head_dim
    channel_stats = linear_stats = wgrad = adamw = 0.0
    for N in model.N:
        S = round(share * N)
        channel_stats += rooflines.channel_stats_work(tokens, N, 2).seconds(gpu)
        linear_stats += rooflines.linear_stats_work(tokens, N, model.K, 2).seconds(gpu)
        launches = rooflines.salient_wgrad_work(tokens, N, model.K, S, 2).values()
        wgrad += sum(work.seconds(gpu) for work in launches)
        adamw += rooflines.sparse_adamw_work(model.layers * S, model.K, 2, master=True).seconds(gpu)
    return {"channel_stats": channel_stats, "linear_stats": linear_stats, "salient_wgrad": wgrad, "sparse_adamw": adamw}
