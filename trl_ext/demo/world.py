"""
A small world whose true reward is known: short film reviews from a grammar whose words carry sentiment.

The true reward of a review is three times the mean value of its sentiment words, in [-3, 3], in Bradley-Terry logits:
the better of two reviews is preferred with probability sigmoid(difference). Length earns nothing. In the reasoning
flavour a review follows a trace of random words, which earns nothing either.
"""

import math
import random
import re


# Value of a word: what the true reward is the mean of
SENTIMENT = {
    **dict.fromkeys(["superb", "brilliant", "moving"], 1.0),
    **dict.fromkeys(["good", "funny", "charming", "liked"], 0.5),
    **dict.fromkeys(["odd", "slow", "loud", "saw"], 0.0),
    **dict.fromkeys(["dull", "clumsy", "bland", "disliked"], -0.5),
    **dict.fromkeys(["awful", "dreadful", "painful"], -1.0),
}
ADJECTIVES = [word for word in SENTIMENT if not word.endswith(("liked", "saw"))]
VERBS = ["liked", "saw", "disliked"]
PARTS = ["plot", "cast", "score", "ending", "script", "lead"]
FILMS = ["western", "comedy", "thriller", "musical", "drama", "cartoon", "romance", "mystery"]
OPENINGS = [
    "a review of the",
    "what i thought of the",
    "notes on the",
    "in short , the",
    "my view of the",
    "last night : the",
]
TONES = ["new", "old", "long", "short", "late", "first", "second", "last"]
REASONING = "think it over , then"
OPEN, CLOSE = "<think>", "</think>"
EMPTY = f"{OPEN} {CLOSE}"
REWARD_SCALE = 3.0

PROMPTS = [f"{opening} {tone} {film} :" for opening in OPENINGS for tone in TONES for film in FILMS]


def reward(completion: str) -> float:
    """True reward of a completion's answer, in logits; what stands before the end of a trace is not read."""
    values = [SENTIMENT[word] for word in completion.split(CLOSE)[-1].split() if word in SENTIMENT]
    return REWARD_SCALE * sum(values) / len(values) if values else 0.0


def review(rng: random.Random) -> str:
    """One to four sentences of one mood."""
    mood = rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0])

    def draw(words: list[str]) -> str:
        return rng.choices(words, [math.exp(-2 * abs(SENTIMENT[word] - mood)) for word in words])[0]

    sentences = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.3:
            sentences.append(f"i {draw(VERBS)} the {rng.choice(PARTS)} .")
        else:
            sentences.append(f"the {rng.choice(PARTS)} was {rng.choice(['', 'very ', 'quite '])}{draw(ADJECTIVES)} .")
    return " ".join(sentences)


def trace(rng: random.Random) -> str:
    """A trace that tells nothing: words of any sentiment, in no order."""
    words = " ".join(rng.choices([*SENTIMENT, *PARTS], k=rng.randint(3, 12)))
    return f"{OPEN} {words} {CLOSE}"


def corpus(rng: random.Random, size: int) -> list[tuple[str, str]]:
    """Prompts and completions to fine-tune on: plain ones, with a trace, and with reasoning switched off."""
    texts = []
    for _ in range(size):
        prompt = rng.choice(PROMPTS)
        kind = rng.randrange(3)
        if kind == 0:
            texts.append((prompt, f" {review(rng)}"))
        elif kind == 1:
            texts.append((f"{REASONING} {prompt}", f" {trace(rng)} {review(rng)}"))
        else:
            texts.append((f"{REASONING} {prompt} {EMPTY}", f" {review(rng)}"))
    return texts


def vocabulary() -> list[str]:
    """All words of the world."""
    grammar = ["i", "the", "was", "very", "quite", ".", OPEN, CLOSE, *PARTS, *SENTIMENT]
    return sorted({*grammar, *" ".join([REASONING, *PROMPTS]).split()})


def prefer(rng: random.Random, first: str, second: str) -> tuple[str, str]:
    """(chosen, rejected), drawn by Bradley-Terry: now and then the worse one wins."""
    probability = 1 / (1 + math.exp(reward(second) - reward(first)))
    return (first, second) if rng.random() < probability else (second, first)


def clean(text: str) -> str:
    """A decoded completion with single spaces, led by one, as the corpus has it."""
    return " " + re.sub(r"\s+", " ", text).strip()
