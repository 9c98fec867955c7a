"""Short online runs on the tiny model."""

import functools

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.conftest import WORDS, preference_rows
from tests.helpers import options
from trl_ext.generation import Completions


@functools.cache
def prompts(rows: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": row["prompt"]} for row in preference_rows(rows)])


def conversations(**columns) -> Dataset:
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], **columns} for row in preference_rows(8)]
    return Dataset.from_list(rows)


def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


class Scripted(trl_ext.OnlineDPOTrainer):
    """Completions that follow from the prompt alone, so that runs can be compared."""

    def generate(self, model, inputs, thinking=True, reference=False):
        count = 1 if reference else self.num_generations
        texts = [scripted(prompt, k) for k in range(count) for prompt in inputs["prompt"]]
        encode = lambda text: torch.tensor(self.processing_class(text)["input_ids"])  # noqa: E731
        return Completions(
            prompts=inputs["prompt"],
            texts=texts,
            prompt_ids=[encode(prompt) for prompt in inputs["prompt"]],
            ids=[torch.cat([encode(text), torch.tensor([self.eos_token_ids[0]])]) for text in texts],
            ended=torch.ones(len(texts), dtype=torch.bool),
        )


def scripted(prompt: str, k: int) -> str:
    # Differs in length from sample to sample of a prompt: no ties under `length_reward`
    start = sum(map(ord, prompt)) + 7 * k
    return "".join(" " + WORDS[(start + 3 * i) % len(WORDS)] for i in range(2 + (start + 5 * k) % 3 + 4 * k))


def online(model_dir, output_dir, *, cls=trl_ext.OnlineDPOTrainer, config=None, trainer_kwargs=None, **overrides):
    config = config or trl_ext.OnlineDPOConfig
    overrides = {"max_new_tokens": 8, "max_length": 64, **overrides}
    trainer_kwargs = {"reward_funcs": length_reward, **(trainer_kwargs or {})}
    if isinstance(trainer_kwargs.get("model", model_dir), str):
        model = trainer_kwargs.pop("model", str(model_dir))
    else:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return cls(
        model=model,
        args=config(**options(output_dir, **overrides)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=trainer_kwargs.pop("train_dataset", prompts()),
        **trainer_kwargs,
    )


def batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def learn(trainer, inputs):
    """Loss and gradients of one batch, without a training step."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
