"""
RE-PO: labels that may be wrong count as much as they are believed.

Needs nothing but pairs. Without a column `annotator_id` all labels share one reliability. With it, whole numbers from 0, each annotator has
one of their own: say how many there are, `--loss_kwargs '{"annotators": 5}'`. The reliabilities are printed when training ends.

    python examples/robust_em.py --output_dir out
    python examples/robust_em.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"base": "ipo"}'` among them.
"""

from dataclasses import dataclass, field

from trl import TrlParser

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import load_preferences


@dataclass
class Script:
    model_name_or_path: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model."})
    dataset_name: str = field(
        default="trl-lib/ultrafeedback_binarized",
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the preference data."},
    )


if __name__ == "__main__":
    parser = TrlParser([Script, DPOConfig])
    parser.set_defaults(loss_type=["robust_em"])
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
