"""What a claim is: data, sides, runs, rows. One file per claim derives from [`Claim`]."""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset

from .judging import Row, compare, row, select, unmeasured
from .worlds import World


@dataclass(frozen=True)
class Side:
    """A loss that is compared, with its settings: arguments of `DPOConfig`. All sides of a claim have the same number of them."""

    name: str
    settings: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """One training: the unit that is done once and written at once."""

    claim: str
    condition: str
    side: str
    setting: int
    seed: int

    @property
    def key(self) -> str:
        parts = [self.condition, self.side, f"setting {self.setting}", f"seed {self.seed}"]
        return "-".join(part.replace(" ", "_") for part in parts if part)


@dataclass(frozen=True)
class Scale:
    """How large the experiments are. `None` leaves what the claim says."""

    name: str = "toy"
    seeds: int | None = None
    settings: int | None = None
    work: float = 1.0  # share of training steps and of data
    samples: int = 256  # completions for each point
    fine_tuning: int = 300  # steps of the toy start

    def resized(self, name: str, work: float) -> "Scale":
        return dataclasses.replace(self, name=name, work=work)

    def count(self, number: int) -> int:
        """A number of steps or rows at this size, at least 2."""
        return max(2, round(number * self.work))


SCALES = {"toy": Scale(), "quick": Scale("quick", seeds=2, settings=2, work=0.35, samples=96, fine_tuning=200)}


class Claim:
    """
    A paper's claim as an experiment. What a claim states about itself are class attributes; `data` and, where a default will not
    do, `execute` and `rows` are its own.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    text: ClassVar[str]
    conditions: ClassVar[tuple[str, ...]] = ("",)
    sides: ClassVar[tuple[Side, ...]]
    seeds: ClassVar[int] = 6
    steps: ClassVar[int] = 40
    batch: ClassVar[int] = 16
    smallest: ClassVar[float] = 0.1  # of an effect in reward, logits
    drawn: ClassVar[str] = "reward"  # against KL
    toy_only: ClassVar[bool] = False  # whether it needs what only the demonstration's world has

    def __init__(self, scale: Scale):
        self.scale = scale
        numbers = {side.name: len(side.settings) for side in self.sides}
        if len(set(numbers.values())) > 1:
            raise ValueError(f"{self.name}: the sides have different numbers of settings, {numbers}: unequal search.")

    def runs(self) -> list[Run]:
        """All runs, seeds outermost: what is there when time runs out is whole seeds."""
        seeds = min(self.seeds, self.scale.seeds or self.seeds)
        return [
            Run(self.name, condition, side.name, setting, seed)
            for seed in range(seeds)
            for condition in self.conditions
            for side in self.sides
            for setting in range(len(side.settings))[: self.scale.settings]
        ]

    def settings(self, run: Run) -> dict[str, Any]:
        return next((side.settings[run.setting] for side in self.sides if side.name == run.side), {})

    def gently(self, world: World, run: Run) -> dict[str, Any]:
        """The settings with two thirds of the world's learning rate: each round warms up anew, and its warm-ups add up."""
        return {**self.settings(run), "learning_rate": 2 / 3 * world.training["learning_rate"]}

    def described(self, run: Run) -> Any:
        """What is written beside a run's result: where it differs, the run is done anew."""
        return [self.settings(run), self.steps, self.batch]

    def data(self, world: World, run: Run) -> Dataset:
        raise NotImplementedError

    def execute(self, world: World, run: Run) -> dict[str, Any]:
        """Train once and measure on the way: `points`, and what else the claim reads."""
        steps = self.scale.count(self.steps)
        return {"points": world.train(self.data(world, run), self.settings(run), run.seed, steps, self.batch).points}

    def rows(self, results: list[dict[str, Any]]) -> list[Row]:
        """Ours, the first side, against each other side at equal KL."""
        ours, *others = [side.name for side in self.sides]
        return [self.against(results, condition, ours, other) for condition in self.conditions for other in others]

    def against(
        self,
        results: list[dict[str, Any]],
        condition: str,
        ours: str,
        theirs: str,
        metric: str = "reward",
        what: str = "true reward",
        smallest: float | None = None,
    ) -> Row:
        """The row of one comparison at equal KL; of `length`, shorter is better."""
        saved = what.endswith("saved")
        measured = f"{what} by {ours} beside {theirs}, at equal KL" if saved else f"{what}, {ours} less {theirs}"
        measured += f" ({condition})" if condition else ""
        paths = [
            select(results, lambda each, side=side: each["side"] == side and each["condition"] == condition)
            for side in (ours, theirs)
        ]
        try:
            values, kls, means = compare(*paths, metric)
        except ValueError as error:
            return unmeasured(self.name, measured, f"not measured: {error}")
        a, b = (statistics.fmean(mean[side] for mean in means) for side in ("ours", "theirs"))
        if saved and metric == "reward":  # of what is low where the reward is high
            a, b = -a, -b
        note = f"{a:.3g} and {b:.3g}, at KL {', '.join(f'{kl:.2g}' for kl in kls)}; {len(values)} seeds"
        if metric == "length":
            values = [-value for value in values]
        return row(self.name, measured, values, self.smallest if smallest is None else smallest, note)
