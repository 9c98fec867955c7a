"""What is logged: means over the rows of all processes."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator


EXTREMES = {"min": torch.amin, "max": torch.amax}


def means_over_processes(accelerator: Accelerator, metrics: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """
    The mean of each metric over the rows of all processes, with one gather and one transfer for all of them.

    Sums and counts are added up over processes before they are divided, so that processes with fewer rows count less. Of a
    metric whose name ends with `/min` or `/max`, the smallest or largest value is taken.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
        metrics (`dict[str, float | torch.Tensor]`):
            By name, the same names on all processes: a number or a scalar tensor, which is one value per process; or a tensor
            of shape `(B,)`, one value per row, NaN where a row has none.

    Returns:
        `dict[str, float]`: the means (smallest, largest values); a metric for which no row of any process has a value is left out.
    """
    if not metrics:
        return {}
    extremes = [EXTREMES.get(name.rpartition("/")[2]) for name in metrics]
    rows = []
    for extreme, value in zip(extremes, metrics.values(), strict=True):
        value = torch.as_tensor(value, dtype=torch.float32, device=accelerator.device).detach().flatten()
        value = extreme(value, dim=0, keepdim=True) if extreme else value
        rows.append(torch.stack([value.nansum(), (~value.isnan()).sum()]))
    gathered = accelerator.gather(torch.stack(rows).unsqueeze(0)).cpu()
    values = {}
    for name, extreme, (totals, counts) in zip(metrics, extremes, gathered.permute(1, 2, 0), strict=True):
        if counts.any():
            total = extreme(totals[counts > 0]) if extreme else totals.sum() / counts.sum()
            values[name] = total.item()
    return values
