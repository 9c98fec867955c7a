"""The table of all claims: CSV, Markdown and a plot."""

import csv
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from common import provenance, table, write

from trl_ext.metrics.intervals import student_interval

from .frame import Claim
from .judging import RULE, SEARCH, Row, end_kls, frontier, select


WIDTH = 3  # panels beside each other


class Report:
    """
    Rows of claims and the files that hold them.

    Args:
        folder (`Path`): Where the files go.
        label (`str`): Of the size: `quality_LABEL.csv`, `.md`, `.png`, and `_points.csv`.
        device (`str`): Where the runs were.
    """

    def __init__(self, folder: Path, label: str, device: str):
        self.folder, self.label, self.source = folder, label, provenance(device)
        self.before = {(row["claim"], row["measured"]): row for row in self._read()}
        self.rows: list[Row] = []
        self.claims: list[tuple[Claim, list[dict[str, Any]]]] = []
        self.ran: set[str] = set()

    def file(self, suffix: str) -> Path:
        return self.folder / f"quality_{self.label}{suffix}"

    def _read(self) -> list[dict[str, str]]:
        if not self.file(".csv").exists():
            return []
        with open(self.file(".csv"), newline="") as file:
            return list(csv.DictReader(file))

    def add(self, claim: Claim, results: list[dict[str, Any]], ran: bool = True) -> None:
        """Judge a claim by its results; each run that failed is a row too."""
        self.claims.append((claim, results))
        self.ran |= {claim.name} if ran else set()
        missing = len(claim.runs()) - len(results)
        for row in claim.rows(results):
            note = "; ".join(
                filter(None, [row.note, f"{missing} of {len(claim.runs())} runs are missing" if missing else ""])
            )
            self.rows.append(dataclasses.replace(row, note=note))
        for result in results:
            if "error" in result:
                what = " ".join(
                    filter(
                        None,
                        [result["condition"], result["side"], f"setting {result['setting']}, seed {result['seed']}"],
                    )
                )
                self.rows.append(Row(claim.name, f"run: {what}", *[math.nan] * 4, "failed", result["error"]))

    def write(self) -> None:
        """All files, a table on the screen, and what became of the figures that stood there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Rows of claims that have no run here stay as they are
        known = {claim.name for claim, _ in self.claims}
        kept = [row for row in self.before.values() if row["claim"] not in known]
        write(kept + [{**cells(row), **self.source} for row in self.rows], self.file(".csv"), say=False)
        points = [
            {**{key: result[key] for key in ("claim", "condition", "side", "setting", "seed")}, **point}
            for _, results in self.claims
            for result in results
            for point in result.get("points", [])
        ]
        if points:
            write(
                [{key: rounded(value) for key, value in point.items()} for point in points],
                self.file("_points.csv"),
                say=False,
            )
        write_text(self.file(".md"), self.markdown(kept))
        plot(self.claims, self.file(".png"))
        # The column `notes` is the one that is wrapped
        shown = [
            {
                "claim": row.claim,
                "notes": row.measured,
                "effect": figure(row.effect),
                "interval": span(row),
                "verdict": row.verdict,
            }
            for row in self.rows
        ]
        columns = {"claim": "claim", "notes": "measured", "effect": "effect", "interval": "95 %", "verdict": "verdict"}
        table(shown, columns, f"Claims ({self.label})")
        for line in self.reproduced():
            print(line)
        print(
            f"In {self.folder}: {', '.join(sorted(path.name for path in self.folder.glob(f'quality_{self.label}*')))}"
        )

    def reproduced(self) -> list[str]:
        """For each row of the claims that ran: whether its figure lies in the interval that stood there."""
        lines = []
        for row in self.rows:
            old = self.before.get((row.claim, row.measured))
            if (
                row.claim not in self.ran
                or old is None
                or row.verdict == "failed"
                or not math.isfinite(float(old["low"] or "nan"))
            ):
                continue
            inside = float(old["low"]) <= row.effect <= float(old["high"])
            where = "inside" if inside else "OUTSIDE"
            lines.append(
                f"{row.claim}: {row.measured}: {row.effect:.3g}, {where} the interval that stood there, [{float(old['low']):.3g}, "
                f"{float(old['high']):.3g}]"
            )
        return lines

    def markdown(self, kept: list[dict[str, str]]) -> str:
        head = "| claim | what was measured | effect | 95 % interval | verdict | |\n| --- | --- | --- | --- | --- | --- |\n"
        lines = [
            f"| {row.claim} | {row.measured} | {figure(row.effect)} | {span(row)} | {row.verdict} | {row.note.replace('|', '/')} |\n"
            for row in self.rows
        ]
        lines += [
            f"| {row['claim']} | {row['measured']} | {row['effect']} | [{row['low']}, {row['high']}] | {row['verdict']} | {row['note']} |\n"
            for row in kept
        ]
        claimed = "".join(
            f"- `{claim.name}` ({claim.paper}). {claim.text} {len(claim.runs())} runs.\n" for claim, _ in self.claims
        )
        seconds = sum(result["cpu_seconds"] for _, results in self.claims for result in results)
        remarks = self.file("_remarks.md")
        missing = sum(len(claim.runs()) - len(results) for claim, results in self.claims)
        total = sum(len(claim.runs()) for claim, _ in self.claims)
        parts = [
            f"# Claims of papers as experiments ({self.label})\n\n"
            + (f"**Incomplete: {missing} of {total} runs have not been done yet.**\n\n" if missing else "")
            + f"{WORLDS[self.label]}\n\n`python benchmarks/quality.py"
            f"{' --quick' if self.label == 'quick' else ''}` makes this report; `--claim NAME` one claim of it. All runs together took "
            f"{seconds / 60:.0f} minutes of one core.\n",
            f"{RULE} Smallest effects: 0.1 logits of true reward, 1 token, 0.02 of exploitability and of reliability, 0.3 of rank "
            f"correlation, 0.05 of a share.\n\n{SEARCH}\n",
            head + "".join(lines),
            f"![reward against KL](quality_{self.label}.png)\n\nThe frontier of each loss, a mean over seeds and its 95 % interval.\n",
            f"## What is claimed\n\n{claimed}",
            remarks.read_text() if remarks.exists() else "",
            f"Measured with {', '.join(f'{key} {value}' for key, value in self.source.items() if value not in ('-', 'measured'))}.\n",
        ]
        return "\n".join(filter(None, parts))


WORLDS = {
    "toy": "In the demonstration's world: short film reviews, a true reward in [-3, 3] logits that their words decide, a language model of three "
    "layers. Completions are the policy's own, KL is to the start, in nats per completion. Effects in a world this small need not be those "
    "of a large model.",
    "quick": "A look at whether everything works: two seeds and a third of the work. **No evidence.**",
    "real": "A model and prompts of the user's; the reward that is called true is a reward model or function of theirs.",
}


def cells(row: Row) -> dict[str, Any]:
    return {key: rounded(value) for key, value in dataclasses.asdict(row).items()}


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def span(row: Row) -> str:
    return "" if math.isnan(row.low) else f"[{figure(row.low)}, {figure(row.high)}]"


def write_text(path: Path, text: str) -> None:
    Path(f"{path}.part").write_text(text)
    os.replace(f"{path}.part", path)


def plot(claims: list[tuple[Claim, list[dict[str, Any]]]], path: Path) -> None:
    """A panel for each claim and condition: what each loss reaches at each KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(claim, condition, results) for claim, results in claims for condition in claim.conditions if results]
    if not panels:
        return
    height = math.ceil(len(panels) / WIDTH)
    figure, grid = plt.subplots(height, WIDTH, figsize=(5 * WIDTH, 3.6 * height), layout="constrained", squeeze=False)
    for axes, (claim, condition, results) in zip(grid.flat, panels, strict=False):
        for side in claim.sides:
            paths = select(
                results, lambda each, s=side, c=condition: each["side"] == s.name and each["condition"] == c
            )
            line = line_of(paths, claim.drawn)
            if line:
                kls, means, lows, highs = zip(*line, strict=True)
                axes.plot(kls, means, marker="o", markersize=3, label=side.name)
                axes.fill_between(kls, lows, highs, alpha=0.15)
        axes.set_title(" ".join(filter(None, [claim.name, f"({condition})" if condition else ""])), fontsize=10)
        axes.set_xlabel("KL to the start (nats per completion)")
        axes.set_ylabel({"reward": "true reward (logits)", "length": "length (tokens)"}.get(claim.drawn, claim.drawn))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
            # Of an interval that is much wider than what the losses differ by, a part is shown
            values = [value for line in axes.lines for value in line.get_ydata()]
            room = 0.6 * (max(values) - min(values)) + 1e-3
            axes.set_ylim(min(values) - room, max(values) + room)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def line_of(paths: dict, metric: str) -> list[tuple[float, float, float, float]]:
    """KL, mean and interval over seeds along the frontier of a loss, up to where the furthest of its settings ends."""
    seeds = sorted(set.intersection(*(set(each) for each in paths.values()))) if paths else []
    if not seeds:
        return []
    top = max(end_kls(paths))
    kls = [share * top for share in (0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)]
    read = frontier(paths, seeds, kls, metric)
    line = []
    for at, kl in enumerate(kls):
        mean, low, high = student_interval([values[at] for values in read.values()])
        # One seed has no interval
        line.append((kl, mean, *((low, high) if len(seeds) > 1 else (mean, mean))))
    return line
