"""What is logged: means over the rows of all processes."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator


EXTREMES = {"min": min, "max": max}


def means_over_processes(accelerator: Accelerator, metrics: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """
    The mean of each metric over the rows of all processes, with one gather and one transfer for all of them.

    Sums and counts are added up over processes before they are divided, so that processes with fewer rows count less. Of a
    metric whose name ends with `/min` or `/max`, a number per process, the smallest or largest is taken.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
        metrics (`dict[str, float | torch.Tensor]`):
            By name, the same names on all processes: a number or a scalar tensor, which is one value per process; or a tensor
            of shape `(B,)`, one value per row, NaN where a row has none.

    Returns:
        `dict[str, float]`: the means; a metric for which no row of any process has a value is left out.
    """
    if not metrics:
        return {}
    rows = []
    for value in metrics.values():
        value = torch.as_tensor(value, dtype=torch.float32, device=accelerator.device).detach().flatten()
        rows.append(torch.stack([value.nansum(), (~value.isnan()).sum()]))
    gathered = accelerator.gather(torch.stack(rows).unsqueeze(0))
    means = {}
    for name, (totals, counts) in zip(metrics, gathered.permute(1, 2, 0).tolist(), strict=True):
        extreme = EXTREMES.get(name.rpartition("/")[2])
        if extreme:
            means[name] = extreme(totals)
        elif sum(counts):
            means[name] = sum(totals) / sum(counts)
    return means
