"""The rounds: stages one after the other, each done once, whatever happens in between."""

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.data.cache import content_key, processes, write_atomically
from trl_ext.data.groups import from_groups
from trl_ext.data.load import load_preferences
from trl_ext.data.sampling import sample_completions
from trl_ext.data.scores import score_preferences
from trl_ext.rounds.config import RoundsConfig
from trl_ext.rounds.extrapolate import extrapolate
from trl_ext.rounds.log_probs import completion_log_probs, implicit_rewards
from trl_ext.rounds.shaping import balance_lengths, drop_truncated, mix_replay, text_length
from trl_ext.trainers.dpo import DPOTrainer
from trl_ext.trainers.dpo_config import DPOConfig
from trl_ext.trainers.loss_terms import build_losses, resolve_loss_types


logger = get_logger(__name__)

# What a round's pairs have beside the texts
COLUMNS = ("score_chosen", "score_rejected", "initial_chosen_logps", "initial_rejected_logps")


class IterativeDPO:
    """
    Rounds of sample, score, pair, train.

    Everything lies on disk under `output_dir/round-1`, `round-2`, ...: `samples`, `scored`, `pairs` (datasets), `train`
    (checkpoints), `model` (what was trained), `policy` (after extrapolation, where there is any) and `metrics.json`. A run that
    was killed goes on at the stage it was in; a stage that is done is not done again.

    Args:
        config ([`RoundsConfig`]):
            Settings.

    Example:

    ```python
    >>> from trl_ext.rounds import IterativeDPO, RoundsConfig

    >>> config = RoundsConfig(
    ...     model="Qwen/Qwen3-0.6B",
    ...     prompts="trl-lib/ultrafeedback-prompt",
    ...     judge="path/to/reward-model",
    ...     output_dir="rounds",
    ...     training={"loss_type": "length_regularized", "loss_kwargs": {"alpha": 0.02}},
    ... )
    >>> IterativeDPO(config).run()
    ```
    """

    def __init__(self, config: RoundsConfig):
        self.config = config
        self.state = processes()
        self.folder = Path(config.output_dir)
        self.names = resolve_loss_types(config.training.get("loss_type", "sigmoid"))
        self.losses = build_losses(self.names, config.training.get("loss_kwargs"))
        self.prompts = load_preferences(config.prompts)
        if "prompt" not in self.prompts.column_names:
            raise ValueError(f"{config.prompts} has no column 'prompt'; its columns are {self.prompts.column_names}.")
        # What the chat template reads beside the prompt
        self._kept = [
            name for name in ("prompt", "tools", "chat_template_kwargs") if name in self.prompts.column_names
        ]
        self._training_arguments(self.folder)  # refused now, not after the first sampling
        for name, loss in self.losses.items():
            missing = [column for column in loss.required_columns if column not in COLUMNS]
            if missing:
                raise ValueError(f"The loss {name!r} needs {missing}, which rounds do not make; they make {COLUMNS}.")

    def run(self) -> list[dict[str, Any]]:
        """All rounds; returns the metrics of each."""
        self._claim()
        metrics = []
        for number in range(1, self.config.rounds + 1):
            folder = self.folder / f"round-{number}"
            policy = self._policy(number - 1)
            samples = self._dataset(folder / "samples", lambda n=number, p=policy, f=folder: self._sample(n, p, f))
            scored = self._dataset(
                folder / "scored", lambda n=number, p=policy, s=samples, f=folder: self._score(n, p, s, f)
            )
            pairs = self._dataset(folder / "pairs", lambda n=number, s=scored: self._pair(n, s))
            self._stage(folder / "model", lambda p=policy, d=pairs, f=folder: self._train(f, p, d))
            if self.config.extrapolation and number > 1:
                before = self.folder / f"round-{number - 1}" / "model"
                self._stage(folder / "policy", lambda f=folder, b=before: self._extrapolate(f, b))
            metrics.append(self._metrics(number, folder, scored, pairs))
        metrics.append(self._last())
        if self.state.is_main_process:
            write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        return metrics

    def _last(self) -> dict[str, Any]:
        """What the policy writes after the last round, on that round's prompts."""
        number, rounds = self.config.rounds + 1, self.config.rounds
        folder = self.folder / f"after-round-{rounds}"
        policy = self._policy(rounds)
        samples = self._dataset(folder / "samples", lambda: self._sample(number, policy, folder, rounds))
        scored = self._dataset(folder / "scored", lambda: self._score(number, policy, samples, folder))
        return self._metrics(number, folder, scored, None)

    # What is done

    def _claim(self) -> None:
        """Refuse a folder that another configuration has filled."""
        names = [field.name for field in dataclasses.fields(self.config) if field.name not in ("output_dir", "rounds")]
        settings = {name: getattr(self.config, name) for name in names}
        if not isinstance(settings["judge"], (str, dict)):
            settings["judge"] = type(settings["judge"]).__name__  # an object has no lasting name
        path = self.folder / "settings.json"
        text = json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n"
        if path.exists() and path.read_text() != text:
            old = json.loads(path.read_text())
            changed = sorted(name for name in settings if json.loads(text).get(name) != old.get(name))
            raise ValueError(
                f"{self.folder} holds rounds with other settings: {changed} differ. Choose another `output_dir`, remove that "
                "folder, or restore the settings. More `rounds` can be added any time."
            )
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            write_atomically(path, text)

    def _stage(self, target: Path, work: Callable[[], None]) -> None:
        """Do `work`, which fills `target`, unless that is done; half-finished results are removed first."""
        done = target.with_name(f"{target.name}.done")
        if done.exists():
            return
        self.state.wait_for_everyone()
        if self.state.is_main_process and target.exists():
            shutil.rmtree(target)
        self.state.wait_for_everyone()
        logger.info(f"{target.parent.name}: {target.name}", main_process_only=True)
        work()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            write_atomically(done, "")
        self.state.wait_for_everyone()

    def _dataset(self, target: Path, make: Callable[[], Dataset]) -> Dataset:
        def work() -> None:
            dataset = make()
            if self.state.is_main_process:
                dataset.save_to_disk(target)

        self._stage(target, work)
        return load_from_disk(target)

    # Stages

    def _policy(self, number: int) -> str:
        """Where the policy after round `number` lies."""
        if number == 0:
            return self.config.model
        folder = self.folder / f"round-{number}"
        extrapolated = folder / "policy"
        return str(extrapolated if extrapolated.exists() else folder / "model")

    def _sample(self, number: int, policy: str, folder: Path, prompts_of: int | None = None) -> Dataset:
        prompts, size = self.prompts.select_columns(self._kept), self.config.prompts_per_round
        if size is not None:
            start = ((prompts_of or number) - 1) * size
            prompts = prompts.select([index % len(prompts) for index in range(start, start + size)])
        return sample_completions(
            prompts,
            policy,
            self.config.n,
            seed=int(content_key(self.config.seed, number), 16) % 2**31,
            cache_dir=folder / "chunks",
            **self.config.sampling,
        )

    def _score(self, number: int, policy: str, samples: Dataset, folder: Path) -> Dataset:
        if self.config.judge == "implicit":
            before = self.config.implicit_reference if number == 1 else self._policy(number - 2)
            return implicit_rewards(samples, policy, before, **self.config.scoring)
        # An empty completion cannot be judged; it stays in `samples` and in the share that is logged
        judged = samples.map(_without_empty).filter(lambda row: len(row["completions"]) >= 2)
        if not len(judged):
            raise ValueError(f"Round {number}: no prompt has two completions with any text.")
        scoring = {"cache_dir": folder / "scores", **self.config.scoring}
        return score_preferences(judged, self.config.build_judge(), **scoring)

    def _pair(self, number: int, scored: Dataset) -> Dataset:
        config = self.config
        groups = drop_truncated(scored) if config.drop_truncated else scored
        shaped = {"length_penalty": 0.0}
        if config.length_shaping == "balance":
            groups, shaped["length_penalty"] = balance_lengths(groups)
        if self.state.is_main_process:
            write_atomically(self.folder / f"round-{number}" / "shaping.json", json.dumps(shaped))
        groups = groups.select_columns([*self._kept, "completions", "scores"])
        if config.pairing == "group":
            return groups
        pairs = from_groups(groups, config.pairing, f"round {number}")
        if config.min_margin:
            pairs = pairs.filter(lambda row: row["score_chosen"] - row["score_rejected"] >= config.min_margin)
            if not len(pairs):
                raise ValueError(f"Round {number}: no pair has a margin of `min_margin={config.min_margin}` or more.")
        if "inpo" in self.losses:
            for side in ("chosen", "rejected"):
                rows = list(zip(pairs["prompt"], pairs[side], strict=True))
                length = config.training.get("max_length", 1024)
                values = completion_log_probs(config.model, rows, max_length=length)
                pairs = pairs.add_column(f"initial_{side}_logps", values)
        if config.replay is not None:
            pairs = mix_replay(pairs, load_preferences(config.replay), config.replay_share, config.seed + number)
        return pairs

    def _training_arguments(self, folder: Path) -> DPOConfig:
        options = {"seed": self.config.seed, **self.config.training}
        if self.config.pairing == "group":
            options["pairing"] = "group"
        return DPOConfig(output_dir=str(folder), **options)

    def _train(self, folder: Path, policy: str, pairs: Dataset) -> None:
        args = self._training_arguments(folder / "train")
        dtype = args.model_init_kwargs or {}
        reference = self.config.model if self.config.reference == "keep" else policy
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(policy, **{"dtype": "float32", **dtype}),
            ref_model=AutoModelForCausalLM.from_pretrained(reference, **{"dtype": "float32", **dtype}),
            args=dataclasses.replace(args, model_init_kwargs=None) if dtype else args,
            train_dataset=pairs,
            processing_class=AutoTokenizer.from_pretrained(self.config.model),
        )
        checkpoints = sorted(
            (path for path in (folder / "train").glob("checkpoint-*") if (path / "trainer_state.json").exists()),
            key=lambda path: int(path.name.split("-")[1]),
        )
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
        trainer.save_model(str(folder / "model"))
        if self.state.is_main_process:
            write_atomically(folder / "log.json", json.dumps(trainer.state.log_history, indent=2) + "\n")

    def _extrapolate(self, folder: Path, before: Path) -> None:
        if self.state.is_main_process:
            extrapolate(folder / "model", before, self.config.extrapolation, folder / "policy")
            AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "policy")

    def _metrics(self, number: int, folder: Path, scored: Dataset, pairs: Dataset | None) -> dict[str, Any]:
        """What the policy that the round began with wrote, and what became of it; after the last round, the former."""
        samples = load_from_disk(folder / "samples")
        lengths = [text_length(completion) for row in samples["completions"] for completion in row]
        scores = [score for row in scored["scores"] for score in row]
        reasons = [reason for row in samples["stop_reasons"] for reason in row]
        metrics = {
            "round": number,
            "prompts": len(samples),
            "mean_score": sum(scores) / len(scores),
            "mean_length": sum(lengths) / len(lengths),
            "truncated": sum(reason != "stop" for reason in reasons) / len(reasons),
        }
        if pairs is not None:
            metrics |= {"pairs": len(pairs), **json.loads((folder / "shaping.json").read_text())}
        if pairs is not None and "chosen" in pairs.column_names:
            gaps = [text_length(row["chosen"]) - text_length(row["rejected"]) for row in pairs]
            metrics["length_gap"] = sum(gaps) / len(gaps)
        if self.state.is_main_process:
            write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        return metrics


def _without_empty(row: dict) -> dict:
    kept = [i for i, completion in enumerate(row["completions"]) if text_length(completion)]
    return {name: [row[name][i] for i in kept] for name in ("completions", "stop_reasons")}


def table(metrics: list[dict[str, Any]]):
    """The rounds as a rich table."""
    from rich.table import Table

    names = {
        "round": "round",
        "mean_score": "score",
        "mean_length": "length\ncharacters",
        "truncated": "truncated",
        "pairs": "pairs",
        "length_gap": "chosen longer\nby",
        "length_penalty": "length\npenalty",
    }
    shown = Table(title="What the policy wrote at the start of each round, and after the last")
    there = [name for name in names if any(row.get(name) is not None for row in metrics)]
    for name in there:
        shown.add_column(names[name], justify="right")
    for row in metrics:
        values = (row.get(name) for name in there)
        shown.add_row(*(f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v) for v in values))
    return shown
