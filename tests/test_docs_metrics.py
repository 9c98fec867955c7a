"""The page on metrics: short runs of each trainer log what stands there, and nothing stands there that none of them logs."""

import re
from collections import defaultdict
from pathlib import Path
from unittest import mock

from datasets import Dataset

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import OUR_LOSSES, build, options
from tests.online.runs import Scripted, length_reward, online, prompts
from trl_ext.metrics import MetricsCallback
from trl_ext.trainers.reward import RewardConfig, RewardTrainer
from trl_ext.trainers.terms import Terms


PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
PAIRS = ("prompt", "chosen", "rejected")
ONCE = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
# What no run below logs, and why
NOT_HERE = {"aux_loss": "the tiny model is no mixture of experts"}


def tables() -> dict[str, list[list[str]]]:
    """By heading, the cells of the rows of the table under it."""
    found = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("| ")]
        found[heading.replace("`", "")] = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]
    return found


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def length_of_first(asked, first, second):
    return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


# Each run, and the tables in which what it logs has to stand


def pairs(model_dir, folder):
    rows = [{**row, "weight": 0.5 + index / 4} for index, row in enumerate(preference_rows(4))]
    losses = ["sigmoid", *OUR_LOSSES]
    return build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, folder, dataset=Dataset.from_list(rows), loss_type=losses, **ONCE
    )  # fmt: skip


def lists(model_dir, folder):
    rows = [{**row, "score_chosen": [1.0, 2.0], "score_rejected": [0.5, 0.0]} for row in preference_rows(4)]
    data = Dataset.from_list(rows)
    return build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, folder, dataset=data, loss_type="e_dpo", max_steps=1
    )


def groups(model_dir, folder):
    rows = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], row["chosen_empty_trace"]],
            "scores": [2.0, 0.0, 1.0],
            "behaviour_logps": [-30.0, -20.0, -10.0],
        }
        for row in preference_rows(4)
    ]
    return build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, folder, dataset=Dataset.from_list(rows), max_steps=1,
        loss_type=["trpa", "drpo", "aligndistil", "anchored"],
        trainer_kwargs={"teacher_model": str(model_dir), "reverse_model": build_folder(model_dir, folder)},
    )  # fmt: skip


def build_folder(model_dir, folder):
    """The same model under another name: two teachers of one name are refused."""
    link = folder / "reverse"
    link.symlink_to(model_dir)
    return str(link)


def measured_alpha(model_dir, folder):
    kwargs = {"loss_type": "bias_variance", "loss_kwargs": {"alpha": "auto"}}
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, folder, rows=4, max_steps=1, **kwargs)


def sampled(model_dir, folder):
    return online(
        model_dir, folder, cls=Scripted, loss_type=["bias_variance", "sigmoid"], num_iterations=2,
        trainer_kwargs={"eval_dataset": prompts(4)}, **{**ONCE, "max_steps": 2},
    )  # fmt: skip


def rewarded(model_dir, folder):
    data = Dataset.from_list([{name: row[name] for name in PAIRS} for row in preference_rows(4)])
    args = RewardConfig(**options(folder, **ONCE))
    return RewardTrainer(str(model_dir), args, train_dataset=data, eval_dataset=data)


def fine_tuned(model_dir, folder):
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(4)])
    return build(trl_ext.SFTTrainer, trl_ext.SFTConfig, model_dir, folder, dataset=data, **ONCE)


def held_out(model_dir, folder):
    trainer = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, folder, rows=4, **ONCE)
    names = ["kl_to_reference", "mean_reward", "mean_length", "ended_share", "win_rate", "length_controlled_win_rate"]
    names += ["preference_accuracy", "calibration_error", "length_bias"]
    data = Dataset.from_list([{name: row[name] for name in PAIRS} for row in preference_rows(4)])
    callback = MetricsCallback(
        trainer, names, prompts(8), data, reward_funcs=length_reward, judge=length_of_first, max_new_tokens=6
    )
    trainer.add_callback(callback)
    return trainer


COMMON, PREFERENCES = ["Of every run", "Of tokens"], ["Of every run", "Of tokens", "Of pairs"]
RUNS = {
    pairs: [*PREFERENCES, "Of each loss"],
    lists: [*PREFERENCES, "Of each loss"],
    groups: [*PREFERENCES, "Of each loss"],
    measured_alpha: [*PREFERENCES, "Of each loss"],
    sampled: ["Of every run", "Of pairs", "Online", "Of each loss"],
    rewarded: ["Of every run", "RewardTrainer"],
    fine_tuned: COMMON,
    held_out: [*PREFERENCES, "MetricsCallback"],
}


def forms(key: str, losses: list[str]) -> set[str]:
    """A key and what it is without what the page says may stand before or behind it."""
    found = {key, key.removeprefix("eval_")}
    found |= {re.sub("_(low|high|empty_trace)$", "", each) for each in found}
    return found | {re.sub(f"^({'|'.join(losses)})/", "", each) for each in found}


def test_each_key_stands_on_the_page(tiny_model_dir, tmp_path, subtests):
    page, used, of_losses, losses = tables(), set(), defaultdict(set), trl_ext.list_losses()
    given = Terms._metrics

    def noted(self, name, *args):
        found = given(self, name, *args)
        of_losses[name] |= set(found)
        return found

    for run, headings in RUNS.items():
        keys = [key for heading in headings for row in page[heading] for key in words(row[0])]
        patterns = {key: re.escape(key).replace("NAME", "[^/]+") for key in keys}
        folder = tmp_path / run.__name__
        folder.mkdir()
        trainer = run(tiny_model_dir, folder)
        with mock.patch.object(Terms, "_metrics", noted):
            if trainer.args.eval_strategy == "steps":
                trainer.evaluate()  # before training too
            trainer.train()
        logged = {key for entry in trainer.state.log_history for key in entry} - {"step"}
        unknown = set()
        for key in logged:
            written = forms(key, losses)
            rows = {name for name, pattern in patterns.items() if any(re.fullmatch(pattern, each) for each in written)}
            used |= rows
            unknown |= set() if rows else {key}
        with subtests.test(run.__name__):
            assert not unknown
    stands = {key for rows in page.values() for row in rows for key in words(row[0])}
    with subtests.test("nothing more"):
        assert stands - used == set(NOT_HERE)
    with subtests.test("each loss"):
        shown = defaultdict(set)
        for row in page["Of each loss"]:
            for name in words(row[1]):
                shown[name] |= set(words(row[0]))
        assert shown == {name: keys for name, keys in of_losses.items() if keys}


def test_each_key_has_one_row():
    for heading, rows in tables().items():
        assert rows and all(len(row) == (6 if heading == "Of each loss" else 5) for row in rows), heading
        keys = [key for row in rows for key in words(row[0])]
        assert len(keys) == len(set(keys)), heading
        assert all(row[1] or row[-3] for row in rows), heading
