"""DAPO's dynamic sampling (https://arxiv.org/abs/2503.14476, section 3.2) over TRL's GRPO trainer, which has none."""

import random
from typing import Any

import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig

# What a row of a generated batch consists of, by the side that is padded; `None` for one value a row.
PADDED = {
    "prompt_ids": "left",
    "prompt_mask": "left",
    "completion_ids": "right",
    "completion_mask": "right",
    "tool_mask": "right",
    "old_per_token_logps": "right",
    "ref_per_token_logps": "right",
    "sampling_per_token_logps": "right",
    "importance_sampling_ratio": "right",
    "advantages": None,
}


class DynamicSamplingMixin:
    """Makes a `GRPOTrainer` one that replaces prompts all of whose completions earned the same and so teach nothing.

    After a batch is generated, groups with zero reward variance are generated anew with other prompts of the training
    set, again and again until every group has a signal or the rounds are used up. Which prompts those are depends on
    the seed, the step and the batch only, so that a resumed run takes the same. If the training set has a column
    `length`, they are of the length of the batch.

    TRL's logs stay those of the batch that was generated first. Besides, there is `dynamic_sampling/replaced`, the
    share of the groups that were replaced, `dynamic_sampling/left`, the share that has no signal in the end, and
    `dynamic_sampling/rounds`.

    Args:
        dynamic_sampling_rounds: how often at most a batch is generated again; 0 for never.
        model, reward_funcs, args, train_dataset, more, kwargs: of `GRPOTrainer`.

    Raises:
        ValueError: a setting of TRL's does not go with it.
    """

    model: Any
    args: Any
    state: Any
    accelerator: Any
    train_dataset: Any
    num_generations: int
    reward_weights: Tensor
    _metrics: Any
    _tokenizer: Any

    def __init__(
        self, model, reward_funcs, args=None, train_dataset=None, *more, dynamic_sampling_rounds: int = 0, **kwargs
    ):
        self.dynamic_sampling_rounds = dynamic_sampling_rounds
        if dynamic_sampling_rounds:
            check(args or GRPOConfig(), train_dataset)
        super().__init__(model, reward_funcs, args, train_dataset, *more, **kwargs)  # type: ignore[call-arg]

    def _calculate_rewards(self, *args, **kwargs) -> Tensor:
        by_function = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        if self.dynamic_sampling_rounds and self.model.training:
            rewards = (
                (by_function * self.reward_weights.to(by_function.device)).nansum(1).view(-1, self.num_generations)
            )
            signal = rewards.amax(1) > rewards.amin(1)
            # Those of all processes, in their order.
            self._signal = signal.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        return by_function

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if not (self.dynamic_sampling_rounds and self.model.training):
            return batch
        if unknown := batch.keys() - PADDED.keys() - {"num_items_in_batch"}:
            raise ValueError(f"dynamic_sampling_rounds: needs text prompts, but there is {', '.join(sorted(unknown))}")
        group = self.num_generations
        metrics = self._metrics["train"]
        logged = {key: list(values) for key, values in metrics.items() if key != "num_tokens"}
        used = gather_object([row["prompt"] for row in inputs[::group]])
        had_signal, signal, rounds = self._signal, self._signal.clone(), 0
        # All processes generate together, each as many groups as the one that lacks most.
        while rounds < self.dynamic_sampling_rounds and (count := self._gathered(~signal).sum(1).max().item()):
            fresh = self._fresh(inputs[0].get("length"), used, count * self.accelerator.num_processes)
            if not fresh:
                break
            used += [row["prompt"] for row in fresh]
            start = count * self.accelerator.process_index
            again = super()._generate_and_score_completions(  # type: ignore[misc]
                [row for row in fresh[start : start + count] for _ in range(group)]
            )
            slots, found = (mask.nonzero().flatten().tolist() for mask in (~signal, self._signal))
            for slot, source in zip(slots, found, strict=False):
                move(again, source, batch, slot, group, self._tokenizer.pad_token_id)
                signal[slot] = True
            rounds += 1
        loss_mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch["num_items_in_batch"] = self.accelerator.gather(loss_mask.sum()).sum()
        metrics.update(logged)
        metrics["dynamic_sampling/replaced"].append(self._gathered(signal & ~had_signal).float().mean().item())
        metrics["dynamic_sampling/left"].append(self._gathered(~signal).float().mean().item())
        metrics["dynamic_sampling/rounds"].append(rounds)
        return batch

    def _gathered(self, mask: Tensor) -> Tensor:
        """The masks [groups] of all processes, [processes, groups]."""
        return self.accelerator.gather(mask.unsqueeze(0))

    def _fresh(self, length: int | None, used: list, count: int) -> list[dict]:
        """`count` rows of the training set with other prompts than those used; none if there are not that many."""
        rng = random.Random(f"{self.args.seed}/{self.state.global_step}/{used}")
        rows: Any = self.train_dataset
        order = range(len(rows)) if length is None else [i for i, of in enumerate(rows["length"]) if of == length]
        fresh: list[dict] = []
        for i in rng.sample(order, len(order)):
            if rows[i]["prompt"] not in used and all(rows[i]["prompt"] != row["prompt"] for row in fresh):
                fresh.append(rows[i])
            if len(fresh) == count:
                return fresh
        return []


def check(args: GRPOConfig, train_dataset) -> None:
    """Whether groups can be replaced one by one.

    Raises:
        ValueError: they cannot.
    """
    if not isinstance(train_dataset, Dataset):
        raise ValueError("dynamic_sampling_rounds: needs a training set that can be indexed; pass 0, or another one")
    if args.scale_rewards == "batch" or args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            "dynamic_sampling_rounds: needs advantages that depend on their group alone; pass 0, or scale_rewards "
            "group or none and multi_objective_aggregation sum_then_normalize"
        )
    on_process = args.per_device_train_batch_size * args.steps_per_generation
    if on_process % args.num_generations:
        raise ValueError(
            f"dynamic_sampling_rounds: needs whole groups on every process, but num_generations {args.num_generations} "
            f"does not divide its {on_process} completions; pass 0, or change per_device_train_batch_size"
        )


def move(source: dict[str, Tensor], i: int, target: dict[str, Tensor], j: int, group: int, pad_token_id: int) -> None:
    """Puts the i-th group of one batch in the place of the j-th of another, which grows wider where it must."""
    for key, side in PADDED.items():
        if key not in target:
            continue
        rows = source[key][i * group : (i + 1) * group]
        if side is not None:
            value = pad_token_id if key.endswith("_ids") else 0
            width = max(rows.shape[1], target[key].shape[1])
            rows, target[key] = (widen(rows, width, side, value), widen(target[key], width, side, value))
        target[key][j * group : (j + 1) * group] = rows


def widen(x: Tensor, width: int, side: str, value: int) -> Tensor:
    """A tensor [rows, columns] padded to that many columns."""
    missing = width - x.shape[1]
    return F.pad(x, (missing, 0) if side == "left" else (0, missing), value=value)
