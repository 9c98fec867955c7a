"""
A general preference model: what people prefer may go in circles, which no reward can follow.

Trains a sequence classifier whose outputs are the embedding of a completion, and says on pairs that were held out how often it
prefers the chosen one.

    python examples/preference_model.py --output_dir out
    python examples/preference_model.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `RewardConfig` is a flag, `--preference_dim 8` and `--preference_temperature 0.1` among them. Then it is a judge of two:

    judge = trl_ext.PreferenceModel("out")   # DPOTrainer(..., judge=judge), OnlineDPOTrainer(..., judge=judge), score_preferences(...)
    trl-ext iterate examples/rounds/sppo.yaml --judge '{preference_model: out}'
"""

from dataclasses import dataclass, field

from trl import TrlParser

from trl_ext.data import load_preferences
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


@dataclass
class Script:
    model_name_or_path: str = field(
        default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model that it starts from."}
    )
    dataset_name: str = field(
        default="trl-lib/ultrafeedback_binarized",
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the preference data."},
    )
    held_out: float = field(default=0.1, metadata={"help": "Share of the pairs that accuracy is measured on."})


if __name__ == "__main__":
    parser = TrlParser([Script, RewardConfig])
    parser.set_defaults(preference_dim=6, learning_rate=2e-6)
    script, args = parser.parse_args_and_config()

    pairs = load_preferences(script.dataset_name).select_columns(["prompt", "chosen", "rejected"])
    split = pairs.train_test_split(test_size=script.held_out, seed=args.seed)
    trainer = RewardTrainer(
        model=script.model_name_or_path, args=args, train_dataset=split["train"], eval_dataset=split["test"]
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()
