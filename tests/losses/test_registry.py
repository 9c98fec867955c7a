import dataclasses
import inspect
import re
from dataclasses import dataclass

import pytest
import torch
import trl

from tests.losses.batches import pairs
from trl_ext import get_loss, list_losses, register_loss
from trl_ext.losses import TRL_LOSS_TYPES, Loss, list_aliases, loss_class, resolve_name


OURS = [
    "aligndistil",
    "alpha_dpo",
    "anchored",
    "asft",
    "beta_dpo",
    "bias_variance",
    "cpo",
    "dmpo",
    "drpo",
    "eurus",
    "inpo",
    "length_regularized",
    "margin_adaptive",
    "offset",
    "reward_distillation",
    "robust_em",
    "simpo",
    "sppo_soft",
    "step_apo",
    "trpa",
]


def called(self, batch):
    return batch.delta


def test_names_and_aliases():
    assert list_losses() == OURS
    for alias, name in {
        "odpo": "offset",
        "adpo": "anchored",
        "madpo": "margin_adaptive",
        "bvpo": "bias_variance",
        "ilr_dpo": "length_regularized",
        "r_dpo": "length_regularized",
        "gpo": "sppo_soft",
        "aligned_sft": "asft",
        "cpl": "step_apo",
        "d_dpo": "reward_distillation",
        "e_dpo": "reward_distillation",
        "lcpo": "robust_em",
        "re_po": "robust_em",
    }.items():
        assert type(get_loss(alias)) is loss_class(name)
        assert alias in list_aliases(name)


def test_trls_loss_types_are_those_of_trl():
    text = inspect.getsource(trl.DPOTrainer._compute_loss).split("Should be one of")[1]
    assert set(re.findall(r"'([a-z_]+)'", text)) == set(TRL_LOSS_TYPES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ofset", r"Unknown loss 'ofset'. Did you mean 'offset'\? Known: \['adpo', .*'sppo_soft', .*\]"),
        ("zzz", r"Unknown loss 'zzz'. Known"),
        ("sigmoid", "TRL's own loss type: pass it as `loss_type` to the trainer"),
        (None, "named by a string, got None"),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        get_loss(name)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("offset", {"alhpa": 1.0}, r"no hyper-parameter 'alhpa'. Did you mean 'alpha'\? It has: \['alpha', 'scaling'"),
        ("offset", {"zzz": 1.0}, r"The loss 'offset' has no hyper-parameter 'zzz'\. It has: \['alpha', 'scaling'"),
        ("offset", {"alpha": "1"}, "`alpha='1'` is a str; expected float"),
        ("offset", {"alpha": float("nan")}, "`alpha=nan` is not finite"),
        ("offset", {"alpha": float("-inf")}, "`alpha=-inf` is not finite"),
        ("offset", {"alpha": True}, "`alpha=True` is a bool; expected float"),
        ("offset", {"alpha": None}, "`alpha=None` is a NoneType; expected float"),
        ("offset", {"alpha": -0.5}, "`alpha=-0.5` must be at least 0"),
        (
            "offset",
            {"scaling": "sqrt"},
            r"`scaling='sqrt'` is unknown; choose one of \['log', 'log_ratio', 'linear'\]",
        ),
        ("offset", {"scaling": 1}, "`scaling=1` is a int; expected str"),
        ("offset", {"margin_floor": 0.0}, "`margin_floor=0.0` must be positive"),
        ("offset", {"margin_floor": "0.1"}, "expected float or None"),
        ("anchored", {"tau": 0.0}, "`tau=0.0` must be positive"),
        ("offset", {"margin_floor": -1.0}, "`margin_floor=-1.0` must be positive, or None for no floor"),
        ("anchored", {"tau": -1.0}, "`tau=-1.0` must be positive, or None for 1 / beta"),
        ("anchored", {"beta_r": 0.0}, "`beta_r=0.0` must be positive"),
        ("anchored", {"beta_r": -1.0}, "`beta_r=-1.0` must be positive"),
        ("anchored", {"label_smoothing": -0.1}, r"`label_smoothing=-0.1` must lie in \[0, 1\]"),
        ("anchored", {"label_smoothing": 1.5}, r"`label_smoothing=1.5` must lie in \[0, 1\]"),
        ("anchored", {"standardize": 1}, "`standardize=1` is a int; expected bool"),
        ("margin_adaptive", {"c_min": 1.0}, r"`c_min=1.0` must lie in \(0, 1\)"),
        ("margin_adaptive", {"c_min": 0.0}, r"`c_min=0.0` must lie in \(0, 1\)"),
        ("margin_adaptive", {"c_max": 1.0}, "`c_max=1.0` must be above 1"),
        ("margin_adaptive", {"lmbda": 0.0}, "`lmbda=0.0` must be positive"),
        ("margin_adaptive", {"c_max": 0.5}, "`c_max=0.5` must be above 1"),
        ("margin_adaptive", {"lmbda": -1.0}, "`lmbda=-1.0` must be positive"),
        ("margin_adaptive", {"tau": 0.0}, "`tau=0.0` must be positive"),
        ("margin_adaptive", {"tau": -1.0}, "`tau=-1.0` must be positive"),
        ("bias_variance", {"alpha": 1.01}, r"`alpha=1.01` must lie in \[0, 1\]"),
        ("bias_variance", {"alpha": -0.01}, r"`alpha=-0.01` must lie in \[0, 1\]"),
        ("bias_variance", {"base": "bias_variance"}, "cannot be 'bias_variance' itself"),
        ("bias_variance", {"base": "sigmod"}, "Unknown loss 'sigmod'. Did you mean 'sigmoid'"),
        ("bias_variance", {"base": "bvpo"}, "cannot be 'bias_variance' itself"),
        ("length_regularized", {"alpha": -0.1}, "`alpha=-0.1` must be at least 0"),
        ("inpo", {"eta": 0.0}, "`eta=0.0` must be positive"),
        ("inpo", {"eta": -1.0}, "`eta=-1.0` must be positive"),
        ("inpo", {"tau": 0.0076}, r"`tau=0.0076` must lie in \[0, eta=0.0075\]"),
        ("inpo", {"tau": -0.1}, r"`tau=-0.1` must lie in \[0, eta=0.0075\]"),
        ("alpha_dpo", {"alpha": -0.1}, "`alpha=-0.1` must be at least 0"),
        ("alpha_dpo", {"gamma_beta_ratio": -0.1}, "`gamma_beta_ratio=-0.1` must be at least 0"),
        ("alpha_dpo", {"momentum": 1.0}, r"alpha_dpo: `momentum=1.0` must lie in \[0, 1\)"),
        ("beta_dpo", {"a": -0.1}, "`a=-0.1` must be at least 0"),
        ("beta_dpo", {"rho": -0.1}, r"`rho=-0.1` must lie in \[0, 1\)"),
        ("beta_dpo", {"rho": 1.0}, r"`rho=1.0` must lie in \[0, 1\)"),
        ("beta_dpo", {"momentum": -0.1}, r"beta_dpo: `momentum=-0.1` must lie in \[0, 1\)"),
        (
            "robust_em",
            {"base": "hinge"},
            r"`base='hinge'` is unknown; choose one of \['sigmoid', 'ipo', 'simpo', 'cpo'\]",
        ),
        ("robust_em", {"eta": 0.0}, r"`eta=0.0` must lie in \(0, 1\)"),
        ("robust_em", {"eta": 1.0}, r"`eta=1.0` must lie in \(0, 1\)"),
        ("robust_em", {"rate": -0.1}, r"`rate=-0.1` must lie in \[0, 1\]"),
        ("robust_em", {"rate": 1.1}, r"`rate=1.1` must lie in \[0, 1\]"),
        ("robust_em", {"gamma_beta_ratio": -0.1}, "`gamma_beta_ratio=-0.1` must be at least 0"),
        ("robust_em", {"annotators": 0}, "`annotators=0` must be at least 1"),
        ("robust_em", {"annotators": 2.0}, "`annotators=2.0` is not a whole number"),
        ("sppo_soft", {"target": "wins"}, r"`target='wins'` is unknown; choose one of \['win_rate', 'score'\]"),
        (
            "reward_distillation",
            {"combine": "max"},
            r"reward_distillation: `combine='max'` is unknown; choose one of \['mean', 'min'\]",
        ),
        ("asft", {"weight": -0.1}, r"asft: `weight=-0.1` must be at least 0 \(0 is plain SFT\)"),
        ("cpo", {"nll_weight": -1.0}, "cpo: `nll_weight=-1.0` must be at least 0"),
        ("dmpo", {"gamma": 0.0}, r"dmpo: `gamma=0.0` must lie in \(0, 1\]"),
        ("dmpo", {"gamma": 1.1}, r"dmpo: `gamma=1.1` must lie in \(0, 1\]"),
        ("eurus", {"absolute_weight": -0.5}, r"eurus: `absolute_weight=-0.5` must be at least 0 \(0 is DPO\)"),
        ("simpo", {"gamma_beta_ratio": -0.1}, "simpo: `gamma_beta_ratio=-0.1` must be at least 0"),
        ("simpo", {"gamma": 1.0}, r"The loss 'simpo' has no hyper-parameter 'gamma'.*\['gamma_beta_ratio'\]"),
        ("aligndistil", {"beta2": -0.1}, "aligndistil: `beta2=-0.1` must be at least 0"),
        ("aligndistil", {"temperature": 0.0}, "aligndistil: `temperature=0.0` must be positive"),
        ("aligndistil", {"length_norm": 1.0}, "`length_norm=1.0` is a float"),
        ("step_apo", {"alpha": -0.5}, r"step_apo: `alpha=-0.5` must be at least 0 \(0 is DPO\)"),
        ("trpa", {"kappa": 0.0}, "trpa: `kappa=0.0` must be positive"),
        ("trpa", {"kl_weight": -0.1}, "trpa: `kl_weight=-0.1` must be at least 0"),
        ("drpo", {"tau": 0.0}, "drpo: `tau=0.0` must be positive"),
        ("drpo", {"length_temperature": 0.0}, "drpo: `length_temperature=0.0` must be positive"),
        ("drpo", {"max_length": 0}, "drpo: `max_length=0` must be positive"),
        ("drpo", {"max_length": 12.5}, "`max_length=12.5` is not a whole number"),
        ("drpo", {"delta": -0.1}, "drpo: `delta=-0.1` must be at least 0"),
        ("drpo", {"kl_weight": -1.0}, "drpo: `kl_weight=-1.0` must be at least 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_hyperparameters(name, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        get_loss(name, **hyperparameters)


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("offset", {"alpha": 0}),
        ("offset", {"margin_floor": 1e-9}),
        ("anchored", {"tau": 1e-9, "beta_r": 1e-9}),
        ("anchored", {"label_smoothing": 1}),
        ("margin_adaptive", {"c_min": 1e-9, "c_max": 1 + 1e-9, "lmbda": 1e-9, "tau": 1e-9}),
        ("margin_adaptive", {"c_min": 1 - 1e-9}),
        ("bias_variance", {"alpha": 0}),
        ("bias_variance", {"alpha": 1}),
        ("bias_variance", {"alpha": "auto"}),
        ("length_regularized", {"alpha": 0}),
        ("inpo", {"eta": 1e-9, "tau": 0}),
        ("inpo", {"eta": 0.1, "tau": 0.1}),
        ("alpha_dpo", {"alpha": 0, "gamma_beta_ratio": 0, "momentum": 0}),
        ("beta_dpo", {"a": 0, "rho": 0, "momentum": 0}),
        ("robust_em", {"eta": 1e-9, "rate": 0, "gamma_beta_ratio": 0, "annotators": 1}),
        ("robust_em", {"eta": 1 - 1e-9, "rate": 1}),
        ("sppo_soft", {"target": "score"}),
        ("reward_distillation", {"combine": "min"}),
        ("asft", {"weight": 0}),
        ("cpo", {"nll_weight": 0}),
        ("dmpo", {"gamma": 1e-9}),
        ("dmpo", {"gamma": 1}),
        ("eurus", {"absolute_weight": 0}),
        ("simpo", {"gamma_beta_ratio": 0}),
        ("aligndistil", {"beta2": 0, "temperature": 1e-9}),
        ("step_apo", {"alpha": 0}),
        ("trpa", {"kappa": 1e-9, "kl_weight": 0, "correct": -3}),
        ("drpo", {"tau": 1e-9, "length_temperature": 1e-9, "max_length": 1, "delta": 0, "kl_weight": 0, "correct": 0}),
    ],
    ids=str,
)
def test_bounds_that_are_allowed(name, hyperparameters):
    assert dataclasses.asdict(get_loss(name, **hyperparameters)).items() >= hyperparameters.items()


def test_defaults():
    assert {name: dataclasses.asdict(get_loss(name)) for name in OURS} == {
        "offset": {"alpha": 1.0, "scaling": "log", "margin_floor": None},
        "anchored": {"tau": None, "beta_r": 1.0, "label_smoothing": 0.0, "standardize": False},
        "margin_adaptive": {"c_min": 0.5, "c_max": 2.0, "lmbda": 1.0, "tau": 2.0},
        "bias_variance": {"alpha": 0.5, "base": "sigmoid", "base_kwargs": {}},
        "length_regularized": {"alpha": 0.02},
        "inpo": {"eta": 0.0075, "tau": 0.0025},
        "sppo_soft": {"target": "win_rate"},
        "reward_distillation": {"combine": "mean"},
        "asft": {"weight": 0.1},
        "cpo": {"nll_weight": 1.0},
        "dmpo": {"gamma": 0.7},
        "eurus": {"absolute_weight": 1.0},
        "simpo": {"gamma_beta_ratio": 0.5},
        "step_apo": {"alpha": 1.0},
        "trpa": {"kappa": 2.5, "kl_weight": 0.001, "correct": 1.0},
        "drpo": {
            "tau": 10.0,
            "delta": 1e-4,
            "kl_weight": 1e3,
            "length_temperature": 0.1,
            "max_length": 8192,
            "correct": 1.0,
        },
        "aligndistil": {"beta2": 10.0, "temperature": 1.0, "length_norm": True},
        "alpha_dpo": {"alpha": 0.2, "gamma_beta_ratio": 0.6, "momentum": 0.9},
        "beta_dpo": {"a": 0.6, "rho": 0.2, "momentum": 0.9},
        "robust_em": {"base": "sigmoid", "eta": 0.9, "rate": 0.1, "gamma_beta_ratio": 0.5, "annotators": 1},
    }


def test_integers_will_do():
    assert get_loss("offset", alpha=1) == get_loss("offset", alpha=1.0)
    assert get_loss("anchored", tau=2)(pairs([1.0])).isfinite()


def test_register_a_plain_dataclass():
    @register_loss("squared", aliases=["sq"])
    @dataclass
    class Squared:
        target: float = 1.0

        def __call__(self, batch):
            return (batch.delta - self.target) ** 2

    loss = get_loss("sq", target=3.0)
    assert loss(pairs([1.0])).item() == pytest.approx(4.0)
    assert (loss.columns, loss.optional_columns, loss.paper, loss.takes_groups) == ((), (), "", False)
    assert not loss.takes_lists
    assert (loss.required_columns, loss.divides_by_beta, loss.column_help) == ((), False, "")
    assert (loss.title, loss.citation, loss.reads, loss.reads_beta) == ("", "", {"ref_logps"}, True)
    assert (loss.remark(("chosen",)), loss.evidence, loss.one_turn) == ("", "", "")
    assert loss.metrics(pairs([1.0])) == {}
    assert loss.check_columns({}) is None
    assert "squared" in list_losses()
    with pytest.raises(ValueError, match="not finite"):
        get_loss("squared", target=float("nan"))


def test_what_a_plain_dataclass_states_is_kept():
    stated = {
        "paper": "2601.00001",
        "title": "Stated",
        "evidence": "Recalled.",
        "citation": "@article{stated}",
        "columns": ("quality",),
        "optional_columns": ("weight",),
        "reads": frozenset({"token_logps"}),
        "update_first": False,
        "takes_groups": True,
        "takes_lists": True,
        "column_help": "Give every row a quality.",
        "required_columns": ("quality", "kind"),
        "divides_by_beta": True,
        "reads_beta": False,
    }
    methods = {
        "metrics": lambda self, batch: {"quality/mean": 3.0},
        "check_columns": lambda self, columns: columns["quality"] < 0,
        "remark": lambda self, columns: f"Read {columns}.",
    }
    register_loss("stated")(dataclass(type("Stated", (), {**stated, **methods, "__call__": called})))
    loss = get_loss("stated")
    assert {name: getattr(loss, name) for name in stated} == stated
    assert loss.metrics(pairs([1.0])) == {"quality/mean": 3.0}
    assert loss.check_columns({"quality": torch.tensor([1.0, -1.0])}).tolist() == [False, True]
    assert loss.remark("a") == "Read a."


def test_register_a_loss_with_columns():
    @register_loss("scored")
    @dataclass(frozen=True)
    class Scored(Loss):
        columns = ("score_chosen",)

        def __call__(self, batch):
            return batch.delta * batch.column("score_chosen")

    assert get_loss("scored").required_columns == ("score_chosen",)
    assert get_loss("scored")(pairs([2.0], score_chosen=[3.0])).item() == pytest.approx(6.0)


@pytest.mark.parametrize("name", ["sigmoid", "offset", "odpo"])
def test_a_name_that_is_taken_is_refused(name):
    owner = "TRL" if name == "sigmoid" else "trl_ext.losses.offset.OffsetLoss"
    for arguments in ({"name": name}, {"name": "new", "aliases": [name]}):
        with pytest.raises(ValueError, match=rf"'{name}' of .*Mine is taken: {owner} has it"):

            @register_loss(**arguments)
            @dataclass
            class Mine:
                def __call__(self, batch):
                    return batch.delta

    assert "new" not in list_losses()


def test_the_same_class_again_replaces_itself():
    def define():
        @register_loss("again")
        @dataclass
        class Again:
            def __call__(self, batch):
                return batch.delta

        return Again

    first, second = define(), define()
    assert first is not second
    assert loss_class("again") is second


@pytest.mark.parametrize(
    "thing",
    [
        called,
        object,
        dataclass(type("NoCall", (), {})),
        type("NoDataclass", (), {"__call__": called}),
        dataclass(type("Instance", (), {"__call__": called}))(),
    ],
    ids=lambda thing: getattr(thing, "__name__", "Instance"),
)
def test_what_is_no_callable_dataclass_is_refused(thing):
    with pytest.raises(TypeError, match="needs a dataclass with a `__call__"):
        register_loss("thing")(thing)


@pytest.mark.parametrize("name", ["", " ", "my loss", "a,b", "a\n", "\tb", None, 3, object])
def test_what_is_no_name_is_refused(name):
    for arguments in ({"name": name}, {"name": "new", "aliases": [name]}):
        with pytest.raises(ValueError, match="expected a string that is not empty and has no blanks or commas"):
            register_loss(**arguments)
    assert list_losses() == OURS


def test_names_of_any_other_kind():
    cls = dataclass(type("Named", (), {"__call__": lambda self, batch: batch.delta}))
    assert register_loss("my-loss.v2", aliases="Übung")(cls) is cls  # one alias may stand alone
    assert (resolve_name("my-loss.v2"), resolve_name("Übung")) == ("my-loss.v2", "my-loss.v2")
    assert list_aliases("my-loss.v2") == ["Übung"]


def test_half_precision_columns_are_widened():
    batch = pairs([0.0], score_chosen=torch.tensor([1.5], dtype=torch.bfloat16))
    assert batch.column("score_chosen").dtype == torch.float32
