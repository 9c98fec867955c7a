"""Evaluation of an online run: generation on the evaluation prompts, and a comparison with the reference's own completions."""

import torch

from trl_ext.generation import Completions
from trl_ext.trainers.online.rewards import Scores, call_judge


class Evaluation:
    """How [`OnlineDPOTrainer`] evaluates."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """
        Generates on the evaluation prompts. Beside the loss and the metrics of training, each with the prefix `eval_`:
        `eval_win_rate`, the share of the policy's completions that are better than the reference's own (ties are half), where
        the losses have a reference.

        The same seed each time, so that two evaluations differ by the policy alone and training is not disturbed.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._data.evaluation(eval_dataset)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _compare_with_reference(self, model, inputs, completions: Completions, scores: Scores, thinking: bool) -> None:
        if completions.vision is not None:
            return
        suffix = "" if thinking else "_empty_trace"
        baseline = self.generate(model, inputs, thinking, reference=True)
        prompts = completions.prompts
        k = len(completions.ids) // len(prompts)
        if self.judge is not None:
            templates = self._judge_templates(inputs)
            wins = call_judge(
                self.judge,
                prompts * k,
                completions.texts,
                baseline.texts * k,
                None if templates is None else templates * k,
            )
        else:
            theirs = self.score(inputs, baseline)
            difference = scores.values - theirs.values
            wins = ((difference > 0) + 0.5 * (difference == 0))[scores.mask & theirs.mask]
            self._note({f"reference/scores{suffix}": theirs.values[theirs.mask]})
        lengths = torch.tensor([float(len(row)) for row in baseline.ids])
        self._note({f"win_rate{suffix}": wins.float(), f"reference/mean_length{suffix}": lengths})
