"""What holds for every loss."""

import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from tests.losses.batches import group, pairs, with_tokens
from trl_ext import get_loss, list_losses
from trl_ext.losses import loss_class
from trl_ext.losses.base import refuse_values


VARIANTS = [
    ("alpha_dpo", {}),
    ("beta_dpo", {}),
    ("beta_dpo", {"a": 0.0, "rho": 0.0}),
    ("reward_distillation", {}),
    ("reward_distillation", {"combine": "min"}),
    ("robust_em", {}),
    ("robust_em", {"base": "ipo"}),
    ("robust_em", {"base": "simpo"}),
    ("robust_em", {"base": "cpo"}),
    ("offset", {}),
    ("offset", {"scaling": "linear"}),
    ("offset", {"scaling": "log_ratio"}),
    ("offset", {"scaling": "log", "margin_floor": 0.5}),
    ("anchored", {}),
    ("anchored", {"label_smoothing": 0.2, "standardize": True}),
    ("margin_adaptive", {}),
    ("margin_adaptive", {"c_max": 4.0, "c_min": 0.25, "tau": 6.9}),
    ("bias_variance", {}),
    ("bias_variance", {"base": "ipo"}),
    ("length_regularized", {}),
    ("inpo", {}),
    ("sppo_soft", {}),
    ("sppo_soft", {"target": "score"}),
    ("asft", {}),
    ("cpo", {}),
    ("dmpo", {}),
    ("dmpo", {"gamma": 1.0}),
    ("eurus", {}),
    ("simpo", {}),
    ("step_apo", {}),
]
IDS = [f"{name}-{'-'.join(map(str, kwargs.values()))}" for name, kwargs in VARIANTS]
# Where something that follows from the policy counts as a constant, finite differences see it move; their own tests have the
# gradients by hand
WITH_CONSTANTS = (
    ("beta_dpo", {}),
    ("robust_em", {}),
    ("robust_em", {"base": "cpo"}),
    ("robust_em", {"base": "ipo"}),
    ("robust_em", {"base": "simpo"}),
)
OF_TOKENS = ("dmpo",)
# What a pair's loss is depends on the others in the batch
OF_BATCHES = ("beta_dpo",)


REFERENCE_FREE = [variant for variant in VARIANTS if variant[0] in ("asft", "cpo", "simpo")]
# These learn from whole groups alone: test_whole_groups.py
WHOLE_GROUPS = {"drpo": {"behaviour_logps"}, "trpa": {"ref_logps", "behaviour_logps"}}
WITH_REFERENCE = [variant for variant in VARIANTS if variant not in REFERENCE_FREE]


def full(deltas, *, dtype=torch.float64, margins=None, lengths=None, requires_grad=False, win_rates=False):
    """A batch that every loss can take: positive margins, positive scores, an empty-trace pair. With `win_rates`, scores lie in [0, 1]."""
    margins = [1.5] * len(deltas) if margins is None else margins
    rejected = torch.full((len(deltas),), 0.25, dtype=torch.float32)
    columns = {"score_chosen": rejected + torch.tensor(margins, dtype=torch.float32), "score_rejected": rejected}
    if win_rates:
        columns = {"score_chosen": torch.sigmoid(columns["score_chosen"]), "score_rejected": rejected}
    columns |= {"initial_chosen_logps": rejected - 12, "initial_rejected_logps": rejected - 11}
    columns |= {"q_chosen": columns["score_chosen"], "q_rejected": rejected - 1}
    kwargs = {"dtype": dtype, "lengths": lengths, "requires_grad": requires_grad, **columns}
    return dataclasses.replace(pairs(deltas, **kwargs), empty_trace=pairs([-delta for delta in deltas], **kwargs))


def given(name, batch):
    """The batch as the trainers give it to a loss: with tokens where it reads them, which have the same sums."""
    return with_tokens(batch) if name in OF_TOKENS else batch


def test_every_loss_is_here():
    # `aligndistil` is a function of logits and not of log-probs: its own tests
    assert {*dict(VARIANTS), *WHOLE_GROUPS, "aligndistil"} == set(list_losses())


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype(name, kwargs, dtype):
    for size in (1, 5):
        batch = full([0.5] * size, dtype=dtype, win_rates=name == "sppo_soft")
        loss = get_loss(name, **kwargs)(given(name, batch))
        assert loss.shape == (size,)
        assert loss.dtype == dtype


@pytest.mark.parametrize(("name", "kwargs"), [variant for variant in VARIANTS if variant not in WITH_CONSTANTS])
def test_gradient_by_finite_differences(name, kwargs):
    base = full([-2.0, 0.3, 4.0], lengths=([9, 4, 6], [3, 8, 6]), win_rates=name == "sppo_soft")
    loss = get_loss(name, **kwargs)

    def of(chosen, rejected, empty_chosen, empty_rejected):
        empty = dataclasses.replace(base.empty_trace, chosen_logps=empty_chosen, rejected_logps=empty_rejected)
        batch = dataclasses.replace(base, chosen_logps=chosen, rejected_logps=rejected, empty_trace=empty)
        return loss(given(name, batch))

    empty = base.empty_trace
    inputs = [base.chosen_logps, base.rejected_logps, empty.chosen_logps, empty.rejected_logps]
    assert torch.autograd.gradcheck(of, [tensor.clone().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_at_extremes(name, kwargs, dtype):
    """Log-ratios of 1e5 and margins of 1e4, in value and gradient."""
    deltas = [1e5, -1e5, 0.0, 1e5, -1e5]
    margins = [1e4, 1e4, 1e4, 1e-3, 1e-3]
    lengths = ([10_000, 1, 7, 1, 7], [1, 10_000, 7, 7, 1])
    win_rates = kwargs == {} and name == "sppo_soft"
    batch = full(deltas, dtype=dtype, margins=margins, lengths=lengths, requires_grad=True, win_rates=win_rates)
    loss = get_loss(name, **kwargs)(given(name, batch))
    loss.float().sum().backward()
    assert loss.isfinite().all()
    for tensor in (batch.chosen_logps, batch.rejected_logps):
        assert tensor.grad.isfinite().all()
    if name == "bias_variance":
        assert batch.empty_trace.chosen_logps.grad.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [
        "anchored",
        "margin_adaptive",
        "length_regularized",
        "inpo",
        "bias_variance",
        "asft",
        "cpo",
        "dmpo",
        "eurus",
        "reward_distillation",
        "simpo",
        "step_apo",
    ],
)
def test_finite_for_contradicted_labels(name):
    margins = [-1e4, -50.0, -1.0, 1e4]
    batch = full([1e5, -1e5, 3.0, -3.0], dtype=torch.float32, margins=margins, requires_grad=True)
    loss = get_loss(name)(given(name, batch))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert batch.chosen_logps.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_groups_are_finite_at_extremes(dtype):
    batch = group([[1e5, -1e5, 0.0]], [[1e4, -1e4, 0.0]], [[True, True, False]], dtype=dtype)
    loss = get_loss("anchored")(batch)
    loss.float().sum().backward()
    assert loss.isfinite().all()
    assert batch.logps.grad.isfinite().all()
    assert loss.dtype == dtype


@pytest.mark.parametrize(("name", "kwargs"), WITH_REFERENCE)
def test_no_gradient_reaches_columns_or_the_reference(name, kwargs):
    batch = full([1.0, -2.0], requires_grad=True, win_rates=name == "sppo_soft")
    scores = [column.requires_grad_() for column in batch.columns.values()]
    references = [batch.ref_chosen_logps.requires_grad_(), batch.ref_rejected_logps]
    loss = get_loss(name, **kwargs)(given(name, batch))
    gradients = torch.autograd.grad(loss.sum(), scores, allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in gradients)
    (reference,) = torch.autograd.grad(loss.sum(), references[:1], allow_unused=True)
    if "ref_logps" not in get_loss(name, **kwargs).reads or name == "alpha_dpo":  # whose margin is a constant
        assert reference is None
        return
    (policy,) = torch.autograd.grad(get_loss(name, **kwargs)(given(name, batch)).sum(), batch.chosen_logps)
    # The reference enters through the log-ratio alone; that of inpo with the share 1 - tau / eta, the rest is a column
    share = 1 - 0.0025 / 0.0075 if name == "inpo" else 1
    torch.testing.assert_close(reference, -share * policy)


@settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.sampled_from([variant for variant in VARIANTS if variant[0] not in OF_BATCHES]),
    st.lists(
        st.tuples(
            st.floats(-1e5, 1e5), st.floats(2**-10, 1e4, width=32), st.integers(1, 10_000), st.integers(1, 10_000)
        ),
        min_size=1,
        max_size=9,
    ),
)
def test_any_shape_and_any_value(variant, rows):
    """Finite, and each pair's loss its own: a batch gives what its pairs give one by one."""
    deltas, margins, chosen, rejected = (list(column) for column in zip(*rows, strict=True))
    loss = get_loss(variant[0], **variant[1])
    win_rates = variant == ("sppo_soft", {})
    values = loss(given(variant[0], full(deltas, margins=margins, lengths=(chosen, rejected), win_rates=win_rates)))
    assert values.isfinite().all()
    assert values.shape == (len(rows),)
    for index, (delta, margin, n_chosen, n_rejected) in enumerate(rows):
        alone = full([delta], margins=[margin], lengths=([n_chosen], [n_rejected]), win_rates=win_rates)
        # The same reference, so that rounding is the same
        for batch, whole in ((alone, full(deltas)), (alone.empty_trace, full(deltas).empty_trace)):
            shift = whole.ref_chosen_logps[index] - batch.ref_chosen_logps
            for field in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"):
                object.__setattr__(batch, field, getattr(batch, field) + shift)
        torch.testing.assert_close(loss(given(variant[0], alone))[0], values[index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS, ids=IDS)
def test_metrics_are_detached_scalars_or_one_value_per_row(name, kwargs):
    batch = full([1.0, -2.0], requires_grad=True, win_rates=name == "sppo_soft")
    metrics = get_loss(name, **kwargs).metrics(given(name, batch))
    assert metrics
    for key, value in metrics.items():
        assert value.shape == ((2,) if name in ("bias_variance", *OF_TOKENS, *dict(REFERENCE_FREE)) else ()), key
        assert not value.requires_grad, key


@pytest.mark.parametrize("name", list_losses())
def test_states_what_it_needs(name):
    cls = loss_class(name)
    assert cls.paper
    assert cls.title
    assert cls.citation.startswith("@")
    assert isinstance(cls.columns, tuple)
    reads = (set() if name in dict(REFERENCE_FREE) else {"ref_logps"}) | (
        {"token_logps"} if name in OF_TOKENS else set()
    )
    assert get_loss(name).reads == {"aligndistil": {"teachers"}, **WHOLE_GROUPS}.get(name, reads)
    assert cls.takes_groups == (name in ("aligndistil", "anchored", *WHOLE_GROUPS))
    assert cls.takes_pairs == (name not in WHOLE_GROUPS)
    assert get_loss(name).takes_lists == (name == "reward_distillation")
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_loss(name).alpha = 3


def test_missing_column_names_what_is_there():
    with pytest.raises(ValueError, match=r"no column 'score_chosen'; its columns are \['weight'\]"):
        get_loss("margin_adaptive")(pairs([0.0], weight=[1.0]))


@pytest.mark.parametrize(("name", "kwargs"), REFERENCE_FREE)
def test_without_a_reference(name, kwargs):
    """The same as beside one, which gets no gradient."""
    batch = full([1.0, -2.0], requires_grad=True)
    reference = batch.ref_chosen_logps.requires_grad_()
    values = get_loss(name, **kwargs)(batch)
    assert torch.autograd.grad(values.sum(), reference, allow_unused=True) == (None,)
    alone = dataclasses.replace(batch, ref_chosen_logps=None, ref_rejected_logps=None)
    assert torch.equal(get_loss(name, **kwargs)(alone), values)
    assert get_loss(name, **kwargs).metrics(alone).keys() == get_loss(name, **kwargs).metrics(batch).keys()


@pytest.mark.parametrize("name", dict(REFERENCE_FREE))
def test_a_row_without_a_pair_has_no_value_per_token(name):
    """Beside `bias_variance` a row may lack its traced pair, or one of its completions."""
    batch = full([1.0] * 4, lengths=([5, 0, 5, 0], [5, 5, 0, 0]))
    for key, value in get_loss(name).metrics(batch).items():
        assert value.isnan().tolist() == [False, True, True, True], key


@pytest.mark.parametrize(("name", "kwargs"), WITH_REFERENCE)
def test_a_batch_without_the_reference_is_refused(name, kwargs):
    batch = full([1.0, -2.0], win_rates=name == "sppo_soft")
    batch = dataclasses.replace(batch, ref_chosen_logps=None, ref_rejected_logps=None)
    if "ref_logps" not in get_loss(name, **kwargs).reads:
        assert get_loss(name, **kwargs)(batch).isfinite().all()
        return
    with pytest.raises(ValueError, match='loss whose `reads` does not hold "ref_logps" is given none'):
        get_loss(name, **kwargs)(given(name, batch))


def test_groups_without_the_reference_are_refused():
    batch = dataclasses.replace(group([[1.0, 2.0]], [[0.0, 1.0]]), ref_logps=None)
    with pytest.raises(ValueError, match='loss whose `reads` does not hold "ref_logps" is given none'):
        get_loss("anchored")(batch)


def test_values_that_are_no_numbers_or_probabilities_are_refused():
    nan = float("nan")
    scored = {"score_chosen": [1.0, nan], "score_rejected": [0.0, 0.0]}
    for name, columns, message in [
        (
            "anchored",
            {"preference_prob": [0.5, nan]},
            r"^1 of 2 rows: anchored: `preference_prob` must lie in \[0, 1\]",
        ),
        ("anchored", {"preference_prob": [-0.1, 1.1]}, "^2 of 2 rows: anchored: `preference_prob`"),
        ("anchored", scored, r"^1 of 2 rows: anchored: \['score_chosen', 'score_rejected'\] must be finite"),
        ("anchored", {"score_chosen": [0.0] * 2, "score_rejected": [1.0, float("inf")]}, "must be finite"),
        ("margin_adaptive", scored, "^1 of 2 rows: margin_adaptive: .*must be numbers"),
        ("reward_distillation", scored, "^1 of 2 rows: reward_distillation: .*must be finite"),
        ("offset", scored, "^1 of 2 pairs"),
        (
            "inpo",
            {"initial_chosen_logps": [0.0, nan], "initial_rejected_logps": [0.0, 0.0]},
            "^1 of 2 rows: inpo: .*finite",
        ),
        (
            "step_apo",
            {"q_chosen": [0.0, nan], "q_rejected": [0.0, 0.0]},
            "^1 of 2 rows: step_apo: .*'q_chosen', 'q_rejected'.*finite",
        ),
        ("sppo_soft", scored, r"^1 of 2 rows: sppo_soft reads scores as win rates, in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            get_loss(name)(pairs([0.0, 1.0], **columns))
    for name in ("anchored", "sppo_soft"):  # the bounds themselves are probabilities
        columns = {"preference_prob": [0.0, 1.0], "score_chosen": [0.0, 1.0], "score_rejected": [1.0, 0.0]}
        assert get_loss(name)(pairs([0.0, 1.0], **columns)).isfinite().all()


def test_values_are_looked_at_on_a_cpu_only():
    """Elsewhere that would make the host wait."""
    refuse_values(torch.ones(2, dtype=torch.bool, device="meta"), "no")
    with pytest.raises(ValueError, match="2 of 2 rows: no"):
        refuse_values(torch.ones(2, dtype=torch.bool), "no")
