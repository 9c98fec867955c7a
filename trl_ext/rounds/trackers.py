"""Where the trainings of rounds are logged to: one run for each round, under one name."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


@contextlib.contextmanager
def one_run(group: str, name: str) -> Iterator[None]:
    """
    While open, what transformers' callbacks log is a run of its own among those of a group.

    The name itself stands in the training arguments (`run_name`). W&B is told the group, and TensorBoard a folder per run where all
    would share one (`TENSORBOARD_LOGGING_DIR`); both by the environment, which is put back. W&B's callback leaves its run open, and
    the next round's would go on in it: it is closed, unless the caller had opened it.

    Args:
        group (`str`):
            What the rounds are called together. A `WANDB_RUN_GROUP` of the user's is kept.
        name (`str`):
            What this one is called.
    """
    wanted = {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", group)}
    if "TENSORBOARD_LOGGING_DIR" in os.environ:
        wanted["TENSORBOARD_LOGGING_DIR"] = os.path.join(os.environ["TENSORBOARD_LOGGING_DIR"], name)
    before = {key: os.environ.get(key) for key in wanted}
    theirs = _wandb_run()
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        if theirs is None and _wandb_run() is not None:
            sys.modules["wandb"].finish()


def _wandb_run() -> Any:
    """W&B's run that is open in this process; `None` where there is none, or where W&B has not been imported."""
    return getattr(sys.modules.get("wandb"), "run", None)


class LogRound(TrainerCallback):
    """
    Logs what the policy wrote before the training of a round, at step 0.

    Args:
        trainer ([`~transformers.Trainer`]):
            Whose log it goes to.
        metrics (`dict`):
            Those of the round; each is logged as `round/NAME`.
    """

    def __init__(self, trainer: Any, metrics: dict[str, Any]):
        self.trainer = trainer
        self.metrics = {f"round/{name}": float(value) for name, value in metrics.items() if name != "round"}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # a training that is resumed has it
            self.trainer.log(dict(self.metrics))
