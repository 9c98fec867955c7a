"""The online flavour: a reward function of the small world scores what the policy itself writes."""

from typing import Any

from trl_ext.demo import lm, world


SETTINGS = {
    "learning_rate": 3e-4, "beta": 0.1, "per_device_train_batch_size": 24, "num_generations": 4, "temperature": 1.0,
    "max_new_tokens": lm.MAX_NEW_TOKENS,
}  # fmt: skip
# In logits per word: rewards are known to like long answers
LENGTH_BIAS = 0.05
LOSS_KWARGS = {"length_regularized": {"alpha": 0.06}}


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """The true reward, and a liking for length that the true reward has not."""
    return [world.reward(text) + LENGTH_BIAS * len(text.split()) for text in completions]
