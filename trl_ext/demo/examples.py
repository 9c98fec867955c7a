"""What policies write before and after training: the same prompts, the same random numbers."""

import textwrap
from typing import Any

from rich.table import Table
from rich.text import Text

from trl_ext.demo import world
from trl_ext.demo.judging import Judged


# Of a text, characters in the table; results.json has all of them
LONGEST = 150
# Losses in the table
MOST = 6


def table(judged: Judged, runs: list[dict[str, Any]]) -> Table:
    """The examples of the first seed, whose models are saved: for each prompt the start's completion, and that of each loss."""
    seed, known = judged.seeds[0], judged.metric == "reward"
    examples = {run["loss"]: run["examples"] for run in runs if (run["data"], run["seed"]) == (judged.data, seed)}
    names = _shown(judged)
    shown = Table(title=f"Before and after training, seed {seed}: the same random numbers for each prompt")
    shown.add_column("loss", no_wrap=True)
    if known:
        shown.add_column("reward", justify="right", no_wrap=True)
    shown.add_column("completion")
    if len(names) < len(judged.rows):
        shown.caption = (
            f"{judged.baseline}, and those {MOST - 1} other losses of {len(judged.rows) - 1} that end highest"
        )
    for number, example in enumerate(examples[names[0]]):
        shown.add_section()
        shown.add_row("prompt", *[""] * known, _cell(example["prompt"]), style="bold")
        texts = {"start": example["before"], **{name: examples[name][number]["after"] for name in names}}
        for name, text in texts.items():
            reward = [f"{world.reward(text):.2f}"] if known else []
            shown.add_row(name, *reward, _cell(text))
    return shown


def _shown(judged: Judged) -> list[str]:
    """All losses in their order; where there are many, the baseline and those that end highest."""
    ranked = sorted(judged.rows, key=lambda row: (row["loss"] != judged.baseline, -row["end"].mean))
    best = {row["loss"] for row in ranked[:MOST]}
    return [row["loss"] for row in judged.rows if row["loss"] in best]


def _cell(text: str) -> Text:
    return Text(textwrap.shorten(text, LONGEST, placeholder=" ..."))
