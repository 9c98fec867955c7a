"""The online flavour: a reward function of the small world scores what the policy itself writes."""

import copy
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from trl_ext import OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.demo import lm, world


SETTINGS = {"learning_rate": 3e-4, "beta": 0.1, "per_device_train_batch_size": 24, "num_generations": 4}
# In logits per word: rewards are known to like long answers
LENGTH_BIAS = 0.05
LOSS_KWARGS = {"length_regularized": {"alpha": 0.06}}


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """The true reward, and a liking for length that the true reward has not."""
    return [world.reward(text) + LENGTH_BIAS * len(text.split()) for text in completions]


def train(
    name: str,
    task: Any,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    steps: int,
    seed: int,
    callback: TrainerCallback,
) -> tuple[PreTrainedModel, float]:
    """Train one loss online from the start; returns the policy and the seconds it took, and saves the model."""
    args = OnlineDPOConfig(
        output_dir=str(folder / (name if task.name == "plain" else f"{name}-{task.name}")),
        loss_type=name,
        loss_kwargs=LOSS_KWARGS.get(name),
        max_steps=steps,
        max_new_tokens=lm.MAX_NEW_TOKENS,
        max_length=task.max_length,
        temperature=1.0,
        warmup_steps=min(5, steps - 1),
        seed=seed,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **SETTINGS,
    )
    policy = copy.deepcopy(start)
    trainer = OnlineDPOTrainer(
        model=policy,
        ref_model=copy.deepcopy(start),
        reward_funcs=reward,
        args=args,
        processing_class=tokenizer,
        train_dataset=task.train.select_columns(["prompt"]),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    policy.eval()
    trainer.save_model()
    return policy, seconds
