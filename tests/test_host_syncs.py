"""A training step of ours does not make the host wait for the device: nothing is read back that the next line needs."""

import traceback
from collections import Counter

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch


class Waits(TorchDispatchMode):
    """Counts, by the file of this package that asks, operations for whose result the host has to wait."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        masks = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if by_mask or any(
            part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
        ):
            files = [frame.filename for frame in traceback.extract_stack()]
            last = [file for file in files if "/torch/" not in file and not file.endswith("test_host_syncs.py")][-1]
            if "/trl_ext/" in last:
                self.found[last.rpartition("/trl_ext/")[2]] += 1
        return operation(*args, **(kwargs or {}))


def weighted(rows=8):
    return Dataset.from_list([{**row, "weight": 0.5} for row in preference_rows(rows)])


# Offset and its like look at their values on a CPU, where nobody waits
@pytest.mark.parametrize(
    ("share_prefix", "loss_type"),
    [
        (True, ["bias_variance", "length_regularized", "sigmoid"]),
        (False, ["bias_variance", "length_regularized", "sigmoid"]),
        (True, ["alpha_dpo", "beta_dpo", "robust_em"]),
        (True, ["dmpo"]),
    ],
)
def test_a_step_waits_for_nothing(share_prefix, loss_type, tiny_model_dir, tmp_path):
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=weighted(), share_prefix=share_prefix,
        loss_type=loss_type, logging_steps=100,
    )  # fmt: skip
    inputs = first_batch(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs).backward()  # the first batch is scored both ways
    with Waits() as waits:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert not waits.found


def test_what_waits_is_seen():
    with Waits() as waits:
        trl_ext.get_loss("offset")(
            trl_ext.PreferenceBatch(
                *torch.zeros(6, 2), columns={"score_chosen": torch.ones(2), "score_rejected": torch.zeros(2)}
            )
        )
    assert waits.found == {"losses/offset.py": 1} or waits.found == {"losses/base.py": 1}
