"""Overlap with reference answers as a reward: values by hand, and wherever rewards are given."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from tests.helpers import build
from tests.online.runs import Scripted, online, prompts, scripted
from tests.test_rounds import settings
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.cli import main
from trl_ext.data import Ensemble, RewardFunction, TextOverlap, overlap, score_preferences
from trl_ext.data.fingerprint import function_key
from trl_ext.rounds.rewards import build_scorer


ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "the cat is on the mat"
# Of "the cat sat on the mat", six words each. BLEU: 5 of 6 words, 3 of 5 pairs of words, 1 of 4 triples, 0 of 3, one added to
# all but the first. ROUGE-L: "the cat on the mat" in common. Words and pairs of words for ROUGE-1 and ROUGE-2
BY_HAND = {
    "bleu": (5 / 6 * 4 / 6 * 2 / 5 * 1 / 4) ** (1 / 4),
    "rouge1": 5 / 6,
    "rouge2": 3 / 5,
    "rougeL": 5 / 6,
    "rougeLsum": 5 / 6,
}
MODULE = """
import datasets
import evaluate


class SharedWords(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = [
            datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            datasets.Features({"predictions": text, "references": text}),
        ]
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, scale=1.0):
        (said,), (known,) = predictions, references
        known = [known] if isinstance(known, str) else known
        words = set(said.split())
        share = max(len(words & set(each.split())) / len(words) for each in known)
        return {"shared_words": share * scale, "count": len(known)}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def module(tmp_path):
    """A folder with a module of `evaluate`, which is not on the hub."""
    folder = tmp_path / "shared_words"
    folder.mkdir()
    (folder / "shared_words.py").write_text(MODULE)
    return folder


def score(text, reference, *args, **kwargs):
    (value,) = TextOverlap(*args, **kwargs)(["p"], [text], reference=[reference])
    return value


@pytest.mark.parametrize("metric", ["bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_the_same_text_has_1_and_another_0(metric):
    for text in (REFERENCE, "the cat"):
        assert score(text, text, metric) == pytest.approx(1.0, abs=1e-6)
        assert score(text, text, metric) <= 1
    assert score("dull dull", "big boxy ox", metric) == 0.0
    assert score("", REFERENCE, metric) == score(" \n", REFERENCE, metric) == 0.0


@pytest.mark.parametrize("metric", BY_HAND)
def test_values_by_hand(metric):
    assert score("the cat sat on the mat", REFERENCE, metric) == pytest.approx(BY_HAND[metric], abs=1e-6)


def test_bleu_of_a_short_answer():
    """All of it is there; the brevity penalty is exp(1 - 6 / 3)."""
    assert score("the cat is", REFERENCE) == pytest.approx(math.exp(-1), abs=1e-6)


def test_chrf_by_hand():
    """Of "abc" in "abd": 2 of 3 letters, 1 of 2 pairs, 0 of 1 triple; longer n-grams are in neither."""
    assert score("abc", "abd", "chrf") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3, abs=1e-6)


def test_several_references():
    """BLEU looks for n-grams in all of them: each half of the answer stands in one."""
    text, halves = "a b c d", ["a b x y z", "p q c d"]
    whole = (4 / 4 * 3 / 4 * 1 / 3 * 1 / 2) ** (1 / 4)  # 2 of 3 pairs of words, no triple
    # Alone: 2 of 4 words and 1 of 3 pairs each; the first is longer by one word
    alone = (2 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** (1 / 4)
    each = [alone * math.exp(1 - 5 / 4), alone]
    assert score(text, halves) == pytest.approx(whole, abs=1e-6)
    assert score(text, halves, combine="max") == pytest.approx(max(each), abs=1e-6)
    assert score(text, halves, combine="mean") == pytest.approx(sum(each) / 2, abs=1e-6)
    # ROUGE-L: 2 of 4 words; of the first reference 2 of 5
    each = [2 * 0.5 * 0.4 / 0.9, 0.5]
    assert score(text, halves, "rougeL") == score(text, halves, "rougeL", combine="max") == pytest.approx(max(each))
    assert score(text, halves, "rougeL", combine="mean") == pytest.approx(sum(each) / 2)


def test_messages_and_rows_without_a_reference():
    said = [{"role": "assistant", "content": "no"}, {"role": "assistant", "content": REFERENCE}]
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    reward = TextOverlap("rougeL")
    references = [REFERENCE, [REFERENCE], [said[1]], [[said[1]], "dog"], None, "", []]
    assert reward(["p"] * 7, [said] * 7, reference=references) == [1.0] * 4 + [None] * 3
    assert reward(["p"] * 2, [[called], []], reference=[REFERENCE] * 2) == [0.0, 0.0]
    for bad in (3, " ", ["a", 3], [{"role": "assistant", "content": None}]):
        with pytest.raises(ValueError, match="holds no text; expected a text, a list of texts, or messages"):
            reward(["p"], [said], reference=[bad])
    with pytest.raises(ValueError, match="compares completions with the column 'answer', which is not there"):
        TextOverlap("rougeL", "answer")(["p"], [said], reference=["a"])


def test_options():
    assert score("THE CAT", "the cat") == 0.0
    assert score("THE CAT", "the cat", options={"lowercase": True}) == pytest.approx(1.0)
    assert score("cats", "cat", "rouge1") == 0.0
    assert score("cats", "cat", "rouge1", options={"use_stemmer": True}) == 1.0
    # Without smoothing no answer has a value that lacks four words in a row
    assert score("the cat sat on the mat", REFERENCE, options={"smooth_method": "none"}) == 0.0


@pytest.mark.parametrize(
    "given, message",
    [
        ({"combine": "min"}, "`combine='min'` is none of"),
        ({"result": "score"}, "is of modules of `evaluate`; 'bleu' gives one number"),
        ({"options": {"lower": True}}, "cannot be used with 'bleu'"),
        ({"metric": "./nowhere"}, "There is no module of `evaluate` './nowhere'"),
        ({"metric": "rogueL"}, "The module 'rogueL' of `evaluate` cannot be loaded: .*'rougeL'"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TextOverlap(**given)


@pytest.mark.parametrize("metric, library", [("bleu", "sacrebleu"), ("rougeL", "rouge_score"), ("./x", "evaluate")])
def test_a_library_that_is_not_installed(metric, library, monkeypatch):
    real = importlib.import_module

    def without(name, *args):
        if name.split(".")[0] == library:
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr("trl_ext.data.overlap.importlib.import_module", without)
    with pytest.raises(ImportError, match=rf"needs {library}.*pip install 'trl-ext\[text-rewards\]'"):
        TextOverlap(metric)


def test_no_library_is_loaded_before_it_is_asked_for():
    code = (
        "import sys, trl_ext.data.overlap; print({'sacrebleu', 'rouge_score', 'evaluate', 'nltk'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_a_module_of_evaluate(module):
    assert score("a b c", "b c d", str(module)) == pytest.approx(2 / 3)
    assert score("a b c", ["x", "a b c y"], str(module)) == 1.0
    assert score("a b c", ["x", "a b c y"], str(module), combine="mean") == 0.5
    assert score("a b c", ["x", "y"], str(module), result="count") == 2.0
    assert score("a b c", "b c d", str(module / "shared_words.py"), options={"scale": 3.0}) == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"expected one finite number under one of .*'f1'.*Name it by `result`"):
        score("a", "b", str(module), result="f1")


def test_a_module_that_is_edited_is_another(module):
    first, again = (function_key(TextOverlap(str(module)), None, "f") for _ in range(2))
    (module / "shared_words.py").write_text(MODULE.replace("max(", "min("))
    edited = function_key(TextOverlap(str(module)), None, "f")
    assert first == again != edited and None not in (first, edited)


def test_what_scores_are_kept_under(monkeypatch):
    given = [{}, {"metric": "chrf"}, {"combine": "max"}, {"options": {"lowercase": True}}, {"column": "answer"}]
    keys = [RewardFunction(TextOverlap(**each)).key() for each in given]
    assert None not in keys and len({*keys}) == 5
    used = TextOverlap()
    used(["p"], ["a"], reference=["a"])
    assert RewardFunction(used).key() == keys[0]
    monkeypatch.setattr("trl_ext.data.overlap.importlib.metadata.version", lambda name: "0")
    assert RewardFunction(TextOverlap()).key() not in keys


PAIRS = [
    {"prompt": "Where?", "chosen": "the cat sat on the mat", "rejected": "dull", "reference": REFERENCE},
    {"prompt": "Where?", "chosen": REFERENCE, "rejected": "the cat", "reference": "the cat"},
]


@pytest.fixture
def calls(monkeypatch):
    """Number of texts that were compared."""
    made, compared = [], TextOverlap._reward

    def counted(self, text, references):
        made.append(text)
        return compared(self, text, references)

    monkeypatch.setattr(TextOverlap, "_reward", counted)
    return made


def test_scores_of_pairs_and_groups(calls):
    data = Dataset.from_list(PAIRS)
    scored = score_preferences(data, TextOverlap("rougeL"))
    assert scored["score_chosen"] == pytest.approx([5 / 6, 1 / 2]) and scored["score_rejected"] == [0.0, 1.0]
    assert len(calls) == 4
    assert score_preferences(data, TextOverlap("rougeL")).to_list() == scored.to_list() and len(calls) == 4
    assert (
        score_preferences(data, TextOverlap("rouge1"))["score_chosen"][0] == pytest.approx(5 / 6) and len(calls) == 8
    )
    # Another reference, another score; the other row is known
    edited = Dataset.from_list([{**PAIRS[0], "reference": "dull"}, PAIRS[1]])
    assert score_preferences(edited, TextOverlap("rougeL"))["score_rejected"] == [1.0, 1.0] and len(calls) == 10
    groups = Dataset.from_list([{"prompt": "p", "completions": ["a", "b c", ""], "reference": ["b", "c"]}])
    assert score_preferences(groups, TextOverlap("rouge1"))["scores"] == [pytest.approx([0.0, 2 / 3, 0.0])]


def test_among_several_rewards():
    """Each is given what it reads, and what reads nothing is called as before."""

    def length(prompts, completions):
        return [float(len(each)) for each in completions]

    def told(prompts, completions, hint):
        return [float(each) for each in hint]

    rows = [{**row, "hint": 10 * (i + 1)} for i, row in enumerate(PAIRS)]
    several = Ensemble([length, TextOverlap("rougeL"), RewardFunction(told, columns=["hint"])], "sum", [0.0, 1.0, 2.0])
    scored = score_preferences(Dataset.from_list(rows), several)
    assert scored["score_chosen"] == pytest.approx([20 + 5 / 6, 40 + 1 / 2])
    told.columns = ("hint",)
    assert score_preferences(Dataset.from_list(rows), told)["score_chosen"] == [10.0, 20.0]


def test_offline_in_the_trainer(tiny_model_dir, tmp_path):
    """Pairs are scored by their references, the scores are learnt from, and the references go no further."""
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(PAIRS * 2), loss_type="anchored",
        trainer_kwargs={"reward_funcs": TextOverlap("rougeL")}, max_steps=1,
    )  # fmt: skip
    targets = [1 / (1 + math.exp(-margin)) for margin in (5 / 6, -1 / 2)]
    trainer.train()
    assert trainer.state.log_history[0]["target/mean"] == pytest.approx(sum(targets) / 2, rel=1e-5)


def test_columns_that_cannot_be_read(calls):
    with pytest.raises(ValueError, match=r"The dataset lacks \['answer'\].* A reward reads them"):
        score_preferences(Dataset.from_list(PAIRS), TextOverlap("rougeL", "answer"))
    for missing in (None, ""):
        rows = [PAIRS[0], {**PAIRS[1], "reference": missing}]
        with pytest.raises(ValueError, match=f"Row 1 has {missing!r} in the column 'reference'"):
            score_preferences(Dataset.from_list(rows), [TextOverlap("rougeL")])
    assert not calls


def answered(*texts):
    """Prompts whose reference is one of the completions that [`Scripted`] gives them, where `texts` says which."""
    rows = prompts(8)
    return rows.add_column(
        "reference", [None if k is None else scripted(rows[i]["prompt"], k) for i, k in enumerate(texts)]
    )


def test_online(tiny_model_dir, tmp_path):
    """The completion that is the reference is preferred, the longer or the shorter one; rows without one teach nothing."""
    data = answered(0, 1, 0, 1, 1, None, None, 0)
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, per_device_train_batch_size=8, max_steps=1, num_generations=2,
        trainer_kwargs={"reward_funcs": TextOverlap("rougeL"), "train_dataset": data, "eval_dataset": data},
    )  # fmt: skip
    inputs = {name: list(data[name]) for name in data.column_names}
    completions = trainer.generate(trainer.model, inputs)
    scores = trainer.score(inputs, completions)
    assert scores.mask.tolist() == [[True, True]] * 5 + [[False, False]] * 2 + [[True, True]]
    best = [row.argmax().item() for row in scores.values]
    assert [best[i] for i in (0, 1, 2, 3, 4, 7)] == [0, 1, 0, 1, 1, 0]
    assert all(scores.values[i, best[i]] == 1.0 > scores.values[i].min() >= 0 for i in (0, 1, 2, 3, 4, 7))
    trainer.train()
    assert 0 < trainer.state.log_history[0]["rewards/rougeL/mean"] < 1
    assert "eval_rewards/rougeL/mean" in trainer.evaluate()
    with pytest.raises(ValueError, match=r"reads \['reference'\], which the eval dataset does not have"):
        trainer.evaluate(prompts(8))


def test_online_without_the_column(tiny_model_dir, tmp_path):
    with pytest.raises(
        ValueError, match=r"TextOverlap.* reads \['reference'\], which the train dataset does not have"
    ):
        online(tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": [TextOverlap("rougeL")]})


def test_by_name(tmp_path, tiny_model_dir, capsys):
    """As rounds name a function, in YAML and on the command line."""
    scorer = build_scorer("trl_ext.data.overlap:rougeL", None, None)
    assert scorer == RewardFunction(TextOverlap("rougeL")) and scorer.columns == ("reference",)
    with pytest.raises(AttributeError, match="no attribute 'blue'"):
        _ = overlap.blue
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"what {i}", "reference": "good bad film" if i else None} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = settings(tiny_model_dir, str(path), tmp_path / "run", rounds=1)
    (tmp_path / "rounds.yaml").write_text(json.dumps(config))  # which YAML reads
    command = ["iterate", str(tmp_path / "rounds.yaml"), "--reward_funcs", "trl_ext.data.overlap:chrf"]
    assert main(command) != 0
    assert "Row 0 has None in the column 'reference'" in " ".join(capsys.readouterr().err.split())
    path.write_text("\n".join(map(json.dumps, rows[1:])))
    assert main(command) in (0, None)
    assert (tmp_path / "run" / "round-1" / "model" / "model.safetensors").is_file()
