"""
Margin-adaptive DPO (MADPO): amplify pairs with small reward-model margins, damp large and contradicted ones.

Needs `score_chosen` and `score_rejected` as Bradley-Terry logits of a reward model trained on the same preferences.
The default dataset's scores are ratings from 1 to 10: the script runs on them, the method wants logits.

    python examples/margin_adaptive.py --output_dir out
    python examples/margin_adaptive.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"c_max": 4.0, "c_min": 0.25, "tau": 6.907}'` among them.
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
    parser.set_defaults(loss_type=["margin_adaptive"], loss_kwargs={"c_max": 4.0, "c_min": 0.25, "tau": 6.907})
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
