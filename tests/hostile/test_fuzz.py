"""
Whatever a parser, a reader or a column is given: it works, or it says with a `ValueError` or `TypeError` what is wrong.

Examples are the same in every run; `TRL_EXT_FUZZ=1000` tries as many of each property, others each time.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import build_tokenizer
from tests.helpers import options
from trl_ext import DPOConfig, OnlineDPOConfig, get_loss, list_losses, run_dpo, sources
from trl_ext.compare.metrics import chosen_metrics
from trl_ext.compare.runs import read_run
from trl_ext.compare.show import table
from trl_ext.data.adapters import ADAPTERS
from trl_ext.data.cache import Ledger, read_sealed
from trl_ext.data.checks import check_tokenized
from trl_ext.data.columns import check_values
from trl_ext.data.groups import check_group
from trl_ext.data.inspection import inspect_preferences
from trl_ext.data.load import load_preferences
from trl_ext.data.sampling import _kept
from trl_ext.data.texts import check_pair, problem_of_text
from trl_ext.data.tokens import pair_lengths, prompt_ids, reward_ids, template_arguments
from trl_ext.data.turns import check_turns
from trl_ext.reading import read_json, read_yaml
from trl_ext.rounds import RoundsConfig
from trl_ext.rounds.settings import check_early, given_overrides
from trl_ext.trainers.checkpoint_files import check_checkpoint
from trl_ext.trainers.options import FRACTIONS, WHOLE
from trl_ext.trainers.terms import LOSSES_FILE, STATE_FILE, Terms


GIVEN = int(os.environ.get("TRL_EXT_FUZZ", 0))
TOKENIZER = build_tokenizer()


def examples(number: int) -> Callable:
    """As many examples as a test of a property has time for."""
    return settings(
        max_examples=GIVEN or number,
        derandomize=not GIVEN,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def works_or_refuses(action: Callable[[], Any]) -> Any:
    """What `action` gives; `None` where it refuses, with a message."""
    try:
        return action()
    except (ValueError, TypeError) as error:
        assert str(error).strip(), repr(error)
        return None


NUMBERS = st.one_of(
    st.floats(), st.integers(-3, 10), st.integers(), st.sampled_from([10**400, -(10**400), 1e308, 0.0])
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", " ", "nan", "1e-6", "user", "assistant", "prompt", "\0", "../x", "é\ud7ff", "[", "{", "<|im_end|>"]
    ),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
NAMES = st.sampled_from(["role", "content", "tool_calls", "prompt", "a", ""])
VALUES = st.recursive(
    st.one_of(PLAIN, st.binary(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.one_of(st.sampled_from(["user", "assistant", "system"]), PLAIN),
            "content": st.one_of(TEXTS, VALUES),
        }
    ),
    max_size=4,
)
SPOKEN = st.one_of(TEXTS, MESSAGES, VALUES)
JSONS = st.one_of(st.text(max_size=30), st.builds(lambda value: json.dumps(value, default=str), VALUES))
BYTES = st.one_of(st.binary(max_size=60), JSONS.map(lambda text: text.encode("utf-8", "replace")))


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory) -> Iterator[None]:
    """No bars, and a cache of `datasets` that goes with the tests."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Settings and options


YAMLS = st.one_of(st.text(alphabet="ab:-[]{}&*!|>?%@#'\"\n \t0123.,<~", max_size=40), JSONS, st.text(max_size=20))


@examples(150)
@given(YAMLS)
@example("a: 1\na: 2\n")
@example("&a [*a]")
@example("? {a: 1}\n: b")
@example("a: 2020-13-40")
@example("[" * 500)
@example("!!timestamp x")
@example("0o9: 1e999")
def test_yaml(text):
    works_or_refuses(lambda: read_yaml(text, "here"))
    works_or_refuses(lambda: given_overrides(["--training", text]))


@examples(150)
@given(JSONS)
@example('{"a": 1, "a": 2}')
@example("[" * 100_000)
@example("9" * 5000)
def test_json(text):
    works_or_refuses(lambda: read_json(text))
    works_or_refuses(lambda: sources.read_hyperparameters(text))


@examples(100)
@given(st.lists(st.one_of(st.sampled_from(["offset", "ipo", "odpo", "a,b"]), VALUES), max_size=3), VALUES)
def test_losses_and_hyperparameters_before_torch(names, given_):
    works_or_refuses(lambda: sources.refuse_unknown_losses(names, trl=True))
    works_or_refuses(lambda: sources.refuse_unknown_hyperparameters(names, given_))


ROUNDS = [field for field in RoundsConfig.__dataclass_fields__ if field not in ("model", "prompts", "output_dir")]


@examples(40)
@given(st.lists(st.tuples(st.sampled_from(ROUNDS), YAMLS), max_size=3), st.lists(TEXTS, max_size=3))
@example([("reward_funcs", "..:f")], [])
@example([("training", "{3: 1, x: 2}")], [])
@example([("training", "{loss_type: 3}")], [])
@example([("seed", "!!binary aGVsbG8=")], [])
def test_settings_of_rounds(folder, pairs, more):
    path = folder / "rounds.yaml"
    path.write_text("model: a/b\nprompts: a/c\noutput_dir: out\n")
    arguments = [part for name, text in pairs for part in (f"--{name}", text)] + more
    overrides = works_or_refuses(lambda: given_overrides(arguments))
    if overrides is not None:
        works_or_refuses(lambda: check_early(str(path), overrides))
        works_or_refuses(lambda: RoundsConfig.from_yaml(path, overrides))


@examples(100)
@given(st.sampled_from(ROUNDS), VALUES)
@example("reward_funcs", ":")
@example("judge", {"preference_model": "a/b", "max_length": -1})
@example("sampling", {"temperature": float("nan")})
def test_rounds(name, value):
    given_ = {"model": "a/b", "prompts": "a/c", "output_dir": "out", "reward_funcs": "a/d", name: value}
    works_or_refuses(lambda: RoundsConfig(**given_))


OPTIONS = sorted(
    {
        *FRACTIONS,
        *WHOLE,
        "beta",
        "loss_type",
        "loss_weights",
        "loss_kwargs",
        "pairing",
        "share_prefix",
        "logprob_backend",
        "logprob_memory_mb",
    }
    | {
        "ref_logps_memory_mb",
        "ref_model_sync_steps",
        "ref_model_mixup_alpha",
        "max_grad_norm",
        "teacher_model_init_kwargs",
        "reward_weights",
    }
    | {
        "missing_eos_penalty",
        "length_penalty",
        "mixture_coef",
        "num_generations",
        "generation_kwargs",
        "steps_per_generation",
    }
)


@examples(250)
@given(st.sampled_from(OPTIONS), VALUES, st.sampled_from([DPOConfig, OnlineDPOConfig]))
@example("beta", 10**400, DPOConfig)
@example("loss_weights", [10**400], DPOConfig)
@example("max_new_tokens", None, OnlineDPOConfig)
@example("teacher_model_init_kwargs", "{", DPOConfig)
def test_options(name, value, config):
    if name in config.__dataclass_fields__:
        given_ = {**options("out"), "loss_type": ["offset"], "sync_ref_model": True, name: value}
        made = works_or_refuses(lambda: config(**given_))
        if made is not None and isinstance(value, float):
            assert not math.isnan(value)


ARGUMENTS = st.one_of(
    st.sampled_from(
        [f"--{name}" for name in OPTIONS]
        + ["--config", "--datasets", "--dataset_name", "--model_name_or_path", "--output_dir", "--env"]
    ),
    TEXTS,
)


@examples(3)
@given(st.lists(ARGUMENTS, max_size=4), YAMLS)
@example(["--config", "CONFIG"], "3: 4\nx: 5\n")
@example(["--config", "CONFIG"], "dataset_name: 3\n")
@example(["--config", "CONFIG"], "datasets: [3]\n")
@example(["--config", "CONFIG"], "env: {3: a}\n")
@example(["--config", "CONFIG"], "loss_type: 3\n")
@example(["--output_dir", "\0"], "")
def test_arguments_of_run_dpo(folder, given_, text):
    path = folder / "config.yaml"
    path.write_text(text, errors="replace")
    given_ = [str(path) if each == "CONFIG" else each for each in given_]
    start = ["--model_name_or_path", "a/b", "--dataset_name", "a/c"]
    if not {"-h", "--help"} & {*given_}:
        works_or_refuses(lambda: run_dpo.check_early([*start, *given_]))


@examples(200)
@given(st.sampled_from(list_losses()), st.data())
def test_hyperparameters(name, data):
    fields = [*sources.loss_classes()[name][1], "nothing"]
    given_ = data.draw(st.dictionaries(st.sampled_from(fields), VALUES, max_size=2))
    works_or_refuses(lambda: get_loss(name, **given_))


# Rows


LOSSES = {name: get_loss(name) for name in ("offset", "anchored", "margin_adaptive", "step_apo", "robust_em")}
COLUMNS = ("score_chosen", "score_rejected", "preference_prob", "weight", "q_chosen", "annotator_id")
CELLS = st.one_of(st.floats(0.1, 0.9), st.integers(0, 3), VALUES)


@examples(250)
@given(
    st.sampled_from([*LOSSES, "reward_distillation"]),
    st.sampled_from(COLUMNS),
    st.lists(CELLS, min_size=1, max_size=3),
)
@example("offset", "score_chosen", [1e308])
@example("offset", "score_chosen", [10**400])
@example("reward_distillation", "score_chosen", [[10**400]])
def test_numeric_columns(name, column, values):
    loss = LOSSES.get(name) or get_loss(name)
    needed = [other for other in loss.required_columns if other != column]
    whole = {column: values, **{other: [0.05] * len(values) for other in needed}}
    works = works_or_refuses(lambda: check_values(whole, {name: loss}, "train") or True)
    if works:  # what reaches the loss, in float32, is finite
        assert all(torch.tensor(each, dtype=torch.float32).isfinite().all() for each in values)


@examples(250)
@given(
    st.fixed_dictionaries(
        {"prompt": SPOKEN, "chosen": SPOKEN, "rejected": SPOKEN},
        optional={"tools": VALUES, "chat_template_kwargs": VALUES},
    )
)
@example({"prompt": [], "chosen": [], "rejected": []})
@example({"prompt": "a", "chosen": ["a"], "rejected": "b"})
@example({"prompt": "a", "chosen": "b", "rejected": "c", "tools": "{"})
def test_rows_of_pairs(row):
    if works_or_refuses(lambda: check_pair(row, "Row 0") or True):  # then it can be made tokens of
        lengths = works_or_refuses(lambda: pair_lengths(row, TOKENIZER))
        assert lengths is None or all(length >= 0 for length in lengths.values())


@examples(200)
@given(st.lists(SPOKEN, max_size=3), st.one_of(st.lists(st.floats(), max_size=3), VALUES), VALUES)
@example(["a", None], [1.0, 2.0], None)
@example(["a", "b"], [10**400, 0], None)
def test_rows_of_groups(completions, scores, logps):
    check_group_ = lambda row: works_or_refuses(lambda: check_group(row, 0, "train"))  # noqa: E731
    check_group_({"prompt": "a", "completions": completions, "scores": scores})
    check_group_({"prompt": "a", "completions": completions, "scores": scores, "behaviour_logps": logps})
    check_group_({"prompt": "a", "completions": scores, "scores": completions})


class Rows:
    """Some rows with what adapters ask of a dataset, at no cost."""

    def __init__(self, rows: list[dict]):
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def map(self, function: Callable, **given_: Any) -> list:
        made = function({name: [row[name] for row in self.rows] for name in self.column_names}, [*range(len(self))])
        return [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)]


PUBLISHED = {
    "HuggingFaceH4/ultrafeedback_binarized": ("chosen", "rejected", "score_chosen", "score_rejected"),
    "nvidia/HelpSteer2": ("prompt", "response_1", "response_2", "preference_strength"),
    "berkeley-nest/Nectar": ("prompt", "answers"),
    "Anthropic/hh-rlhf": ("chosen", "rejected"),
    "argilla/ultrafeedback-binarized-preferences": ("instruction", "chosen_response", "rejected_response", "chosen_avg_rating", "rejected_avg_rating"),
    "argilla/dpo-mix-7k": ("chosen", "rejected", "chosen_rating", "rejected_rating"),
}  # fmt: skip
DIALOGUES = st.lists(st.sampled_from(["\n\nHuman: ", "\n\nAssistant: ", "a", "\n", "Human:", "\0"]), max_size=6).map(
    "".join
)
ANSWERS = st.lists(
    st.fixed_dictionaries({"answer": st.one_of(TEXTS, VALUES), "rank": st.one_of(NUMBERS, VALUES)}), max_size=3
)


CELL = st.one_of(SPOKEN, DIALOGUES, ANSWERS, NUMBERS)
RATED = {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}


@examples(200)
@given(
    st.one_of(
        [
            st.tuples(st.just(name), st.fixed_dictionaries(dict.fromkeys(PUBLISHED[name], CELL)))
            for name in sorted(PUBLISHED)
        ]
    )
)
@example(("HuggingFaceH4/ultrafeedback_binarized", {**RATED, "score_chosen": 10**400, "score_rejected": 1}))
@example(("HuggingFaceH4/ultrafeedback_binarized", {**RATED, "score_chosen": "nan", "score_rejected": 1}))
@example(
    ("HuggingFaceH4/ultrafeedback_binarized", {"chosen": "", "rejected": "", "score_chosen": 2, "score_rejected": 1})
)
@example(("nvidia/HelpSteer2", {"prompt": "a", "response_1": None, "response_2": "b", "preference_strength": 1}))
def test_adapters(published):
    name, row = published
    for adapted in works_or_refuses(lambda: ADAPTERS[name](Rows([row]))) or ():
        assert not any(problem_of_text(adapted[side]) for side in ("prompt", "chosen", "rejected"))
        assert all(math.isfinite(adapted.get(score, 0.0)) for score in ("score_chosen", "score_rejected", "weight"))


@examples(150)
@given(st.lists(VALUES, max_size=3), st.lists(st.integers(-2, 3), max_size=4), VALUES)
def test_token_ids_and_turns(ids, turns, other):
    for row in (
        {"prompt_ids": [1], "chosen_ids": ids, "rejected_ids": other},
        {"prompt_ids": other, "chosen_ids": [1], "rejected_ids": ids},
    ):
        works_or_refuses(lambda row=row: [*check_tokenized(iterable([row]), "train", 8, True)])
    row = {"chosen_ids": [1] * len(turns), "rejected_ids": [1], "chosen_turns": turns, "rejected_turns": [0]}
    works_or_refuses(lambda: check_turns(row, 0, "train"))
    works_or_refuses(lambda: check_turns({**row, "rejected_turns": other}, 0, "train"))


def iterable(rows: list[dict]) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@examples(150)
@given(st.text(max_size=20), st.text(max_size=20), st.one_of(st.none(), st.integers(1, 5)))
@example("", "", None)
@example("", "", 1)
def test_tokens(prompt, completion, length):
    ids = works_or_refuses(lambda: reward_ids(prompt, completion, TOKENIZER, max_length=length))
    assert ids is None or length is None or len(ids) <= length
    works_or_refuses(lambda: prompt_ids(prompt, TOKENIZER, False))
    works_or_refuses(lambda: template_arguments({"tools": prompt, "chat_template_kwargs": completion}))


@examples(8)
@given(
    st.lists(
        st.fixed_dictionaries({"prompt": SPOKEN, "chosen": SPOKEN, "rejected": SPOKEN, "score_chosen": CELLS}),
        min_size=1,
        max_size=3,
    )
)
@example([{"prompt": "a", "chosen": [], "rejected": [None], "score_chosen": 0.5}])
@example([{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c", "score_chosen": 0.5}])
def test_inspection(rows):
    data = works_or_refuses_arrow(lambda: Dataset.from_list(rows))
    if data is not None:
        report = works_or_refuses(lambda: inspect_preferences(data))
        if report is not None:
            assert report.tables() and json.dumps(report.to_dict())


def works_or_refuses_arrow(action: Callable[[], Any]) -> Any:
    """Rows of several types, numbers out of range and lone surrogates are no dataset: that is not ours to say."""
    try:
        return action()
    except Exception:
        return None


# Files


@examples(50)
@given(st.sampled_from(["json", "jsonl", "csv", "parquet"]), BYTES, st.integers(1, 3))
@example("json", b"null", 1)
@example("jsonl", b'{"a": "\xe9"}', 1)
@example("json", b"[" * 5000, 1)
@example("csv", b"a,a\n1,2\n", 1)
@example("json", b"{}", 1)
def test_data_files(folder, kind, content, times):
    path = folder / f"data.{kind}"
    path.write_bytes(b"\n".join([content] * times))
    data = works_or_refuses(lambda: load_preferences(str(path)))
    if data is not None:
        assert len([*data]) == len(data)  # each row can be read


STATE = st.fixed_dictionaries(
    {
        "log_history": st.one_of(
            VALUES, st.lists(st.dictionaries(st.sampled_from(["step", "loss", "x"]), PLAIN, max_size=3), max_size=3)
        )
    }
)


@examples(150)
@given(st.one_of(BYTES, STATE.map(lambda state: json.dumps(state, default=str).encode())))
@example(b'{"log_history": [{"step": NaN, "loss": 1}]}')
@example(b'{"log_history": [{"step": 1, "loss": 1' + b"0" * 400 + b"}]}")
@example(b"[" * 100_000)
def test_logged_runs(folder, content):
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "trainer_state.json").write_bytes(content)
    shown(run)


@examples(150)
@given(st.text(alphabet='step,loss\n"0123456789._-+einfa \r;\0é', max_size=40), st.booleans())
@example("1_0,2\n", True)
@example("1,2,3\n", True)
@example("inf,1\n", True)
def test_logged_tables(folder, text, headed):
    path = folder / "run.csv"
    path.write_text("step,loss\n" * headed + text, newline="")
    shown(path)


def shown(path: Path) -> None:
    run = works_or_refuses(lambda: read_run(path))
    if run is not None:
        assert all(math.isfinite(step) for values in run.series.values() for step in values)
        assert table({"run": [run]}, works_or_refuses(lambda: chosen_metrics([run])) or [])


@examples(100)
@given(BYTES, BYTES, st.sampled_from(["trainer_state.json", "config.json", "model.safetensors", "optimizer.pt"]))
@example(b"[" * 100_000, b"", "config.json")
def test_checkpoints(folder, content, other, name):
    for path in folder.glob("checkpoint/*"):
        path.unlink()
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    (checkpoint / LOSSES_FILE).write_bytes(content)
    (checkpoint / STATE_FILE).write_bytes(other)
    (checkpoint / name).write_bytes(content)
    works_or_refuses(lambda: check_checkpoint(checkpoint))
    for loss in ("beta_dpo", "offset"):
        works_or_refuses(lambda loss=loss: Terms({loss: get_loss(loss)}, {loss: 1.0}).load(checkpoint))


@examples(150)
@given(st.lists(BYTES, max_size=3))
@example([b'["a", NaN]'])
@example([b"[" * 100_000])
def test_caches(folder, lines):
    path = folder / "name-0.jsonl"
    path.write_bytes(b"\n".join(lines))
    scores = Ledger(folder, "name").read()
    assert all(isinstance(key, str) and math.isfinite(value) for key, value in scores.items())
    assert not _kept(path, 1, 2) or len(read_sealed(path)) == 1
