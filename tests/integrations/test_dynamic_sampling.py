"""Prompts that teach nothing are replaced: every row of the batch is read back and its advantage worked out again."""

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from trl import GRPOConfig, GRPOTrainer

from longact_kernels.integrations.dynamic_sampling import DynamicSamplingMixin


class DynamicSamplingTrainer(DynamicSamplingMixin, GRPOTrainer):
    pass


GROUP = 4
TOKENIZER = tiny.tokenizer(chat=False)


def reward(prompts, completions, **_):
    """Nothing to learn from prompts that begin with "dull": all completions earn 1."""
    return [
        1.0 if prompt.startswith("dull") else sum(map(ord, text)) % 97 / 97
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def trainer(folder, rows, rounds=3, group=GROUP, **config):
    return DynamicSamplingTrainer(
        dynamic_sampling_rounds=rounds,
        model=tiny.model(),
        args=GRPOConfig(
            output_dir=str(folder),
            **{
                "per_device_train_batch_size": 4 * group,
                "num_generations": group,
                "max_completion_length": 8,
                "bf16": False,
                "use_cpu": True,
                "report_to": "none",
                **config,
            },
        ),
        reward_funcs=reward,
        train_dataset=rows if not isinstance(rows, list) else Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )


def prompts(dull, lively, **more):
    names = [f"dull {'x' * (i % 5)}{i}" for i in range(dull)] + [f"lively {i}" for i in range(lively)]
    return [{"prompt": name, **more} for name in names]


def generate(rl, rows):
    return rl._generate_and_score_completions([row for row in rows for _ in range(rl.num_generations)])


def texts(batch, part):
    ids = [i[m.bool()] for i, m in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)]
    return TOKENIZER.batch_decode(ids, skip_special_tokens=True)


def test_more_processes_than_groups_may_train_without_it(tmp_path, monkeypatch):
    rl = trainer(tmp_path, prompts(0, 8), rounds=0)
    monkeypatch.setattr(type(rl.accelerator), "num_processes", 9)
    monkeypatch.setattr(type(rl.accelerator), "process_index", 8)
    rows = [row for row in prompts(0, 2) for _ in range(GROUP)]
    rl.model.train()
    rewards = rl._calculate_rewards(rows, [row["prompt"] for row in rows], [str(i) for i in range(8)], [[1]] * 8)
    assert rewards.shape == (2 * GROUP, 1)


@pytest.mark.parametrize("config", [{}, {"num_iterations": 2}, {"scale_rewards": "none"}])
def test_every_group_has_a_signal_and_its_own_advantages(tmp_path, config):
    rl = trainer(tmp_path, prompts(4, 40), **config)
    whole = rl._generate_single_turn

    def of_all_lengths(*args, **kwargs):
        completions, logprobs = whole(*args, **kwargs)
        # Cut off early in the first batch, so that what replaces them is wider.
        most = 4 if len(completions) == 4 * GROUP else 8
        return [ids[: 1 + sum(ids) % most] for ids in completions], logprobs

    rl._generate_single_turn = of_all_lengths
    first = [*prompts(2, 0), {"prompt": "lively 1"}, {"prompt": "lively 2 with a longer text"}]
    batch = generate(rl, first)
    asked, answered = texts(batch, "prompt"), texts(batch, "completion")
    groups = [asked[i : i + GROUP] for i in range(0, len(asked), GROUP)]
    assert all(len(set(group)) == 1 for group in groups) and len({group[0] for group in groups}) == 4
    assert [group[0] for group in groups][2:] == ["lively 1", "lively 2 with a longer text"]
    assert all(group[0].startswith("lively") for group in groups)

    rewards = torch.tensor(reward(asked, answered)).view(-1, GROUP)
    expected = rewards - rewards.mean(1, keepdim=True)
    if config.get("scale_rewards") != "none":
        expected = expected / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"].view(-1, GROUP), expected)
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    if "num_iterations" in config:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            log_probs, *_ = rl._get_per_token_logps_and_entropies(rl.model, ids, mask, batch["completion_ids"].shape[1])
        kept = batch["completion_mask"].bool()
        torch.testing.assert_close(batch["old_per_token_logps"][kept], log_probs[kept])
    metrics = rl._metrics["train"]
    assert metrics["dynamic_sampling/replaced"] == [0.5] and metrics["dynamic_sampling/left"] == [0]
    # The logs are those of what was generated first.
    assert metrics["frac_reward_zero_std"] == [0.5] and len(metrics["reward"]) == 1


def test_the_rounds_are_a_bound(tmp_path):
    rl = trainer(tmp_path, prompts(40, 0), rounds=2)
    sizes = []
    calculate = rl._calculate_rewards

    def watched(inputs, *args):
        sizes.append(len(inputs) // GROUP)
        return calculate(inputs, *args)

    rl._calculate_rewards = watched
    batch = generate(rl, prompts(4, 0))
    assert sizes == [4, 4, 4]
    assert not batch["advantages"].any()
    metrics = rl._metrics["train"]
    assert metrics["dynamic_sampling/rounds"] == [2] and metrics["dynamic_sampling/left"] == [1]


def test_only_what_has_no_signal_is_generated_again_and_a_spent_training_set_ends_it(tmp_path):
    rl = trainer(tmp_path, prompts(6, 0), rounds=5)
    batch = generate(rl, [*prompts(3, 0), {"prompt": "lively 1"}])
    # Of six dull prompts three are in the batch; the other three are tried once.
    assert rl._metrics["train"]["dynamic_sampling/rounds"] == [1]
    assert batch["advantages"].view(-1, GROUP).any(1).tolist() == [False, False, False, True]


def test_nothing_is_generated_again_without_need_or_in_evaluation(tmp_path):
    rl = trainer(tmp_path, prompts(4, 4))
    generate(rl, prompts(0, 4))
    assert rl._metrics["train"]["dynamic_sampling/rounds"] == [0]
    rl.model.eval()
    generate(rl, prompts(4, 0))
    assert "dynamic_sampling/rounds" not in rl._metrics["eval"]


def test_fresh_prompts_are_of_the_same_length_and_the_same_again_after_resuming(tmp_path):
    rows = [*prompts(0, 20, length=512), *({"prompt": f"longer {i}", "length": 1024} for i in range(20))]
    drawn = [
        [row["prompt"] for row in trainer(tmp_path, rows)._fresh(length, ["lively 1"], 5)]
        for length in (512, 1024, 512)
    ]
    assert drawn[0] == drawn[2] and len(set(drawn[0])) == 5 and "lively 1" not in drawn[0]
    assert all(prompt.startswith("lively") for prompt in drawn[0])
    assert all(prompt.startswith("longer") for prompt in drawn[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scale_rewards": "batch"}, "depend on their group alone"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "depend on their group alone"),
        ({"rows": IterableDataset.from_generator(lambda: iter(prompts(4, 4)))}, "training set that can be indexed"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=f"dynamic_sampling_rounds: needs .*{message}"):
        trainer(tmp_path, config.pop("rows", prompts(4, 4)), **config)
