"""What `trl-ext inspect` advises: each rule on data made for it, its figures worked by hand, its sources held to the report."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from datasets import Dataset

from tests.helpers import options
from trl_ext import DPOConfig, get_loss
from trl_ext.cli import main
from trl_ext.data import inspect_preferences
from trl_ext.data.advice import FEW_PAIRS, MEASURED, REPORT, Suggestion


ROOT = Path(__file__).resolve().parents[1]


def rows(number=20, **columns):
    """Pairs of equal length; a column is a value, or a function of the row's number."""
    made = []
    for i in range(number):
        given = {name: value(i) if callable(value) else value for name, value in columns.items()}
        made.append({"prompt": f"p {i}", "chosen": f"a {i}", "rejected": f"b {i}", **given})
    return Dataset.from_list(made)


def scored(margins):
    return rows(len(margins), score_chosen=lambda i: margins[i], score_rejected=0.0)


def groups(scores, **columns):
    return Dataset.from_list(
        [{"prompt": f"p {i}", "completions": list("abc"), "scores": scores, **columns} for i in range(4)]
    )


def advice(data, **kwargs) -> dict[str, Suggestion]:
    found = inspect_preferences(data, **kwargs).advice
    assert len({each.loss for each in found}) == len(found) or [each.loss for each in found].count("anchored") == 2
    return {each.loss: each for each in found}


def test_plain_pairs_suggest_dpo():
    report = inspect_preferences(rows())
    assert [each.loss for each in report.advice] == ["sigmoid", "any"]
    assert report.advice[0].settings == {"beta": 0.1}
    assert report.advice[1].settings == {"learning_rate": 5e-7, "num_train_epochs": 1}


def test_few_scored_pairs_suggest_offset():
    offset = advice(scored([2.0, 3.0, 4.0]))["offset"]
    assert offset.settings == {"loss_kwargs": {"alpha": 1.0, "scaling": "log"}}
    assert (
        "3 scored pairs, which is few" in offset.why and "the median margin of 3 asks for a gap of 1.1." in offset.why
    )
    assert "96 pairs" in offset.sources[1]
    assert FEW_PAIRS == round(math.sqrt(96 * 640))


def test_small_margins_suggest_a_linear_offset():
    offset = advice(scored([0.25, 0.5, 4.0]))["offset"]
    assert (
        offset.settings["loss_kwargs"]["scaling"] == "linear"
        and "median margin of 0.5 asks for a gap of 0.5" in offset.why
    )
    assert advice(scored([0.25, 1.0]))["offset"].settings["loss_kwargs"]["scaling"] == "log"  # one in two is not most


def test_many_scored_pairs_are_told_what_was_measured():
    many = list(advice(scored([2.0] * (FEW_PAIRS + 1))).values())
    assert [each.loss for each in many] == ["offset", "sigmoid", "any"]
    assert "compare it with DPO" in many[0].why and "640 pairs" in many[0].sources[1]
    assert "which is few" in advice(scored([2.0] * FEW_PAIRS))["offset"].why


def test_contradicted_labels_suggest_targets_at_the_fitted_temperature():
    """Margins of 1, a quarter of them negative: sigmoid(1 / T) = 3 / 4 at the best fit, so T = 1 / log 3 = 0.91."""
    found = advice(scored([1.0, 1.0, -1.0, 1.0] * 3))
    assert found["anchored"].settings == {"loss_kwargs": {"beta_r": 0.91}}
    assert "contradict 3 of 12 labels" in found["anchored"].why and "divided by 0.91" in found["anchored"].why
    assert "offset" not in found  # its logarithm takes no such margin
    assert "anchored" not in advice(scored([2.0, 1.0]))
    assert "anchored" not in advice(scored([-1.0, 1.0]))  # as good as a coin
    probable = scored([1.0, 1.0, -1.0, 1.0]).add_column("preference_prob", [0.5, 0.95, 0.2, 0.8])
    anchored = advice(probable)["anchored"]
    assert "75% of them between 0.1 and 0.9" in anchored.why and anchored.settings == {"beta": 0.1}


def longer(wins, losses):
    """Pairs whose chosen completion has two words more, or as many less."""
    texts = [("a a a", "b")] * wins + [("a", "b b b")] * losses
    return Dataset.from_list([{"prompt": f"p {i}", "chosen": c, "rejected": r} for i, (c, r) in enumerate(texts)])


def test_length_bias_suggests_a_price_per_token(tiny_model_dir):
    """Differences of two tokens, won in three of four: sigmoid(2 alpha) = 3 / 4, so alpha = log(3) / 2 = 0.55."""
    from transformers import AutoTokenizer

    in_words = advice(longer(75, 25))["length_regularized"]
    assert in_words.settings == {"loss_kwargs": {"alpha": 0.02}} and "75% of 100 pairs" in in_words.why
    assert "--processing_class" in in_words.sources[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    counts = inspect_preferences(longer(75, 25), processing_class=tokenizer).lengths
    step = abs(counts["chosen"][0] - counts["rejected"][0])
    in_tokens = advice(longer(75, 25), processing_class=tokenizer)["length_regularized"]
    assert in_tokens.settings["loss_kwargs"]["alpha"] == pytest.approx(math.log(3) / step, rel=0.05)
    always = advice(longer(10, 0), processing_class=tokenizer)["length_regularized"]
    assert always.settings == {"loss_kwargs": {"alpha": 0.02}}  # no price fits: none loses


@pytest.mark.parametrize(
    ("wins", "losses", "biased"), [(14, 6, False), (15, 5, True), (1080, 920, False), (1120, 880, True)]
)
def test_length_bias_is_more_than_chance_and_not_tiny(wins, losses, biased):
    """Of 20, 1.96 standard deviations are 4.4 wins; of 2000, 54 % are more than chance, and not worth a price."""
    assert ("length_regularized" in advice(longer(wins, losses))) == biased


def test_groups_suggest_losses_on_groups():
    found = list(advice(groups([3.0, 1.0, 2.0])).values())
    assert [each.loss for each in found] == ["anchored", "sigmoid", "any"]
    assert found[0].settings == {"loss_kwargs": {"standardize": True, "beta_r": 0.5}}
    logps = [-1.0, -2.0, -3.0]
    assert "drpo" in advice(groups([1.0, 0.0, 0.0], behaviour_logps=logps))
    levels = advice(groups([3.0, 1.0, 2.0], behaviour_logps=logps))
    assert "3 levels" in levels["trpa"].why and "drpo" not in levels


def test_columns_suggest_the_losses_that_read_them():
    empty = advice(rows(chosen_empty_trace="x", rejected_empty_trace="y"))["bias_variance"]
    assert empty.settings == {"loss_kwargs": {"alpha": 0.5}}
    steps = advice(rows(q_chosen=lambda i: 0.5 if i < 15 else 0.75, q_rejected=-0.25))["step_apo"]
    assert steps.settings == {"beta": 0.3, "loss_kwargs": {"alpha": 1.0}} and "0.75 in the median" in steps.why
    lists = advice(rows(score_chosen=lambda i: [1.0, 2.0], score_rejected=lambda i: [0.0, 1.5]))
    assert lists["reward_distillation"].settings == {"loss_kwargs": {"combine": "mean"}} and "offset" not in lists


def test_annotators_are_counted():
    several = advice(rows(20, annotator_id=lambda i: 2 * (i % 4)))["robust_em"]
    assert several.settings == {"loss_kwargs": {"annotators": 7, "eta": 0.9, "rate": 0.1}}
    assert "4 annotators, 5 pairs each" in several.why
    assert "robust_em" not in advice(rows(annotator_id=3)) and "robust_em" not in advice(rows(annotator_id="Ann"))


def test_max_length_keeps_nearly_all_pairs_whole(tiny_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    texts = ["a " * 70] + ["a"] * 99  # one in a hundred is long
    data = Dataset.from_list([{"prompt": "p", "chosen": text, "rejected": "b"} for text in texts])
    assert advice(data, processing_class=tokenizer)["any"].settings["max_length"] == 64
    assert advice(data.select(range(50)), processing_class=tokenizer)["any"].settings["max_length"] > 64


EVERYTHING = {
    "scored": scored([2.0, 3.0]),
    "contradicted": scored([1.0, 1.0, -1.0, 1.0]),
    "small": scored([0.5, 0.25]),
    "probable": rows(preference_prob=0.7),
    "annotated": rows(annotator_id=lambda i: i % 3),
    "traces": rows(chosen_empty_trace="x", rejected_empty_trace="y"),
    "steps": rows(q_chosen=1.0, q_rejected=0.5),
    "lists": rows(score_chosen=lambda i: [1.0, 2.0], score_rejected=lambda i: [0.0, 1.5]),
    "groups": groups([1.0, 0.0, 0.0], behaviour_logps=[-1.0, -2.0, -3.0]),
    "long": longer(30, 0),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_is_suggested_can_be_run(name, tmp_path):
    """As a config, and as options of the command line, which say the same."""
    from trl import TrlParser

    for each in inspect_preferences(EVERYTHING[name]).advice:
        loss = {} if each.loss == "any" else {"loss_type": each.loss}
        wanted = DPOConfig(**options(tmp_path, **loss, **each.settings))
        flags = shlex.split(each.flags())
        (given,) = TrlParser(DPOConfig).parse_args_and_config(
            [*flags, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
        )
        for field in {**loss, **each.settings}:
            assert getattr(given, field) == getattr(wanted, field), field
        assert each.why and each.sources
        if each.loss not in ("any", "sigmoid"):
            get_loss(each.loss, **each.settings.get("loss_kwargs", {}))


def test_figures_are_those_of_the_report():
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (ROOT / REPORT).read_text().splitlines()
    ]
    table = {line[1]: (line[2], line[3]) for line in lines if len(line) == 6}
    for what, effect, low, high in MEASURED.values():
        shown, interval = table[what]
        assert float(shown) == pytest.approx(effect, abs=5e-3)
        assert [float(end) for end in re.findall(r"-?[\d.]+", interval)] == pytest.approx([low, high], abs=5e-4)


def test_json_has_all_that_the_tables_show(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    scored([2.0, 3.0, 4.0]).to_json(path)
    capsys.readouterr()
    assert main(["inspect", str(path), "--json", "--plot", str(tmp_path / "plot.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["facts", "unit", "losses", "deciles", "advice", "plot"]
    assert report["facts"]["rows"] == "3" and report["unit"] == "words" and (tmp_path / "plot.png").exists()
    assert report["losses"]["offset"] == {"can": True, "why_not": "", "remark": ""}
    assert (
        not report["losses"]["bias_variance"]["can"]
        and "chosen_empty_trace" in report["losses"]["bias_variance"]["why_not"]
    )
    assert report["deciles"]["margin"] == [2.0] * 5 + [3.0] * 5 + [4.0] and list(report["deciles"])[1:] == [
        "prompt",
        "chosen",
        "rejected",
    ]
    assert report["advice"][0]["loss"] == "offset" and report["advice"][0]["settings"]["loss_kwargs"]["alpha"] == 1.0
    assert main(["inspect", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(each["why"] in shown for each in report["advice"])
    assert '--loss_type offset --loss_kwargs \'{"alpha": 1.0,' in shown and "[0.04, 0.14]" in shown
    assert "100 % 4 2 2 2" in shown and "share below margin prompt chosen rejected" in shown.replace("┃ ", "")


RENAMED = [
    (["--columns", "score_chosen=a", "score_rejected=b"], None),
    (["--columns", "score_chosen=a", "--columns", "score_rejected=b"], None),
    (["--columns", "score_chosen=x", "score_rejected=b"], "The dataset lacks ['x']; its columns are ['a', 'b', 'chosen', 'prompt', 'rejected']"),
    (["--columns", "score_choosen=a"], "Nothing reads columns called ['score_choosen']. Names that are read: ['annotator_id',"),
    (["--columns", "chosen=a"], "The dataset already has columns called ['chosen']"),
    (["--columns", "score_chosen"], "`--columns score_chosen`: expected NAME=COLUMN"),
    (["--columns", "score_chosen="], "`--columns score_chosen=`: expected NAME=COLUMN"),
    (["--columns", "score_chosen=a", "score_rejected=a"], "has the column ['a'] twice"),
    (["--columns", "score_chosen=a", "score_chosen=b"], "has the name ['score_chosen'] twice"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), RENAMED)
def test_columns_of_other_names(arguments, message, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows(3, a=3.5, b=1.0).to_json(path)
    assert main(["inspect", str(path), *arguments]) == (2 if message else 0)
    shown = capsys.readouterr()
    if message:
        assert message in shown.err and "The data" not in shown.out and "Traceback" not in shown.err
    else:
        assert "offset" in shown.out and "5% 2.5, 25% 2.5" in shown.out


def test_columns_may_change_places(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows(3).to_json(path)
    assert main(["inspect", str(path), "--columns", "chosen=rejected", "rejected=chosen"]) == 0
