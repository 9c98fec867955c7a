"""
DMPO: trajectories of several turns, of which the later ones count less.

The data is yours: conversations, in `prompt` the messages before the assistant's first turn, in `chosen` and `rejected` two lists of
messages that go on from there, with users or tools between the assistant's turns. Each turn of the assistant is scored, nothing else.

    python examples/dmpo.py --model_name_or_path path/to/model --dataset_name trajectories.jsonl --output_dir out --max_steps 100

A chat template that drops reasoning of earlier turns, such as Qwen3's, needs `--training_template true`. Every field of `DPOConfig` is
a flag, `--loss_kwargs '{"gamma": 0.9}'` among them.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import TrlParser
from trl.chat_template_utils import get_training_chat_template

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import load_preferences


@dataclass
class Script:
    dataset_name: str = field(metadata={"help": "Hub name, folder or file (JSON Lines, Parquet) of the trajectories."})
    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Hub name or folder of the model."}
    )
    training_template: bool = field(
        default=False, metadata={"help": "Take the chat template that TRL has for training models of this family."}
    )


if __name__ == "__main__":
    parser = TrlParser([Script, DPOConfig])
    parser.set_defaults(loss_type=["dmpo"], loss_kwargs={"gamma": 0.7}, learning_rate=1e-6)
    script, args = parser.parse_args_and_config()

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    if script.training_template:  # `None` where the tokenizer's own will do
        tokenizer.chat_template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    dataset = load_preferences(script.dataset_name)
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
