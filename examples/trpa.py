"""
TRPA: the policy writes several solutions of each problem, a rule sorts them into levels, and each two levels are told apart.

Or DRPO, by flag, which tells right from wrong and, among the right ones, prefers the short. The data is yours: a column `prompt` with
the problem, and a column `answer` with the number that solves it. A solution is right (1) if the last number in it is the answer,
better than nothing (0.5) if there is a number, else 0. From which score on one is right is the hyper-parameter `correct`, 1 by default.

    python examples/trpa.py --dataset_name problems.jsonl --output_dir out
    python examples/trpa.py --loss_type drpo --loss_kwargs '{"max_length": 512}' --dataset_name problems.jsonl --output_dir out

Every field of `OnlineDPOConfig` is a flag. `max_length` of DRPO is the most tokens that are sampled, `--max_new_tokens`.
"""

import re
from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import TrlParser

from trl_ext import OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.data import load_preferences


@dataclass
class Script:
    dataset_name: str = field(
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the problems."}
    )
    model_name_or_path: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model."})


def level(completions, answer, **kwargs):
    """1 for the answer, 0.5 for another number, 0 for none."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", "")) for text in texts]
    return [
        (float(found[-1]) == float(right)) * 0.5 + 0.5 if found else 0.0
        for found, right in zip(numbers, answer, strict=True)
    ]


if __name__ == "__main__":
    parser = TrlParser([Script, OnlineDPOConfig])
    parser.set_defaults(loss_type=["trpa"], num_generations=8, temperature=1.0, max_new_tokens=512, max_length=1024)
    script, args = parser.parse_args_and_config()

    trainer = OnlineDPOTrainer(
        model=script.model_name_or_path,
        reward_funcs=level,
        args=args,
        train_dataset=load_preferences(script.dataset_name).select_columns(["prompt", "answer"]),
        processing_class=AutoTokenizer.from_pretrained(script.model_name_or_path),
    )
    trainer.train()
    trainer.save_model()
