"""The roofline model of the benchmarks: a row by hand, and that nobody takes it for a measurement."""

import csv
import importlib
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# A prompt of 3 tokens with completions of 2 and 1
BATCH = [([7, 8, 9], [[10, 11], [12]])]


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("roofline")


@pytest.fixture
def shape(roofline):
    return roofline.Shape(hidden=4, layers=2, intermediate=8, heads=2, kv_heads=1, head_dim=2, tied=False, vocab=10)


def test_what_each_path_runs(roofline):
    # Two rows of 5 tokens, the second padded; every query sees every key of its row
    assert roofline.plain_rows(BATCH) == roofline.Work(tokens=10, seen=50, scored=3)
    assert roofline.plain_rows(BATCH, every_position=True).scored == 8
    # Rows of 5 and 4 tokens, each under its triangle: 15 + 10
    assert roofline.unpadded_rows(BATCH) == roofline.Work(tokens=9, seen=25, scored=3)
    # p0 p1 | p2 c0 | p2: the prefix's triangle of 3, then 2 * 2 + 3, then 1 * 2 + 1
    assert roofline.shared_prompts(BATCH) == roofline.Work(tokens=5, seen=13, scored=3)


def test_trls_step_by_hand(roofline, shape):
    # A layer: 4 x 8 into q, k and v, 4 x 4 out, 3 x 4 x 8; two layers
    assert shape.trunk == 2 * (32 + 16 + 96) and shape.parameters == 288 + 2 * 40
    stages = roofline.step(shape, roofline.plain_rows(BATCH), "trl", lora=False)
    assert stages == {
        # Reference, policy, recomputed, two backward: 5 times 2 x 288 x 10; 288 weights and 20 x (12 + 8 + 36) values of 2 bytes
        "layers: products": (28800, 14080),
        # 2 + 2.5 + 1 forwards of 4 x 2 layers x width 4 x 50; 5 times 20 x 12 values
        "attention": (8800, 2400),
        # 5 times 20 x (16 + 24 + 24 + 24) values
        "layers: elementwise": (0, 17600),
        # 4 products and the reference's, 2 x 3 x 4 x 10 each; of 40 weights, 12 hidden values and 30 logits each
        "head: products": (1200, 820),
        # 3 + 1 passes over 30 logits of 2 bytes; 40 float32 sums: zeros, read and written, read and rounded
        "head: kernels": (0, 4 * 60 + 40 * (4 + 8 + 6)),
        "optimizer": (0, 8 * 368 * 2),
    }
    rates = roofline.Rates(1e-6, 1e-6, "toy")  # a million of each per second
    found = roofline.predicted([stages], rates)
    assert found["milliseconds"] == pytest.approx(28.8 + 8.8 + 17.6 + 1.2 + 0.96 + 5.888)
    assert found["bound"] == "layers: products, operations (46%)"
    assert found["tera_operations"] == pytest.approx(38800e-12)


def test_our_lora_step_by_hand(roofline, shape):
    stages = roofline.step(shape, roofline.shared_prompts(BATCH), "ours", lora=True)
    assert stages == {
        "layers: products": (4 * 2 * 288 * 5, 4 * (288 + 10 * 56) * 2),
        "attention": (5.5 * 4 * 2 * 4 * 13, 5 * 10 * 12 * 2),
        "layers: elementwise": (0, 5 * 10 * 88 * 2),
        "head: products": (3 * 240, 3 * 164),
        "head: kernels": (0, 4 * 60),
        "optimizer": (0, 0),
    }


@pytest.mark.parametrize(
    ("path", "mode", "kept", "products", "passes", "sums"),
    [
        ("trl", "full", "", 4, 3, 4 + 3 * 8 + 6), ("trl", "frozen", "", 3, 3, 0), ("trl", "reference", "", 1, 1, 0),
        ("ours", "full", "", 4, 4, 3 * 8 + 2), ("ours", "full", "kept", 3, 3, 0), ("ours", "frozen", "", 2, 3, 0),
        ("ours", "reference", "", 1, 1, 0), ("products", "full", "", 3, 0, 0), ("products", "frozen", "", 2, 0, 0),
    ],
)  # fmt: skip
def test_head(path, mode, kept, products, passes, sums, roofline, shape):
    tokens = 2 * 4096 + 1  # three tiles
    assert roofline.head_products(path, kept, mode=mode) == products
    stages = roofline.head(shape, tokens, path, mode, kept=bool(kept))
    assert stages["head: products"] == (products * 2 * tokens * 40, products * (80 + tokens * 8 + tokens * 20))
    assert stages["head: kernels"] == (0, passes * tokens * 20 + sums * 40)


def test_peak_memory_by_hand(roofline, shape):
    # Policy and reference 2 x 736 bytes, moments 1472. TRL's head: 10 x 2 x 4 x 2 of checkpoints, 3 x 10 logits of 2 bytes, 160 of the
    # weight's gradient, 48 of the hidden states'. Its layers: 80 + 368 half way and 10 tokens of (32 + 24 + 32) values
    trl = roofline.plain_rows(BATCH)
    assert roofline.at_head(shape, trl, "trl", False, 2) == 160 + 60 + 160 + 48
    assert roofline.at_layers(shape, trl, False, 2) == 80 + 368 + 1760
    assert roofline.peak_gb(shape, trl, "trl", lora=False) == pytest.approx((4 * 736 + 2208) / 1e9)
    assert roofline.peak_gb(shape, trl, "trl", lora=True) == pytest.approx((736 + 80 + 1760) / 1e9)
    # Ours, half the tokens: 40 + 368 + 880. Beside the checkpoints, 80, there is room for 60 of logits and 80 of the weight's gradient
    ours = roofline.shared_prompts(BATCH)
    assert roofline.keeps(shape, ours, 2) and roofline.peak_gb(shape, ours, "ours", lora=False) == pytest.approx(
        (4 * 736 + 1288) / 1e9
    )
    # Not for 100,000 tokens of 20 bytes, where a tile of 4,096 and 1.6 MB of hidden states set the peak
    assert not roofline.keeps(shape, roofline.Work(tokens=5, seen=13, scored=100_000), 2)


def test_a_prediction_is_marked(roofline, tmp_path, monkeypatch, capsys):
    throughput = importlib.import_module("throughput")
    flags = ["--model-only", "--device", "cuda", "--size", "8b", "--vocab", "1000", "--csv"]
    with pytest.raises(SystemExit):
        throughput.parse([*flags, "h200.csv"])
    assert "contains 'model'; got ['h200.csv']" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["throughput.py", *flags, str(tmp_path / "model.csv")])
    throughput.main()
    assert "MODEL, nothing was measured" in " ".join(capsys.readouterr().out.split())
    with open(tmp_path / "model.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["trl", "trl, unpadded", "ours"]
    assert {row["kind"] for row in rows} == {"model"}
    assert {row["assumed"] for row in rows} == {"790 TFLOP/s and 4.3 TB/s (H200)"}
    assert not {"device", "seconds", "torch"} & set(rows[0])


def test_a_faster_device_is_faster_where_it_counts(roofline, shape):
    stages = [roofline.step(shape, roofline.plain_rows(BATCH), "trl", lora=False)]
    of = {rate: roofline.predicted(stages, roofline.Rates(*rate, "toy")) for rate in ((1, 1), (1e9, 1), (1, 1e9))}
    total = sum(moved for _, moved in stages[0].values())
    assert of[1e9, 1]["milliseconds"] == pytest.approx(total / 1e9)  # bytes alone
    assert of[1, 1e9]["milliseconds"] == pytest.approx(38800 / 1e9, rel=1e-3)  # operations alone
