"""Log-probabilities outside a trainer are those that the trainer gives to a reference model."""

import contextlib
import copy

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import options
from trl_ext.rounds import log_probs
from trl_ext.rounds.log_probs import implicit_rewards, pair_log_probs


TOOLS_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>tools ' + (tools | tojson) + '<|im_end|>' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + ' ' + message.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if style is defined %}{{- style }}{%- endif %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant ' }}{%- endif %}"
)


def texts(rows):
    return Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])


def conversations(rows):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    tools = [{"type": "function", "function": {"name": "look_up", "description": "the story", "parameters": {}}}]
    return Dataset.from_list(
        [
            {
                **{name: [{"role": role, "content": row[name]}] for name, role in roles.items()},
                "tools": str(tools).replace("'", '"'),
                "chat_template_kwargs": {"style": " funny"},
            }
            for row in rows
        ]
    )


def with_bos(tokenizer):
    """A tokenizer that puts `<|im_start|>` before plain text, as those of Llama put their own first token."""
    tokenizer = copy.deepcopy(tokenizer)
    first = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[first])
    return tokenizer


def of_the_trainer(model_dir, tokenizer, data, args):
    """Reference log-probs of each pair by the trainer's own method, on the batches of its own collator."""
    models = [AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) for _ in range(2)]
    trainer = trl_ext.DPOTrainer(
        model=models[0], ref_model=models[1], args=args, train_dataset=data, processing_class=tokenizer
    )
    values = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        with trainer.compute_loss_context_manager():
            values.append(tuple(t.item() for t in trainer.compute_ref_log_probs(trainer.ref_model, batch)))
    return values


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"max_length": 9},
        {"max_length": 9, "truncation_mode": "keep_end"},
        {"logprob_backend": "trl"},
        {"bf16": True},
        {"share_prefix": False},
        {"ld_alpha": 0.5},
    ],
    ids=lambda change: "-".join(map(str, change)) or "plain",
)
@pytest.mark.parametrize("form", ["text", "text-bos", "chat"])
def test_equal_to_the_trainers_reference(form, change, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    # Rows whose prompt fills `max_length` are not trained on
    rows = [row for row in preference_rows(30) if len(tokenizer(row["prompt"])["input_ids"]) < 7][:3]
    if form == "chat":
        tokenizer.chat_template = TOOLS_TEMPLATE
        change = {**change, **({"max_length": 130} if "max_length" in change else {})}
    if form == "text-bos":
        tokenizer = with_bos(tokenizer)
    data = conversations(rows) if form == "chat" else texts(rows)
    args = trl_ext.DPOConfig(**options(tmp_path, **change))
    expected = of_the_trainer(tiny_model_dir, tokenizer, data, args)
    assert len(expected) == len(rows)
    size = 1 if args.bf16 else 2  # padding changes the last digits, which in bfloat16 are large
    given = pair_log_probs(str(tiny_model_dir), data, tokenizer, args, batch_size=size, ld_alpha=args.ld_alpha)
    for ours, theirs in zip(given, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_by_hand(tiny_model_dir, tmp_path):
    """Completions of plain text end with the end-of-sequence token, which is counted; longest first is undone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = [
        {"prompt": "what", "chosen": " a film", "rejected": " bad"},
        {"prompt": "how so", "chosen": " good and very dull story", "rejected": " it was slow<|eos|>"},
        {"prompt": "i", "chosen": " saw", "rejected": " saw that scene"},
    ]
    args = trl_ext.DPOConfig(**options(tmp_path))
    given = pair_log_probs(str(tiny_model_dir), Dataset.from_list(rows), tokenizer, args, batch_size=2)
    for row, values in zip(rows, given, strict=True):
        start = len(tokenizer(row["prompt"])["input_ids"])
        for side, value in zip(("chosen", "rejected"), values, strict=True):
            text = row["prompt"] + row[side].removesuffix("<|eos|>") + "<|eos|>"
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            assert value == pytest.approx(logps.gather(1, ids[0, start:, None]).sum().item(), abs=1e-3)


def test_truncation_keeps_the_beginning_or_the_end(tiny_model_dir, tmp_path):
    """Seven tokens, two of them the prompt's, cut to four: two of the completion are left, or four, the first without context."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    ids = tokenizer("what a film was good<|eos|>")["input_ids"]
    assert len(ids) == 7 and len(tokenizer("what")["input_ids"]) == 2
    data = Dataset.from_list([{"prompt": "what", "chosen": " a film was good", "rejected": " a film was good"}])

    def summed(part, first):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([part])).logits[0].log_softmax(-1)
        return sum(logps[at - 1, part[at]].item() for at in range(first, len(part)))

    for mode, expected in (("keep_start", summed(ids[:4], 2)), ("keep_end", summed(ids[-4:], 1))):
        args = trl_ext.DPOConfig(**options(tmp_path, max_length=4, truncation_mode=mode))
        ((value, other),) = pair_log_probs(str(tiny_model_dir), data, tokenizer, args)
        assert value == pytest.approx(expected, abs=1e-4) and other == value


def test_a_prompt_that_leaves_no_room_keeps_its_place(tiny_model_dir, tmp_path):
    """Training leaves such a row out; here nothing of its completions is scored, and the rows after it are not moved."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    long = {"prompt": "what a very long review was this", "chosen": " good", "rejected": " bad"}
    rows = Dataset.from_list([long, {"prompt": "i", "chosen": " saw", "rejected": " saw it"}])
    args = trl_ext.DPOConfig(**options(tmp_path, max_length=5))
    first, second = pair_log_probs(str(tiny_model_dir), rows, tokenizer, args)
    alone = pair_log_probs(str(tiny_model_dir), rows.select([1]), tokenizer, args)
    assert first == (0.0, 0.0) and second == pytest.approx(alone[0], abs=1e-4) and max(second) < 0


def test_weights_are_loaded_as_for_training(tiny_model_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        log_probs.AutoModelForCausalLM, "from_pretrained", lambda name, **options: seen.append((name, options))
    )
    log_probs.load_model("x", trl_ext.DPOConfig(**options(tmp_path)))
    log_probs.load_model("y", trl_ext.DPOConfig(**options(tmp_path, model_init_kwargs={"dtype": "bfloat16"})))
    assert seen == [("x", {"dtype": "float32"}), ("y", {"dtype": "bfloat16"})]


@pytest.mark.parametrize(
    ("bf16", "fp16", "enabled"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_the_precision_is_that_of_the_training(bf16, fp16, enabled, tiny_model_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch, "autocast", lambda *args, **options: asked.append((*args, options)) or contextlib.nullcontext()
    )
    args = trl_ext.DPOConfig(**options(tmp_path))
    args.bf16, args.fp16 = bf16, fp16
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    pair_log_probs(str(tiny_model_dir), texts(preference_rows(1)), tokenizer, args)
    assert asked[0] == ("cpu", torch.bfloat16 if bf16 else torch.float16, {"enabled": enabled})


@pytest.mark.parametrize("count", [2, 3])
def test_implicit_rewards(count, tiny_model_dir, tmp_path, monkeypatch):
    """log policy - log reference, for each completion in its own place."""
    known = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0, "e": 16.0, "f": 32.0}
    asked = []

    def fake(name, pairs, *rest, **options):
        asked.append((name, pairs.column_names, rest))
        return [
            tuple((3 if name == "policy" else 1) * known[row[side]] for side in ("chosen", "rejected"))
            for row in pairs
        ]

    monkeypatch.setattr(log_probs, "pair_log_probs", fake)
    beside = {"tools": "[]", "chat_template_kwargs": {"mood": "!"}, "scores": [0.0] * count, "other": 1}
    rows = [{"prompt": "p", "completions": list("abc"[:count]), **beside},
            {"prompt": "q", "completions": list("def"[:count]), **beside}]  # fmt: skip
    scored = implicit_rewards(Dataset.from_list(rows), "policy", "reference", "tokenizer", "args", 5)
    assert scored["scores"] == [[2.0, 4.0, 8.0][:count], [16.0, 32.0, 64.0][:count]]
    columns = ["prompt", "tools", "chat_template_kwargs", "chosen", "rejected"]
    assert asked == [(name, columns, ("tokenizer", "args", 5)) for name in ("policy", "reference")]


def test_work_is_shared_among_processes(tiny_model_dir, tmp_path, monkeypatch):
    """Each of two processes scores half of the rows, and both have all of them in their order."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    args = trl_ext.DPOConfig(**options(tmp_path))
    data = texts(preference_rows(5))
    whole = pair_log_probs(str(tiny_model_dir), data, tokenizer, args)

    class Process:
        num_processes, device, is_main_process = 2, torch.device("cpu"), False

        def __init__(self, index):
            self.process_index = index

    parts = []
    monkeypatch.setattr(log_probs, "gather_object", lambda mine: parts.extend(mine) or [*parts])
    placed, real = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args: placed.append(args) or real(self, *args))
    for index in (0, 1):
        monkeypatch.setattr(log_probs, "processes", lambda index=index: Process(index))
        try:
            shared = pair_log_probs(str(tiny_model_dir), data, tokenizer, args)
        except KeyError:
            assert index == 0  # its other half comes from the second one
    assert [len(part) for part in parts] == [3, 2]
    assert placed == [(Process.device,)] * 2  # the model, where the process computes
    assert shared == [pytest.approx(values, abs=1e-4) for values in whole]
