"""What all integrations share: connecting a controller with a training that begins, and what its logs get."""

from typing import Any

from torch import nn

from longact_kernels import LongAct, SalientAdamW


def check_model(longact: LongAct, model: nn.Module) -> None:
    """Whether a controller is on the model that is trained, in whatever wrappers that is.

    Raises:
        ValueError: it is on another one, or on none any more.
    """
    if not longact.layers:
        raise ValueError("longact: it is on no layer any more; make a new one after restore()")
    modules = {id(module) for module in model.modules()}
    for name, layer in longact.layers.items():
        if id(layer) not in modules:
            raise ValueError(
                f"longact: {name}, which it trains sparsely, is not in the model that is trained; make LongAct on that "
                "model, and pass it as model=, since model_init makes another one"
            )


def connect(longact: LongAct, optimizer: Any) -> None:
    """Attaches a controller to an optimizer, in whatever wrappers that is; `SalientAdamW` finds the sets by itself.

    Raises:
        ValueError: the optimizer holds none of the controller's weights.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not longact.held_by(optimizer):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} holds none of the weights that LongAct is on; make it from the "
            "parameters of the model that is trained"
        )
    if not isinstance(optimizer, SalientAdamW):
        longact.attach(optimizer)


def metrics_of(longact: LongAct, optimizer: Any = None) -> dict[str, float]:
    """What a log gets of a training.

    Returns:
        `churn`, the mean over the layers, once there are two sets; `skipped`, how many steps have changed nothing
        because of NaN or Inf, once there are some; `updates_lost`, the share of a 16-bit weight's last update that
        rounded to nothing, where `SalientAdamW` keeps no master of it.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    churn, lost = longact.churn, getattr(optimizer, "updates_lost", None)
    found = {"churn": sum(churn.values()) / len(churn)} if churn else {}
    if longact.numbers.watch.skipped:
        found["skipped"] = longact.numbers.watch.skipped
    if lost is not None:
        found["updates_lost"] = float(lost)
    return found
