"""LongAct in transformers' `Trainer` and those built on it: by a callback, or by a mixin that also clips right."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.integrations.common import check_model, connect, metrics_of
from longact_kernels.sparse.config import LongActConfig


class LongActCallback(TrainerCallback):
    """Connects a controller with a `Trainer`, `SFTTrainer` or `GRPOTrainer`.

    It attaches the controller to a stock optimizer, as in the paper. `SalientAdamW`, passed as
    `optimizers=(SalientAdamW(...), None)` or `optimizer_cls_and_kwargs=(SalientAdamW, {...})`, needs no attaching. Logs
    of the loss get the mean `churn` of all layers.

    The Trainer clips gradients before it calls a callback. So where the set is chosen after backward (in the first
    step, and with `selection="current"`), it clips by the norm of the unmasked gradients. And reporters (`report_to`)
    see a log before the churn is added. `LongActTrainerMixin` has neither limit.

    Args:
        longact: the controller.
        restore: turn the salient layers into plain ones when training ends.
    """

    def __init__(self, longact: LongAct, restore: bool = False):
        self.longact = longact
        self.restore = restore

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        check(self.longact, args)
        check_model(self.longact, model)
        if self.longact.grad == "compact" and args.max_grad_norm:
            raise ValueError(
                "grad: the Trainer's gradient clipping does not see compact gradients; use LongActTrainerMixin, "
                "max_grad_norm=0, or LongAct(grad='full')"
            )
        connect(self.longact, optimizer)

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        if "loss" in logs:
            metrics = metrics_of(self.longact, optimizer)
            logs |= metrics
            state.log_history[-1] |= metrics

    def on_train_end(self, args, state, control, **kwargs):
        if self.restore:
            self.longact.restore()


class LongActTrainerMixin:
    """Turns a `Trainer` into one that trains with LongAct: `class Sparse(LongActTrainerMixin, SFTTrainer): ...`.

    Unless you pass an optimizer, it is `SalientAdamW` with the learning rate, betas, eps and decay groups of the
    training arguments. Gradients are masked before they are clipped; compact gradients are clipped too. Logs of the
    loss, also those of reporters, have the mean `churn` of all layers.

    Args:
        longact: the controller, or the options of a controller to make, by default LongAct's defaults. None trains
            densely with the same optimizer.
        optimizer_options: more arguments of `SalientAdamW`, such as `state`.
        args, kwargs: arguments of the trainer.

    Raises:
        ValueError: `args.optim` asks for another optimizer, or something does not go with `longact`.
    """

    model: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    args: TrainingArguments

    def __init__(
        self,
        *args,
        longact: LongAct | LongActConfig | None = LongActConfig(),  # noqa: B008  it is frozen
        optimizer_options: Mapping[str, Any] = {},
        **kwargs,
    ):
        self.optimizer_options = optimizer_options
        super().__init__(*args, **kwargs)
        self.longact = LongAct(self.model, longact) if isinstance(longact, LongActConfig) else longact
        if self.longact is not None:
            check(self.longact, self.args)
        given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if not given and self.args.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"optim: got {self.args.optim.value!r}, but the optimizer is SalientAdamW; needed adamw_torch_fused or "
                "adamw_torch, or the optimizer itself in optimizers=(..., None)"
            )

    def create_optimizer(self, model=None) -> Optimizer:
        if self.longact is not None:
            check_model(self.longact, self.model)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            options = {
                "lr": self.args.learning_rate,
                "betas": (self.args.adam_beta1, self.args.adam_beta2),
                "eps": self.args.adam_epsilon,
                "longact": self.longact or False,
                "fused": self.args.optim == "adamw_torch_fused",
                **self.optimizer_options,
            }
            self.optimizer_cls_and_kwargs = SalientAdamW, options
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if self.longact is not None:
            connect(self.longact, optimizer)
        return optimizer

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.longact is not None:
            self.longact.look_at(loss)
        return loss

    def _clip_grad_norm(self, model):
        # The norm that clipping sees must be that of the update: rows outside the salient sets do not count.
        if self.longact is None:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        if self.longact.grad == "compact":
            return self.longact.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.longact.mask_gradients()
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.longact is not None and "loss" in logs:
            logs |= metrics_of(self.longact, self.optimizer)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def check(longact: LongAct, args: TrainingArguments) -> None:
    """Whether a controller goes with a Trainer's arguments.

    Raises:
        ValueError: it does not.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: got {args.n_gpu} GPUs in one process (DataParallel), needed one process a GPU; use torchrun "
            "or accelerate launch"
        )
    if longact.compact is not None and args.world_size > 1 and longact.compact.alone:
        raise ValueError(
            "grad: DistributedDataParallel, which the Trainer puts around the model, needs a parameter that trains "
            "beside compact gradients; leave one unfrozen, such as the norms, or use LongAct(grad='full')"
        )
    if longact.grad == "compact" and args.fp16:
        raise ValueError(
            "grad: the Trainer unscales fp16 gradients where compact ones are not seen; use bf16=True, or "
            "LongAct(grad='full')"
        )
