"""From logits to the next tokens, until each completion has ended."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList


# Rows that have finished leave once they are this part of the batch, as the cache of those that stay is copied each time. On a CPU
# one row to a quarter of them take about the same time (benchmarks/decoding.py); a device is not asked for every single row
SHARE = 1 / 16

# Entries of the vocabulary whose probabilities are added up to find the one that is drawn: about the root of most vocabularies
PART = 256

# Their rows do not depend on one another, and they keep nothing of a row from token to token
_WITHOUT_ROWS = tuple(
    getattr(transformers, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
)
# Tensors with a row for each completion that a model is called with; rows are the dimension before the last
_WITH_ROWS = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


class NoEndYet(LogitsProcessor):
    """
    transformers' `MinNewTokensLengthLogitsProcessor`, in place: that looks through the whole vocabulary at each token.

    Args:
        theirs (`MinNewTokensLengthLogitsProcessor`):
            Says until when no end is drawn, and which tokens are one.
    """

    def __init__(self, theirs: transformers.MinNewTokensLengthLogitsProcessor):
        self.length = theirs.prompt_length_to_skip + theirs.min_new_tokens
        self.ends = theirs.eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.size(1) >= self.length:
            return scores
        ends = self.ends.to(scores.device)
        return scores.index_fill_(1, ends[ends < scores.size(1)], -torch.inf)


class DrawToken(LogitsProcessor):
    """Draws each row's next token, as [`draw`] does, and leaves it as the only one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        points = torch.rand(scores.size(0), 1, dtype=torch.float64, device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, draw(scores, points), 0.0)


def draw(scores: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """
    Each row's next token.

    By inversion of the distribution function, which on a CPU costs a fraction of `torch.multinomial`: that draws a random
    number for each entry of the vocabulary. The function is added up over parts of the vocabulary, and then within one of them.

    Args:
        scores (`torch.Tensor` of shape `(N, V)`):
            Logits.
        points (`torch.Tensor` of shape `(N, 1)`):
            In [0, 1], float64: where in the distribution the token lies.

    Returns:
        `torch.Tensor` of shape `(N, 1)`.
    """
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    if weights.size(1) % PART:
        weights = nn.functional.pad(weights, (0, -weights.size(1) % PART))
    parts = weights.view(len(weights), -1, PART)
    until = parts.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    if until.device.type == "cpu" and not until[:, -1].isfinite().all():  # a GPU would have to be waited for
        raise ValueError(
            "The model's logits are not finite, so no token can be drawn: its weights may be NaN, or too large for the dtype they are in."
        )
    place, part = _above(until, points)
    within = parts.gather(1, part.unsqueeze(2).expand(-1, -1, PART)).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    return part * PART + _above(within, place)[1]


def _above(cumulated: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the first entry above a share of its total, never one that adds nothing; and where in that entry the share lies."""
    total = cumulated[:, -1:]
    points = torch.minimum(points * total, torch.nextafter(total, torch.zeros_like(total)))
    entry = torch.searchsorted(cumulated, points, right=True)
    before = torch.where(entry > 0, cumulated.gather(1, (entry - 1).clamp(min=0)), 0)
    return ((points - before) / (cumulated.gather(1, entry) - before)).clamp(0, 1), entry


def draw_on_cpu(model, input_ids, logits_processor=None, generation_config=None, **kwargs):
    """
    transformers' own loop with [`DrawToken`] in place of its draw.

    `generate` hands a loop that is not its own no `synced_gpus`, so [`sample`] does.
    """
    generation_config.do_sample = False  # a copy of the caller's
    logits_processor.append(DrawToken())
    return type(model)._sample(
        model, input_ids, logits_processor=logits_processor, generation_config=generation_config, **kwargs
    )


def decode(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    leave: bool,
    fill: int,
    **kwargs: Any,
) -> torch.Tensor:
    """
    transformers' loop, in which rows leave the batch when they have finished.

    On a CPU each token takes a random number for every row, those that have left included: what a row draws does not depend on
    when others finish.

    Where `synced_gpus`, a process whose rows have all finished goes on until those of all processes have, with whatever is left
    of its batch: the model and the logits processors run as often in each.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, kwargs:
            What `generate` hands to a loop.
        synced_gpus (`bool`):
            Whether all processes run the model together.
        leave (`bool`):
            Whether rows can be taken out of the model's cache.
        fill (`int`):
            Token that follows those of a completion that has finished.

    Returns:
        `torch.Tensor`: prompts and completions, in the order of `input_ids`.
    """
    leave = leave and _can_leave(logits_processor, kwargs)
    logits_processor = LogitsProcessorList(
        NoEndYet(each) if type(each) is transformers.MinNewTokensLengthLogitsProcessor else each
        for each in logits_processor
    )
    rows, device = input_ids.size(0), input_ids.device
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    places = torch.arange(rows, device=device)
    done: list[tuple[torch.Tensor, torch.Tensor]] = []  # places and tokens of rows that are not waited for any more
    ids, waiting = input_ids, rows
    outputs = model._prefill(ids, generation_config, kwargs)
    with model._optimize_model_for_decode():
        while model._has_unfinished_sequences(not waiting, synced_gpus, device):
            if outputs is None:
                inputs = model.prepare_inputs_for_generation(
                    ids, next_sequence_length=1 if kwargs["use_cache"] else None, **kwargs
                )
                outputs = model(**inputs, return_dict=True)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
            logits = outputs.logits
            # A copy of those of a prompt, which may be large, and are not kept
            scores = logits_processor(ids, logits[:, -1].to(torch.float32, copy=logits.size(1) > 1))
            outputs = logits = None
            if not waiting:  # for other processes alone
                ids = nn.functional.pad(ids, (0, 1), value=fill)
                continue
            tokens = _next_tokens(scores, generation_config.do_sample, places, rows).masked_fill(finished, fill)
            ids = torch.cat([ids, tokens.unsqueeze(1)], dim=1)
            finished = finished | stopping_criteria(ids, None)
            waiting = int((~finished).sum())
            if not waiting:
                done.append((places, ids))
            if leave and waiting <= (1 - SHARE) * len(ids):
                if waiting:
                    done.append((places[finished], ids[finished]))
                stay = (~finished).nonzero().flatten() if waiting else places.new_zeros(1)
                ids, places, finished = ids[stay], places[stay], finished[stay]
                _keep_rows(stay, logits_processor, kwargs)
    width = max(part.size(1) for _, part in done)
    result = ids.new_full((rows, width), fill)
    for part, tokens in done:
        result[part, : tokens.size(1)] = tokens
    return result


def _next_tokens(scores: torch.Tensor, do_sample: bool, places: torch.Tensor, rows: int) -> torch.Tensor:
    if not do_sample:
        return scores.argmax(dim=-1)
    if scores.device.type == "cpu":
        points = torch.rand(rows, 1, dtype=torch.float64)
        return draw(scores, points[places]).squeeze(1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


def _can_leave(processors: LogitsProcessorList, kwargs: dict[str, Any]) -> bool:
    tensors = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    return tensors <= {*_WITH_ROWS} and all(
        type(each) in _WITHOUT_ROWS
        or type(each) is transformers.RepetitionPenaltyLogitsProcessor
        or hasattr(each, "keep_rows")
        for each in processors
    )


def _keep_rows(stay: torch.Tensor, processors: LogitsProcessorList, kwargs: dict[str, Any]) -> None:
    """Take all other rows out of what the model and the processors remember."""
    kwargs["past_key_values"].batch_select_indices(stay)
    for name in _WITH_ROWS:
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name].index_select(-2, stay)
    for each in processors:
        if hasattr(each, "keep_rows"):
            each.keep_rows(stay)
        elif isinstance(getattr(each, "prompt_ignore_length", None), torch.Tensor):
            each.prompt_ignore_length = each.prompt_ignore_length.to(stay.device)[stay]
