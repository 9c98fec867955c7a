"""The rounds: stages one after the other, each done once, whatever happens in between."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trl_ext.data.cache import content_seed, processes, write_atomically
from trl_ext.data.columns import takes_each_reward
from trl_ext.data.generators import check_dtype
from trl_ext.data.groups import from_groups
from trl_ext.data.rewards import JUDGES, read_columns
from trl_ext.data.sampling import check_prompts, sample_completions
from trl_ext.data.scores import check_columns, score_preferences
from trl_ext.rounds.checks import load_rows, refuse_unloadable_model
from trl_ext.rounds.config import RoundsConfig
from trl_ext.rounds.disk import claim
from trl_ext.rounds.extrapolate import extrapolate
from trl_ext.rounds.log_probs import implicit_rewards, load_model, pair_log_probs
from trl_ext.rounds.progress import Progress, paired, sampled, scored_of, trained_in
from trl_ext.rounds.rehearsal import made_up_groups, rehearse
from trl_ext.rounds.replay import TEMPLATE, load_replay, mix_replay
from trl_ext.rounds.report import round_metrics, round_table
from trl_ext.rounds.rewards import IMPLICIT, check_kinds, model_names
from trl_ext.rounds.shaping import balance_lengths, drop_truncated, without_empty
from trl_ext.rounds.trackers import LogRound, one_run
from trl_ext.trainers.arguments import explained, refuse_liger_without_gpu, refuse_missing_trackers
from trl_ext.trainers.checkpoints import last_whole
from trl_ext.trainers.dpo import DPOTrainer
from trl_ext.trainers.dpo_config import DPOConfig
from trl_ext.trainers.loss_types import build_losses, resolve_loss_types
from trl_ext.trainers.terms import check_reads


# What a round's pairs have beside the texts: from what scores, and from the first policy
SCORES = ("score_chosen", "score_rejected")
INITIAL = ("initial_chosen_logps", "initial_rejected_logps")


class IterativeDPO:
    """
    Rounds of sample, score, pair, train.

    Everything lies on disk under `output_dir/round-1`, `round-2`, ...: `samples`, `scored`, `pairs` (datasets), `train`
    (checkpoints), `model` (what was trained), `policy` (after extrapolation, where there is any) and `metrics.json`. A run that
    was killed goes on at the stage it was in; a stage that is done is not done again.

    Args:
        config ([`RoundsConfig`]):
            Settings.

    Raises:
        `ValueError`: For settings, prompts and data to replay that cannot be used, before anything is sampled.

    Example:

    ```python
    >>> from trl_ext.rounds import IterativeDPO, RoundsConfig

    >>> config = RoundsConfig(
    ...     model="Qwen/Qwen3-0.6B",
    ...     prompts="trl-lib/ultrafeedback-prompt",
    ...     reward_funcs="path/to/reward-model",
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
        # Refused now, not after the first sampling
        self.args = self._training_arguments(self.folder)
        unset_hf_deepspeed_config()  # ZeRO-3 is of training: what samples and scores is loaded whole in each process
        check_dtype((self.args.model_init_kwargs or {}).get("dtype", "auto"))
        self._check_losses()
        models = model_names(config.scorer)
        models += [("implicit reference", name) for name in [config.implicit_reference] if name is not None]
        for what, name in [("model", config.model), *models]:
            refuse_unloadable_model(name, what)
        check_kinds(config.scorer)
        self.prompts = self._load_prompts()
        self.tokenizer = AutoTokenizer.from_pretrained(config.model)
        if not isinstance(self.prompts[0]["prompt"], str) and self.tokenizer.chat_template is None:
            raise ValueError(
                f"`prompts={config.prompts!r}` holds conversations, and the tokenizer of {config.model!r} has no chat template. "
                "Use a model with one, or prompts of plain text."
            )
        self.replay = None
        if config.replay is not None:
            read = [name for name in SCORES if name in self._read]
            self.replay = load_replay(config.replay, self.prompts, read)
        made_up = self._pairs(made_up_groups(self.prompts), "a round")
        for name in INITIAL if "inpo" in self.losses else ():
            made_up = made_up.add_column(name, [-1.0] * len(made_up))
        rehearse(self.args, made_up, self.tokenizer, self._reads_reference)

    def _load_prompts(self) -> Dataset:
        prompts = load_rows(self.config.prompts, "prompts")
        if "prompt" not in prompts.column_names:
            raise ValueError(f"{self.config.prompts} has no column 'prompt'; its columns are {prompts.column_names}.")
        check_prompts(prompts)
        read = read_columns(self.config.scorer)
        check_columns(prompts, read)
        # The prompt, and what the chat template and rewards read beside it
        kept = dict.fromkeys(("prompt", *TEMPLATE, *read))
        return prompts.select_columns([name for name in kept if name in prompts.column_names])

    @property
    def _read(self) -> set[str]:
        """Columns that the losses of this run read."""
        return {name for loss in self.losses.values() for name in (*loss.required_columns, *loss.optional_columns)}

    @property
    def _reads_reference(self) -> bool:
        """Whether a loss of this run, TRL's own included, reads the reference."""
        return any(name not in self.losses or "ref_logps" in self.losses[name].reads for name in self.args.loss_type)

    def _check_losses(self) -> None:
        """Refuse losses that read what the rounds do not make, or what these rewards do not give."""
        config = self.config
        for name, loss in self.losses.items():
            missing = [column for column in loss.required_columns if column not in (*SCORES, *INITIAL)]
            if missing:
                raise ValueError(
                    f"The loss {name!r} needs {missing}, which rounds do not make; they make {(*SCORES, *INITIAL)}."
                )
            if "behaviour_logps" in loss.reads:
                raise ValueError(
                    f"The loss {name!r} reads log-probs under the policy that sampled the completions, which rounds do not keep. "
                    "Train it online: `trl_ext.OnlineDPOTrainer`."
                )
            if "teachers" in loss.reads:
                raise ValueError(
                    f"The loss {name!r} learns from a teacher and a reverse teacher, which rounds have not. Train it online, on what "
                    "the policy samples: `trl_ext.OnlineDPOTrainer`."
                )
        if config.reference == "keep" and not self._reads_reference:
            raise ValueError(
                f"`reference='keep'` would have no effect: none of the losses {list(self.losses)} reads a reference. Leave it out."
            )
        several = isinstance(config.reward_funcs, (list, tuple)) and len(config.reward_funcs) > 1
        if several and takes_each_reward(self.losses):
            raise ValueError(
                f"The losses {list(self.losses)} take each of several rewards, and rounds keep one score per completion. Give one that "
                'combines them, `reward_funcs={"mean": [...]}`, or train online: `trl_ext.OnlineDPOTrainer`.'
            )
        check_reads(self.losses, config.pairing == "group")
        if config.pairing == "group" and "inpo" in self.losses:
            raise ValueError('`inpo` is a loss on pairs: it has no meaning with `pairing="group"`.')
        target, of_group = (
            getattr(self.losses.get("sppo_soft"), "target", None),
            getattr(config.scorer, "scores", None),
        )
        if target is not None and of_group is not None and target != of_group:
            raise ValueError(
                f"`sppo_soft` has `target={target!r}`, and the preference model gives groups `scores={of_group!r}`: the two must be the "
                f"same. Give `judge={{preference_model: ..., scores: {target}}}` or `loss_kwargs={{target: {of_group}}}`."
            )
        win_rates = config.judge is not None and config.length_shaping is None
        if target == "win_rate" and not win_rates:
            raise ValueError(
                f"`sppo_soft` reads scores as win rates, in [0, 1], which `reward_funcs={config.reward_funcs!r}`, "
                f"`judge={config.judge!r}` and `length_shaping={config.length_shaping!r}` do not give. Give a judge of "
                "two, `judge='module:function'`, without length shaping; or take the scores as they are: `loss_kwargs={'target': 'score'}`."
            )

    def run(self) -> list[dict[str, Any]]:
        """All rounds; returns the metrics of each."""
        config = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        settings = {name: value for name, value in config.items() if name not in ("output_dir", "rounds")}
        claim(self.folder, settings)
        metrics = []
        for number in range(1, self.config.rounds + 1):
            folder = self.folder / f"round-{number}"
            policy = self._policy(number - 1)
            progress = Progress(f"round {number} of {self.config.rounds}")
            samples, scored = self._written(progress, number, policy, folder)
            pairs = progress.dataset(
                "pair", folder / "pairs", partial(self._pair, number, scored), paired, ["shaping.json"]
            )
            row = round_metrics(number, folder, samples, scored, pairs, self.config.scorer)
            metrics.append(row)
            if self.state.is_main_process:
                Console().print(round_table(row, f"What the policy wrote at the start of round {number}"))
            train = partial(self._train, folder, policy, pairs, row)
            progress.stage("train", folder / "model", train, trained_in(folder), ["log.json"])
            if self.config.extrapolation and number > 1:
                before = self.folder / f"round-{number - 1}" / "model"
                move = partial(self._extrapolate, folder, before)
                progress.stage("extrapolate", folder / "policy", move, lambda: f"by {self.config.extrapolation:g}")
        metrics.append(self._last())
        if self.state.is_main_process:
            write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        return metrics

    def _last(self) -> dict[str, Any]:
        """What the policy writes after the last round, on that round's prompts."""
        number, rounds = self.config.rounds + 1, self.config.rounds
        folder = self.folder / f"after-round-{rounds}"
        policy = self._policy(rounds)
        progress = Progress(f"after round {rounds}")
        samples, scored = self._written(progress, number, policy, folder, rounds)
        return round_metrics(number, folder, samples, scored, scorer=self.config.scorer)

    def _written(
        self, progress: Progress, number: int, policy: str, folder: Path, prompts_of: int | None = None
    ) -> tuple[Dataset, Dataset]:
        """What a policy writes, and the same with scores."""
        sample = partial(self._sample, number, policy, folder, prompts_of)
        samples = progress.dataset("sample", folder / "samples", sample, sampled)
        score = partial(self._score, number, policy, samples, folder)
        scored = progress.dataset("score", folder / "scored", score, scored_of(samples))
        return samples, scored

    # Stages

    def _policy(self, number: int) -> str:
        """Where the policy after round `number` lies."""
        if number == 0:
            return self.config.model
        folder = self.folder / f"round-{number}"
        extrapolated = folder / "policy"
        return str(extrapolated if extrapolated.exists() else folder / "model")

    def _sample(self, number: int, policy: str, folder: Path, prompts_of: int | None = None) -> Dataset:
        prompts, size = self.prompts, self.config.prompts_per_round
        if size is not None:
            start = ((prompts_of or number) - 1) * size
            prompts = prompts.select([index % len(prompts) for index in range(start, start + size)])
        return sample_completions(
            prompts,
            policy,
            self.config.num_generations,
            seed=content_seed(self.config.seed, number),
            cache_dir=folder / "chunks",
            **self.config.sampling,
        )

    def _score(self, number: int, policy: str, samples: Dataset, folder: Path) -> Dataset:
        scorer = self.config.scorer
        if scorer == IMPLICIT:
            before = self.config.implicit_reference if number == 1 else self._policy(number - 2)
            return implicit_rewards(samples, policy, before, self.tokenizer, self.args, **self.config.scoring)
        # An empty completion is not scored; it stays in `samples` and in the share that is logged
        judged = samples.map(without_empty).filter(lambda row: len(row["completions"]) >= 2)
        if not len(judged):
            raise ValueError(f"Round {number}: no prompt has two completions with any text.")
        given = {"judge" if isinstance(scorer, JUDGES) else "reward_funcs": scorer}
        return score_preferences(judged, **given, **{"cache_dir": folder / "scores", **self.config.scoring})

    def _pair(self, number: int, scored: Dataset) -> Dataset:
        config = self.config
        groups = drop_truncated(scored) if config.drop_truncated else scored
        shaped = {"length_penalty": 0.0}
        if config.length_shaping == "balance":
            groups, shaped["length_penalty"] = balance_lengths(groups)
        if self.state.is_main_process:
            write_atomically(self.folder / f"round-{number}" / "shaping.json", json.dumps(shaped))
        pairs = self._pairs(groups, f"round {number}")
        if config.pairing == "group":
            return pairs
        if config.min_margin:
            pairs = pairs.filter(lambda row: row["score_chosen"] - row["score_rejected"] >= config.min_margin)
            if not len(pairs):
                raise ValueError(f"Round {number}: no pair has a margin of `min_margin={config.min_margin}` or more.")
        if self.replay is not None:
            pairs = mix_replay(pairs, self.replay, config.replay_share, config.seed + number)
        if "inpo" in self.losses:
            values = pair_log_probs(config.model, pairs, self.tokenizer, self.args, ld_alpha=self.args.ld_alpha)
            for name, column in zip(INITIAL, zip(*values, strict=True), strict=True):
                pairs = pairs.add_column(name, list(column))
        return pairs

    def _pairs(self, groups: Dataset, split: str) -> Dataset:
        """What a round trains on; whole groups stay what they are."""
        groups = groups.select_columns([*self.prompts.column_names, "completions", "scores"])
        return groups if self.config.pairing == "group" else from_groups(groups, self.config.pairing, split)

    def _training_arguments(self, folder: Path, **named: str) -> DPOConfig:
        options = {"seed": self.config.seed, **self.config.training, **named}
        if self.config.pairing == "group":
            options["pairing"] = "group"
        try:
            args = DPOConfig(output_dir=str(folder), **options)
            get_reporting_integration_callbacks(args.report_to)
            refuse_missing_trackers(args.report_to)
            if args.use_liger_kernel:
                refuse_liger_without_gpu(args.use_cpu)
            return args
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"`training` cannot be used: {explained(error)}") from error

    def _train(self, folder: Path, policy: str, pairs: Dataset, metrics: dict[str, Any]) -> None:
        group = self.config.training.get("run_name") or self.folder.name
        name = f"{group}-round-{metrics['round']}"
        # trackio knows no groups, but projects
        project = self.config.training.get("project", group)
        args = self._training_arguments(folder / "train", run_name=name, project=project)
        with one_run(group, name):
            self._learn(folder, policy, pairs, args, metrics)
        unset_hf_deepspeed_config()

    def _learn(self, folder: Path, policy: str, pairs: Dataset, args: DPOConfig, metrics: dict[str, Any]) -> None:
        reference = self.config.model if self.config.reference == "keep" else policy
        trainer = DPOTrainer(
            model=load_model(policy, args),
            ref_model=load_model(reference, args) if self._reads_reference else None,
            args=dataclasses.replace(args, model_init_kwargs=None) if args.model_init_kwargs else args,
            train_dataset=pairs,
            processing_class=self.tokenizer,
        )
        trainer.add_callback(LogRound(trainer, metrics))
        trainer.train(resume_from_checkpoint=last_whole(folder / "train", warn=True))
        trainer.save_model(str(folder / "model"))
        if self.state.is_main_process:
            write_atomically(folder / "log.json", json.dumps(trainer.state.log_history, indent=2) + "\n")

    def _extrapolate(self, folder: Path, before: Path) -> None:
        if self.state.is_main_process:
            extrapolate(folder / "model", before, self.config.extrapolation, folder / "policy")
            AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "policy")
