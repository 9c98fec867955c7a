"""What is trained on: a start, and for each seed pairs that were sampled from it, or a split of data of the user's."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from trl_ext.data import load_preferences
from trl_ext.data.checks import require_columns
from trl_ext.demo import lm, world
from trl_ext.metrics.intervals import mean_interval


FINE_TUNING_STEPS = 200
PAIRS, HELD_OUT_PAIRS = 400, 192
# Prompts that no pair has, and completions for each point that is measured
HELD_OUT_PROMPTS, SAMPLES = 64, 192
# Of these, what is shown as text
EXAMPLES = 2
# Positions that a prompt, a trace and a review of the world need at most, and those of the model for data of the user's
WORLD_LENGTH, OWN_LENGTH = 128, 256


@dataclass
class Task:
    """What a loss is trained and measured on."""

    name: str
    seed: int
    train: Dataset
    test: Dataset | None
    prompts: list[str]
    max_length: int
    reward_known: bool = True
    start: dict[str, float | None] = field(default_factory=dict)  # the start as a point of every path
    before: list[str] = field(default_factory=list)  # what it writes for the first prompts


def world_start(seed: int, advance: Callable[[], None]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small language model, fine-tuned on the grammar."""
    set_seed(seed)
    rng = random.Random(seed)
    tokenizer = lm.word_tokenizer(world.vocabulary())
    model = lm.build_model(tokenizer, WORLD_LENGTH)
    lm.fine_tune(model, tokenizer, world.corpus(rng, 6000), FINE_TUNING_STEPS, WORLD_LENGTH, rng, advance)
    return model, tokenizer


def world_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, kinds: list[str], pairs: bool
) -> list[Task]:
    """
    Pairs sampled from the start and labelled by Bradley-Terry, "plain" ones and those with a trace ("traced").

    Args:
        kinds (`list[str]`): Which of the two.
        pairs (`bool`): Without, prompts alone: who learns online writes what it learns from.
    """
    set_seed(seed)
    rng = random.Random(seed)
    shuffled = random.Random(0).sample(world.PROMPTS, len(world.PROMPTS))
    held_out = [shuffled[number % HELD_OUT_PROMPTS] for number in range(SAMPLES)]
    prompts = rng.choices(shuffled[HELD_OUT_PROMPTS:], k=PAIRS + HELD_OUT_PAIRS)

    def sampled(prompts: list[str]) -> list[str]:
        completions = lm.sample(model, tokenizer, lm.encode(tokenizer, prompts), lm.MAX_NEW_TOKENS)
        return [world.clean(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions]

    def labelled(prompts: list[str]) -> list[tuple[str, str]]:
        return [world.prefer(rng, *pair) for pair in zip(sampled(prompts), sampled(prompts), strict=True)]

    tasks = []
    for kind in kinds:
        asked, fresh = prompts, held_out
        if kind == "traced":
            asked, fresh = ([f"{world.REASONING} {prompt}" for prompt in each] for each in (prompts, held_out))
        rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in asked]
        if pairs:
            rows = [scored(prompt, pair) for prompt, pair in zip(asked, labelled(asked), strict=True)]
        if pairs and kind == "traced":
            empty = labelled([f"{prompt} {world.EMPTY}" for prompt in asked])
            for row, (chosen, rejected) in zip(rows, empty, strict=True):
                row |= {"chosen_empty_trace": chosen, "rejected_empty_trace": rejected}
        test = Dataset.from_list(rows[PAIRS:]) if pairs else None
        tasks.append(Task(kind, seed, Dataset.from_list(rows[:PAIRS]), test, fresh, WORLD_LENGTH))
    return tasks


def scored(prompt: str, pair: tuple[str, str]) -> dict[str, Any]:
    """A row of preference data, with the true rewards as scores."""
    chosen, rejected = pair
    scores = {"score_chosen": world.reward(chosen), "score_rejected": world.reward(rejected)}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **scores}


def own_dataset(name: str) -> Dataset:
    """A dataset of the user's; a `ValueError` for one that the demonstration cannot use."""
    dataset = load_preferences(name)
    require_columns(dataset, ["prompt", "chosen", "rejected"])
    if len(dataset) < 20:
        raise ValueError(
            f"The dataset has {len(dataset)} rows; the demonstration holds some out and needs at least 20."
        )
    if not isinstance(dataset[0]["prompt"], str):
        raise ValueError("The demonstration's model has no chat template: give prompt, chosen and rejected as text.")
    return dataset


def own_start(
    dataset: Dataset, seed: int, advance: Callable[[], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tokenizer and a small model made from the chosen texts of a dataset of the user's."""
    set_seed(seed)
    texts = list(zip(dataset["prompt"], dataset["chosen"], strict=True))
    tokenizer = lm.trained_tokenizer(prompt + chosen for prompt, chosen in texts)
    model = lm.build_model(tokenizer, OWN_LENGTH + lm.MAX_NEW_TOKENS)
    lm.fine_tune(model, tokenizer, texts, FINE_TUNING_STEPS, OWN_LENGTH, random.Random(seed), advance)
    return model, tokenizer


def own_task(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, seed: int) -> Task:
    """A split of a dataset of the user's."""
    split = dataset.train_test_split(test_size=max(10, len(dataset) // 10), seed=seed)
    # What does not fit before a completion cannot be sampled from
    short = [prompt for prompt in split["test"]["prompt"] if len(tokenizer(prompt)["input_ids"]) <= OWN_LENGTH]
    if not short:
        raise ValueError(f"No held-out prompt has {OWN_LENGTH} tokens or fewer; the demonstration's model ends there.")
    return Task("plain", seed, split["train"], split["test"], short[:128], OWN_LENGTH, reward_known=False)


def measure(
    policy: PreTrainedModel, start: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> tuple[dict[str, float | None], list[str]]:
    """
    True reward, KL to the start and length of fresh completions of held-out prompts, the first two with standard errors; and the
    first completions as text. The random numbers of whoever calls stay as they are.
    """
    prompts = lm.encode(tokenizer, task.prompts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)  # the same draws for every loss: differences come from the models
        completions = lm.sample(policy, tokenizer, prompts, lm.MAX_NEW_TOKENS)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
    found = {"reward": torch.tensor([world.reward(text) for text in texts])} if task.reward_known else {}
    found |= {"kl": lm.kl_to_reference(policy, start, prompts, completions)}
    values: dict[str, float | None] = {"reward": None}
    for name, each in found.items():
        values[name] = each.mean().item()
        values[f"{name}_standard_error"] = mean_interval(each)[0]
    return {**values, "length": sum(map(len, completions)) / len(completions)}, texts[:EXAMPLES]
