"""The data of a step: how long prompts and completions are, their token ids, and what each path makes of them."""

import argparse
import random


# Medians of tokens (prompt, completion); lengths are log-normal around them. Prompt over completion follows the table
# of Wang and Hegde (2024), https://arxiv.org/abs/2410.20305; the medians themselves are rounded.
PROFILES = {"ultrafeedback": (130, 310), "hh": (120, 60), "tldr": (350, 32)}

# Token ids of a prompt, and those of each of its completions
Prompt = tuple[list[int], list[list[int]]]


class Lengths:
    """Draws prompt and completion lengths: uniform within `completion` and 20% of `prompt`, or by a profile."""

    def __init__(self, prompt: int, completion: tuple[int, int], profile: str | None, seed: int = 0):
        self.random = random.Random(seed)
        self.range, self.profile = (prompt, completion), profile

    def prompt(self) -> int:
        if self.profile:
            return self._log_normal(PROFILES[self.profile][0])
        return max(1, int(self.range[0] * self.random.uniform(0.8, 1.2)))

    def completion(self) -> int:
        return self._log_normal(PROFILES[self.profile][1]) if self.profile else self.random.randint(*self.range[1])

    def _log_normal(self, median: int) -> int:
        return min(4096, max(4, round(median * self.random.lognormvariate(0, 0.6))))


def sampled(args: argparse.Namespace) -> list[list[Prompt]]:
    """The batches of a run: prompts with `num_generations` completions each, as many as make `pairs` pairs."""
    lengths = Lengths(args.prompt, tuple(args.completion), args.profile)

    def ids(count: int) -> list[int]:
        return [lengths.random.randrange(6, args.vocab) for _ in range(count)]

    def prompt() -> Prompt:
        return ids(lengths.prompt()), [ids(lengths.completion()) for _ in range(args.num_generations)]

    return [[prompt() for _ in range(args.pairs // (args.num_generations // 2))] for _ in range(args.batches)]


def tokens(batch: list[Prompt]) -> int:
    """Of all rows of a batch, each with its own prompt, padding aside."""
    return sum(len(prompt) + len(completion) for prompt, completions in batch for completion in completions)


def pairs(batch: list[Prompt]) -> list[dict]:
    """A batch as pairs, each with a prompt of its own."""
    return [
        {"prompt_ids": prompt, "chosen_ids": completions[k], "rejected_ids": completions[k + 1]}
        for prompt, completions in batch
        for k in range(0, len(completions), 2)
    ]


def groups(batch: list[Prompt]) -> list[dict]:
    """A batch as whole groups."""
    return [
        {
            **first,
            "score_chosen": 1.0,
            "score_rejected": 0.0,
            "further_pairs": further,
            "group_scores": [1.0, 0.0, *[0.5] * (2 * len(further))],
        }
        for first, *further in (pairs([prompt]) for prompt in batch)
    ]
