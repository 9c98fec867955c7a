"""What is refused when a config or a trainer is built, or when a new dataset is evaluated."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig as TRLConfig

import trl_ext
from tests.online.runs import Scripted, batch, conversations, learn, online, prompts
from trl_ext.losses import get_loss, register_loss, registry
from trl_ext.losses.base import Loss
from trl_ext.trainers.online.checks import reads_win_rates
from trl_ext.trainers.online.prompts import check_prompts, read_columns


def soft(prompts, first, second):
    return [0.7 if len(a) > len(b) else 0.3 for a, b in zip(first, second, strict=True)]


ORACLE = {"reward_funcs": None, "judge": soft}


def config(**kwargs):
    return trl_ext.OnlineDPOConfig(output_dir="out", use_cpu=True, bf16=False, **kwargs)


# Arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reward_funcs": None}, "got neither"),
        ({"reward_funcs": []}, "got neither"),
        ({"judge": soft}, "got both"),
        ({"reward_funcs": None, "judge": 3}, "is not callable"),
        ({"reward_funcs": 3}, "`reward_funcs` has 3, a int; expected a function"),
        ({"reward_funcs": [len, {"a": 1}]}, "`reward_funcs` has {'a': 1}, a dict"),
        ({"reward_funcs": torch.nn.Linear(1, 1)}, "`reward_funcs` has a Linear without a tokenizer"),
        ({"reward_funcs": "./rewards/none"}, "There is no reward model './rewards/none'"),
        ({"reward_funcs": [len, "/rewards/none"]}, "There is no reward model '/rewards/none'"),
        ({"model": "./models/none"}, "There is no model './models/none'"),
        ({"compute_metrics": lambda x: {}}, "would not be called"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, "no column 'prompt'"),
        ({"train_dataset": Dataset.from_dict({"prompt": []})}, "train dataset is empty"),
        ({"train_dataset": None}, "`train_dataset` is required"),
        ({"eval_dataset": Dataset.from_dict({"prompt": []})}, "eval dataset is empty"),
        ({"eval_dataset": {"short": Dataset.from_dict({"text": ["a"]})}}, "short dataset has no column 'prompt'"),
    ],
)
def test_refused_arguments(kwargs, message, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        online(tiny_model_dir, tmp_path, trainer_kwargs=kwargs)


def test_a_model_is_not_its_own_reference(tiny_model_dir, tmp_path):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="are the same object"):
        trl_ext.OnlineDPOTrainer(
            model, model, len, config(), processing_class=AutoTokenizer.from_pretrained(tiny_model_dir)
        )


def test_a_tokenizer_is_needed():
    with pytest.raises(ValueError, match="`processing_class` must be provided"):
        trl_ext.OnlineDPOTrainer(torch.nn.Linear(1, 1), reward_funcs=len, args=config())


@pytest.mark.parametrize("penalty", [{"length_penalty": 0.1}, {"missing_eos_penalty": 1.0}])
def test_an_oracle_gives_no_reward_to_take_from(penalty, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=f"'{next(iter(penalty))}'. take something off a reward"):
        online(tiny_model_dir, tmp_path, trainer_kwargs=ORACLE, **penalty)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_generations": 1}, "at least 2"),
        ({"num_generations": 2.5}, "at least 2"),
        ({"pairing": "best"}, "choose one of"),
        ({"pairing": "group"}, r"\['sigmoid'\] take pairs"),
        ({"loss_type": "exo_pair"}, r"names \['exo_pair'\], which are not defined online"),
        ({"loss_type": "bias_variance", "pairing": "all"}, "use `pairing='best_worst'`"),
        ({"loss_type": "bias_variance", "loss_kwargs": {"alpha": "auto"}}, r"offline training alone.*\"alpha\": 0.5"),
        ({"loss_type": "inpo"}, r"reads \['initial_chosen_logps', 'initial_rejected_logps'\].*`trl_ext.DPOTrainer`"),
        ({"loss_type": ["sigmoid", "inpo"]}, "'inpo' reads"),
        ({"loss_type": "step_apo"}, r"reads \['q_chosen', 'q_rejected'\].*`trl_ext.DPOTrainer`"),
        ({"mixture_coef": 1.5}, r"must lie in \[0, 1\]"),
        ({"mixture_coef": -0.1}, r"must lie in \[0, 1\]"),
        ({"mixture_coef": "high"}, "is text; expected a number"),
        ({"mixture_samples": "some"}, "choose 'all' or 'half'"),
        ({"mixture_coef": 0.5, "use_vllm": True}, "use_vllm=False"),
        ({"mixture_coef": 0.5, "generation_kwargs": {"num_beams": 2}}, "Leave `num_beams` out"),
        ({"missing_eos_penalty": -1.0}, "must be a positive number"),
        ({"length_penalty": float("nan")}, "must be a finite number"),
        ({"reward_weights": [1.0, float("nan")]}, "must be finite numbers, one per reward function"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, "must lie in"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "must be a whole number, at least 1"),
        ({"beta": [0.1, -1.0]}, "at least 0"),
        ({"loss_type": "ipo", "beta": 0.0}, "no meaning for"),
        ({"loss_weights": [1.0, 2.0]}, "2 weights for 1 losses"),
    ],
)
def test_refused_configs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(**kwargs)


@pytest.mark.parametrize("kwargs", [{"mixture_coef": 1}, {"mixture_coef": 0.0}, {"ref_model_mixup_alpha": 0.0}])
def test_bounds_that_are_allowed(kwargs):
    config(**kwargs)


def test_a_plain_config_of_trl_is_checked_too(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="'inpo' reads"):
        online(tiny_model_dir, tmp_path, config=TRLConfig, loss_type="inpo")


# Prompts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", None], "The prompt in row 1 of the train dataset is empty: None"),
        (["a", "b", ""], "The prompt in row 2 of the train dataset is empty: ''"),
        ([[{"role": "user", "content": "a"}], []], r"The prompt in row 1 of the train dataset is empty: \[\]"),
        ([1, 2], "The prompt in row 0 of the train dataset is 1; expected text, or a list of messages"),
        ([0, 2], "The prompt in row 0 of the train dataset is 0; expected text"),
        ([["a", "b"]], "row 0 of the train dataset has the message 'a'; expected a dict with 'role' and 'content'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused_prompts(rows, message, stream, tiny_model_dir):
    data = Dataset.from_dict({"prompt": rows})
    with pytest.raises(ValueError, match=message):
        checked = check_prompts(
            data.to_iterable_dataset() if stream else data, [], "train", AutoTokenizer.from_pretrained(tiny_model_dir)
        )
        list(checked)


def test_prompts_of_two_kinds(tiny_model_dir):
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}]
    data = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="row 1 of the eval dataset is a list, the first one a str"):
        list(check_prompts(data, [], "eval", AutoTokenizer.from_pretrained(tiny_model_dir)))


def test_prompts_that_are_fine_stay_as_they_are(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for data in (prompts(), conversations()):
        assert check_prompts(data, [], "train", tokenizer)["prompt"][:] == data["prompt"][:]
        stream = check_prompts(data.to_iterable_dataset(), [], "train", tokenizer)
        assert [row["prompt"] for row in stream] == data["prompt"][:]


def test_conversations_need_a_template(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    check_prompts(prompts(), [], "train", tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        check_prompts(conversations(), [], "train", tokenizer)
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no chat template"):
        trl_ext.OnlineDPOTrainer(
            str(tiny_model_dir),
            reward_funcs=len,
            args=config(),
            train_dataset=conversations(),
            processing_class=tokenizer,
        )


def test_the_template_of_a_processors_tokenizer(tiny_model_dir):
    """A processor without a template of its own renders with that of its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    processor = SimpleNamespace(chat_template=None, tokenizer=tokenizer)
    assert len(check_prompts(conversations(), [], "train", processor)) == 8
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        check_prompts(conversations(), [], "train", processor)
    processor.chat_template = "own"
    assert len(check_prompts(conversations(), [], "train", processor)) == 8


# Columns


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-0.5, "'weight' of the train dataset is negative .* in row 3"),
        (float("nan"), "'weight' of the train dataset is not finite in row 3"),
        (None, "'weight' of the train dataset has no value in row 3"),
    ],
)
def test_refused_weights(weight, message, tiny_model_dir, tmp_path):
    weights = [1.0] * 8
    weights[3] = weight
    data = prompts().add_column("weight", weights)
    with pytest.raises(ValueError, match=message):
        online(tiny_model_dir, tmp_path, trainer_kwargs={"train_dataset": data})
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, max_steps=2,
        trainer_kwargs={"train_dataset": data.to_iterable_dataset()},
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_weight_in_a_stream_counts(tiny_model_dir, tmp_path):
    losses = []
    for weight in (1.0, 2.0):
        data = prompts().add_column("weight", [weight] * 8).to_iterable_dataset()
        trainer = online(tiny_model_dir, tmp_path, cls=Scripted, max_steps=1, trainer_kwargs={"train_dataset": data})
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(2 * losses[0])


@pytest.fixture
def needs_level(monkeypatch):
    """A loss that reads a column of the prompts, registered for one test."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))

    @register_loss("needs_level")
    @dataclass(frozen=True)
    class NeedsLevel(Loss):
        columns = ("level",)
        optional_columns = ("annotator_id", "other_chosen")

        def __call__(self, batch):
            return batch.delta

    return "needs_level"


def test_columns_of_the_prompts(needs_level, tiny_model_dir, tmp_path):
    losses = {"a": get_loss(needs_level), "b": get_loss("offset")}
    assert read_columns(["prompt", "level"], "train", losses, False) == ["level"]
    available = ["prompt", "level", "other_chosen", "weight", "annotator_id", "score_chosen"]
    assert read_columns(available, "train", losses, False) == ["level", "annotator_id", "weight"]
    with pytest.raises(
        ValueError, match="'needs_level' needs the column 'level', which the train dataset does not have"
    ):
        online(tiny_model_dir, tmp_path, loss_type=needs_level)
    with pytest.raises(ValueError, match="'level' of the train dataset is not finite in row 2"):
        data = prompts().add_column("level", [1.0, 2.0, float("inf"), *[1.0] * 5])
        online(tiny_model_dir, tmp_path, loss_type=needs_level, trainer_kwargs={"train_dataset": data})


def test_an_evaluation_lacks_columns(needs_level, tiny_model_dir, tmp_path):
    data = prompts().add_column("weight", [1.0] * 8)
    message = r"The eval dataset lacks the columns \['weight'\]"
    with pytest.raises(ValueError, match=message):
        online(tiny_model_dir, tmp_path, trainer_kwargs={"train_dataset": data, "eval_dataset": prompts()})
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, trainer_kwargs={"train_dataset": data})
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(prompts())
    with pytest.raises(ValueError, match="The hard dataset lacks the columns"):
        trainer.evaluate({"hard": prompts()})
    with pytest.raises(ValueError, match="no column 'prompt'"):
        trainer.evaluate(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="'weight' of the eval dataset is negative"):
        trainer.evaluate(prompts().add_column("weight", [-1.0] * 8))
    assert "eval_loss" in trainer.evaluate(data)


# Rewards and what losses read in them


@pytest.mark.parametrize(
    ("name", "kwargs", "reads"),
    [
        ("sppo_soft", {}, True),
        ("sppo_soft", {"target": "score"}, False),
        ("offset", {}, False),
        ("offset", {"scaling": "log_ratio"}, False),
        ("anchored", {}, False),
        ("margin_adaptive", {}, False),
        ("bias_variance", {"base": "sppo_soft"}, True),
        ("bias_variance", {"base": "offset"}, False),
        ("length_regularized", {}, False),
    ],
)
def test_which_losses_read_win_rates(name, kwargs, reads):
    assert reads_win_rates(get_loss(name, **kwargs)) == reads


def test_rewards_that_are_no_win_rates(tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, loss_type="sppo_soft",
        trainer_kwargs={"reward_funcs": lambda completions, **kwargs: [float(i // 3) for i, _ in enumerate(completions)]},
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        trainer.train()
    text = str(error.value)
    assert (
        "'sppo_soft' cannot take 2 of 4 pairs of this batch, the first with score_chosen=2, score_rejected=0" in text
    )
    assert '"target": "score"' in text and "A `judge` in place of `reward_funcs` gives win rates" in text


def test_rewards_that_are_win_rates(tiny_model_dir, tmp_path):
    share = lambda completions, **kwargs: [i / len(completions) for i, _ in enumerate(completions)]  # noqa: E731
    trainer = online(
        tiny_model_dir,
        tmp_path,
        cls=Scripted,
        loss_type="sppo_soft",
        max_steps=1,
        trainer_kwargs={"reward_funcs": share},
    )
    trainer.train()


@pytest.mark.parametrize("pairing", ["best_worst", "all"])
def test_rewards_that_have_no_ratio(pairing, tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, loss_type="offset", loss_kwargs={"scaling": "log_ratio"}, pairing=pairing,
        trainer_kwargs={"reward_funcs": lambda completions, **kwargs: [-1.0 / len(text) for text in completions]},
    )  # fmt: skip
    with pytest.raises(ValueError, match="'offset' cannot take 4 of 4 pairs") as error:
        trainer.train()
    assert "judge" not in str(error.value)


def test_groups_are_checked_by_their_ends(tiny_model_dir, tmp_path):
    class InRange(Loss):
        takes_groups = True

        def check_columns(self, columns):
            return (columns["score_chosen"] > 9) | (columns["score_rejected"] < 0)

        def __call__(self, batch):
            return batch.logps.sum(dim=1)

    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, loss_type="anchored", pairing="group", num_generations=3,
        trainer_kwargs={"reward_funcs": lambda completions, **kwargs: [2.0 * (i // 4) for i, _ in enumerate(completions)]},
    )  # fmt: skip
    trainer._terms.losses = {"anchored": InRange()}
    inputs = batch(trainer)
    learn(trainer, inputs)
    for rewards in (lambda completions, **kwargs: [5.0 * (i // 4) for i, _ in enumerate(completions)],
                    lambda completions, **kwargs: [i // 4 - 1.0 for i, _ in enumerate(completions)]):  # fmt: skip
        trainer.reward_funcs = [rewards]
        with pytest.raises(ValueError, match="'anchored' cannot take 4 of 4 pairs"):
            learn(trainer, inputs)


@pytest.mark.parametrize("loss_type", ["offset", "margin_adaptive"])
def test_an_oracle_gives_no_rewards(loss_type, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="which a `judge` has not"):
        online(tiny_model_dir, tmp_path, loss_type=loss_type, trainer_kwargs=ORACLE)
    with pytest.raises(ValueError, match="which a `judge` has not"):
        online(tiny_model_dir, tmp_path, loss_type="sppo_soft", loss_kwargs={"target": "score"}, trainer_kwargs=ORACLE)


def test_probabilities_need_an_oracle():
    class NeedsProbabilities(Loss):
        columns = ("preference_prob",)

    with pytest.raises(ValueError, match="'a' needs 'preference_prob': give a `judge`"):
        read_columns(["prompt"], "train", {"a": NeedsProbabilities()}, False)
    assert read_columns(["prompt", "preference_prob"], "train", {"a": NeedsProbabilities()}, True) == []


def test_resuming_with_another_loss_is_refused(tiny_model_dir, tmp_path):
    saved = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    online(
        tiny_model_dir, tmp_path, cls=Scripted, loss_type="offset", loss_kwargs={"scaling": "linear"}, **saved
    ).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"was trained with the losses .*offset.* A resumed run continues the same"):
        online(tiny_model_dir, tmp_path, cls=Scripted, loss_type="sigmoid", **saved).train(
            resume_from_checkpoint=checkpoint
        )
