import dataclasses
import json
import math

import pytest
import torch

from tests.losses.batches import pairs
from trl_ext import DPOConfig, PreferenceBatch, get_loss, register_loss
from trl_ext.losses.base import PLAIN_LOSSES
from trl_ext.losses.bias_variance import present
from trl_ext.trainers.loss_types import build_losses


def both(traced, empty, **kwargs):
    return dataclasses.replace(
        pairs(traced, requires_grad=True, **kwargs), empty_trace=pairs(empty, requires_grad=True, **kwargs)
    )


def test_value_and_gradient():
    batch = both([4.0], [-2.0], beta=0.5)
    loss = get_loss("bias_variance", alpha=0.3)(batch)
    assert loss.item() == pytest.approx(0.3 * math.log1p(math.exp(-2)) + 0.7 * math.log1p(math.exp(1)))
    traced, empty = torch.autograd.grad(loss.sum(), [batch.chosen_logps, batch.empty_trace.chosen_logps])
    assert traced.item() == pytest.approx(-0.3 * 0.5 / (1 + math.exp(2)))
    assert empty.item() == pytest.approx(-0.7 * 0.5 / (1 + math.exp(-1)))


def softplus(z):
    return math.log1p(math.exp(z))


# Of a pair by hand: its delta, the lengths of its completions; beta is 0.5, scores are 2 and 1
BASES = {
    "sigmoid": lambda delta, chosen, rejected: softplus(-0.5 * delta),
    "hinge": lambda delta, chosen, rejected: max(0.0, 1 - 0.5 * delta),
    # The log-ratios of `pairs` are delta / 2 + 0.5 and -delta / 2 + 0.5
    "ipo": lambda delta, chosen, rejected: ((delta / 2 + 0.5) / chosen - (-delta / 2 + 0.5) / rejected - 1) ** 2,
    "length_regularized": lambda delta, chosen, rejected: softplus(-0.5 * delta - 0.02 * (chosen - rejected)),
    "r_dpo": lambda delta, chosen, rejected: softplus(-0.5 * delta - 0.02 * (chosen - rejected)),
    "offset": lambda delta, chosen, rejected: softplus(-0.5 * delta),  # log(2 - 1) = 0
    "anchored": lambda delta, chosen, rejected: softplus(-0.5 * delta) + 0.5 * delta / (1 + math.e),
}


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.25])
@pytest.mark.parametrize("base", BASES)
def test_values_of_every_base(base, alpha):
    scores = {"score_chosen": [2.0, 2.0], "score_rejected": [1.0, 1.0]}
    traced, empty = [4.0, -1.0], [-2.0, 3.0]
    batch = both(traced, empty, lengths=([6, 3], [4, 12]), beta=0.5, **scores)
    batch = dataclasses.replace(
        batch, empty_trace=pairs(empty, lengths=([2, 5], [1, 8]), beta=0.5, requires_grad=True, **scores)
    )
    lengths = [((6, 4), (2, 1)), ((3, 12), (5, 8))]
    expected = [
        alpha * BASES[base](one, *of_one) + (1 - alpha) * BASES[base](other, *of_other)
        for one, other, (of_one, of_other) in zip(traced, empty, lengths, strict=True)
    ]
    assert get_loss("bias_variance", alpha=alpha, base=base)(batch).tolist() == pytest.approx(expected)


def test_base_that_reads_columns():
    loss = get_loss("bias_variance", base="offset")
    assert loss.columns == ("chosen_empty_trace", "rejected_empty_trace")
    assert loss.required_columns == (*loss.columns, "score_chosen", "score_rejected")
    scores = {"score_chosen": [2.0], "score_rejected": [1.0]}
    torch.testing.assert_close(loss(both([4.0], [4.0], **scores)), get_loss("offset")(pairs([4.0], **scores)))
    assert loss.check_columns({name: torch.tensor(value) for name, value in scores.items()}).tolist() == [False]
    assert get_loss("bias_variance").required_columns == loss.columns
    assert loss.column_help == get_loss("offset").column_help
    assert loss.optional_columns == ()
    for base in PLAIN_LOSSES:
        loss = get_loss("bias_variance", base=base)
        assert (loss.required_columns, loss.optional_columns, loss.column_help) == (loss.columns, (), "")
        assert loss.check_columns({}) is None
    assert get_loss("bias_variance", base="adpo").optional_columns == get_loss("anchored").optional_columns
    # A row that the base cannot take
    bad = {"score_chosen": torch.tensor([2.0, 1.0]), "score_rejected": torch.tensor([1.0, 1.0])}
    assert get_loss("bias_variance", base="offset").check_columns(bad).tolist() == [False, True]


@pytest.mark.parametrize(
    ("base", "divides"),
    [
        ("sigmoid", False),
        ("hinge", False),
        ("ipo", True),
        ("offset", False),
        ("anchored", True),
        ("gpo", True),
        ("inpo", False),
    ],
)
def test_beta_of_0_where_the_base_divides_by_it(base, divides):
    assert get_loss("bias_variance", base=base).divides_by_beta is divides
    assert get_loss("bias_variance", base=base).reads_beta is (base != "inpo")
    if divides:
        with pytest.raises(ValueError, match=r"`beta=0` has no meaning for \['bias_variance'\]"):
            DPOConfig(output_dir="unused", loss_type="bias_variance", loss_kwargs={"base": base}, beta=0.0, bf16=False)


def test_alpha_is_half_by_default():
    assert get_loss("bias_variance") == get_loss("bias_variance", alpha=0.5, base="sigmoid")


@pytest.mark.parametrize("alpha", ["Auto", "", "half"])
def test_alpha_that_is_no_number(alpha):
    with pytest.raises(ValueError, match=rf"`alpha='{alpha}'` is a str; expected float in \[0, 1\], or 'auto'"):
        get_loss("bias_variance", alpha=alpha)


def test_alpha_that_is_not_measured_yet():
    loss = get_loss("bias_variance", alpha="auto")
    with pytest.raises(ValueError, match="`alpha='auto'` is measured by the trainer before training"):
        loss(both([1.0], [1.0]))


def test_a_base_that_needs_no_reference():
    @register_loss("free")
    @dataclasses.dataclass(frozen=True)
    class Free:
        reads = ()

        def __call__(self, batch):
            return -batch.chosen_logps

    loss = get_loss("bias_variance", base="free", alpha=0.25)
    assert (loss.reads, get_loss("bias_variance").reads) == (frozenset(), {"ref_logps"})
    assert get_loss("bias_variance", base="offset").reads == {"ref_logps"}
    without = {"ref_chosen_logps": None, "ref_rejected_logps": None}
    batch = both([4.0], [-2.0])  # chosen log-probs of -20 + 2.5 and -20 - 0.5
    batch = dataclasses.replace(batch, empty_trace=dataclasses.replace(batch.empty_trace, **without), **without)
    assert loss(batch).tolist() == pytest.approx([0.25 * 17.5 + 0.75 * 20.5])
    assert {name: value.tolist() for name, value in loss.metrics(batch).items()} == {"empty_trace/share": [1.0]}


@pytest.mark.parametrize("base", ["sigmoid", "ipo", "hinge", "offset"])
def test_no_nan_where_a_pair_is_missing(base):
    """Nothing is left of the completions: lengths of 0, log-probs of 0."""
    zeros, lengths = torch.zeros(2, dtype=torch.float64), torch.tensor([0, 3])
    columns = {"score_chosen": zeros + 2, "score_rejected": zeros}
    chosen = [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    batches = [
        PreferenceBatch(chosen[0], zeros, zeros, zeros, lengths, lengths, columns=columns),
        PreferenceBatch(chosen[1], zeros, zeros, zeros, lengths.flip(0), lengths.flip(0), columns=columns),
    ]
    batch = dataclasses.replace(batches[0], empty_trace=batches[1])
    get_loss("bias_variance", base=base)(batch).sum().backward()
    for parameter, missing in zip(chosen, (0, 1), strict=True):
        assert parameter.grad.isfinite().all()
        assert parameter.grad[missing] == 0
        assert parameter.grad[1 - missing] != 0


def test_a_row_that_lacks_a_pair_has_the_other_term_alone():
    batch = both([4.0, 4.0, 4.0], [-2.0, -2.0, -2.0])
    batch = dataclasses.replace(
        batch,
        chosen_lengths=torch.tensor([7, 0, 7]),
        rejected_lengths=torch.tensor([7, 0, 7]),
        empty_trace=dataclasses.replace(batch.empty_trace, chosen_lengths=torch.tensor([7, 7, 0])),
    )
    traced, empty = math.log1p(math.exp(-0.4)), math.log1p(math.exp(0.2))
    loss = get_loss("bias_variance", alpha=0.3)(batch)
    assert loss.tolist() == pytest.approx([0.3 * traced + 0.7 * empty, 0.7 * empty, 0.3 * traced])
    loss.sum().backward()
    assert batch.chosen_logps.grad[1] == 0
    assert batch.empty_trace.chosen_logps.grad[2] == 0


def test_metrics_have_one_value_per_row():
    batch = both([4.0] * 4, [-2.0, 0.5, 3.0, 0.0], beta=0.5)
    lengths = {"chosen_lengths": torch.tensor([7, 1, 0, 7]), "rejected_lengths": torch.tensor([7, 1, 7, 7])}
    batch = dataclasses.replace(batch, empty_trace=dataclasses.replace(batch.empty_trace, **lengths))
    metrics = get_loss("bias_variance").metrics(batch)
    assert metrics["empty_trace/share"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert all(value.is_floating_point() for value in metrics.values())  # so that they can be averaged
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert metrics["empty_trace/margins"].tolist() == [pytest.approx(-1.0), pytest.approx(0.25), nan, pytest.approx(0)]
    assert metrics["empty_trace/accuracies"].tolist() == [0.0, 1.0, nan, 0.0]


def test_a_pair_is_missing_where_either_completion_is_empty():
    batch = pairs([0.0] * 4, lengths=([0, 1, 0, 1], [0, 0, 1, 1]))
    assert present(batch).tolist() == [False, False, False, True]


def test_without_the_empty_trace_pair():
    with pytest.raises(ValueError, match="chosen_empty_trace"):
        get_loss("bias_variance", alpha=1.0)(pairs([1.0]))


def test_remarks_are_those_of_the_base():
    columns = ("prompt", "chosen_empty_trace", "rejected_empty_trace")
    assert "takes each label as certain" in get_loss("bias_variance", base="anchored").remark(columns)
    assert get_loss("bias_variance", base="anchored").remark((*columns, "preference_prob")) == ""
    for base in (*PLAIN_LOSSES, "offset"):
        assert get_loss("bias_variance", base=base).remark(columns) == ""


def test_hyperparameters_of_the_base():
    scores = {"score_chosen": [2.5], "score_rejected": [1.0]}
    batch = both([4.0], [-2.0], beta=0.5, **scores)
    loss = get_loss("bias_variance", alpha=0.25, base="odpo", base_kwargs={"alpha": 2.0})
    offset = 2 * math.log(1.5)
    assert loss(batch).tolist() == pytest.approx([0.25 * softplus(offset - 2) + 0.75 * softplus(offset + 1)])
    # Of the target sigmoid(1.5 / beta_r) = sigmoid(3)
    q = 1 / (1 + math.exp(-3))
    loss = get_loss("bias_variance", alpha=0.25, base="anchored", base_kwargs={"beta_r": 0.5, "tau": 4})
    traced = q * softplus(-1) + (1 - q) * softplus(1)
    empty = q * softplus(0.5) + (1 - q) * softplus(-0.5)
    assert loss(batch).tolist() == pytest.approx([0.25 * traced + 0.75 * empty])
    assert loss.divides_by_beta is False  # which `anchored` does without `tau`
    assert get_loss("bias_variance", base="anchored", base_kwargs={"label_smoothing": 0.1}).remark(()) == ""
    linear = get_loss("bias_variance", base="offset", base_kwargs={"scaling": "linear"})
    contradicted = {"score_chosen": torch.tensor([0.0]), "score_rejected": torch.tensor([1.0])}
    assert linear.check_columns(contradicted) is None


def test_they_survive_json_and_stay_out_of_the_hash():
    given = {"alpha": 0.3, "base": "offset", "base_kwargs": {"alpha": 2.0, "scaling": "linear"}}
    loss = get_loss("bias_variance", **given)
    assert dataclasses.asdict(loss) == given
    assert get_loss("bias_variance", **json.loads(json.dumps(dataclasses.asdict(loss)))) == loss
    assert loss != get_loss("bias_variance", alpha=0.3, base="offset")
    assert hash(loss) == hash(dataclasses.replace(loss))
    assert dataclasses.replace(loss, alpha=0.5).base_loss == get_loss("offset", alpha=2.0, scaling="linear")
    assert loss.base_kwargs is not given["base_kwargs"]  # what the config holds may change afterwards


def test_they_may_stand_alone_in_a_config():
    for kwargs in ({"base_kwargs": {}}, {"bvpo": {"base_kwargs": {}}}):
        assert build_losses(["bias_variance"], kwargs)["bias_variance"] == get_loss("bias_variance")
    with pytest.raises(
        ValueError, match=r"`base_kwargs=\{'alpha': 1.0\}` would be ignored: `base='sigmoid'` is TRL's"
    ):
        build_losses(["bias_variance"], {"base_kwargs": {"alpha": 1.0}})
    args = DPOConfig(
        output_dir="unused",
        loss_type="bias_variance",
        loss_kwargs='{"base": "offset", "base_kwargs": {"alpha": 2.0}}',
        bf16=False,
    )
    loss = build_losses(["bias_variance"], args.loss_kwargs)["bias_variance"]
    assert loss.base_loss == get_loss("offset", alpha=2.0)


@pytest.mark.parametrize(
    ("base", "base_kwargs", "message"),
    [
        ("offset", {"alhpa": 1.0}, "The loss 'offset' has no hyper-parameter 'alhpa'. Did you mean 'alpha'"),
        ("offset", {"alpha": -1.0}, "offset: `alpha=-1.0` must be at least 0"),
        ("odpo", {"alpha": "1"}, "OffsetLoss: `alpha='1'` is a str; expected float"),
    ],
)
def test_what_the_base_refuses_names_both(base, base_kwargs, message):
    start = rf"^bias_variance: `base='{base}'` with `base_kwargs=\{{'al.*\}}`: "
    with pytest.raises(ValueError, match=start + message):
        get_loss("bias_variance", base=base, base_kwargs=base_kwargs)


@pytest.mark.parametrize("base", PLAIN_LOSSES)
def test_trls_bases_have_no_hyperparameters(base):
    with pytest.raises(
        ValueError, match=rf"`base_kwargs=\{{'beta': 1.0\}}` would be ignored: `base='{base}'` is TRL's"
    ):
        get_loss("bias_variance", base=base, base_kwargs={"beta": 1.0})
    assert get_loss("bias_variance", base=base, base_kwargs={}).base_kwargs == {}


def test_a_base_that_asks_for_more_than_the_mixture_has():
    @register_loss("greedy")
    @dataclasses.dataclass(frozen=True)
    class Greedy:
        remembers: bool = False
        looks: bool = False

        @property
        def reads(self):
            return ["ref_logps", "token_logps", "behaviour_logps"] if self.looks else ["ref_logps"]

        def init_state(self):
            return {"mean": torch.zeros(())} if self.remembers else {}

        def update(self, state, batch, reduce):
            return state

        def __call__(self, batch):
            return batch.delta

    reason = "but the mixture gives its base one log-probability per completion and no state"
    reads = "reads 'behaviour_logps' and reads 'token_logps'"
    for kwargs, beyond in [
        ({"remembers": True}, "keeps state"),
        ({"looks": True}, reads),
        ({"remembers": True, "looks": True}, f"{reads} and keeps state"),
    ]:
        with pytest.raises(ValueError, match=f"^bias_variance: `base='greedy'` {beyond}, {reason}"):
            get_loss("bias_variance", base="greedy", base_kwargs=kwargs)
    assert get_loss("bias_variance", base="greedy").reads == frozenset({"ref_logps"})
