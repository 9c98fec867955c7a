"""Where claims are tried: a start, prompts, a reward that is taken as true. Sampling, training and measuring are the same in each."""

import contextlib
import copy
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data.cache import write_atomically
from trl_ext.data.tokens import prompt_ids
from trl_ext.demo.lm import kl_to_reference
from trl_ext.demo.training import quiet
from trl_ext.generation import evaluating, sample_rows


SILENT = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}


@dataclass
class Sampled:
    """Completions of a policy: prompts and texts as the dataset has them, and the token ids of both."""

    prompts: list[Any]
    texts: list[Any]
    prompt_ids: list[torch.Tensor]
    ids: list[torch.Tensor]


@dataclass
class Trained:
    """A path of measurements, and the trainer that made it."""

    points: list[dict[str, float]]
    trainer: DPOTrainer


@dataclass
class World:
    """
    Args:
        start (`PreTrainedModel`): The policy before training, and the reference that every KL is to.
        score (`Callable`): The true reward of completions, in Bradley-Terry logits: `score(prompts, texts)`.
        prompts (`list`): Prompts to train on, strings or conversations.
        held_out (`list`): Prompts to measure on.
        folder (`Path`): Where what several runs share is kept.
        name (`str`): Folder or hub name of the start.
        training (`dict`): Arguments of `DPOConfig` that no claim sets.
        reward_learning_rate (`float`): Of the reward models that claims train.
        samples (`int`): Completions for each point that is measured.
    """

    start: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    score: Callable[[list, list], list[float]]
    prompts: list
    held_out: list
    folder: Path
    name: str
    training: dict[str, Any]
    reward_learning_rate: float
    samples: int
    max_new_tokens: int
    rows_at_once: int = 256  # of sampling; a quarter of it where logits of all tokens are kept
    pairs_at_once: int = 64
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.start.device

    # Sampling

    def tokens(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return prompt_ids(prompt, self.tokenizer, False)
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return prompt_ids(text, self.tokenizer, True)

    def completion(self, prompt: Any, ids: torch.Tensor) -> Any:
        """A completion as the dataset has it: text after a text, a message after messages."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    def tokens_of(self, completion: Any) -> int:
        text = completion if isinstance(completion, str) else completion[0]["content"]
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def sample(self, model: PreTrainedModel, prompts: list, seed: int) -> Sampled:
        """One completion of each prompt, at temperature 1; the random numbers of whoever calls stay as they are."""
        config = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        prompt_ids = [torch.tensor(self.tokens(prompt)) for prompt in prompts]
        ids: list[torch.Tensor] = []
        with torch.random.fork_rng(), evaluating(model, None):
            torch.manual_seed(seed)
            for first in range(0, len(prompts), self.rows_at_once):
                part = prompt_ids[first : first + self.rows_at_once]
                ids += [drawn.cpu() for drawn in sample_rows(model, part, config, 1, self.device)]
        texts = [self.completion(prompt, drawn) for prompt, drawn in zip(prompts, ids, strict=True)]
        return Sampled(prompts, texts, prompt_ids, ids)

    def kl(self, model: PreTrainedModel, drawn: Sampled) -> float:
        """KL to the start in nats per completion, on completions that the model has drawn: see [`kl_to_reference`]."""
        with evaluating(model, None):
            each = kl_to_reference(model, self.start, drawn.prompt_ids, drawn.ids, max(1, self.rows_at_once // 4))
        return each.mean().item()

    # Measuring

    def measure(self, model: PreTrainedModel, prompts: list | None = None) -> dict[str, float]:
        """Reward, KL to the start and length of fresh completions of held-out prompts; the same draws for every model."""
        asked = [(prompts or self.held_out)[i % len(prompts or self.held_out)] for i in range(self.samples)]
        drawn = self.sample(model, asked, seed=10**6)
        rewards = self.score(asked, drawn.texts)
        return {
            "kl": self.kl(model, drawn),
            "reward": sum(rewards) / len(rewards),
            "length": sum(map(len, drawn.ids)) / len(rewards),
            **{name: measure(asked, drawn.texts) for name, measure in self.extra.items()},
        }

    # Data

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, as JSON: made once, whichever process asks first."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                write_atomically(path, json.dumps(make()))
        return json.loads(path.read_text())

    def variant(self, prompt: Any, kind: str) -> Any:
        """The prompt as it is ("plain"), or with reasoning asked for ("traced") or switched off ("empty")."""
        if kind != "plain":
            raise ValueError(f"This world has no prompts of the kind {kind!r}.")
        return prompt

    def foreign(self, prompts: list, seed: int) -> list:
        """Texts that answer the prompts and come from no policy."""
        raise ValueError("This world has no texts from elsewhere.")

    def groups(
        self, seed: int, count: int, each: int = 4, model: PreTrainedModel | None = None, kind: str = "plain"
    ) -> list[dict]:
        """Prompts with completions of the start (or of a model) and their true rewards: `prompt`, `completions`, `scores`."""

        def make() -> list[dict]:
            rng = random.Random(seed)
            prompts = [self.variant(rng.choice(self.prompts), kind) for _ in range(count)]
            drawn = self.sample(model or self.start, [prompt for prompt in prompts for _ in range(each)], seed)
            scores = self.score(drawn.prompts, drawn.texts)
            return [
                {"prompt": prompt, "completions": drawn.texts[i * each :][:each], "scores": scores[i * each :][:each]}
                for i, prompt in enumerate(prompts)
            ]

        return make() if model is not None else self.kept(f"groups-{kind}-{seed}-{count}-{each}", make)

    # Training

    def batches(self, size: int) -> dict[str, int]:
        """Arguments of a trainer that learns from so many pairs at each step."""
        at_once = min(size, self.pairs_at_once)
        return {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": max(1, size // at_once)}

    def train(
        self,
        dataset: Dataset,
        settings: dict[str, Any],
        seed: int,
        steps: int,
        batch: int,
        model: PreTrainedModel | None = None,
        prompts: list | None = None,
        marks: tuple[float, ...] = (0.15, 0.4, 1.0),
    ) -> Trained:
        """
        Train the start, or a model in place, and measure after shares `marks` of the steps.

        The reference of the loss is the model that training begins with.
        """
        points = [{"step": 0, **self.kept_start(prompts)}] if model is None else []
        with self.trainer(dataset, settings, seed, steps, batch, model) as trainer:
            policy = trainer.model
            trainer.add_callback(
                _At(
                    {max(1, round(share * steps)) for share in marks},
                    lambda step: points.append({"step": step, **self.measure(policy, prompts)}),
                )
            )
            trainer.train()
        return Trained(points, trainer)

    @contextlib.contextmanager
    def trainer(
        self,
        dataset: Dataset,
        settings: dict[str, Any],
        seed: int,
        steps: int,
        batch: int,
        model: PreTrainedModel | None = None,
    ) -> Iterator[DPOTrainer]:
        """The trainer of a run, in a folder that goes with it."""
        with quiet(), tempfile.TemporaryDirectory() as folder:
            trainer = DPOTrainer(
                model=self.clone(self.start) if model is None else model,
                ref_model=self.clone(self.start if model is None else model),
                args=DPOConfig(
                    output_dir=folder,
                    max_steps=steps,
                    seed=seed,
                    warmup_steps=min(5, steps - 1),
                    **{**SILENT, **self.training, **self.batches(batch), **settings},
                ),
                processing_class=self.tokenizer,
                train_dataset=dataset,
            )
            trainer.remove_callback(PrinterCallback)
            yield trainer

    def kept_start(self, prompts: list | None = None) -> dict[str, float]:
        """The start as a point of every path."""
        name = f"start-{'-'.join(['held' if prompts is None else 'own', *self.extra])}"
        return self.kept(name, lambda: {**self.measure(self.start, prompts), "kl": 0.0})

    def clone(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of the weights in a model that no trainer has touched."""
        copied = copy.deepcopy(self.start)
        copied.load_state_dict(model.state_dict())
        return copied


class _At(TrainerCallback):
    """Calls a function after some steps."""

    def __init__(self, steps: set[int], call: Callable[[int], None]):
        self.steps, self.call = steps, call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.call(state.global_step)


def prefer(rng: random.Random, gap: float) -> bool:
    """Whether the first of two wins, drawn by Bradley-Terry from its lead in logits."""
    return rng.random() < float(torch.sigmoid(torch.tensor(gap, dtype=torch.float64)))
