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
    "learning_rate": 5e-4,
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "max_length": MAX_LENGTH,
}


class ToyWorld(World):
    def completion(self, prompt: str, ids: torch.Tensor) -> str:
        return world.clean(super().completion(prompt, ids))


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
            lm.fine_tune(
                model, tokenizer, world.corpus(rng, 6000), scale.fine_tuning, MAX_LENGTH, rng, lambda: None
            )
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
        training=TRAINING,
        samples=scale.samples,
        max_new_tokens=64,
    )
