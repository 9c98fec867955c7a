"""Preference data that several claims are made of."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from transformers import AutoModelForSequenceClassification, PrinterCallback

from trl_ext.data.rewards import RewardModel
from trl_ext.demo.training import quiet
from trl_ext.trainers.reward import RewardConfig, RewardTrainer

from .worlds import SILENT, World, prefer


# Every completion of a group of four is in one pair
TWOS = ((0, 1), (2, 3))
# What the training of a reward model shares with that of a policy
REWARD_TRAINING = ("lr_scheduler_type", "use_cpu", "bf16", "max_length")


def labelled(groups: Sequence[dict[str, Any]], seed: int, noise: float = 0.0) -> list[dict[str, Any]]:
    """
    Pairs of each group's completions, labelled by Bradley-Terry from the true rewards; a share `noise` of the labels is flipped.

    Each row says with `group`, `first` and `second` which completions these are, chosen first.
    """
    rng = random.Random(seed)
    rows = []
    for number, group in enumerate(groups):
        for a, b in TWOS:
            scores = group["scores"]
            if prefer(rng, scores[a] - scores[b]) == (rng.random() < noise):
                a, b = b, a
            rows.append({
                "prompt": group["prompt"], "chosen": group["completions"][a], "rejected": group["completions"][b],
                "group": number, "first": a, "second": b,
            })  # fmt: skip
    return rows


def pairs(rows: Sequence[dict[str, Any]], *columns: str) -> Dataset:
    """The columns that a trainer reads, and no true reward by accident."""
    return Dataset.from_list(
        [{name: row[name] for name in ("prompt", "chosen", "rejected", *columns)} for row in rows]
    )


def reward_model(world: World, name: str, rows: Sequence[dict[str, Any]], steps: int) -> RewardModel:
    """A reward model that is trained on pairs by Bradley-Terry, from the start's weights."""
    folder = world.folder / "reward-models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), quiet():
        if not folder.exists():
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(world.name, num_labels=1, dtype="float32")
            model.config.pad_token_id = world.tokenizer.pad_token_id
            shared = {key: value for key, value in world.training.items() if key in REWARD_TRAINING}
            args = RewardConfig(
                output_dir=f"{folder}.training",
                max_steps=steps,
                learning_rate=world.reward_learning_rate,
                **SILENT,
                **world.batches(32),
                **shared,
            )
            trainer = RewardTrainer(
                model=model, args=args, train_dataset=pairs(rows), processing_class=world.tokenizer
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.save_model(f"{folder}.part")
            Path(f"{folder}.part").rename(folder)
    scorer = RewardModel(str(folder), processing_class=world.tokenizer, dtype="float32")
    scorer.load()
    scorer.model.to(world.device)
    return scorer


def scored(world: World, name: str, rows: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The pairs with `score_chosen` and `score_rejected` of a reward model that is trained on them; kept under the name."""

    def make() -> list[list[float]]:
        model = reward_model(world, name, rows, steps)
        found: list[list[float]] = [[], []]
        for first in range(0, len(rows), world.rows_at_once):
            part = rows[first : first + world.rows_at_once]
            for scores, side in zip(found, ("chosen", "rejected"), strict=True):
                scores += model([row["prompt"] for row in part], [row[side] for row in part])
        return found

    chosen, rejected = world.kept(f"scores-{name}", make)
    return [{**row, "score_chosen": a, "score_rejected": b} for row, a, b in zip(rows, chosen, rejected, strict=True)]
