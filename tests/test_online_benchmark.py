"""The benchmark of online steps: what its paths do in a step, that they agree, and its arithmetic. Nothing is timed here."""

import csv
import json
import math
import re
import sys
from collections import Counter
from itertools import chain

import pytest
import torch

from tests.benchmark_modules import module


TINY = ["--size", "tiny", "--vocab", "500", "--prompts", "2", "--prompt", "5", "9", "--new-tokens", "6", "--steps", "1",
        "--memory", "none"]  # fmt: skip


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return module("online")


def rows_of(online, *flags):
    flags = [*TINY, *flags]
    return online.results(online.parse(flags), flags)


def test_all_paths_take_the_same_step(online):
    rows = rows_of(online, "--accumulation", "2", "--paths", *online.PATHS)
    assert [row["path"] for row in rows] == ["trl", "trl-no-checkpointing", "trl-best", "ours"]
    assert [row["checkpointing"] for row in rows] == [True, False, False, True]
    for row in rows:
        # TRL's gradients are a sum over micro-batches, ours a mean: they are compared as what they are means of
        assert row["loss_difference"] < 1e-5 and row["gradient_difference"] < 1e-5
        assert row["completion_tokens"] == 6.0
        assert all(row[part] > 0 for part in ("generate", "score", "learn", "update", "completion_ms"))
    assert rows[0]["speed"] == rows[1]["speed_no_checkpointing"] == rows[2]["speed_best"] == 1.0
    assert rows[0]["gradient_difference"] == 0.0 < rows[3]["gradient_difference"]


def test_prompts_of_a_step(online):
    """The second step has the third and fourth micro-batch in each path; TRL's best has them in one."""
    args = online.parse([*TINY, "--accumulation", "2"])
    texts = module("online_paths").prompt_texts(args)
    assert len(texts) == len(set(texts)) == 4 * 2 * 2
    for name, sizes in {"trl": [2, 2], "trl-best": [4], "ours": [2, 2]}.items():
        path = online.Path(name, args)
        path.step()
        seen, learn = [], path.trainer.training_step

        def step(model, inputs, *rest, seen=seen, learn=learn):
            seen.append(inputs["prompt"])
            return learn(model, inputs, *rest)

        path.trainer.training_step = step
        path.step()
        assert [len(prompts) for prompts in seen] == sizes
        assert [*chain(*seen)] == texts[4:8]
        assert path.trainer.current_gradient_accumulation_steps == len(sizes)
        assert path.trainer.state.global_step == 2 and len(path.steps) == 2
        assert path.steps[1]["tokens"] == 8 * 6


def test_four_completions_of_a_prompt(online):
    """TRL's trainer gets each prompt twice: as many completions in all, and the same ones where they are given."""
    args = online.parse([*TINY, "--num-generations", "4"])
    given = module("online_paths").given_completions(args)
    theirs, ours = online.Path("trl", args), online.Path("ours", args)
    prompts = list(given)
    _, mask, ids, completion_mask, _ = theirs._given_theirs(None, [each for each in prompts for _ in range(2)])
    assert len(mask) == 8 and completion_mask.all()
    # In halves, as TRL pairs row i with row 4 + i
    first, second = prompts
    expected = [given[first][0], given[first][2], given[second][0], given[second][2],
                given[first][1], given[first][3], given[second][1], given[second][3]]  # fmt: skip
    assert torch.equal(ids, torch.stack(expected))
    completions = ours._given_ours(None, {"prompt": prompts})
    blocks = [given[prompt][k] for k in range(4) for prompt in prompts]
    assert all(map(torch.equal, completions.ids, blocks)) and not completions.ended.any()
    for path in (theirs, ours):
        path.step()
        assert path.steps[0]["tokens"] == 2 * 4 * 6


def test_scaled(online, tmp_path, monkeypatch, capsys):
    flags = ["--paths", "trl", "ours", "--csv", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["online.py", *TINY, *flags, "--scale", "num_generations", "2", "4"])
    online.main()
    assert "comple-" in capsys.readouterr().out and (tmp_path / "plot.png").stat().st_size > 0
    with open(tmp_path / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["path"], row["num_generations"]) for row in rows] == [
        ("trl", "2"), ("ours", "2"), ("trl", "4"), ("ours", "4"),
    ]  # fmt: skip
    for row in rows:
        completions = 2 * int(row["num_generations"])
        assert float(row["completion_ms"]) == pytest.approx(1e3 * float(row["seconds"]) / completions)
        assert row["device"] and row["torch"] and row["trl"] and row["prompt"] == "[5, 9]"
    # Of four, ours learns from other pairs than TRL's
    assert float(rows[1]["gradient_difference"]) < 1e-5 and rows[3]["gradient_difference"] == ""


@pytest.mark.parametrize(
    ("axis", "value", "expected"), [("accumulation", 3, 3), ("prompt", 7, [7, 7]), ("num_generations", 8, 8)]
)
def test_each_axis_reaches_the_run(online, axis, value, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(online, "measure", lambda args, flags: seen.append((args, flags)) or [])
    rows_of(online, "--scale", axis, "2", str(value))
    assert getattr(seen[1][0], axis) == expected and seen[0][0] is not seen[1][0]
    assert "--scale" not in seen[1][1] and seen[1][1][-2:] == [f"--{axis}", str(value)]


def test_ragged(online):
    """Three in `new_tokens` at each token, the same in both; given completions have drawn lengths too."""
    paths = module("online_paths")
    logits = torch.zeros(500)
    logits[1] = paths.eos_bias(500, 6)
    assert (logits / 0.9).softmax(0)[1] == pytest.approx(0.5)

    rows = rows_of(
        online, "--ragged", "--new-tokens", "24", "--paths", "trl", "ours", "--prompts", "8", "--steps", "2"
    )
    # A geometric length of mean 8, cut at 24: 8 (1 - (7/8)^24) = 7.68, of 16 completions in two steps; +- 4 of its deviations
    deviation = 7.0 / math.sqrt(32)
    assert all(abs(row["completion_tokens"] - 7.68) < 4 * deviation for row in rows)
    assert rows[1]["gradient_difference"] < 1e-5
    args = online.parse([*TINY, "--ragged", "--new-tokens", "24"])
    given = [*chain(*paths.given_completions(args).values())]
    lengths = Counter(map(len, given))
    assert len(lengths) > 1 and all((len(ids) < 24) == (ids[-1] == 1) for ids in given)


def test_figures(online):
    """By hand: ratios are medians over rounds, learning is what the parts leave, a completion costs its share."""
    seconds = {"trl": [9.0, 12.0, 10.0], "trl-best": [6.0, 3.0, 5.0], "ours": [3.0, 2.0, 4.0]}
    part = {"generate": 1.0, "score": 0.25, "update": 0.25}
    steps = {name: [{**part, "tokens": 40}, {**part, "tokens": 40}, {**part, "tokens": 28}] for name in seconds}
    found = online.figures("ours", seconds, steps, completions=4)
    assert found == {
        "seconds": 3.0, "seconds_min": 2.0, "seconds_max": 4.0,
        "completion_ms": 750.0, "completion_tokens": 9.0,
        "speed": 3.0,  # of 3, 6, 2.5
        "speed_best": 1.5,  # of 2, 1.5, 1.25
        "generate": 1.0, "score": 0.25, "update": 0.25,
        "learn": 1.5,  # of 1.5, 0.5, 2.5
        "learn_speed": 5.0,  # of 7.5 / 1.5, 10.5 / 0.5, 8.5 / 2.5
    }  # fmt: skip


def test_memory(online, monkeypatch, capsys):
    peaks = {"trl": {"peak_mb": 900.0, "added_mb": 600.0}, "ours": {"peak_mb": 600.0, "added_mb": 150.0}}
    assert online.beside_trl(peaks, "ours") == {
        "peak_mb": 600.0, "added_mb": 150.0, "memory": pytest.approx(2 / 3), "added_memory": 0.25,
    }  # fmt: skip
    assert online.beside_trl({}, "ours") == {}
    monkeypatch.setattr(sys, "argv", ["online.py", *TINY, "--measure-memory", "ours"])
    online.main()
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The kernel adds its counts of pages up now and then: of a process that has had its peak, a little may be missing
    assert measured["peak_mb"] > 100 and measured["peak_mb"] >= measured["added_mb"] > -2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--paths", "ours"], "--paths begins with trl"),
        (["--no-checkpointing", "--paths", "trl", "trl-no-checkpointing"], "leave one of them out"),
        (["--num-generations", "3"], "--num-generations takes an even number, as TRL's trainer samples two; not 3"),
        (["--accumulation", "0"], "--accumulation, --prompts and --steps take numbers from 1"),
        (["--prompt", "9", "5"], r"--prompt takes MIN and MAX, or one number of tokens; not \[9, 5\]"),
        (["--prompt", "1", "2", "3"], "--prompt takes MIN and MAX"),
        (["--ragged", "--new-tokens", "3"], "--ragged draws an end .* 4 at least"),
        (["--scale", "vocab", "4"], "--scale takes one of accumulation, num_generations, prompt, then values"),
        (["--scale", "accumulation"], "--scale takes one of"),
    ],
)
def test_a_wrong_flag_says_what_is_right(online, flags, message, capsys):
    with pytest.raises(SystemExit):
        online.parse(flags)
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(message, err), err


def test_a_wrong_value_of_a_scale_ends_before_the_first_is_measured(online, monkeypatch):
    monkeypatch.setattr(online, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        rows_of(online, "--scale", "num_generations", "2", "3")
