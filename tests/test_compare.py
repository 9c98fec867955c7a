"""`trl-ext compare` on histories written by hand."""

import csv
import json
import math
import os

import pytest

from trl_ext.cli import main
from trl_ext.compare import chosen_metrics, grouped, read_run
from trl_ext.compare.metrics import better, cell


def entries(**metrics):
    """A history as transformers writes it: one entry per step and metric, beside the epoch."""
    return [
        {name: value, "epoch": 0.1 * step, "step": step}
        for name, values in metrics.items()
        for step, value in values.items()
    ]


def write(folder, history, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": history, **more}))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one loss, the state of the second in its checkpoints, and a run of another as a CSV file."""
    write(
        tmp_path / "dpo-seed1",
        entries(
            **{"loss": {10: 0.7, 20: 0.5}, "eval_rewards/accuracies": {10: 0.6, 20: 0.5}, "objective/kl": {20: 1.0}}
        ),
    )
    write(tmp_path / "dpo-seed2" / "checkpoint-9", entries(loss={9: 9.0}))
    write(
        tmp_path / "dpo-seed2" / "checkpoint-30",
        entries(
            **{"loss": {10: 0.5, 30: 0.1}, "eval_rewards/accuracies": {10: 0.8, 20: 0.7}, "objective/kl": {20: 2.0}}
        ),
    )
    (tmp_path / "offset.csv").write_text("name,Step,loss,objective/kl\nx,10,0.9,\nx,20,0.3,0.25\n")
    return [tmp_path / name for name in ("dpo-seed1", "dpo-seed2", "offset.csv")]


def table_of(path):
    with open(path) as file:
        return {(row["metric"], row["run"]): row for row in csv.DictReader(file)}


def test_the_table(runs, tmp_path, capsys):
    assert main(["compare", *map(str, runs), "--csv", str(tmp_path / "table.csv")]) == 0
    shown = capsys.readouterr().out
    found = table_of(tmp_path / "table.csv")
    assert list(found) == [
        (metric, run) for metric in ("objective/kl", "eval_rewards/accuracies", "loss") for run in ("dpo", "offset")
    ]

    def numbers(metric, run):
        row = found[metric, run]
        return [
            row["seeds"],
            *(float(row[name]) if row[name] else None for name in ("last", "last_spread", "best", "best_spread")),
        ]

    # Standard deviations of two values: their distance over the root of 2
    assert numbers("loss", "dpo") == ["2", pytest.approx(0.3), pytest.approx(0.4 / math.sqrt(2)), pytest.approx(0.3), pytest.approx(0.4 / math.sqrt(2))]  # fmt: skip
    assert numbers("eval_rewards/accuracies", "dpo") == ["2", pytest.approx(0.6), pytest.approx(0.2 / math.sqrt(2)), pytest.approx(0.7), pytest.approx(0.2 / math.sqrt(2))]  # fmt: skip
    assert numbers("objective/kl", "dpo") == ["2", 1.5, pytest.approx(1 / math.sqrt(2)), None, None], "no best KL"
    assert numbers("loss", "offset") == ["1", 0.3, None, 0.3, None]
    assert numbers("eval_rewards/accuracies", "offset") == ["0", None, None, None, None]
    lines = [line.split() for line in shown.splitlines()]
    at = lines.index(["│", "loss", *["│"] * 5])
    assert lines[at + 1 : at + 3] == [
        ["│", "dpo", "│", "2", "│", "0.3", "±", "0.28", "│", "0.3", "±", "0.28", "│", "20-30", "│"],
        ["│", "offset", "│", "1", "│", "0.3", "│", "0.3", "│", "20", "│"],
    ]
    assert "mean ± standard deviation over seeds" in shown


def test_chosen_metrics(runs, capsys):
    assert main(["compare", str(runs[0]), "--metrics", "loss"]) == 0
    shown = capsys.readouterr().out
    assert "loss" in shown and "accuracies" not in shown and "seeds" not in shown
    assert main(["compare", *map(str, runs), "--metrics", "loss", "objective/klm"]) == 2
    error = capsys.readouterr().err
    assert "No run has the metric 'objective/klm'. Did you mean 'objective/kl'? There are" in error
    assert "['eval_rewards/accuracies', 'loss', 'objective/kl']" in error


def test_of_like_metrics_the_one_that_most_runs_have(tmp_path):
    both = {"rewards/accuracies": {1: 0.5}, "eval_rewards/accuracies": {1: 0.5}}
    one = read_run(write(tmp_path / "one", entries(**both)))
    two = read_run(write(tmp_path / "two", entries(**{"rewards/accuracies": {1: 0.5}})))
    assert chosen_metrics([one]) == ["eval_rewards/accuracies"]
    assert chosen_metrics([one, two]) == ["rewards/accuracies"]
    other = read_run(write(tmp_path / "other", entries(grad_norm={1: 0.5})))
    with pytest.raises(ValueError, match=r"None of the metrics .* Choose some of \['grad_norm'\] with --metrics"):
        chosen_metrics([other])


@pytest.mark.parametrize(
    ("metric", "end"),
    [
        ("eval_loss", min), ("loss/offset", min), ("eval_pairs/calibration_error", min), ("eval_pairs/log_loss", min),
        ("eval_samples/win_rate", max), ("rewards/accuracies", max), ("objective/scores", max), ("rewards/margins", max),
        ("learning_rate", None), ("rewards/rejected", None), ("objective/kl", None), ("mean_length", None),
        ("reference/scores", None), ("objective/non_score_reward", None),
    ],
)  # fmt: skip
def test_which_end_is_the_better_one(metric, end):
    assert better(metric) is end


def test_values_that_are_not_finite(tmp_path, capsys):
    """A run that broke off says so; its best was before."""
    path = write(tmp_path / "run-s1", entries(loss={0: math.nan, 1: 0.5, 2: math.nan}))
    found = cell([read_run(path)], "loss")
    assert math.isnan(found.last[0]) and found.best == [0.5]
    other = write(tmp_path / "run-s2", entries(loss={1: 0.4, 2: 0.3}))
    assert main(["compare", str(path), str(other)]) == 0
    assert "nan" in capsys.readouterr().out


# Groups


def labels(tmp_path, names, by="seed"):
    runs = [read_run(write(tmp_path / name, entries(loss={1: 0.5}))) for name in names]
    return {
        label: [str(run.path.relative_to(tmp_path)) for run in members] for label, members in grouped(runs, by).items()
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["dpo-seed1", "dpo-seed2", "ipo_s3"], {"dpo": ["dpo-seed1", "dpo-seed2"], "ipo": ["ipo_s3"]}),
        (["a-seed=1-lr2", "a-seed=2-lr2", "a-seed=1-lr3"], {"a-lr2": ["a-seed=1-lr2", "a-seed=2-lr2"], "a-lr3": ["a-seed=1-lr3"]}),
        (["dpo/seed1", "dpo/seed2", "ipo/seed1"], {"dpo": ["dpo/seed1", "dpo/seed2"], "ipo": ["ipo/seed1"]}),
        (["x/seed_1", "x/Seed_2"], {"x": ["x/seed_1", "x/Seed_2"]}),
        (["units1", "units2"], {"units1": ["units1"], "units2": ["units2"]}),
        (["a/out", "b/out"], {"a/out": ["a/out"], "b/out": ["b/out"]}),
        (["a-s1/checkpoint-5", "a-s2/checkpoint-5"], {"a/checkpoint-5": ["a-s1/checkpoint-5", "a-s2/checkpoint-5"]}),
    ],
)  # fmt: skip
def test_seeds_by_name(names, expected, tmp_path):
    assert labels(tmp_path, names) == expected


def test_other_groups(tmp_path):
    names = ["dpo/first", "dpo/second", "ipo/first"]
    assert labels(tmp_path, names, "folder") == {"dpo": names[:2], "ipo": names[2:]}
    assert labels(tmp_path, ["a-s1", "a-s2"], "none") == {"a-s1": ["a-s1"], "a-s2": ["a-s2"]}


def test_seeds_of_other_losses_are_refused(tmp_path, capsys):
    paths = []
    for number, alpha in enumerate([0.5, 0.5, 1.0], start=1):
        paths.append(write(tmp_path / f"run-s{number}", entries(loss={1: 0.5})))
        folder = write(paths[-1] / "checkpoint-1", entries(loss={1: 0.5}))
        (folder / "losses.json").write_text(json.dumps({"offset": {"weight": 1.0, "alpha": alpha}}))
    assert main(["compare", *map(str, paths[:2])]) == 0
    capsys.readouterr()
    assert main(["compare", *map(str, paths)]) == 2
    error = capsys.readouterr().err
    assert "would be seeds of 'run', but were trained with other losses" in error and "--group none" in error
    assert main(["compare", *map(str, paths), "--group", "none"]) == 0


# Where the history lies


def test_the_longest_history(tmp_path):
    folder = write(tmp_path / "run", entries(loss={1: 1.0, 5: 0.5}))  # of a training that was resumed later
    write(folder / "checkpoint-10", entries(loss={1: 1.0, 5: 0.5, 10: 0.2}))
    write(folder / "checkpoint-9", entries(loss={1: 1.0, 5: 0.5, 9: 0.3}))
    assert read_run(folder).series == {"loss": {1: 1.0, 5: 0.5, 10: 0.2}}
    write(folder, entries(loss={1: 1.0, 5: 0.5, 10: 0.2, 12: 0.1}))
    assert read_run(folder).series["loss"][12] == 0.1
    assert read_run(folder / "trainer_state.json").series == read_run(folder).series


def test_what_counts_as_a_metric(tmp_path):
    history = [{"loss": 0.5, "epoch": 0.1, "step": 1, "note": "text", "flag": True, "none": None}]
    assert read_run(write(tmp_path / "run", history)).series == {"loss": {1: 0.5}}


def broken(tmp_path):
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "no_run").mkdir()
    (tmp_path / "no_run" / "model.safetensors").touch()
    write(tmp_path / "above" / "run", entries(loss={1: 0.5}))
    write(tmp_path / "above" / "other" / "checkpoint-3", entries(loss={1: 0.5}))
    write(tmp_path / "silent", [])
    for name, text in {
        "empty": "",
        "cut": '{"log_history": [{"lo',
        "list": "[]",
        "no_step": '{"log_history": [{"loss": 1}]}',
    }.items():
        write(tmp_path / name, [])
        (tmp_path / name / "trainer_state.json").write_text(text)
    for name, text in {
        "empty.csv": "", "head.csv": "step,loss\n", "steps.csv": "loss\n0.1\n", "words.csv": "step,loss\nfirst,0.1\n",
        "texts.csv": "step,name\n1,x\n", "run.txt": "x",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes.csv").write_bytes(b"step,loss\n1,\xff\xfe\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "There is no run"),
        ("empty_folder", "holds no trainer_state.json, nor does a checkpoint in it; it is empty. A run saves one"),
        ("no_run", "it holds ['model.safetensors']. A run saves one with each checkpoint"),
        ("above", "it holds ['other', 'run']. Its folders are runs: give them."),
        ("silent", "has logged no metric yet"),
        ("empty", "trainer_state.json' is empty"),
        ("cut", "is no state of a trainer (JSONDecodeError"),
        ("list", "is no state of a trainer (TypeError"),
        ("no_step", "is no state of a trainer (KeyError: 'step')"),
        ("empty.csv", "has no rows"),
        ("head.csv", "has no rows"),
        ("steps.csv", "has no column 'step'; its columns are ['loss']"),
        ("words.csv", "Line 2 of"),
        ("texts.csv", "has logged no metric yet"),
        ("run.txt", "is no run: give a folder"),
        ("bytes.csv", "cannot be read as CSV"),
    ],
)
def test_what_is_no_run(name, message, tmp_path, monkeypatch, capsys):
    broken(tmp_path)
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "good", entries(loss={1: 0.5}))
    assert main(["compare", str(good), name]) == 2
    error = capsys.readouterr().err
    assert message in error and name in error and "Traceback" not in error


def test_a_run_given_twice(runs, capsys):
    assert main(["compare", str(runs[0]), f"{runs[0]}{os.sep}"]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_a_table_that_cannot_be_written(runs, capsys):
    assert main(["compare", str(runs[0]), "--csv", "nowhere/table.csv"]) == 2
    assert "Cannot write 'nowhere/table.csv': No such file or directory" in capsys.readouterr().err


# Plots


@pytest.fixture
def figure(monkeypatch):
    """The figure that is drawn, kept open."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda *args: None)
    yield plt.gcf
    monkeypatch.undo()
    plt.close("all")


def test_the_plot(runs, tmp_path, figure, capsys):
    assert main(["compare", *map(str, runs), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 1000
    kl, accuracy, loss = figure().axes
    assert [panel.get_title() for panel in (kl, accuracy, loss)] == ["objective/kl", "eval_rewards/accuracies", "loss"]
    dpo, offset = loss.get_lines()
    # The seeds ran to 20 and 30; at 20 the second lies halfway between 0.5 and 0.1
    assert dpo.get_xydata().tolist() == [[10, pytest.approx(0.6)], [20, pytest.approx(0.4)]]
    assert offset.get_xydata().tolist() == [[10, 0.9], [20, 0.3]]
    (band,) = loss.collections
    edges = {(x, round(y, 9)) for x, y in band.get_paths()[0].vertices.tolist()}
    low, high = 0.4 - 0.2 / math.sqrt(2), 0.4 + 0.2 / math.sqrt(2)
    assert {(20.0, round(low, 9)), (20.0, round(high, 9))} <= edges
    assert [line.get_label() for line in accuracy.get_lines()] == ["dpo"] and len(kl.get_lines()) == 2
    assert all(line.get_marker() == "o" for line in kl.get_lines()), "a line of one point would not be seen"
    (legend,) = figure().legends
    assert [text.get_text() for text in legend.get_texts()] == ["dpo", "offset"]


def test_names_in_a_plot_do_not_collide(tmp_path, figure):
    names = [f"a-run-with-quite-a-long-name-{letter}" for letter in "abcdefghij"]
    paths = [write(tmp_path / name, entries(loss={1: 0.5, 2: 0.4}, eval_loss={1: 1.0})) for name in names]
    assert (
        main(["compare", *map(str, paths), "--plot", str(tmp_path / "plot.svg"), "--metrics", "loss", "eval_loss"])
        == 0
    )
    drawn = figure()
    boxes = [text.get_window_extent() for text in drawn.legends[0].get_texts()]
    panels = [panel.get_tightbbox() for panel in drawn.axes]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in [*boxes[:number], *panels])
    whole = drawn.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 for box in boxes)
    styles = [(line.get_color(), line.get_linestyle()) for line in drawn.axes[0].get_lines()]
    assert len(set(styles)) == 10, "more runs than colours"


def test_seeds_without_a_step_in_common(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = [
        write(tmp_path / "a-s1", entries(loss={1: 0.5, 2: 0.4})),
        write(tmp_path / "a-s2", entries(loss={5: 0.5, 6: 0.4})),
    ]
    assert main(["compare", *map(str, paths), "--plot", str(tmp_path / "plot.png")]) == 2
    assert "have no steps of 'loss' in common: one ends at 2, another begins at 5" in capsys.readouterr().err


def test_a_plot_that_cannot_be_drawn(runs, capsys):
    assert main(["compare", str(runs[0]), "--plot", "nowhere/plot.png"]) == 2
    assert "there is no folder 'nowhere'" in capsys.readouterr().err


def test_a_run_of_the_trainer(tiny_model_dir, tmp_path, capsys):
    """What a trainer writes is read."""
    import trl_ext
    from tests.helpers import build

    for seed in (1, 2):
        folder = tmp_path / f"offset-seed{seed}"
        trainer = build(
            trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, folder,
            loss_type="offset", seed=seed, max_steps=2, save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train()
    last = [
        run.series["rewards/accuracies"][2] for run in (read_run(tmp_path / f"offset-seed{seed}") for seed in (1, 2))
    ]
    assert last[1] == [e["rewards/accuracies"] for e in trainer.state.log_history if "rewards/accuracies" in e][-1]
    assert (
        main(
            [
                "compare",
                str(tmp_path / "offset-seed1"),
                str(tmp_path / "offset-seed2"),
                "--csv",
                str(tmp_path / "t.csv"),
            ]
        )
        == 0
    )
    assert float(table_of(tmp_path / "t.csv")["rewards/accuracies", "offset"]["last"]) == pytest.approx(sum(last) / 2)
