"""Which options a resumed run may change: all others make another run of it, and are refused by name."""

import json
from math import prod
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
    *("log_completions", "num_completions_to_print", "log_unique_prompts", "log_multimodal"),
    *("log_completions_hub_repo", "disable_tqdm"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("per_device_eval_batch_size", "use_cpu", "ddp_timeout", "trust_remote_code", "vllm_server_base_url"),
    *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization"),
}
# What each process takes of a step, from which follows how often it generates.
SHARE = ("per_device_train_batch_size", "gradient_accumulation_steps")
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
    if wrong := [name for name, of in numbers_of(held).items() if not (isinstance(of, int) and of > 0)]:
        raise ValueError(f"{path} is damaged ({wrong[0]}); restore it, or delete it")
    return held


def numbers_of(held: dict) -> dict[str, Any]:
    """What says how much a step of a run takes, by name."""
    if "processes" not in held:
        return {}
    config = held.get("grpo_config", {})
    return {"processes": held["processes"], **{name: config.get(name) for name in (*SHARE, "steps_per_generation")}}


def is_change(of: Any) -> bool:
    return (
        isinstance(of, dict)
        and of.keys() >= {"option", "from", "to", "step"}
        and isinstance(of["option"], str)
        and isinstance(of["step"], int)
        and (of["option"] != "processes" or isinstance(of["to"], int))
    )


def as_of(held: dict, step: int) -> dict:
    """What a run was at a checkpoint: without the changes that came later."""
    held = {**held, "grpo_config": dict(held.get("grpo_config", {})), "changes": list(held.get("changes", []))}
    while held["changes"] and held["changes"][-1]["step"] >= step:
        change = held["changes"].pop()
        if change["option"] != "processes":
            held["grpo_config"][change["option"]] = change["from"]
    return held


# Another number of processes: a run is told by those that it began with, and what each of them took of a step


def completions_of(run: dict) -> int:
    """How many completions a step of a run takes."""
    return run["processes"] * prod(run["grpo_config"][name] for name in SHARE)


def share_out(options: dict[str, Any], held: dict, processes: int) -> None:
    """Has processes of another number than the run began with take the same steps, if the options are its own.

    Each keeps `per_device_train_batch_size`, which memory bounds, or takes the next smaller one that shares a step out
    evenly; `gradient_accumulation_steps` makes up for the number.

    Args:
        options: of the resumed run, as typed; written to.
        held: what the run was begun with; see `read_options`.

    Raises:
        ValueError: so many processes cannot share a step equally.
    """
    began, config = held.get("processes", processes), held.get("grpo_config", {})
    if began == processes or any(options[name] != config.get(name) for name in SHARE):
        return  # the user's own; see `changes_of`
    step = completions_of(held)
    generated = step // config[SHARE[1]] * config["steps_per_generation"]
    sizes = [n for n in range(config[SHARE[0]], 0, -1) if step % (n * processes) == generated % (n * processes) == 0]
    if not sizes:
        raise ValueError(
            f"processes: got {processes}, but a step of the run takes {step} completions, which so many cannot share "
            f"equally; needed a number that divides them, such as {began}"
        )
    options |= {SHARE[0]: sizes[0], SHARE[1]: step // (sizes[0] * processes)}
    if options.get("steps_per_generation"):
        options["steps_per_generation"] = generated // (sizes[0] * processes)


def as_begun(wanted: dict, held: dict) -> dict:
    """What a resumed run is to be, on as many processes as it began with, if a step takes as much on both."""
    if wanted["processes"] == held.get("processes", wanted["processes"]) or completions_of(wanted) != completions_of(
        held
    ):
        return wanted
    shares = {name: held["grpo_config"][name] for name in (*SHARE, "steps_per_generation")}
    return {**wanted, "processes": held["processes"], "grpo_config": {**wanted["grpo_config"], **shares}}


def processes_of(held: dict) -> int:
    """How many processes a run has last had."""
    last = [change["to"] for change in held["changes"] if change["option"] == "processes"]
    return last[-1] if last else held["processes"]


def what_stays(before: int, training: GRPOConfig) -> str:
    """What another number of processes leaves as it was, in a line."""
    now, size, steps = training.world_size, *(getattr(training, name) for name in SHARE)
    others = "" if now < before else ", the others one by seed and step"
    return (
        f"going on with processes {now} instead of {before}: a step takes {now * size * steps} completions as before "
        f"({SHARE[0]} {size}, {SHARE[1]} {steps}), prompts come in the same order, and each process has the random "
        f"state that it had{others}"
    )


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
    changes, processes = list(held["changes"]), wanted["processes"]
    wanted = as_begun(wanted, held)
    if held.get("processes", wanted["processes"]) != wanted["processes"]:
        raise ValueError(
            f"{SHARE[0]}: a step would take {completions_of(wanted)} completions on {processes} processes, but the run "
            f"in {where} takes {completions_of(held)}; leave {' and '.join(SHARE)} as they were, or make them so many"
        )
    for name, value in wanted.items():
        if name != "grpo_config" and held.get(name, value) != value:
            refuse(name, held[name], value, where)
    if processes != (before := processes_of({"processes": processes, **held})):
        changes.append({"option": "processes", "from": before, "to": processes, "step": step})
    # Its own default, bf16, is refused where there is neither GPU nor `use_cpu`.
    fixed = {name: wanted["grpo_config"][name] for name in ("use_cpu", "bf16")}
    defaults = options_of(GRPOConfig(output_dir="", **fixed))
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
