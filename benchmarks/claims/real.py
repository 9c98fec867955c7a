"""A world of real size: a chat model and prompts of the user's, and a reward model or function that is taken as true."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.rounds.checks import load_rows
from trl_ext.rounds.rewards import build_scorer

from .frame import Scale
from .worlds import World


HELD_OUT = 256


@dataclass
class RealWorld(World):
    """`answers` are texts of the prompts' dataset, by prompt; none where it has no column `chosen`."""

    answers: dict[str, Any] = field(default_factory=dict)

    def foreign(self, prompts: list, seed: int) -> list:
        missing = [prompt for prompt in prompts if str(prompt) not in self.answers]
        if missing:
            raise ValueError(
                "Texts that no policy wrote are asked for: give --prompts a dataset with the column `chosen`."
            )
        return [self.answers[str(prompt)] for prompt in prompts]


def build(
    folder: Path,
    scale: Scale,
    model: str,
    prompts: str,
    gold: str,
    device: str,
    learning_rate: float,
    max_new_tokens: int,
    train_batch: int,
) -> RealWorld:
    """The world that the command's flags name."""
    rows = load_rows(prompts, "--prompts")
    if "prompt" not in rows.column_names:
        raise ValueError(f"--prompts {prompts} has no column 'prompt'; its columns are {rows.column_names}.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    asked = list(rows["prompt"])
    random.Random(0).shuffle(asked)
    held = min(HELD_OUT, len(asked) // 4)
    if not held:
        raise ValueError(f"--prompts {prompts} has {len(asked)} prompts; at least 4 are needed.")
    scorer = build_scorer(gold, None, None)
    gpu = device == "cuda"

    def score(prompts: list, texts: list) -> list[float]:
        found: list[float] = []
        for first in range(0, len(texts), 16):
            found += scorer(prompts[first : first + 16], texts[first : first + 16])
        return found

    if hasattr(scorer, "load"):
        scorer.load()
    if isinstance(getattr(scorer, "model", None), torch.nn.Module):
        scorer.model.to(device)
    answers = rows["chosen"] if "chosen" in rows.column_names else []
    return RealWorld(
        start=AutoModelForCausalLM.from_pretrained(model, dtype="float32").to(device).eval(),
        tokenizer=tokenizer,
        score=score,
        prompts=asked[held:],
        held_out=asked[:held],
        folder=folder,
        name=model,
        training={
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "use_cpu": not gpu,
            "bf16": gpu,
            "gradient_checkpointing": gpu,
            "max_length": None,
        },
        reward_learning_rate=1e-5,
        samples=scale.samples,
        max_new_tokens=max_new_tokens,
        rows_at_once=64 if gpu else 16,
        pairs_at_once=train_batch,
        answers={str(prompt): answer for prompt, answer in zip(rows["prompt"], answers, strict=False)},
    )
