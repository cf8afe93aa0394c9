"""`LongActGRPOTrainer`: TRL's GRPO trainer with LongAct."""

from trl import GRPOTrainer

from longact_kernels.integrations.trainer import LongActTrainerMixin


class LongActGRPOTrainer(LongActTrainerMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` with `SalientAdamW`, sparse or (with `longact=None`) dense.

    All else is as in TRL: the algorithms and options of `GRPOConfig` work, except `optim`.

    Args:
        args, kwargs: arguments of `GRPOTrainer` and of `LongActTrainerMixin`.
    """
