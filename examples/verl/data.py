"""Prompts of a task as verl reads them: train.parquet and test.parquet.

python examples/verl/data.py FOLDER MODEL [--task niah_multikey_3] [--length 30720] [--train 2048] [--test 64]
"""

import argparse
from pathlib import Path

import pandas
from transformers import AutoTokenizer

from longact_kernels.tasks.build import build_dataset

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("model", help="whose tokens are counted")
parser.add_argument("--task", default="niah_multikey_3")
parser.add_argument("--length", type=int, default=30720, help="of a prompt, in tokens")
parser.add_argument("--train", type=int, default=2048, help="how many prompts")
parser.add_argument("--test", type=int, default=64)
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
for split in ("train", "test"):
    rows = build_dataset(
        arguments.task, tokenizer, split=split, count=getattr(arguments, split), seed=0, length=arguments.length
    )
    # verl opens the assistant's turn itself, so the answer that the task begins is left out.
    made = [
        {
            "data_source": arguments.task,
            "prompt": row["prompt"][:1],
            "reward_model": {"style": "rule", "ground_truth": row["answers"]},
            "extra_info": {"index": i},
        }
        for i, row in enumerate(rows)
    ]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(made).to_parquet(arguments.folder / f"{split}.parquet")
