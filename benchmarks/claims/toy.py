"""The demonstration's world: film reviews whose true reward is known, and its small language model."""

import random
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_ext.demo import lm, world

from .frame import Scale
from .worlds import World


MAX_LENGTH = 128
TRAINING = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "max_length": MAX_LENGTH,
}


class ToyWorld(World):
    def variant(self, prompt: str, kind: str) -> str:
        """The prompt as it is ("plain"), one that asks for a trace ("traced"), or the latter with an empty trace ("empty")."""
        if kind == "plain":
            return prompt
        return f"{world.REASONING} {prompt}" + (f" {world.EMPTY}" if kind == "empty" else "")

    def completion(self, prompt: str, ids: torch.Tensor) -> str:
        return world.clean(super().completion(prompt, ids))

    def foreign(self, prompts: list[str], seed: int) -> list[str]:
        rng = random.Random(seed)
        return [f" {world.review(rng)}" for _ in prompts]


def build(folder: Path, scale: Scale) -> ToyWorld:
    """The world, with a start that is fine-tuned once and kept."""
    torch.set_num_threads(1)
    start = folder / "start"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "start.lock"):
        if not start.exists():
            set_seed(0)
            rng = random.Random(0)
            tokenizer = lm.word_tokenizer(world.vocabulary())
            model = lm.build_model(tokenizer, MAX_LENGTH)
            lm.fine_tune(model, tokenizer, world.corpus(rng, 6000), scale.fine_tuning, MAX_LENGTH, rng, lambda: None)
            model.save_pretrained(folder / "start.part")
            tokenizer.save_pretrained(folder / "start.part")
            (folder / "start.part").rename(start)
    prompts = list(world.PROMPTS)
    random.Random(0).shuffle(prompts)
    return ToyWorld(
        start=AutoModelForCausalLM.from_pretrained(start, dtype="float32").eval(),
        tokenizer=AutoTokenizer.from_pretrained(start),
        score=lambda prompts, texts: [world.reward(text) for text in texts],
        prompts=prompts[64:],
        held_out=prompts[:64],
        folder=folder,
        name=str(start),
        training=TRAINING,
        reward_learning_rate=1e-3,
        samples=scale.samples,
        max_new_tokens=64,
    )
