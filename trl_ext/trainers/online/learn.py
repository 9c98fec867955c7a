"""The fourth step of online training: from what is preferred to a loss."""

import dataclasses
from typing import Any

import torch
from accelerate.utils import send_to_device

from trl_ext.data.columns import WEIGHT
from trl_ext.rows import from_batch, to_batch
from trl_ext.trainers.online.checks import check_rewards
from trl_ext.trainers.online.metrics import dropped_prompts, of_completions, of_learnt, without_comparisons
from trl_ext.trainers.online.selection import Selection, build_table
from trl_ext.trainers.teachers import with_divergences


class Learning:
    """How [`OnlineDPOTrainer`] learns."""

    def learn(self, model: torch.nn.Module, inputs: dict[str, Any], selections: list[Selection]) -> torch.Tensor:
        """
        Fourth step: the mean loss over the prompts of the batch; a prompt without a pair adds 0.

        Args:
            model (`torch.nn.Module`):
                The policy, wrapped or not.
            inputs (`dict[str, Any]`):
                A batch of the dataset: lists by column.
            selections (`list[Selection]`):
                One, or for `bias_variance` one with reasoning and one without.
        """
        terms, scorer = self._terms, self._scorer
        columns = {name: torch.tensor([float(value) for value in inputs[name]]) for name in self._data.columns}
        dropped = [dropped_prompts(selection) for selection in selections]
        if WEIGHT in columns:  # what does not count is not learnt from
            selections = [selection.only(columns[WEIGHT][selection.prompts] > 0) for selection in selections]
        rows, plan, places = build_table(
            selections, columns, self.max_length, self._tokenizer.pad_token_id, self._win_rates
        )
        for each in filter(None, (plan.columns, plan.empty_columns)):
            for name, loss in terms.losses.items():
                check_rewards(name, loss, each)
        if scorer.sharing is not None:
            layout = scorer.sharing.layout(rows.inputs, rows.completion_mask, rows.prompt)
            rows = dataclasses.replace(rows, layout=layout)
        rows, plan = from_batch(send_to_device(to_batch(rows, plan), self.accelerator.device))

        # The reference first: what the policy keeps for its backward is not in memory yet
        ref_token_logps = None
        if self._needs_reference:
            with torch.no_grad(), self._reference() as reference, self.accelerator.autocast():
                ref_token_logps = scorer(reference, rows, statistics=()).log_probs
        divergence = None if self._teachers is None else self._teachers.divergence(rows, plan)
        outputs = scorer(model, rows, statistics=(), divergence=divergence)
        scored = scorer.scored(rows, outputs.log_probs, ref_token_logps, terms.reads)
        if divergence is not None:
            scored = with_divergences(scored, outputs, rows)
        if "behaviour_logps" in terms.reads:  # the policy that has just sampled
            scored = dataclasses.replace(scored, behaviour_logps=scored.logps.detach())
        total, metrics, alone = terms.total(scored, plan, self.beta, self.model.training, self._over_processes)
        compared = bool(self.judge or self.reward_funcs)
        self._note(metrics if compared else without_comparisons(metrics), len(plan.pairs))
        self._note({"beta": self.beta})
        if len(terms.losses) > 1:
            self._note(alone, plan.count)
        for selection, place, lost, suffix in zip(selections, places, dropped, ("", "_empty_trace"), strict=False):
            values = of_completions(selection.completions, selection.scores) | {"pairs/dropped_prompts": lost}
            values |= of_learnt(selection, place, scored.logps, scored.ref_logps, self.beta)
            values = values if compared else without_comparisons(values)
            self._note({name + suffix: value for name, value in values.items()})
        if self.model.training:
            self._ties.count(learnt=any(bool((lost == 0).any()) for lost in dropped))
        # A batch without a pair still runs, so that all processes take part; it adds nothing
        return total + 0.0 * scored.logps.sum()
