"""Which options a resumed run may change: all others make another run of it, and are refused by name."""

import json
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from longact_kernels.commands.files import read_json

# Where a run is, and who is told of it: no part of what it is.
NOT_COMPARED = {"output_dir", "local_rank", "run_name", "hub_token", "logging_dir"}
# Between checkpoints alone, these schedules carry what a new rate would overthrow.
SCHEDULES_WITH_STATE = {"reduce_lr_on_plateau", "greedy"}
SCHEDULE = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"}
# What takes effect at the step after the checkpoint.
MAY_CHANGE = {
    *SCHEDULE,
    *("max_steps", "num_train_epochs"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("beta", "epsilon", "epsilon_high", "delta"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica"),
    *("report_to", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("log_completions_hub_repo", "disable_tqdm"),
    *(
        "log_completions",
        "num_completions_to_print",
        "log_unique_prompts",
        "log_multimodal",
        "log_completions_hub_repo",
    ),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("per_device_eval_batch_size", "use_cpu", "ddp_timeout", "trust_remote_code", "vllm_server_base_url"),
    *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization"),
}
# What they add to a run is in no checkpoint.
NOT_KEPT = ("sync_ref_model", "use_adaptive_entropy")


def options_of(training: GRPOConfig) -> dict[str, Any]:
    """TRL's options as a file has them."""
    return json.loads(json.dumps(training.to_dict(), default=str))


def check_kept(training: GRPOConfig) -> None:
    """Whether checkpoints hold all that going on needs.

    Raises:
        ValueError: an option needs more.
    """
    for name in NOT_KEPT:
        if getattr(training, name, False):
            raise ValueError(f"{name}: what it has done so far is in no checkpoint; such a run cannot be resumed")


def read_options(path: Path) -> dict:
    """What a run was begun with and has changed; empty if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    held = read_json(path)
    config, changes = held.get("grpo_config", {}), held.get("changes", [])
    if not (isinstance(config, dict) and isinstance(changes, list) and all(map(is_change, changes))):
        raise ValueError(f"{path} is damaged (grpo_config or changes); restore it, or delete it")
    return held


def is_change(of: Any) -> bool:
    return (
        isinstance(of, dict)
        and of.keys() >= {"option", "from", "to", "step"}
        and isinstance(of["option"], str)
        and isinstance(of["step"], int)
    )


def as_of(held: dict, step: int) -> dict:
    """What a run was at a checkpoint: without the changes that came later."""
    held = {**held, "grpo_config": dict(held.get("grpo_config", {})), "changes": list(held.get("changes", []))}
    while held["changes"] and held["changes"][-1]["step"] >= step:
        change = held["changes"].pop()
        held["grpo_config"][change["option"]] = change["from"]
    return held


def changes_of(held: dict, wanted: dict, step: int, where: object, stages: int) -> list[dict]:
    """What a run changes when it goes on from a step; earlier changes come first.

    Args:
        held: what it is there; see `as_of`. An option that was not there yet had what is its default now.
        wanted: what it is to be.
        where: its folder.
        stages: how many `lengths` it has.

    Raises:
        ValueError: what it would change makes it another run.
    """
    may_change = set(MAY_CHANGE)
    if stages > 1:
        # They are shared out among the lengths.
        may_change -= {"max_steps", "num_train_epochs"}
    if {config.get("lr_scheduler_type") for config in (held["grpo_config"], wanted["grpo_config"])} & {
        *SCHEDULES_WITH_STATE
    }:
        may_change -= SCHEDULE
    for name, value in wanted.items():
        if name != "grpo_config" and held.get(name, value) != value:
            refuse(name, held[name], value, where)
    changes = list(held["changes"])
    defaults = options_of(GRPOConfig(output_dir="", use_cpu=wanted["grpo_config"]["use_cpu"]))
    for name, value in wanted["grpo_config"].items():
        before = held["grpo_config"].get(name, defaults.get(name))
        if before == value or name in NOT_COMPARED:
            continue
        if name not in may_change:
            refuse(name, before, value, where)
        changes.append({"option": name, "from": before, "to": value, "step": step})
    return changes


def foreign(held: dict, theirs: dict) -> str | None:
    """What makes a checkpoint, with its copy of a run's options, that of another run; None if nothing does."""
    ours, own = ({**of, **of.get("grpo_config", {})} for of in (held, theirs))
    for name in own.keys() - MAY_CHANGE - NOT_COMPARED - {"grpo_config", "changes"}:
        if ours.get(name, own[name]) != own[name]:
            return f"is of another run, with {name} {own[name]!r} instead of {ours[name]!r}"
    return None


def refuse(name: str, held: Any, wanted: Any, where: object) -> None:
    raise ValueError(
        f"output_dir: {where} holds another run, with {name} {held!r} instead of {wanted!r}; resume with the same "
        "settings, or name another output_dir"
    )
