"""What is logged: sums and counts, so that a mean is one over all rows of all micro-batches and processes since the last log."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from trl_ext.losses import PreferenceBatch
from trl_ext.losses.bias_variance import present


# By the end of a metric's name: what is kept of it in place of the mean
EXTREMES = {"min": (torch.amin, torch.minimum, min), "max": (torch.amax, torch.maximum, max)}


class Means:
    """
    Means by name, kept as sums and counts, on the device where they arise, until they are asked for.

    Of a metric whose name ends with `/min` or `/max`, the smallest or largest value is kept.
    """

    def __init__(self):
        self._sums: dict[tuple, torch.Tensor] = {}
        self._ends: dict[str, torch.Tensor] = {}

    def add(self, metrics: Mapping[str, float | torch.Tensor], rows: int = 1) -> None:
        """
        Take in the metrics of one micro-batch. The host does not wait for the device.

        Args:
            metrics (`dict[str, float | torch.Tensor]`):
                By name: a number or a tensor of shape `()`, which is a mean over `rows` rows already; or a tensor of one or more
                dimensions with one value per row, NaN where a row has none.
            rows (`int`, *optional*, defaults to `1`):
                How much a number counts.
        """
        alike: dict[tuple, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, value in metrics.items():
            precision = (
                torch.float32 if isinstance(value, torch.Tensor) and value.device.type == "mps" else torch.float64
            )
            value = torch.as_tensor(value, dtype=precision).detach()
            if name.rpartition("/")[2] in EXTREMES:
                self._keep_end(name, value)
            else:
                alike[value.device, value.shape][name] = value
        for (device, shape), values in alike.items():
            table = torch.stack(list(values.values())).reshape(len(values), -1)
            sums = torch.stack([table.nansum(dim=1), (~table.isnan()).sum(dim=1)], dim=1)
            sums = sums if shape else sums * rows
            key = (device, *values)
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def _keep_end(self, name: str, value: torch.Tensor) -> None:
        of_rows, of_two, _ = EXTREMES[name.rpartition("/")[2]]
        if not value.numel():
            return
        none = torch.inf if of_rows is torch.amin else -torch.inf
        value = of_rows(torch.where(value.isnan(), none, value))
        self._ends[name] = of_two(self._ends[name], value) if name in self._ends else value

    def over_processes(self) -> dict[str, float]:
        """
        The means over all processes, after which it is empty. Called in every process; one may lack a metric that another has.

        A metric of which no row has a value is left out.
        """
        sums: dict[str, list[float]] = {}
        for (_, *names), table in self._sums.items():
            for name, (total, count) in zip(names, table.tolist(), strict=True):
                before = sums.get(name, (0.0, 0.0))
                sums[name] = [before[0] + total, before[1] + count]
        mine = (sums, {name: value.item() for name, value in self._ends.items()})
        everyone = gather_object([mine]) if PartialState().num_processes > 1 else [mine]
        self.__init__()
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        ends: dict[str, float] = {}
        for their_sums, their_ends in everyone:
            for name, (total, count) in their_sums.items():
                totals[name] = [totals[name][0] + total, totals[name][1] + count]
            for name, value in their_ends.items():
                ends[name] = EXTREMES[name.rpartition("/")[2]][2](ends.get(name, value), value)
        means = {name: total / count for name, (total, count) in totals.items() if count}
        return means | {name: value for name, value in ends.items() if abs(value) != float("inf")}


def pair_metrics(batch: PreferenceBatch, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """
    Rewards and log-probabilities of pairs under the `names` that TRL's loss logs them by, in its order.

    One value per pair, NaN where a row has no traced pair: TRL's own are means over all rows.
    """
    logps = batch.chosen_logps.detach(), batch.rejected_logps.detach()
    rewards = logps
    if batch.ref_chosen_logps is not None:
        rewards = logps[0] - batch.ref_chosen_logps, logps[1] - batch.ref_rejected_logps
    chosen, rejected = (batch.beta * each for each in rewards)
    values = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, *logps)
    there = present(batch)
    return {name: value.masked_fill(~there, torch.nan) for name, value in zip(names, values, strict=True)}
