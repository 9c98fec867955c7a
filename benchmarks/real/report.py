"""One row per loss and set of pairs: a table on the screen, CSV and Markdown."""

import statistics
from pathlib import Path
from typing import Any

from common import provenance, table, write

from trl_ext import list_losses
from trl_ext.data.cache import write_atomically
from trl_ext.metrics.intervals import student_interval

from .data import SOURCES, key_of, prepared
from .losses import DERIVED, LEARNING_RATES, LEFT_OUT, SIDES, described
from .runner import SEARCH_SEED, Place


# What has an interval over seeds, and how many digits are shown
MEASURES = {
    "accuracy": "accuracy",
    "accuracy_sums": "by sums",
    "score_correlation": "with scores",
    "length_correlation": "with length",
    "longer_preferred": "longer preferred",
    "calibration_error": "calibration error",
    "overconfidence": "overconfidence",
    "chosen_logratio": "chosen, nats",
}
OVER_PAIRS = ("accuracy_pairs_low", "accuracy_pairs_high")

EXPLAINED = {
    "accuracy": "share of held-out pairs of which the chosen text has the higher reward (`preference_accuracy`; a tie is a half), and the 95 % interval of "
    "Student's t over seeds. The reward is the log-ratio to the start times `beta`, per token for the losses that learn so (`/t`)",
    "over pairs": "Wilson's interval, mean over seeds: how sure the accuracy is with so few held-out pairs. Losses that lie within it cannot be told apart",
    "by sums": "the same share by log-ratios summed over tokens, for all losses alike",
    "with scores": "Pearson's correlation of the reward's margin with the gap of the given scores, over held-out pairs",
    "with length": "the same with the gap of lengths in tokens (`length_bias`)",
    "longer preferred": "share of pairs in which the longer text has the higher reward",
    "calibration error": "expected calibration error of `sigmoid(margin)` (`calibration_error`); biased upwards with few pairs. Rewards are in each loss's own "
    "unit, which for most losses is no logit",
    "overconfidence": "mean of `sigmoid(|margin|)` less accuracy",
    "chosen, nats": "by how much the log-prob of chosen texts has changed: below 0, they have become less likely",
}


def with_others(place: Place, about: dict[str, dict[str, Any]], data: Path) -> tuple[Place, dict[str, dict[str, Any]]]:
    """The same place with what lies there of losses and sets of pairs that were not asked for: they stay in the report."""
    about = dict(about)
    for name, source in SOURCES.items():
        if name not in about and all((data / name / file).is_file() for file in (source.train, source.test)):
            known = prepared(place.start(name), key_of(source, data, place.size))
            about |= {name: known} if known else {}
    keys = {name: about[name]["key"] for name in SOURCES if name in about}
    everything = Place(place.folder, place.size, keys, list(SIDES))
    ran = {run.loss for run in everything.results}
    losses = [loss for loss in SIDES if loss in place.losses or loss in ran]
    return Place(place.folder, place.size, keys, losses), about


def row_of(place: Place, data: str, loss: str) -> dict[str, Any]:
    """What the seeds of a loss say together; where there is nothing, why."""
    searched, final = place.searched(data, loss), place.final(data, loss)
    failures = [f"{run.split}, setting {run.setting}, seed {run.seed}: {place.results[run]['error']}"
                for run in searched + final if "error" in place.results.get(run, {})]  # fmt: skip
    done = [place.results[run] for run in final if run in place.results and "error" not in place.results[run]]
    missing = sum(run not in place.results for run in searched) + (
        0 if place.failed(data, loss) else place.size.seeds - sum(run in place.results for run in final)
    )
    state = "ok" if done and not missing and not failures else "part" if done else "failed" if failures else "not run"
    setting = place.chosen(data, loss)
    notes = [f"{missing} {'run is' if missing == 1 else 'runs are'} missing"] if missing else []
    row = {
        "data": data,
        "loss": loss,
        "rewards": "per token" if SIDES[loss].per_token else "sums",
        "state": state,
        "setting": "" if setting is None else described(SIDES[loss].settings()[setting]),
        "seeds": len(done),
    }
    for name in MEASURES:
        values = [result[name] for result in done if result[name] is not None]
        mean, low, high = student_interval(values) if values else (None, None, None)
        bounds = (low, high) if len(values) > 1 else (None, None)
        row |= {name: mean, **{f"{name}_{end}": bound for end, bound in zip(("low", "high"), bounds, strict=True)}}
    row |= {name: statistics.fmean(result[name] for result in done) if done else None for name in OVER_PAIRS}
    validated = [place.results[run].get("accuracy") for run in searched if run in place.results]
    row |= {
        "validation_accuracy": " ".join("-" if value is None else f"{value:.3f}" for value in validated),
        "seconds_per_run": statistics.fmean(result["seconds"] for result in done) if done else None,
        "cpu_seconds_per_run": statistics.fmean(result["cpu_seconds"] for result in done) if done else None,
        "note": "; ".join(failures + notes),
    }
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def source() -> dict[str, str]:
    return {key: value for key, value in provenance("cpu").items() if value != "-"}


def write_all(place: Place, about: dict[str, dict[str, Any]], folder: Path, load: str) -> list[dict[str, Any]]:
    """All files and the table on the screen; returns the rows."""
    rows = [row_of(place, data, loss) for data in place.keys for loss in place.losses]
    name = f"real_data_{place.size.name}"
    size = {"steps": place.size.steps, "batch": place.size.batch}
    write([{**row, **size, "machine": load, **source()} for row in rows], folder / f"{name}.csv", say=False)
    runs = [
        {"data": run.data, "loss": run.loss, "split": run.split, "setting": described(place.setting(run)), "seed": run.seed, **result}
        for run, result in sorted(place.results.items(), key=lambda each: (each[0].data, each[0].loss, each[0].seed, each[0].setting))
    ]  # fmt: skip
    if runs:
        write([{key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in run.items()} for run in runs],
              folder / f"{name}_runs.csv", say=False)  # fmt: skip
    write_atomically(folder / f"{name}.md", markdown(place, about, rows, load))
    show(rows, f"Losses on real pairs ({place.size.name})")
    print(f"In {folder}: {name}.csv, {name}_runs.csv, {name}.md")
    return rows


def figure(row: dict[str, Any], name: str) -> str:
    """A mean and how far its interval reaches to either side."""
    if row[name] is None:
        return ""
    digits = 1 if name == "chosen_logratio" else 3
    reach = "" if row[f"{name}_low"] is None else f" ± {row[f'{name}_high'] - row[name]:.{digits}f}"
    return f"{row[name]:.{digits}f}{reach}"


def line(row: dict[str, Any]) -> dict[str, str]:
    """A row as the report shows it."""
    low, high = (row[name] for name in OVER_PAIRS)
    figures = {heading: figure(row, name) for name, heading in MEASURES.items()}
    accuracy = figures.pop("accuracy")
    return {
        "loss": row["loss"] + (" /t" if row["rewards"] == "per token" else ""),
        "setting": row["setting"],
        "seeds": str(row["seeds"]),
        "accuracy": accuracy,
        "over pairs": "" if low is None else f"[{low:.2f}, {high:.2f}]",
        **figures,
        "s": "" if row["seconds_per_run"] is None else f"{row['seconds_per_run']:.1f}",
        "note": (f"{row['state'].upper()}: " if row["state"] != "ok" else "") + row["note"],
    }


def show(rows: list[dict[str, Any]], title: str) -> None:
    """In a terminal: what fits."""
    there = ("loss", "accuracy", "over pairs", "with scores", "with length", "calibration error", "s")
    lines = []
    for row in rows:
        shown = line(row)
        # The column `notes` is the one that is wrapped
        lines.append(
            {
                "data": row["data"].split("_")[0],
                **{key: shown[key] for key in there},
                "notes": shown["note"][:80] or None,
            }
        )
    columns = {"data": "data", **{key: key for key in there}, "notes": "notes"}
    table(lines, columns, title)


def markdown(place: Place, about: dict[str, dict[str, Any]], rows: list[dict[str, Any]], load: str) -> str:
    size, parts = place.size, []
    finished, minutes = len(place.results), sum(result["cpu_seconds"] for result in place.results.values()) / 60
    parts.append(
        f"# Losses on real pairs ({size.name})\n\n"
        + ("A look at whether everything works. **No evidence.**\n\n" if size.name == "quick" else "")
        + f"`python benchmarks/real_data.py{' --quick' if size.name == 'quick' else ''}` makes this report. {finished} of {place.total()} runs, "
        f"{minutes:.0f} minutes of one core; {load}. One thread per run, so seconds (`s`, of a run, on the wall) are no measure of speed.\n\n"
        f"Each run begins from the same small model of its data, and takes {size.steps} steps of {size.batch} pairs; a seed is an order of "
        "pairs, the same for every loss. Every loss has four settings, two of `beta` (or what stands in its place) and the learning rates "
        f"{' and '.join(f'{rate:g}' for rate in LEARNING_RATES)}; the one with the best accuracy on validation pairs (seed {SEARCH_SEED}), which are cut off the training pairs by "
        f"prompt, is run with {size.seeds} other seeds and measured on the test pairs. Everything else has the default of the package. A model this "
        "small, from scratch, on a few hundred pairs of which it sees the last "
        f"{size.prompt_tokens} tokens of the prompt and the first {size.completion_tokens} of each text: what is seen here says that the losses learn, and how they differ in length and calibration. It does not "
        "rank them for a large model. Seeds share one start and one test set, so intervals over them say nothing of other data: for that see "
        "`over pairs`.\n"
    )
    for data in place.keys:
        known = about[data]
        pairs = known["pairs"]
        parts.append(
            f"## {data}\n\n{pairs['train']} training, {pairs['validation']} validation and {pairs['test']} test pairs; the longer text is the chosen one in "
            f"{known['longer_chosen']:.0%} of the test pairs. A model of {known['parameters']:,} parameters, {known['pretraining_loss']:.2f} nats per token at the "
            f"end of its pre-training. Logits are scores divided by {known['temperature']:.3g} ({known['nll']:.2f} nats per training pair).\n"
        )
        found = [(SIDES[loss], place.chosen(data, loss)) for loss in place.losses]
        rates = [side.settings()[setting]["learning_rate"] for side, setting in found if setting is not None]
        if rates:
            edge = f"{rates.count(max(LEARNING_RATES))} of {len(rates)} losses did best on validation pairs with the larger learning rate"
            parts.append(f"{edge}: the grid is small, and what lies beyond it was not tried.\n")
        lines = [line(row) for row in rows if row["data"] == data]
        cells = [list(lines[0]), ["---"] * len(lines[0]), *(list(each.values()) for each in lines)]
        parts.append("".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in cells))
    parts.append("## What is measured\n\n" + "".join(f"- `{name}`: {text}.\n" for name, text in EXPLAINED.items()))
    parts.append("## Derived columns\n\n" + "".join(f"- `{name}`: {text}\n" for name, text in DERIVED.items()))
    parts.append(
        "## Left out\n\n" + "".join(f"- `{name}`: {text}.\n" for name, text in LEFT_OUT.items())
        + f"- Of TRL's losses all but {', '.join(f'`{name}`' for name in SIDES if name not in list_losses())}.\n"
    )  # fmt: skip
    parts.append(
        f"Measured with {', '.join(f'{key} {value}' for key, value in source().items() if value != 'measured')}.\n"
    )
    return "\n".join(parts)
