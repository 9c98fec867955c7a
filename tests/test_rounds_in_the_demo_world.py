"""Rounds in a world whose true reward is known, under a reward that likes long answers."""

import json
import random

import pytest
from datasets import load_from_disk
from transformers import set_seed

from trl_ext.demo import lm, world
from trl_ext.rounds import IterativeDPO, RoundsConfig


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that writes reviews of all moods, and prompts for it."""
    folder = tmp_path_factory.mktemp("world")
    set_seed(0)
    rng = random.Random(0)
    tokenizer = lm.word_tokenizer(world.vocabulary())
    model = lm.build_model(tokenizer, 128)
    lm.fine_tune(model, tokenizer, world.corpus(rng, 6000), 240, 128, rng, lambda: None)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts = random.Random(1).sample(world.PROMPTS, 256)
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    return folder


def rounds(start, folder, loss, **overrides):
    training = {
        "max_steps": 40, "learning_rate": 1e-4, "beta": 0.1, "per_device_train_batch_size": 16, "use_cpu": True,
        "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False,
        "logging_strategy": "no", **loss,
    }  # fmt: skip
    settings = {
        "model": str(start / "model"), "prompts": str(start / "prompts.jsonl"), "reward_funcs": "trl_ext.demo.online:reward",
        "output_dir": str(folder), "num_generations": 6, "sampling": {"max_new_tokens": 64, "batch_size": 64}, "training": training,
        **overrides,
    }  # fmt: skip
    metrics = IterativeDPO(RoundsConfig(**settings)).run()
    names = [f"round-{n}" for n in range(1, len(metrics))] + [f"after-round-{len(metrics) - 1}"]
    for entry, name in zip(metrics, names, strict=True):
        texts = [text for row in load_from_disk(folder / name / "samples")["completions"] for text in row]
        entry["reward"] = sum(map(world.reward, texts)) / len(texts)
    return metrics


@pytest.fixture(scope="module")
def plain(start, tmp_path_factory):
    """Three rounds of DPO, their folder and their metrics."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, rounds(start, folder, {"loss_type": "sigmoid"})


def test_length_regularized_rounds_do_not_grow(start, plain, tmp_path):
    ours = rounds(start, tmp_path, {"loss_type": "length_regularized", "loss_kwargs": {"alpha": 0.09}})
    plain = plain[1]
    for metrics in (ours, plain):
        rewards = [entry["reward"] for entry in metrics]
        assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 0.5
    first = ours[0]["mean_length"]
    assert all(abs(entry["mean_length"] / first - 1) < 0.1 for entry in ours), ours
    lengths = [entry["mean_length"] for entry in plain]
    assert lengths == sorted(lengths) and lengths[-1] > 1.3 * first


def test_dice_lowers_the_gap_of_lengths(start, plain, tmp_path):
    """Of the pairs that a policy of one round makes, which like long answers."""
    bootstrap = {
        "model": str(plain[0] / "round-1" / "model"),
        "implicit_reference": str(start / "model"),
        "reward_funcs": "implicit",
        "rounds": 1,
        "num_generations": 3,
    }
    one_step = {"loss_type": "sigmoid", "max_steps": 1}  # the pairs are made before it
    gaps = {
        shaping: rounds(start, tmp_path / str(shaping), one_step, length_shaping=shaping, **bootstrap)[0]["length_gap"]
        for shaping in (None, "balance")
    }
    assert abs(gaps["balance"]) < 0.2 * abs(gaps[None]), gaps
