"""The RL algorithms that TRL's trainer knows, one preset each; a config file and the command line overrule them.

Sources, in their order: DeepSeekMath (https://arxiv.org/abs/2402.03300), DAPO (https://arxiv.org/abs/2503.14476), GSPO
(https://arxiv.org/abs/2507.18071), Dr. GRPO (https://arxiv.org/abs/2503.20783), CISPO of MiniMax-M1
(https://arxiv.org/abs/2506.13585) with ScaleRL's bound (https://arxiv.org/abs/2510.13786), and SAPO
(https://arxiv.org/abs/2511.20347).
"""

from typing import Any, Literal

Algorithm = Literal["grpo", "dapo", "gspo", "dr_grpo", "cispo", "sapo"]
ALGORITHMS: dict[Algorithm, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.04, "epsilon": 0.2},
    "dapo": {
        "loss_type": "dapo",  # the mean over all tokens of the batch
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "overlong_share": 0.2,  # the paper's 4,096 of 20,480 tokens
        "dynamic_sampling_rounds": 2,
    },
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "beta": 0.0,
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "epsilon": 0.2},
    "cispo": {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo", "beta": 0.0, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
}
