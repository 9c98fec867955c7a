"""The empty-trace pair: rendered as a model with reasoning switched off sees it."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.conftest import build_tokenizer, preference_rows
from tests.helpers import build, first_batch, loss_and_gradients
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import EMPTY_TRACE, strip_reasoning_traces
from trl_ext.data.reasoning import answer_text, check_pairs, tokenize_empty_trace, trace_is_open
from trl_ext.data.sampling import render_prompt


# The ways of public templates: a switch; a trace that the generation prompt opens and conversations leave out (as
# DeepSeek-R1); no reasoning at all; an empty block that only the generation prompt has
SWITCH = None  # the fixture's own
OPENS = (
    "{%- for m in messages %}{{- '[' + m.role + ']' + m.content.split('</think>')[-1].lstrip() }}"
    "{%- if m.role == 'assistant' %}{{- '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[assistant]<think>\n' }}{%- endif %}"
)
PLAIN = (
    "{%- for m in messages %}{{- '[' + m.role + ']' + m.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"
)
DROPS = (
    "{%- for m in messages %}{{- '[' + m.role + ']' + m.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[assistant]' }}"
    "{%- if not enable_thinking | default(true) %}{{- '<think>\n</think>\n' }}{%- endif %}{%- endif %}"
)


def conversational(row):
    def message(text, role="assistant"):
        return [{"role": role, "content": text}]

    return {
        **row,
        "prompt": message(row["prompt"], "user"),
        **{key: message(row[key]) for key in ("chosen", "rejected", "chosen_empty_trace", "rejected_empty_trace")},
    }


def row(**changes):
    return {
        "prompt": [{"role": "user", "content": "what is it"}],
        "chosen_empty_trace": [{"role": "assistant", "content": "<b>good"}],
        "rejected_empty_trace": [{"role": "assistant", "content": "bad"}],
        "prompt_ids": [1, 2],
        "has_traces": True,
        **changes,
    }


@pytest.mark.parametrize(
    ("template", "prompt", "chosen"),
    [
        (
            SWITCH,
            "<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n" + EMPTY_TRACE,
            "<b>good<|im_end|>\n",
        ),
        (OPENS, "[user]what is it[assistant]" + EMPTY_TRACE, "<b>good<|im_end|>"),
        (PLAIN, "[user]what is it<|im_end|>[assistant]" + EMPTY_TRACE, "<b>good<|im_end|>"),
        (DROPS, "[user]what is it<|im_end|>[assistant]<think>\n</think>\n", "<b>good<|im_end|>"),
    ],
    ids=["switch", "opens", "plain", "drops"],
)
def test_templates(template, prompt, chosen, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = template or tokenizer.chat_template
    (ids,) = tokenize_empty_trace(row(), tokenizer)["further_pairs"]
    assert tokenizer.decode(ids["prompt_ids"]) == prompt
    assert tokenizer.decode(ids["chosen_ids"]) == chosen
    assert tokenizer.decode(ids["rejected_ids"]) == chosen.replace("<b>good", "bad")
    # What generation with reasoning switched off starts from
    if template in (SWITCH, DROPS):
        generation = tokenizer.apply_chat_template(
            row()["prompt"], add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        assert generation == prompt


def test_plain_text(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    (ids,) = tokenize_empty_trace(
        row(prompt="what is it", chosen_empty_trace=" good", rejected_empty_trace=" bad<|eos|>"), tokenizer
    )["further_pairs"]
    assert tokenizer.decode(ids["prompt_ids"]) == "what is it" + EMPTY_TRACE
    assert tokenizer.decode(ids["chosen_ids"]) == " good<|eos|>"
    assert tokenizer.decode(ids["rejected_ids"]) == " bad<|eos|>"


def test_tools_and_template_arguments_reach_the_template(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{{- tools[0].name ~ mood }}" + PLAIN
    given = row(tools='[{"name": "clock"}]', chat_template_kwargs={"mood": "!"})
    (ids,) = tokenize_empty_trace(given, tokenizer)["further_pairs"]
    assert tokenizer.decode(ids["prompt_ids"]).startswith("clock![user]")


def test_template_that_hides_the_completion(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{{- messages | length }}" + PLAIN.replace("m.content", "m.content | upper")
    with pytest.raises(ValueError, match="cannot be told apart"):
        tokenize_empty_trace(row(), tokenizer)


@pytest.mark.parametrize(
    ("text", "opened", "answer"),
    [
        ("good", False, "good"),
        ("<think>so</think>\n\ngood", False, "good"),
        ("<think>so</think> a </think> b", False, "a </think> b"),
        ("so</think> good", False, "good"),
        ("so</think> good", True, "good"),
        ("<think>so", False, ""),
        ("so it is", True, ""),  # cut: the prompt had opened the trace
    ],
)
def test_answer(text, opened, answer):
    assert answer_text(text, opened) == answer


@pytest.mark.parametrize("template", [SWITCH, OPENS, PLAIN, DROPS], ids=["switch", "opens", "plain", "drops"])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_which_prompts_leave_a_trace_open(template, thinking, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = template or tokenizer.chat_template
    prompt = render_prompt({"prompt": row()["prompt"]}, tokenizer, thinking)
    assert trace_is_open(prompt) == (template == OPENS and thinking is not False)


@pytest.mark.parametrize("form", ["plain", "conversational"])
@pytest.mark.parametrize("precompute", [False, True])
def test_rows_that_lack_a_pair(form, precompute, tiny_model_dir, tmp_path):
    """A row contributes the term it has: the loss is the sum of both terms over all rows, divided by their number."""
    rows = preference_rows(4)
    rows = [conversational(row) for row in rows] if form == "conversational" else rows
    rows[1].update(chosen_empty_trace=None, rejected_empty_trace=None)
    rows[2].update(chosen=None, rejected=None)

    def run(rows, loss_type="bias_variance", **overrides):
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, dataset=Dataset.from_list(rows),
            train_sampling_strategy="sequential", precompute_ref_log_probs=precompute, beta=0.5, **overrides,
        )  # fmt: skip
        for name, parameter in trainer.model.named_parameters():  # away from the reference, where all losses are ln 2
            if "q_proj" in name:
                parameter.data += 0.3
        return loss_and_gradients(trainer, first_batch(trainer))

    loss, gradients = run(rows)
    traced = [row for row in rows if row["chosen"] is not None]
    empty = [row for row in rows if row["chosen_empty_trace"] is not None]
    loss_t, gradients_t = run(traced, loss_kwargs={"alpha": 1.0})
    loss_e, gradients_e = run(empty, loss_kwargs={"alpha": 0.0})
    assert loss.item() == pytest.approx((0.5 * 3 * loss_t + 0.5 * 3 * loss_e).item() / 4, rel=1e-5)
    for name in gradients:
        expected = (1.5 * gradients_t[name] + 1.5 * gradients_e[name]) / 4
        assert (gradients[name] - expected).abs().max() < 1e-5 + 1e-4 * expected.abs().max(), name


def test_empty_pair_beyond_max_length_counts_as_missing(tiny_model_dir, tmp_path):
    rows = preference_rows(4)
    rows[0]["prompt"] = " good" * 20
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    length = len(tokenizer(rows[0]["prompt"])["input_ids"])
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="bias_variance", dataset=Dataset.from_list(rows),
        max_length=length + 3,
    )  # fmt: skip
    assert len(trainer.train_dataset) == 4
    trainer.train()
    assert trainer.state.log_history[0]["empty_trace/share"] == pytest.approx(0.75)


def test_prompts_beyond_max_length(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"All 4 prompts of the train dataset have `max_length=3` tokens or more"):
        build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="bias_variance", max_length=3,
            dataset=Dataset.from_list(preference_rows(4)),
        )  # fmt: skip


def test_tokens_of_both_pairs_are_counted(tiny_model_dir, tmp_path):
    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="bias_variance", max_steps=1)
    batch = next(iter(trainer.get_eval_dataloader()))  # the first four rows
    loss_and_gradients(trainer, batch)
    expected = 0
    for example in trainer.train_dataset.select(range(4)):
        for pair in (example, *example["further_pairs"]):
            expected += 2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])
    assert trainer._metrics["train"]["num_tokens"] == [expected]


@pytest.mark.parametrize("form", ["plain", "conversational"])
def test_strip_reasoning_traces(form):
    def completion(text):
        return text if form == "plain" else [{"role": "assistant", "content": text}]

    rows = [
        {"prompt": "p", "chosen": "<think>\na</think>\n\nb", "rejected": "a</think>c </think> d"},
        {"prompt": "p", "chosen": "<think>never closed", "rejected": "<think>x</think>y"},
    ]
    rows = [{side: completion(text) if side != "prompt" else text for side, text in row.items()} for row in rows]
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        first, second = list(strip_reasoning_traces(dataset))
        assert (first["chosen_empty_trace"], first["rejected_empty_trace"]) == (
            completion("b"),
            completion("c </think> d"),
        )
        assert (second["chosen_empty_trace"], second["rejected_empty_trace"]) == (None, None)
        assert first["chosen"] == rows[0]["chosen"]


def test_strip_reasoning_content():
    rows = [
        {
            "prompt": [{"role": "user", "content": "p"}],
            "chosen": [{"role": "assistant", "content": "b", "reasoning_content": "a"}],
            "rejected": [{"role": "assistant", "content": "c", "reasoning_content": "a"}],
        }
    ]
    (row,) = list(strip_reasoning_traces(Dataset.from_list(rows)))
    assert row["chosen_empty_trace"] == [{"role": "assistant", "content": "b", "reasoning_content": None}]


def test_only_the_last_message_is_stripped():
    call = {"role": "assistant", "content": "<think>first</think>call", "reasoning_content": None}
    last = {"role": "assistant", "content": "<think>second</think> end", "reasoning_content": "kept apart"}
    hidden = {"role": "assistant", "content": None, "reasoning_content": "all of it"}
    rows = Dataset.from_list([{"prompt": "p", "chosen": [call, last], "rejected": [hidden]}])
    (row,) = strip_reasoning_traces(rows)
    assert row["chosen_empty_trace"] == [call, {"role": "assistant", "content": "end", "reasoning_content": None}]
    assert row["rejected_empty_trace"] == [{"role": "assistant", "content": None, "reasoning_content": None}]


def test_rows_are_marked_and_filled():
    whole = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_empty_trace": "c", "rejected_empty_trace": "d"}
    assert check_pairs(whole, 0, "train") == {**whole, "has_traces": True}
    no_empty = {**whole, "chosen_empty_trace": None, "rejected_empty_trace": None}
    assert check_pairs(no_empty, 0, "train") == {**no_empty, "has_traces": True}
    untraced = {**whole, "chosen": None, "rejected": None}
    assert check_pairs(untraced, 0, "train") == {**whole, "chosen": "c", "rejected": "d", "has_traces": False}
    for side in ("chosen", "rejected"):
        mixed = {**whole, f"{side}_empty_trace": [{"role": "assistant", "content": "c"}]}
        with pytest.raises(
            ValueError, match=rf"Row 3 of the eval dataset: '{side}_empty_trace' is a list, '{side}' a str"
        ):
            check_pairs(mixed, 3, "eval")


def test_rows_without_a_pair_have_nothing_to_score():
    tokenizer = build_tokenizer()
    empty = {"chosen_empty_trace": None, "rejected_empty_trace": None}
    given = {"prompt": "p", "prompt_ids": [1, 2], **empty, "has_traces": True}
    assert tokenize_empty_trace(given, tokenizer) == {"further_pairs": []}
    given = row(prompt="what is it", chosen_empty_trace=" good", rejected_empty_trace=" bad", has_traces=False)
    ids = tokenize_empty_trace(given, tokenizer)
    assert ids["chosen_ids"] == ids["rejected_ids"] == [] and "prompt_ids" not in ids
    assert ids["further_pairs"] == [
        {
            "prompt_ids": tokenizer("what is it" + EMPTY_TRACE)["input_ids"],
            "chosen_ids": tokenizer(" good<|eos|>")["input_ids"],
            "rejected_ids": tokenizer(" bad<|eos|>")["input_ids"],
        }
    ]
