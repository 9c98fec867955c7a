"""What the offline and the online trainer do alike with their losses: log, save, resume, describe."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from transformers import Trainer

from trl_ext.rows import TABLE
from trl_ext.trainers.checkpoints import WholeCheckpoints
from trl_ext.trainers.finite import check_finite
from trl_ext.trainers.metrics import Means
from trl_ext.trainers.model_card import complete_model_card, describe_evaluation, describe_losses, describe_training
from trl_ext.trainers.reference import load_reference, save_reference
from trl_ext.trainers.terms import Terms


logger = get_logger(__name__)


class WithTerms(WholeCheckpoints):
    """Put in front of a trainer of TRL's. `_terms` are set when the trainer is built."""

    _terms: Terms

    def _keep_terms(self, terms: Terms, title: str) -> None:
        """Take the losses of the run, under which the model card and its tags name the model."""
        self._terms = terms
        self._means = {"train": Means(), "eval": Means()}
        self._due: dict[str, float] = {}
        for name, loss in terms.losses.items():
            if loss.evidence:
                logger.warning_once(f"How sure the formula of {name!r} is: {loss.evidence}")
        described = terms.described
        if described:
            first = next(iter(described.values()))
            self._name = title
            self._paper = {"title": first.title, "id": first.paper.split(",")[0], "citation": first.citation}
            self._tag_names = [*self._tag_names, "trl-ext", *described]

    def _prepare_inputs(self, inputs):
        # Under DeepSpeed transformers casts all numbers to the model's dtype, in which scores of 6.1 and 6.12 would be one
        inputs = dict(inputs)
        table = {TABLE: send_to_device(inputs.pop(TABLE), self.args.device)} if TABLE in inputs else {}
        return {**super()._prepare_inputs(inputs), **table}

    # Metrics

    def _note(self, metrics: dict[str, Any], rows: int = 1) -> None:
        self._means["train" if self.model.training else "eval"].add(metrics, rows)

    def _over_processes(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.accelerator.reduce(sums, reduction="sum")

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        check_finite(self, grad_norm)
        # Here and not in `log`, which a script may call in one process alone
        if self._terms.losses and (self.control.should_log or self.control.should_training_stop):
            self._due |= self._means["train"].over_processes()
        # transformers' own: that of TRL's online trainer rounds the loss, and divides by the number of its statistics
        return Trainer._maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The final log may follow an evaluation, which leaves the model in its mode
        if self.model.training or "train_runtime" in logs:
            logs.update(self._due)
            self._due = {}
        super().log(logs, start_time)
        if "train_runtime" in logs and self.is_world_process_zero():
            summary = self._terms.summary()
            if summary:
                print(summary)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        own = self._means["eval"].over_processes()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in own.items()})
        return output

    # Checkpoints

    def _save_own(self, folder: Path) -> None:
        super()._save_own(folder)
        if self.is_world_process_zero():
            self._terms.save(folder)
        if self._reference_moves:
            save_reference(self.accelerator.unwrap_model(self.ref_model), folder)

    def _load_optimizer_and_scheduler(self, checkpoint):  # DeepSpeed never calls `_load_from_checkpoint`
        if checkpoint is not None:
            self._terms.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._reference_moves:
            load_reference(self.accelerator.unwrap_model(self.ref_model), checkpoint)

    @property
    def _reference_moves(self) -> bool:
        """Whether a reference model of its own follows the policy; an adapter does so inside the model."""
        return self.args.sync_ref_model and self.ref_model is not None

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            terms = self._terms
            sections = [describe_losses(terms.all_weights, terms.losses, self.beta)] if terms.described else []
            sections += [describe_training(self, dataset_name), describe_evaluation(self.state.log_history)]
            complete_model_card(self.args.output_dir, self.model, sections)
