#!/usr/bin/env bash
# DAPO on 32k contexts with Qwen3-8B on 8 GPUs of 80 GB: verl 0.9, FSDP2, vLLM, LongAct.
#   pip install "verl[vllm,fsdp]==0.9.*" longact_kernels
#   python examples/verl/data.py data Qwen/Qwen3-8B
#   bash examples/verl/qwen3_8b_dapo.sh
# Dense, to compare: LONGACT= bash examples/verl/qwen3_8b_dapo.sh
# Nobody has run it: docs/verl.md says what of it was.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
data=${DATA:-data}
prompt=30720
response=2048
# The paper's setting. Without its two options: absmax, and the set of the batches before a step.
longact=${LONGACT-"{longact:{density:0.3,statistic:l2,selection:current}}"}

sparse=()
if [ -n "$longact" ]; then
    sparse=(
        actor_rollout_ref.actor.optim.optimizer_impl=longact_kernels
        actor_rollout_ref.actor.optim.optimizer=SalientAdamW
        "actor_rollout_ref.actor.optim.override_optimizer_config=$longact"
    )
fi

python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.metric=reward \
    algorithm.filter_groups.max_num_gen_batches=3 \
    data.train_files="$data/train.parquet" \
    data.val_files="$data/test.parquet" \
    data.train_batch_size=8 \
    data.max_prompt_length=$prompt \
    data.max_response_length=$response \
    reward.custom_reward_function.path="$here/reward.py" \
    reward.reward_manager.name=dapo \
    +reward.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward.reward_kwargs.overlong_buffer_cfg.len=$((response / 5)) \
    +reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0 \
    +reward.reward_kwargs.overlong_buffer_cfg.log=False \
    +reward.reward_kwargs.max_resp_len=$response \
    actor_rollout_ref.model.path=Qwen/Qwen3-8B \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.fsdp_config.param_offload=True \
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$((prompt + response)) \
    actor_rollout_ref.actor.ppo_mini_batch_size=8 \
    actor_rollout_ref.actor.loss_agg_mode=token-mean \
    actor_rollout_ref.actor.clip_ratio_low=0.2 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    "${sparse[@]}" \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.max_model_len=$((prompt + response)) \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.total_training_steps=200 \
    trainer.save_freq=20 \
    trainer.test_freq=20 \
    trainer.project_name=longact \
    trainer.experiment_name=qwen3_8b_dapo \
    'trainer.logger=[console]' \
    "$@"
