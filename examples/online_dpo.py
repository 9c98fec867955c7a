"""
Online DPO: the policy writes, rewards score, any loss learns.

With `--reward_funcs` a sequence classifier scores; with `--overlap` the likeness to reference answers; without them a rule does,
here: answers that end by themselves, and soon. For a judge of two answers give the trainer `judge=` in place of
`reward_funcs=`. Reads a dataset with a column `prompt`, and with `--overlap` a column `reference`: a text, or a list of texts.

    python examples/online_dpo.py --output_dir out
    python examples/online_dpo.py --reward_funcs path/to/rm --loss_type offset --num_generations 4 --output_dir out
    python examples/online_dpo.py --overlap bleu --dataset_name answers.jsonl --output_dir out                   # BLEUBERI's reward
    python examples/online_dpo.py --loss_type ipo --mixture_coef 0.125 --output_dir out         # IPO-MD's sampling

Every field of `OnlineDPOConfig` is a flag.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import TrlParser

from trl_ext import OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.data import TextOverlap, load_preferences


@dataclass
class Script:
    model_name_or_path: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model."})
    dataset_name: str = field(
        default="trl-lib/ultrafeedback-prompt",
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the prompts."},
    )
    reward_funcs: str | None = field(default=None, metadata={"help": "Hub name or folder of a sequence classifier."})
    overlap: str | None = field(
        default=None,
        metadata={"help": "What compares with reference answers: bleu, chrf, rougeL, or a module of `evaluate`."},
    )


def brevity(completions, completion_ids, **kwargs):
    """Minus the number of tokens."""
    return [-float(len(ids)) for ids in completion_ids]


if __name__ == "__main__":
    parser = TrlParser([Script, OnlineDPOConfig])
    parser.set_defaults(loss_type=["anchored"], num_generations=4, pairing="group", missing_eos_penalty=1.0)
    script, args = parser.parse_args_and_config()

    overlap = TextOverlap(script.overlap) if script.overlap else None
    trainer = OnlineDPOTrainer(
        model=script.model_name_or_path,
        reward_funcs=[each for each in (script.reward_funcs, overlap) if each] or brevity,
        args=args,
        train_dataset=load_preferences(script.dataset_name).select_columns(
            ["prompt", *(["reference"] if overlap else [])]
        ),
        processing_class=AutoTokenizer.from_pretrained(script.model_name_or_path),
    )
    trainer.train()
    trainer.save_model()
