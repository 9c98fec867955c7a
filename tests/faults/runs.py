"""Runs that are begun, killed and begun again with the same command, and what is compared when they have ended."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.conftest import preference_rows
from tests.faults.moments import note
from tests.helpers import TIMINGS, options
from trl_ext.data import sample_completions, score_preferences
from trl_ext.rounds import IterativeDPO, RoundsConfig
from trl_ext.trainers.checkpoints import last_whole


STEPS = 4
# What a resumed run of transformers' logs of itself alone: how long it took, and its mean loss
OWN = (*TIMINGS, "train_loss")


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        command (`Callable`):
            Begins the run in a folder, of a model, or goes on.
        end (`Callable`):
            What it came to: tensors, numbers and texts by name.
        kept (`Callable`):
            How much is finished in a folder, in words and as a number.
    """

    command: Callable[[Path, Path], None]
    end: Callable[[Path], dict[str, Any]]
    kept: Callable[[Path], tuple[str, int]]


def length(completions, **kwargs):
    """A reward that says when it is asked; it hangs once `TEST_HANGS` is used up. What it knows lies outside: scores are kept by that."""
    note("reward")
    left = int(os.environ.get("TEST_HANGS", "1000"))
    os.environ["TEST_HANGS"] = str(left - 1)
    if not left:
        time.sleep(60)
    return [float(len(completion)) for completion in completions]


# Training, offline and online


def _train(trainer, folder: Path) -> None:
    """As a script does that is started again and again: from the last checkpoint, where there is one."""
    if last_whole(folder):
        trainer.train(resume_from_checkpoint=True)
    else:
        trainer.train()
    trainer.save_model(str(folder / "final"))


def _options(folder: Path, **overrides) -> dict[str, Any]:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "per_device_train_batch_size": 2}
    return options(folder, **{**saving, **overrides})


def offline(folder: Path, model: Path) -> None:
    """Two epochs: the second finds what the reference has said of the first."""
    trainer = trl_ext.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl_ext.DPOConfig(**_options(folder, loss_type="beta_dpo")),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(preference_rows(4)),
    )
    _train(trainer, folder)


def online(folder: Path, model: Path) -> None:
    """Completions of two steps are sampled at once, and learnt from twice."""
    blocks = {"steps_per_generation": 2, "num_iterations": 2, "max_new_tokens": 4, "max_length": 64}
    trainer = trl_ext.OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl_ext.OnlineDPOConfig(**_options(folder, loss_type="offset", **blocks)),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=length,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in preference_rows(8)]),
    )
    _train(trainer, folder)


def trained(folder: Path) -> dict[str, Any]:
    """Weights, what was logged, and all that a checkpoint keeps."""
    last = folder / f"checkpoint-{STEPS}"
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    found = {f"final/{name}": value for name, value in load_file(folder / "final" / "model.safetensors").items()}
    for number, entry in enumerate(log):
        names = [name for name in entry if not any(word in name for word in OWN)]
        found |= {f"log/{number}/{name}": entry[name] for name in names}
    for path in sorted(last.glob("*.safetensors")):
        found |= {f"{path.name}/{name}": value for name, value in load_file(path).items()}
    return found


def checkpoints(folder: Path) -> tuple[str, int]:
    last = last_whole(folder)
    name = Path(last).name if last else "anew"
    return name, int(name.split("-")[1]) if last else 0


# Scores, completions, rounds


def scoring(folder: Path, model: Path) -> None:
    scored = score_preferences(
        Dataset.from_list(preference_rows(8)).select_columns(["prompt", "chosen", "rejected"]),
        length,
        batch_size=2,
        cache_dir=folder / "cache",
    )
    _write(folder, scored.to_list())


def sampling(folder: Path, model: Path) -> None:
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in preference_rows(6)])
    given = {"max_new_tokens": 4, "batch_size": 1, "cache_dir": folder / "cache", "dtype": torch.float32}
    _write(folder, sample_completions(prompts, str(model), 2, **given).to_list())


def _write(folder: Path, rows: list[dict]) -> None:
    (folder / "end.json").write_text(json.dumps(rows))


def written(folder: Path) -> dict[str, Any]:
    return {str(number): row for number, row in enumerate(json.loads((folder / "end.json").read_text()))}


def lines(folder: Path) -> tuple[str, int]:
    number = sum(path.read_text().count("\n") for path in folder.glob("cache/*.jsonl"))
    return f"{number} scores", number


def chunks(folder: Path) -> tuple[str, int]:
    number = len(list(folder.glob("cache/*/*.json")))
    return f"{number} chunks", number


def rounds(folder: Path, model: Path) -> None:
    prompts = folder.parent / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in preference_rows(4)))
    training = _options(folder, max_steps=2, learning_rate=1e-2)
    del training["output_dir"], training["seed"]
    config = RoundsConfig(
        model=str(model),
        prompts=str(prompts),
        reward_funcs="tests.faults.runs:length",
        output_dir=str(folder),
        rounds=2,
        num_generations=3,
        sampling={"max_new_tokens": 4, "batch_size": 2},
        training=training,
    )
    IterativeDPO(config).run()


def of_rounds(folder: Path) -> dict[str, Any]:
    found = {"metrics": json.loads((folder / "metrics.json").read_text())}
    for name in ("round-1", "round-2"):
        log = json.loads((folder / name / "log.json").read_text())
        found[name] = [{key: entry[key] for key in entry if not any(word in key for word in OWN)} for entry in log]
    return found | load_file(folder / "round-2" / "model" / "model.safetensors")


def stages(folder: Path) -> tuple[str, int]:
    number = len(list(folder.glob("*/*.done")))
    return f"{number} stages", number


RUNS = {
    "offline": Run(offline, trained, checkpoints),
    "online": Run(online, trained, checkpoints),
    "scores": Run(scoring, written, lines),
    "samples": Run(sampling, written, chunks),
    "rounds": Run(rounds, of_rounds, stages),
}


def difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The largest between two ends: 0 where they are equal to the bit, infinite where they differ in more than numbers."""
    if first.keys() != second.keys():
        return float("inf")
    return max(_between(first[name], second[name]) for name in first)


def _between(first: Any, second: Any) -> float:
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.shape == second.shape
        return (first.double() - second.double()).abs().max().item() if same and first.numel() else float("inf")
    if isinstance(first, float) and isinstance(second, float):
        return 0.0 if first == second else abs(first - second)
    if isinstance(first, dict) and isinstance(second, dict):
        return max([difference(first, second)] if first or second else [0.0])
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return max((_between(*both) for both in zip(first, second, strict=True)), default=0.0)
    return 0.0 if first == second else float("inf")
