"""What the demonstration says of its runs: numbers, sentences, the plot, and progress where there is no terminal."""

import io
import math

import pytest
from rich.console import Console

from trl_ext.demo import examples, report
from trl_ext.demo.judging import judge, sentence
from trl_ext.demo.progress import Lines, progress


def path(*points):
    """A path of (KL, reward) points, longer by a token with each."""
    return [{"step": at, "kl": kl, "reward": reward, "length": 10.0 + at} for at, (kl, reward) in enumerate(points)]


def run(loss, seed, *points, data="plain"):
    return {"loss": loss, "data": data, "seed": seed, "points": path(*points), "accuracy": 0.5, "seconds": 2.0}


def straight(loss, seed, slope, end=4.0, start=0.0):
    """Reward rises with the root of KL up to the end."""
    return run(
        loss, seed, (0, start), (end / 4, start + slope * math.sqrt(end) / 2), (end, start + slope * math.sqrt(end))
    )


# Mean of the roots of a quarter, a half and all of 4
ROOTS = (1 + math.sqrt(2) + 2) / 3


def test_reward_is_compared_at_the_kl_that_all_reach():
    """DPO ends at KL 4, offset at 9 and with more reward; up to KL 4 both have earned the same per root of KL, or nearly so."""
    runs = [straight("sigmoid", seed, 0.5, 4.0) for seed in (0, 1, 2)]
    runs += [straight("offset", seed, slope, 9.0) for seed, slope in enumerate((0.6, 0.7, 0.8))]
    judged = judge(runs, "reward")
    assert (judged.kl, judged.nearest, judged.baseline, judged.seeds) == (4.0, "sigmoid", "sigmoid", [0, 1, 2])
    assert judged.kls == "1, 2 and 4"
    dpo, offset = judged.rows
    assert dpo["at_equal_kl"].mean == pytest.approx(0.5 * ROOTS)
    assert offset["at_equal_kl"].mean == pytest.approx(0.7 * ROOTS)
    assert offset["difference"].mean == pytest.approx(0.2 * ROOTS)
    # Differences of 0.1, 0.2 and 0.3 per root: standard error 0.1 / sqrt(3), and t of two degrees of freedom
    reach = 4.3027 * 0.1 / math.sqrt(3) * ROOTS
    assert offset["difference"].low == pytest.approx(0.2 * ROOTS - reach, rel=1e-4)
    assert offset["difference"].high == pytest.approx(0.2 * ROOTS + reach, rel=1e-4)
    assert dpo["difference"] is None and dpo["end_difference"] is None
    assert offset["end"].mean == pytest.approx(2.1) and offset["end_kl"].mean == 9
    assert offset["end_difference"].mean == pytest.approx(1.1)
    assert (dpo["gain"].low, dpo["gain"].high) == (dpo["at_equal_kl"].low, dpo["at_equal_kl"].high)


def test_differences_are_paired_by_seed():
    """What a seed adds to all losses is not in the interval of their difference."""
    runs = [straight("sigmoid", seed, 0.5 + seed) for seed in (0, 1, 2)]
    runs += [straight("offset", seed, 0.6 + seed) for seed in (2, 0, 1)]
    offset = judge(runs, "reward").rows[1]
    assert offset["difference"].low == pytest.approx(0.1 * ROOTS) == pytest.approx(offset["difference"].high)
    assert offset["at_equal_kl"].reach > 1


def test_without_dpo_the_first_is_compared_with():
    judged = judge([straight(name, seed, 0.5) for name in ("offset", "anchored") for seed in (0, 1)], "reward")
    assert judged.baseline == "offset" and judged.rows[0]["difference"] is None
    assert "At equal KL no difference to offset is shown" in sentence(judged)


def with_differences(*differences, loss="offset", end=4.0):
    runs = [straight("sigmoid", seed, 1.0) for seed in range(len(differences))]
    return runs + [straight(loss, seed, 1.0 + each, end) for seed, each in enumerate(differences)]


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ((0.3, 0.31, 0.32), "At equal KL more than sigmoid: offset +0.46 ["),
        ((-0.3, -0.31, -0.32), "At equal KL less than sigmoid: offset -0.46 ["),
        ((-0.3, 0.1, 0.32), "At equal KL no difference to sigmoid is shown, the interval holds 0: offset +0.06 ["),
    ],
)
def test_clear_and_unclear_differences(differences, said):
    text = sentence(judge(with_differences(*differences), "reward"))
    assert said in text and text.count("At equal KL") == 1
    assert text.startswith("At KLs of 1, 2 and 4 nats every loss has more true reward than the start.")
    assert "At the end" not in text
    assert text.endswith("In brackets: 95 % intervals over 3 seeds.")


def test_more_reward_at_the_end_by_more_kl_alone_is_named():
    """Contradicting numbers: more reward at the end, less of it at equal KL, since the loss has moved three times as far."""
    text = sentence(judge(with_differences(-0.2, -0.21, -0.22, end=16.0), "reward"))
    assert "At equal KL less than sigmoid: offset -0.31 [" in text
    # At the end 4 (1 - 0.21) less 2: 1.16
    assert "At the end offset has more true reward than sigmoid, +1.16 [" in text
    assert "], and equal KL shows the opposite: its KL is then 16, that of sigmoid 4." in text
    unclear = sentence(judge(with_differences(-0.1, 0.01, 0.12, end=16.0), "reward"))
    assert "], which equal KL does not show: its KL is then 16, that of sigmoid 4." in unclear


def test_what_does_not_rise_over_the_start_is_named():
    runs = [straight("sigmoid", seed, 0.5) for seed in (0, 1, 2)]
    runs += [straight("offset", seed, slope) for seed, slope in enumerate((-0.5, -0.51, -0.52))]
    runs += [straight("anchored", seed, slope) for seed, slope in enumerate((-0.5, 0.0, 0.52))]
    text = sentence(judge(runs, "reward"))
    assert "nats more true reward than the start: sigmoid +0.74 [0.74, 0.74]." in text
    assert "nats less true reward than the start: offset -0.75 [" in text
    assert "it cannot be said whether there is more true reward than at the start: anchored +0.01 [" in text


def test_one_seed_says_nothing():
    judged = judge(with_differences(0.3), "reward")
    assert sentence(judged).startswith("One seed has no interval")
    rows = report.rows([judged], with_differences(0.3))
    assert rows[2]["difference"] == pytest.approx(0.3 * ROOTS) and rows[2]["difference_low"] is None
    assert "±" not in shown(judged, rows)


def test_a_loss_that_has_not_moved_the_model():
    runs = with_differences(0.3, 0.4) + [run("anchored", seed, (0, 0.1), (0, 0.1)) for seed in (0, 1)]
    judged = judge(runs, "reward")
    assert sentence(judged).startswith("At equal KL nothing can be said: anchored has not moved the model")
    assert report.rows([judged], runs)[2]["at_equal_kl"] is None
    assert "at equal KL:" not in shown(judged, report.rows([judged], runs))


def shown(judged, rows):
    console = Console(file=io.StringIO(), width=80)
    console.print(report.table(judged, rows, "Title"))
    return console.file.getvalue()


def test_the_table():
    runs = [*with_differences(0.2, 0.3, 0.4), *with_differences(-0.2, 0.1, 0.2, loss="length_regularized")[3:]]
    judged = judge(runs, "reward")
    rows = report.rows([judged], runs)
    text = shown(judged, rows)
    cells = {
        line.split("│")[1].strip(): [each.strip() for each in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert cells["start"] == ["", "", "0.00", "0.00", "10.0"]
    assert cells["sigmoid"] == ["1.47 ± 0.00", "", "2.00", "4.00", "12.0"]
    # 1.3 and 0.3 times the mean root; 4.303 x 0.1 / sqrt(3) = 0.248 of it to either side
    assert cells["offset"] == ["1.91 ± 0.37", "+0.44 ± 0.37", "2.60", "4.00", "12.0"]
    assert "length_regularized" in cells and "…" not in text
    assert "at equal KL: the mean at 1, 2 and 4 nats, which all runs reach" in text
    assert "mean ± half a 95 % interval over 3 seeds" in text
    assert (rows[0]["loss"], rows[0]["reward"], rows[0]["kl"]) == ("start", 0.0, 0.0)
    assert (rows[2]["seconds"], rows[2]["accuracy"], rows[2]["common_kl"]) == (2.0, 0.5, 4.0)


def written(loss, seed, before, after, reward):
    """A run with one example; it ends at a reward."""
    found = run(loss, seed, (0, 0), (4, reward))
    return {**found, "examples": [{"prompt": "notes on the old drama :", "before": before, "after": after}]}


def cells(table):
    """Title, cells of each line, caption; no line is wider than 80."""
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().split("\n")
    assert max(map(len, lines)) <= 80
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.strip("┏┳━┓┡╇┩└┴─┘┃├┼┤")]


def test_what_is_written_stands_beside_what_the_start_wrote():
    first, later = "the plot was slow .", "the plot was superb . [/b] the cast was awful . the lead was superb ."
    runs = [written("sigmoid", 3, first, later, 1.0), written("offset", 3, first, "i liked the cast .", 2.0)]
    runs += [written(loss, 4, "not this seed", "nor this", 3.0) for loss in ("sigmoid", "offset")]
    # True rewards by hand: 3 times 0; 3 times the mean of 1, -1 and 1; 3 times 0.5
    assert cells(examples.table(judge(runs, "reward"), runs)) == [
        ["Before and after training, seed 3: the same random numbers for each prompt"],
        ["┃ loss    ┃ reward ┃ completion                                                ┃"],
        ["prompt", "", "notes on the old drama :"],
        ["start", "0.00", "the plot was slow ."],
        ["sigmoid", "1.00", "the plot was superb . [/b] the cast was awful . the lead"],
        ["", "", "was superb ."],
        ["offset", "1.50", "i liked the cast ."],
    ]


def test_of_long_texts_and_many_losses_a_part_is_shown():
    """DPO, and the five others that end highest; of texts of the user's the reward is unknown."""
    runs = [written(f"loss{number}", 0, "start", "very " * 40, number) for number in range(9)]
    runs += [written("sigmoid", 0, "start", "\n\nend", -1)]
    for each in runs:
        each["points"] = [{**point, "accuracy": point["reward"] / 10} for point in each["points"]]
    _, heading, *rows, caption = cells(examples.table(judge(runs, "accuracy"), runs))
    assert "reward" not in heading[0]
    names = ["prompt", "start", "loss4", "loss5", "loss6", "loss7", "loss8", "sigmoid"]
    assert [name for name, _ in rows if name] == names and rows[-1] == ["sigmoid", "end"]
    # 29 words of 5 characters, and 4 for the dots
    assert " ".join(text for _, text in rows[2:-1]) == " ".join([*["very"] * 29, "..."] * 5)
    assert caption == ["sigmoid, and those 5 other losses of 9 that end highest"]


def drawn(number, kinds=("plain",), seeds=3):
    from itertools import product

    names = ["sigmoid", "length_regularized", "bias_variance", "margin_adaptive", "anchored", "offset"]
    names += [f"another_long_name_{each}" for each in range(number)]
    runs = []
    for place, (kind, name, seed) in enumerate(product(kinds, names[:number], range(seeds))):
        each = straight(name, seed, 0.5 + 0.01 * place, 2.0 + 3.7 * (place % 5))
        runs.append({**each, "data": kind})
    judged = [judge([run for run in runs if run["data"] == kind], "reward") for kind in kinds]
    return report.figure(judged, runs)


@pytest.mark.parametrize(
    ("number", "kinds"), [(1, ("plain",)), (2, ("plain",)), (3, ("plain",)), (6, ("plain", "traced"))]
)
def test_no_labels_of_the_plot_overlap(number, kinds):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    figure = drawn(number, kinds)
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    # Ticks beyond the limits are kept, and not drawn
    boxes = [(text.get_text(), text.get_window_extent(), text.axes) for text in texts if inside(text)]
    plt.close(figure)
    titles = [text for text, *_ in boxes]
    assert ("sigmoid" in titles and "KL that all reach" in titles) and (number == 1 or "length_regularized" in titles)
    overlapping = [
        (a, b)
        for place, (a, first, _) in enumerate(boxes)
        for b, second, _ in boxes[place + 1 :]
        if first.overlaps(second)
    ]
    assert not overlapping
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for _, box, _ in boxes)


def inside(text):
    """Whether a text that is a tick's is one that is drawn."""
    for axes in text.figure.axes:
        for axis, (low, high), at in ((axes.xaxis, axes.get_xlim(), 0), (axes.yaxis, axes.get_ylim(), 1)):
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if text in (tick.label1, tick.label2):
                    return low <= tick.get_loc() <= high and text.get_position()[at] == tick.get_loc()
    return True


def test_curves_are_gains_over_seeds_up_to_where_all_are():
    runs = straight("sigmoid", 0, 0.5, 4.0, start=3.0), straight("sigmoid", 1, 0.7, 9.0, start=-1.0)
    paths = [each["points"] for each in runs]
    kls, found = zip(*report.curve(paths, "reward"), strict=True)
    assert (kls[0], kls[-1]) == (0.0, 4.0)
    assert (found[0].mean, found[-1].mean) == (pytest.approx(0.0), pytest.approx(1.2))
    # Two seeds that gain 1.0 and 1.4: standard error 0.2, t 12.706
    assert found[-1].high == pytest.approx(1.2 + 12.706 * 0.2, rel=1e-4)


def test_progress_without_a_terminal_is_plain_lines(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("trl_ext.demo.progress.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=20)
    with progress(console) as lines:
        assert isinstance(lines, Lines)
        task = lines.add_task("training", total=5)
        for seconds in (6, 3, 3, 1, 1):  # a line where ten seconds have gone by since the last one, and at the end
            now[0] += seconds
            lines.advance(task)
    assert console.file.getvalue().splitlines() == [
        "[0 s] training ...", "[12 s] training: 3 of 5", "[14 s] training: 5 of 5"
    ]  # fmt: skip


def test_progress_in_a_terminal_is_bars():
    with progress(Console(file=io.StringIO(), force_terminal=True)) as bars:
        bars.advance(bars.add_task("training", total=4))
        assert not isinstance(bars, Lines)
