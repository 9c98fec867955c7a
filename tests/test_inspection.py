"""What `trl-ext inspect` says of a dataset."""

import io
import json
import re
import sys

import pytest
import rich.console
import trl
from datasets import Dataset, DatasetDict
from datasets.utils import logging
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.conftest import build_tokenizer, preference_rows
from tests.helpers import options
from trl_ext import list_losses
from trl_ext.cli import main
from trl_ext.data import inspect_preferences, load_preferences
from trl_ext.data.inspection import Inspection
from trl_ext.data.load import _columns
from trl_ext.data.tokens import pair_lengths


def pairs(**columns):
    rows = [
        {"prompt": "p", "chosen": "a b c", "rejected": "a b", **columns},
        {"prompt": "p", "chosen": "a b", "rejected": "a b c", **columns},
        {"prompt": "q", "chosen": "a b c d", "rejected": "a", **columns},
        {"prompt": "q", "chosen": "a b c d", "rejected": "a", **columns},
    ]
    return Dataset.from_list(rows)


def test_facts():
    facts = inspect_preferences(pairs()).facts
    assert facts["the longer answer wins"] == "3 of 4 (75.0%)"
    assert facts["duplicate pairs"] == "1 of 4 (25.0%)"
    assert facts["pairs there in both orders"] == "2 of 4 (50.0%)"
    assert facts["prompts, each once"] == "2"


def test_losses_and_why_not():
    report = inspect_preferences(pairs())
    assert report.losses["length_regularized"] == "" and report.losses["anchored"] == ""
    assert "needs the column 'score_chosen'" in report.losses["offset"]
    assert set(report.losses) == {*list_losses(), "sigmoid and TRL's others"}
    scored = inspect_preferences(pairs(score_chosen=1.0, score_rejected=2.0))
    assert "4 of 4 pairs" in scored.losses["offset"] and scored.losses["margin_adaptive"] == ""
    assert scored.facts["scores contradict the label"] == "4 of 4 (100.0%)"


def messages(row):
    message = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return {side: message("user" if side == "prompt" else "assistant", text) for side, text in row.items()}


@pytest.mark.parametrize("form", ["text", "conversational"])
def test_tokens_are_counted_as_training_counts_them(form, tiny_model_dir, tmp_path):
    """Against the rows that TRL's trainer has prepared, with a tokenizer that adds special tokens to text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(6)]
    rows = rows if form == "text" else [messages(row) for row in rows]
    trainer = trl.DPOTrainer(
        model=str(tiny_model_dir), args=trl.DPOConfig(**options(tmp_path, max_length=None)),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    prepared = trainer.train_dataset
    expected = {side: [len(ids) for ids in prepared[f"{side}_ids"]] for side in ("prompt", "chosen", "rejected")}
    whole = sorted(p + max(c, r) for p, c, r in zip(*expected.values(), strict=True))
    longest = max(expected["prompt"])
    report = inspect_preferences(Dataset.from_list(rows), processing_class=tokenizer, max_length=whole[-1])
    assert report.lengths == expected and report.unit == "tokens" and report.facts["form"] == form
    assert report.facts[f"longer than max_length={whole[-1]}"] == "0 of 6 (0.0%)"
    report = inspect_preferences(Dataset.from_list(rows), processing_class=tokenizer, max_length=longest)
    over = sum(value > longest for value in whole)
    assert report.facts[f"longer than max_length={longest}"].startswith(f"{over} of 6")
    fills = sum(value == longest for value in expected["prompt"])
    assert report.facts["prompt alone fills it (dropped)"].startswith(f"{fills} of 6")
    report = inspect_preferences(Dataset.from_list(rows), processing_class=tokenizer, max_length=longest + 1)
    assert report.facts["prompt alone fills it (dropped)"] == "0 of 6 (0.0%)"


def test_words_of_messages():
    """Of all messages of a completion; one that only calls a tool has none."""
    call = {"role": "assistant", "content": None}
    row = messages({"prompt": "p q", "chosen": "a b", "rejected": "c"})
    rows = [{**row, "chosen": [*row["chosen"], call, *row["rejected"]], "rejected": [call]}]
    report = inspect_preferences(Dataset.from_list(rows))
    assert report.lengths == {"prompt": [2], "chosen": [3], "rejected": [0]} and report.unit == "words"
    assert report.facts["an empty completion"] == "1 of 1 (100.0%)"


def test_tools_reach_the_template(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = (
        "{%- for t in tools or [] %}{{- t.name }}{%- endfor %}{{- mood }}"
        "{%- for m in messages %}{{- m.content }}{%- endfor %}"
    )
    row = messages({"prompt": "p", "chosen": "a", "rejected": "b"})
    given = {**row, "tools": '[{"name": "clock"}]', "chat_template_kwargs": {"mood": "!"}}
    assert pair_lengths(given, tokenizer)["prompt"] == len(tokenizer("clock!p")["input_ids"])
    assert pair_lengths(row, tokenizer) == {"prompt": 1, "chosen": 1, "rejected": 1}


def test_pairs_without_a_prompt(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    report = inspect_preferences(
        Dataset.from_dict({"chosen": [" a"], "rejected": [" the film"]}), processing_class=tokenizer
    )
    expected = [len(tokenizer(text + "<|eos|>")["input_ids"]) for text in (" a", " the film")]
    assert report.lengths == {"prompt": [0], "chosen": expected[:1], "rejected": expected[1:]}


def test_spread_and_bias():
    rows = [{"prompt": "p q", "chosen": "a " * (n + 1), "rejected": "a"} for n in range(21)]
    facts = inspect_preferences(Dataset.from_list(rows)).facts
    assert facts["chosen, words"] == "median 11, 95% 20, most 21" and facts["prompt, words"].startswith("median 2")
    assert facts["mean length, chosen minus rejected"] == "+10.0"
    assert facts["the longer answer wins"] == "20 of 20 (100.0%)"
    same = inspect_preferences(Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}])).facts
    assert same["the longer answer wins"] == "never longer"


def test_equal_sides_are_not_there_in_both_orders():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": " "}]
    facts = inspect_preferences(Dataset.from_list(rows)).facts
    assert facts["pairs there in both orders"] == "0 of 2 (0.0%)"
    assert facts["chosen equals rejected"] == "1 of 2 (50.0%)"
    assert facts["an empty completion"] == "1 of 2 (50.0%)"


def scored(margins, low=0.25):
    return Dataset.from_list(
        [
            {"prompt": "p", "chosen": f"a {i}", "rejected": "b", "score_chosen": low + m, "score_rejected": low}
            for i, m in enumerate(margins)
        ]
    )


def test_margins_stand_in_the_table():
    report = inspect_preferences(scored([n / 4 for n in range(-4, 17)]))
    shown = "5% -0.75, 25% 0.25, 50% 1.5, 75% 2.75, 95% 3.75 (mean 1.5)"
    assert report.facts["margins of the scores"] == shown
    assert report.facts["scores contradict the label"].startswith("4 of 21")
    assert report.facts["scores tie"].startswith("1 of 21")
    assert "margins of the scores" not in inspect_preferences(pairs()).facts


def test_what_to_mind():
    ratings = inspect_preferences(scored([2.0, 1.0, 3.0], low=4.0))
    assert ratings.losses["margin_adaptive"] == "" and "look like ratings" in ratings.remarks["margin_adaptive"]
    assert ratings.remarks["anchored"] == ratings.remarks["margin_adaptive"] and "offset" not in ratings.remarks
    logits = inspect_preferences(scored([0.5, 0.25, 1.0]))
    assert logits.losses["offset"] == "" and "2 of 3 (66.7%) pairs have a margin below 1" in logits.remarks["offset"]
    assert set(logits.remarks) == {"offset"}
    assert "plain DPO" in inspect_preferences(pairs()).remarks["anchored"]
    known = scored([2.0], low=4.0).add_column("preference_prob", [0.7])
    assert "anchored" not in inspect_preferences(known).remarks
    shown = rich.console.Console(record=True, width=300, file=io.StringIO())
    shown.print(ratings.tables()[1])
    text = shown.export_text()
    assert "look like ratings" in text and text.count("yes") + text.count("no") >= len(ratings.losses)


def test_the_tables():
    report = Inspection(
        facts={"rows": "3", "form": "text"}, losses={"one": "", "two": "no scores", "three": ""}, remarks={"three": "ratings"},
        lengths={}, margins=[], unit="words",
    )  # fmt: skip
    facts, losses = report.tables()
    assert [list(column.cells) for column in facts.columns] == [["rows", "form"], ["3", "text"]]
    assert (facts.title, facts.show_header, losses.title) == ("The data", False, "Losses that can use it")
    assert [(column.header, list(column.cells)) for column in losses.columns] == [
        ("loss_type", ["one", "two", "three"]),
        ("can", ["yes", "no", "yes"]),
        ("why not, or what to mind", ["", "no scores", "ratings"]),
    ]


def figure_of(monkeypatch, path, lengths, margins):
    """The axes that a plot draws into."""
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    Inspection({}, {}, {}, lengths, margins, "tokens").plot(path)
    return drawn[0].axes


@pytest.mark.parametrize("margins", [[], [1.0, -2.0, 0.5]])
def test_what_is_drawn(margins, tmp_path, monkeypatch):
    lengths = {"prompt": [9], "chosen": [1, 2, 3], "rejected": [4, 5]}
    first, *more = figure_of(monkeypatch, tmp_path / "plot.png", lengths, margins)
    assert first.get_xlabel() == "length of completions (tokens)" and first.get_ylabel() == "pairs"
    assert first.get_title() == "Lengths of completions"
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "chosen, median 2",
        "rejected, median 4.5",
    ]
    counts = [sum(bar.get_height() for bar in bars) for bars in first.containers]
    assert counts == [3, 2] and len(first.containers[0]) == 40
    assert [line.get_xdata()[0] for line in first.get_lines()] == [2, 4.5]
    assert [line.get_color() for line in first.get_lines()] == [bars[0].get_facecolor() for bars in first.containers]
    assert len(more) == (1 if margins else 0)
    for axes in more:
        assert axes.get_xlabel() == "score of the chosen minus that of the rejected completion"
        assert axes.get_title() == "Margins of the scores" and axes.get_ylabel() == "pairs"
        assert sum(bar.get_height() for bar in axes.patches) == 3 and len(axes.patches) == 40
        assert [line.get_xdata()[0] for line in axes.get_lines()] == [0, 0.5]
        assert axes.get_lines()[1].get_color() == "black"  # that of the bars would not be seen on them
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["margin, median 0.5"]


def test_outliers_do_not_set_the_axis(tmp_path, monkeypatch):
    """Of 1000 margins five at each end may be left out; of 1000 lengths of both sides together as many."""
    margins = [-1e6] * 2 + [0.0] * 498 + [1.0] * 497 + [1e6] * 3
    lengths = {"prompt": [1], "chosen": [10] * 499 + [99999], "rejected": [20] * 500}
    first, second = figure_of(monkeypatch, tmp_path / "plot.png", lengths, margins)
    assert second.get_title() == "Margins of the scores\n5 of 1,000 lie outside of the axis, 0.5% at either end"
    edges = [bar.get_x() for bar in second.patches] + [second.patches[-1].get_x() + second.patches[-1].get_width()]
    assert [edges[0], edges[-1]] == pytest.approx([0, 1])
    assert sum(bar.get_height() for bar in second.patches) == 995
    assert "1 of 1,000 lie outside" in first.get_title() and first.get_xlim()[1] < 30
    few = figure_of(monkeypatch, tmp_path / "few.png", lengths, [0.0, 1.0, 1e6])[1]
    assert few.get_title() == "Margins of the scores" and sum(bar.get_height() for bar in few.patches) == 3


def test_deciles():
    """0, 1, ..., 20 in steps of two; lengths beside them."""
    report = inspect_preferences(scored([n / 4 for n in range(21)]))
    assert report.deciles["margin"] == [n / 4 for n in range(0, 21, 2)]
    assert report.deciles["chosen"] == [2] * 11 and list(report.deciles) == ["margin", "prompt", "chosen", "rejected"]
    table = report.tables()[2]
    assert [column.header for column in table.columns] == ["share below", "margin", "prompt", "chosen", "rejected"]
    assert list(table.columns[0].cells)[:2] == ["0 %", "10 %"] and list(table.columns[1].cells)[-1] == "5"
    assert "words" in table.title
    assert "margin" not in inspect_preferences(pairs()).deciles


def test_all_facts_by_hand(tiny_model_dir):
    rows = [
        {"prompt": "p q", "chosen": "a b c", "rejected": "a", "score_chosen": 2.0, "score_rejected": 0.5},
        {"prompt": "p q", "chosen": "a", "rejected": "a b c", "score_chosen": 1.0, "score_rejected": 1.0},
        {"prompt": "r", "chosen": "a", "rejected": " ", "score_chosen": None, "score_rejected": 1.0},
    ]
    report = inspect_preferences(Dataset.from_list(rows))
    assert report.facts == {
        "rows": "3",
        "columns": "prompt, chosen, rejected, score_chosen, score_rejected",
        "form": "text",
        "prompt, words": "median 2, 95% 2, most 2",
        "chosen, words": "median 1, 95% 1, most 3",
        "rejected, words": "median 1, 95% 1, most 3",
        "mean length, chosen minus rejected": "+0.3",
        "the longer answer wins": "2 of 3 (66.7%)",
        "prompts, each once": "2",
        "duplicate pairs": "0 of 3 (0.0%)",
        "pairs there in both orders": "2 of 3 (66.7%)",
        "chosen equals rejected": "0 of 3 (0.0%)",
        "an empty completion": "1 of 3 (33.3%)",
        "margins of the scores": "5% 0, 25% 0, 50% 0, 75% 0, 95% 0 (mean 0.75)",
        "scores contradict the label": "0 of 2 (0.0%)",
        "scores tie": "1 of 2 (50.0%)",
    }
    assert (report.margins, report.unit) == ([1.5, 0.0], "words")
    groups = [{"prompt": "p", "completions": list("abc"[:n]), "scores": [1.0, 2.0, 3.0][:n]} for n in (2, 3)]
    facts = inspect_preferences(Dataset.from_list(groups)).facts
    assert facts["completions per group"] == "2 to 3" and facts["pairs"] == "2, best against worst"


def test_rows_without_a_pair():
    """As `pair_traces` leaves them, where only the empty-trace pair could be made."""
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": None, "rejected": None}]
    report = inspect_preferences(Dataset.from_list(rows))
    assert report.facts["rows without a pair"] == "1 of 2 (50.0%)" and report.lengths["chosen"] == [1]
    with pytest.raises(ValueError, match="No row of the dataset has a pair"):
        inspect_preferences(Dataset.from_list(rows[1:]))
    with pytest.raises(ValueError, match="Row 1: the completions are str 'a' and NoneType"):
        inspect_preferences(Dataset.from_list([rows[0], {"prompt": "p", "chosen": "a", "rejected": None}]))
    with pytest.raises(ValueError, match="Row 0: the completions are int"):
        inspect_preferences(Dataset.from_list([{"prompt": "p", "chosen": 1, "rejected": 2}]))


def test_groups_and_conversations(tiny_model_dir):
    data = Dataset.from_list([{"prompt": "p", "completions": ["a", "b b", "c"], "scores": [1.0, 2.0, 3.0]}] * 2)
    assert inspect_preferences(data).facts["pairs"] == "2, best against worst"
    message = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = [
        {"prompt": message("user", "p"), "chosen": message("assistant", "a b"), "rejected": message("assistant", "c")}
    ]
    report = inspect_preferences(
        Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(tiny_model_dir)
    )
    assert report.facts["form"] == "conversational" and report.unit == "tokens"
    with pytest.raises(ValueError, match="holds no pairs"):
        inspect_preferences(Dataset.from_dict({"text": ["a"]}))


PAIR = {"prompt": "p", "chosen": "a b", "rejected": "c"}


def test_command(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in pairs(score_chosen=2.0, score_rejected=1.0)))
    assert main(["inspect", str(path), "--plot", str(tmp_path / "plot.png")]) == 0
    shown = capsys.readouterr().out
    assert "the longer answer wins" in shown and "offset" in shown
    assert (tmp_path / "plot.png").exists()


def files(folder):
    """What users have in place of a dataset, by name."""
    line = json.dumps(PAIR) + "\n"
    texts = {
        "empty.jsonl": "", "blank.jsonl": "\n\n", "cut.jsonl": line + line[:20], "list.json": f"[{line},{line[:20]}",
        "numbers.jsonl": line + "[1]\n", "nothing.json": "[]", "bad.csv": "question,answer\n1,2\n", "empty.csv": "",
        "ragged.csv": "prompt,chosen,rejected\n1,2,3\n1,2,3,4,5\n", "false.parquet": "no parquet file", "notes.txt": "a", "mixed/a.jsonl": line,
        "mixed/b.jsonl": '{"text": "a"}\n', "other/readme.md": "a", "saved/dataset_info.json": "{}", "good.jsonl": line,
        "talk.jsonl": json.dumps(messages(PAIR)) + "\n", "part/a.jsonl": line, "part/b.jsonl": line[:20],
        "kinds.jsonl": line + json.dumps({**PAIR, "chosen": [{"role": "user", "content": "a"}]}) + "\n",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    (folder / "none").mkdir()
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "tokenizer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./missing.jsonl"], "There is no dataset './missing.jsonl': it looks like a path"),
        (["owner/missing"], "none on the hub or the hub cannot be reached"),
        (["empty.jsonl"], "'empty.jsonl': the file is empty"),
        (["blank.jsonl"], "'blank.jsonl': the file is empty"),
        (["empty.csv"], "'empty.csv': the file is empty"),
        (["nothing.json"], "'nothing.json': the file holds no rows"),
        (["cut.jsonl"], "'cut.jsonl': line 2 is no JSON (Unterminated string"),
        (["list.json"], "'list.json': line 2 is no JSON"),
        (["part"], "b.jsonl': line 1 is no JSON"),
        (["numbers.jsonl"], "'numbers.jsonl': a row of line 2 is '[1]'; expected an object"),
        (["binary.jsonl"], "'binary.jsonl': it is no text: the byte at position 128"),
        (["false.parquet"], "'false.parquet': Parquet magic bytes not found"),
        (["notes.txt"], "expected a file that ends in"),
        (["bad.csv"], "its columns are ['answer', 'question']"),
        (["ragged.csv"], "'ragged.csv': Error tokenizing data. C error: Expected 3 fields in line 3, saw 5"),
        (
            ["mixed"],
            "its files have different columns. a.jsonl has ['prompt', 'chosen', 'rejected']; b.jsonl has ['text']",
        ),
        (["none"], "the folder holds no file that ends in"),
        (["other"], "the folder holds no file that ends in"),
        (["saved"], "Cannot read 'saved': Directory saved is neither"),
        (["kinds.jsonl"], "Row 1: the completions are list"),
        (["part", "--split", "test"], "line 1 is no JSON"),
        (["missing.jsonl", "--processing_class", "./no"], "There is no tokenizer './no'"),
        (["good.jsonl", "--processing_class", "none"], "Cannot load the tokenizer 'none'"),
        (["talk.jsonl", "--processing_class", "tokenizer"], "has no chat template"),
        (["missing.jsonl", "--max_length", "-5"], "`--max_length -5` must be at least 1"),
        (["missing.jsonl", "--max_length", "0"], "`--max_length 0` must be at least 1"),
        (["missing.jsonl", "--plot", "nowhere/plot.png"], "there is no folder 'nowhere'"),
        (["missing.jsonl", "--plot", "plot.xyz"], "its name must end in one of"),
        (["missing.jsonl", "--plot", "plot"], "its name must end in one of"),
        (["missing.jsonl", "--plot", "folder.png"], "it cannot be written there"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert main(["inspect", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err
    assert "The data" not in shown.out


def test_the_readers_own_complaints_are_not_shown_beside_ours(tmp_path, monkeypatch):
    seen, before = [], logging.get_verbosity()

    def fails(path, name):
        seen.append(logging.get_verbosity())
        raise KeyError("odd")

    monkeypatch.setattr("trl_ext.data.load._load", fails)
    with pytest.raises(ValueError, match=r"Cannot read '.*': the folder holds no file"):
        load_preferences(str(tmp_path))
    assert seen == [logging.CRITICAL] and logging.get_verbosity() == before


def test_a_plot_needs_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert main(["inspect", "missing.jsonl", "--plot", "plot.png"]) == 2
    assert "A plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_kinds_of_data(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}]
    data = Dataset.from_list(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.JSON").write_text(json.dumps(rows))
    data.to_csv(tmp_path / "a.csv")
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "folder" / "b.jsonl").write_text(json.dumps(rows[1]))
    for name in ("a.jsonl", "a.JSON", "a.csv", "a.parquet", "saved", "folder"):
        assert load_preferences(str(tmp_path / name)).to_list() == rows, name
    assert load_preferences(str(tmp_path / "a.jsonl"), "test").to_list() == rows  # a file is one split, however called
    DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(tmp_path / "splits")
    assert load_preferences(str(tmp_path / "splits")).to_list() == rows
    assert load_preferences(str(tmp_path / "splits"), "test").to_list() == rows[:1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": 1', "line 3 is no JSON (Expecting ',' delimiter, column 8): '{\"a\": 1'"),
        (
            "a.json",
            b'\n [{"a": 1},\n  {"a" 1}]',
            "line 3 is no JSON (Expecting ':' delimiter, column 8): '{\"a\" 1}]'",
        ),
        ("a.json", b'[{"a": 1}, 3]', "a row is '3'; expected an object with columns"),
        ("a.json", b" [ ]", "the file holds no rows"),
        ("a.jsonl", b'{"a": 1}\n3', "a row of line 2 is '3'; expected an object with columns"),
        ("a.jsonl", b"abc\xff", "it is no text: the byte at position 3 is not UTF-8"),
        ("a.csv", b"a,b\n", "the file has a header and no rows"),
        ("a.csv", b"a,b", "the file has a header and no rows"),
        ("a.csv", b" \n", "the file is empty"),
    ],
    ids=repr,
)
def test_why_a_file_cannot_be_read(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    try:
        _columns(tmp_path / name)
    except ValueError as error:
        assert str(error).startswith(said)
    else:
        pytest.fail("the file was read")


def test_columns_of_files(tmp_path):
    (tmp_path / "a.csv").write_text("one,two\n1,2\n")
    (tmp_path / "a.jsonl").write_text('\n{"one": 1, "two": 2}\n{"two": 3}\n')
    (tmp_path / "a.json").write_text('[{"one": 1, "two": 2}]')
    Dataset.from_dict({"one": [1], "two": [2]}).to_parquet(tmp_path / "a.PARQUET")
    for path in tmp_path.iterdir():
        assert _columns(path) == ["one", "two"], path


def test_splits(tmp_path, capsys):
    DatasetDict({"train": pairs(), "test": pairs().select([0])}).save_to_disk(tmp_path / "saved")
    assert main(["inspect", str(tmp_path / "saved"), "--split", "test"]) == 0
    assert re.search(r"rows +│ 1 ", capsys.readouterr().out)
    assert main(["inspect", str(tmp_path / "saved"), "--split", "dev"]) == 2
    assert "has no split 'dev'; it has ['test', 'train']" in capsys.readouterr().err


def test_refused():
    for value in (0, -5, 1.5, True, None):
        with pytest.raises(ValueError, match="must be a whole number, at least 1"):
            inspect_preferences(pairs(), max_length=value)
    with pytest.raises(ValueError, match="Row 1 of the inspected dataset has 2 completions and 1 scores"):
        inspect_preferences(
            Dataset.from_list([{"prompt": "p", "completions": ["a", "b"], "scores": s} for s in ([1.0, 2.0], [1.0])])
        )
