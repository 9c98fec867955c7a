"""The callback on policies whose next token does not depend on what came before: every expectation is a short sum."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import history, options
from tests.online.runs import online, prompts
from trl_ext.data import Ensemble, PreferenceModel, RewardFunction
from trl_ext.metrics import MetricsCallback


MOST = 5  # tokens of a completion
# Probabilities of two words of different lengths and of the end
POLICY, REFERENCE = {" it": 0.3, " what": 0.5, "<|eos|>": 0.2}, {" it": 0.5, " what": 0.1, "<|eos|>": 0.4}


def memoryless(model_dir, probabilities):
    """The tiny model with the same distribution of the next token after anything."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = {tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)[0]): p for word, p in probabilities.items()}
    assert len(ids) == len(probabilities)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.fill_(-40.0 / model.config.hidden_size)
        for token, p in ids.items():
            model.lm_head.weight[token] = math.log(p) / model.config.hidden_size
    return model


def held_out(count, **columns):
    return Dataset.from_dict({"prompt": ["what" + " it" * (index % 3) for index in range(count)], **columns})


PAIRS = Dataset.from_list(
    [
        {"prompt": "what", "chosen": " what what", "rejected": " it"},
        {"prompt": "what it", "chosen": " it", "rejected": " what"},
        {"prompt": "it", "chosen": " it what it", "rejected": " what it what"},
        {"prompt": "it it", "chosen": " what what", "rejected": " what it it"},
    ]
)


def characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def longer(prompts, first, second):
    """A judge that takes what stands first where lengths are equal."""
    return [float(len(a) >= len(b)) for a, b in zip(first, second, strict=True)]


def trainer_of(model_dir, folder, *, policy=POLICY, reference=REFERENCE, cls=trl_ext.DPOTrainer, **overrides):
    """A trainer that learns nothing, so that the policy stays the known one."""
    kwargs = overrides.pop("trainer_kwargs", {})
    overrides = {"learning_rate": 0.0, "beta": 0.5, "max_steps": 2, "per_device_eval_batch_size": 500, **overrides}
    return cls(
        model=memoryless(model_dir, policy),
        ref_model=None if reference is None else memoryless(model_dir, reference),
        args=trl_ext.DPOConfig(**options(folder, **overrides)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=Dataset.from_list(preference_rows(8)),
        **kwargs,
    )


@pytest.fixture(scope="module")
def known(tiny_model_dir, tmp_path_factory):
    return trainer_of(tiny_model_dir, tmp_path_factory.mktemp("known"))


def lengths(probabilities):
    """Probability of each number of tokens, the end included."""
    end = probabilities["<|eos|>"]
    shares = np.array([(1 - end) ** (n - 1) * end for n in range(1, MOST + 1)])
    shares[-1] += (1 - end) ** MOST
    return shares


@pytest.fixture(params=["<|pad|>", "<|eos|>"])
def filled(request, known):
    """With a token of its own that fills rows, and where the end of a completion does."""
    known._tokenizer.pad_token = request.param
    yield known
    known._tokenizer.pad_token = "<|pad|>"


def test_samples_of_a_known_policy(filled):
    names = ["kl_to_reference", "mean_length", "ended_share", "mean_reward"]
    found = MetricsCallback(
        filled, names, held_out(1500), reward_funcs=lambda completions, **_: [c.count("what") for c in completions],
        max_new_tokens=MOST,
    ).measure()  # fmt: skip
    mean_length = (lengths(POLICY) * np.arange(1, MOST + 1)).sum()
    per_token = sum(p * math.log(p / REFERENCE[word]) for word, p in POLICY.items())
    expected = {
        "mean_length": mean_length,
        "ended_share": 1 - 0.8**MOST,
        "mean_reward": mean_length * 0.5,
        "kl_to_reference": mean_length * per_token,
    }
    for name, value in expected.items():
        low, high = found[f"samples/{name}_low"], found[f"samples/{name}_high"]
        # Twice the width of an interval of 95%: one seed, and no luck needed
        assert abs(found[f"samples/{name}"] - value) < high - low < 0.25 * value, name
    assert found["samples/kl_per_token"] == pytest.approx(per_token, rel=0.1)
    error = found["samples/kl_to_reference_standard_error"]
    assert found["samples/kl_to_reference_high"] - found["samples/kl_to_reference"] == pytest.approx(1.959964 * error)


def wins_of_more_words():
    """Of two independent completions: more words, and as many."""
    ours, theirs = (
        np.array([(1 - end) ** n * (end if n < MOST else 1) for n in range(MOST + 1)])
        for end in (POLICY["<|eos|>"], REFERENCE["<|eos|>"])
    )
    table = ours[:, None] * theirs
    return np.tril(table, -1).sum(), np.trace(table)


def test_win_rate_against_the_references_samples_by_rewards(known):
    words = lambda completions, **_: [len(c.split()) for c in completions]  # noqa: E731
    callback = MetricsCallback(known, ["win_rate"], held_out(1500), reward_funcs=words, max_new_tokens=MOST)
    more, equal = wins_of_more_words()
    found = callback.measure()
    assert found["samples/win_rate"] == pytest.approx(more + equal / 2, abs=0.03)
    # Samples of the two are independent: with the same random numbers more of them would tie
    assert found["samples/ties"] == pytest.approx(equal, abs=0.03)
    assert found == callback.measure(), "the same policy, the same numbers"
    names = {"win_rate", "win_rate_low", "win_rate_high", "ties"}
    assert set(found) == {f"samples/{name}" for name in names}


def test_batches_draw_numbers_of_their_own(known):
    texts = []
    callback = MetricsCallback(
        known, ["mean_reward"], held_out(3).select([0] * 40), reward_funcs=lambda completions, **_: texts.append(completions) or [0.0] * len(completions),
        max_new_tokens=MOST, batch_size=20,
    )  # fmt: skip
    callback.measure()
    assert len(texts) == 2 and texts[0] != texts[1]


def test_a_judge_is_asked_in_both_orders(known):
    calls = []

    def judge(prompts, first, second):
        calls.append((prompts, first, second))
        return [
            0.9 if len(a) > len(b) else 0.6 if len(a) == len(b) else 0.1 for a, b in zip(first, second, strict=True)
        ]

    metrics = ["win_rate", "length_controlled_win_rate"]
    found = MetricsCallback(known, metrics, held_out(30), judge=judge, max_new_tokens=MOST).measure()
    (prompts, ours, theirs), swapped = calls
    assert swapped == (prompts, theirs, ours) and prompts == held_out(30)["prompt"]
    # Whichever is judged first, the mean over both orders is 0.9, 0.5 or 0.1
    values = [0.5 + 0.4 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(ours, theirs, strict=True)]
    assert found["samples/win_rate"] == pytest.approx(sum(values) / 30)
    ties = sum(value == 0.5 for value in values)
    assert 0 < ties < 30 and found["samples/ties"] == pytest.approx(ties / 30)
    assert found["samples/position_bias"] == pytest.approx(0.2 * ties / 30)
    # A win rate that is a matter of length alone
    assert found["samples/length_weight"] < 0
    controlled = found["samples/length_controlled_win_rate"]
    assert abs(controlled - 0.5) < abs(found["samples/win_rate"] - 0.5)


def test_answers_of_a_column_as_baseline(known):
    answers = [" it" * (1 + index % 9) for index in range(60)]
    seen = []

    def judge(prompts, first, second):
        seen.append((first, second))
        return [1.0] * len(prompts)

    callback = MetricsCallback(
        known, ["win_rate"], held_out(60, gold=answers), judge=judge, baseline="gold", max_new_tokens=MOST, num_prompts=50
    )  # fmt: skip
    found = callback.measure()
    assert seen[0][1] == answers[:50] == seen[1][0]
    assert found["samples/win_rate"] == 0.5 and found["samples/position_bias"] == 1.0


@pytest.mark.parametrize("backend", ["torch", "trl"])
def test_pairs_of_a_known_policy(backend, tiny_model_dir, tmp_path):
    trainer = trainer_of(tiny_model_dir, tmp_path, logprob_backend=backend, loss_type="offset")
    found = MetricsCallback(
        trainer, ["preference_accuracy", "calibration_error", "length_bias"], pairs=PAIRS
    ).measure()
    ratio = {word: math.log(POLICY[word] / REFERENCE[word]) for word in POLICY}
    it, what, end = ratio[" it"], ratio[" what"], ratio["<|eos|>"]
    margins = [0.5 * m for m in (2 * what - it, it - what, (2 * it + what) - (2 * what + it), what - 2 * it)]
    assert all(m != 0 for m in margins) and end != 0
    assert [m > 0 for m in margins] == [True, False, False, True]
    assert found["pairs/preference_accuracy"] == 0.5
    assert found["pairs/margin"] == pytest.approx(sum(margins) / 4, rel=1e-5)
    assert found["pairs/log_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4, rel=1e-5)
    assert found["pairs/longer_chosen"] == 0.5 and found["pairs/length_gap"] == 0.0  # 1, 0, 0 and -1 tokens
    assert found["pairs/length_correlation"] == pytest.approx(np.corrcoef([1, 0, 0, -1], margins)[0, 1], rel=1e-5)


def test_reward_models_and_functions_are_added_up(known, tiny_model_dir, tmp_path):
    config = Qwen3Config.from_pretrained(tiny_model_dir, num_labels=1)
    torch.manual_seed(1)
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path)
    known._tokenizer.save_pretrained(tmp_path)
    texts = []

    def words(prompts, completions):
        texts.extend(zip(prompts, completions, strict=True))
        return [float(len(completion.split())) for completion in completions]

    found = MetricsCallback(
        known, ["mean_reward"], held_out(6), reward_funcs=[str(tmp_path), words], reward_weights=[2.0, 0.5], max_new_tokens=MOST
    ).measure()  # fmt: skip
    model = Qwen3ForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rewards = []
    for prompt, completion in texts:
        ids = torch.tensor([known._tokenizer(prompt + completion + "<|eos|>")["input_ids"]])
        with torch.no_grad():
            rewards.append(2 * model(input_ids=ids).logits.item() + 0.5 * len(completion.split()))
    assert len(set(rewards)) > 1 and found["samples/mean_reward"] == pytest.approx(sum(rewards) / 6, rel=1e-4)


def test_conversations(known):
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": "it"}]}] * 3)
    seen = []
    reward = lambda prompts, completions: seen.extend(zip(prompts, completions, strict=True)) or [1.0] * len(prompts)  # noqa: E731
    found = MetricsCallback(known, ["mean_reward"], chats, reward_funcs=reward, max_new_tokens=MOST).measure()
    assert found["samples/mean_reward"] == 1.0
    assert all(prompt == chats[0]["prompt"] and completion[0]["role"] == "assistant" for prompt, completion in seen)


def test_functions_that_read_columns(known):
    def same(completions, reference, **kwargs):
        return [float(each in text) for each, text in zip(reference, completions, strict=True)]

    reward = RewardFunction(same, version="1", columns=["reference"])
    data = held_out(40, reference=["it", "never"] * 20)
    found = MetricsCallback(
        known, ["mean_reward", "win_rate"], data, reward_funcs=reward, max_new_tokens=MOST
    ).measure()
    assert 0.1 < found["samples/mean_reward"] < 0.5  # of the even rows alone
    with pytest.raises(ValueError, match=r"lacks \['reference'\]"):
        MetricsCallback(known, ["mean_reward"], held_out(2), reward_funcs=reward)
    with pytest.raises(ValueError, match="Several rewards as a list have no mean"):
        MetricsCallback(known, ["mean_reward"], data, reward_funcs=Ensemble([reward, reward], "list"))


def test_a_preference_model_as_judge(known, tiny_model_dir):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=2)
    model.config.preference_temperature = 0.5
    seen = []
    judge = PreferenceModel(model, AutoTokenizer.from_pretrained(tiny_model_dir))
    compare = judge.compare
    judge.compare = lambda *given: seen.append(given) or compare(*given)
    found = MetricsCallback(known, ["win_rate"], held_out(6), judge=judge, max_new_tokens=MOST).measure()
    assert len(seen) == 2 and seen[0][1] == seen[1][2] and all(len(given[3]) == 6 for given in seen)
    # s(a, b) = -s(b, a): the order is of no account
    assert found["samples/position_bias"] == pytest.approx(0, abs=1e-6)


# While training


def steps_of(trainer, name):
    return [entry["step"] for entry in trainer.state.log_history if name in entry]


def test_logged_with_every_evaluation_and_found_by_the_best_model(tiny_model_dir, tmp_path):
    # A policy that moves, so that a disturbed run would be another
    run = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "learning_rate": 1e-2, "max_steps": 3,
        "metric_for_best_model": "eval_samples/mean_length", "greater_is_better": False, "gradient_checkpointing": True,
    }  # fmt: skip
    pairs = Dataset.from_list(preference_rows(8))
    alone = trainer_of(
        tiny_model_dir, tmp_path / "alone", **{**run, "save_strategy": "no", "metric_for_best_model": None},
        trainer_kwargs={"eval_dataset": pairs},
    )  # fmt: skip
    alone.train()
    trainer = trainer_of(
        tiny_model_dir, tmp_path / "run", **run, trainer_kwargs={"eval_dataset": {"one": pairs, "two": pairs}}
    )
    metrics = ["mean_length", "kl_to_reference", "preference_accuracy"]
    callback = MetricsCallback(
        trainer, metrics, held_out(20), PAIRS, max_new_tokens=MOST, batch_size=8, eval_on_start=True
    )
    trainer.add_callback(callback)
    trainer.train()
    assert steps_of(trainer, "eval_samples/mean_length") == [0, 1, 2, 3], "once for both datasets"
    assert steps_of(trainer, "eval_pairs/preference_accuracy") == [0, 1, 2, 3]
    own = [entry for entry in trainer.state.log_history if "eval_samples/mean_length" in entry]
    assert all(set(entry) - {"step", "epoch"} == {key for key in entry if key.startswith(("eval_samples/", "eval_pairs/"))}
               for entry in own), "nothing of the training is in them"  # fmt: skip
    assert len({entry["eval_samples/kl_to_reference"] for entry in own}) == 4, "the policy moves"
    assert trainer.state.best_metric == min(entry["eval_samples/mean_length"] for entry in own[1:])
    losses = lambda run: [entry for entry in history(run) if "loss" in entry]  # noqa: E731
    assert losses(trainer) == losses(alone), "training is as without it"
    assert trainer.model.is_gradient_checkpointing


def test_every_so_many_steps(tiny_model_dir, tmp_path):
    trainer = trainer_of(tiny_model_dir, tmp_path, max_steps=4, learning_rate=1e-2)
    alone = trainer_of(tiny_model_dir, tmp_path, max_steps=4, learning_rate=1e-2)
    callback = MetricsCallback(trainer, ["mean_length"], held_out(4), max_new_tokens=MOST, eval_steps=2)
    trainer.add_callback(callback)
    for each in (trainer, alone):
        each.train()
    assert steps_of(trainer, "eval_samples/mean_length") == [2, 4]
    trained = [entry for entry in history(trainer) if "eval_samples/mean_length" not in entry]
    assert trained == history(alone)
    trainer.evaluate(Dataset.from_list(preference_rows(2)))
    assert steps_of(trainer, "eval_samples/mean_length") == [2, 4], (
        "with `eval_steps` evaluations are none of its business"
    )


def test_not_twice_before_the_first_step_and_not_in_a_resumed_run(tiny_model_dir, tmp_path):
    run = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_on_start": True,
    }  # fmt: skip
    data = {"eval_dataset": Dataset.from_list(preference_rows(2))}
    trainer = trainer_of(tiny_model_dir, tmp_path, **run, trainer_kwargs=data)
    add = lambda each: each.add_callback(  # noqa: E731
        MetricsCallback(each, ["mean_length"], held_out(4), max_new_tokens=MOST, eval_on_start=True)
    )
    add(trainer)
    trainer.train()
    assert steps_of(trainer, "eval_samples/mean_length") == [0, 2]
    resumed = trainer_of(tiny_model_dir, tmp_path, **{**run, "eval_on_start": False}, trainer_kwargs=data)
    add(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert steps_of(resumed, "eval_samples/mean_length") == [0, 2], "the first is of the run before"
    measured = [
        [entry for entry in history(each) if "eval_samples/mean_length" in entry] for each in (resumed, trainer)
    ]
    assert measured[0] == measured[1]


def test_the_reference_of_an_adapter_is_the_model_without_it(tiny_model_dir, tmp_path):
    lora = LoraConfig(r=2, target_modules=r".*layers\.1\.mlp\.down_proj", task_type="CAUSAL_LM")
    trainer = trainer_of(tiny_model_dir, tmp_path, reference=None, trainer_kwargs={"peft_config": lora})
    callback = MetricsCallback(
        trainer, ["kl_to_reference", "preference_accuracy"], held_out(1500), PAIRS, max_new_tokens=MOST
    )
    untrained = callback.measure()
    assert untrained["samples/kl_to_reference"] == 0 and untrained["pairs/ties"] == 1
    with torch.no_grad():  # the hidden state is another, and the same everywhere
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:
                parameter.fill_(1.0)
            if "lora_B" in name:
                parameter[::8] = -1.0
        logits = trainer.model(input_ids=torch.tensor([[7, 8]])).logits[0].double()
    torch.testing.assert_close(logits[0], logits[1])
    tokenizer = trainer.processing_class
    policy = {w: logits[0].softmax(-1)[tokenizer(w)["input_ids"][0]].item() for w in POLICY}
    per_token = sum(p * math.log(p / POLICY[word]) for word, p in policy.items())
    assert sum(policy.values()) > 0.999 and per_token > 0.02
    found = callback.measure()
    expected = per_token * (lengths(policy) * np.arange(1, MOST + 1)).sum()
    low, high = found["samples/kl_to_reference_low"], found["samples/kl_to_reference_high"]
    assert abs(found["samples/kl_to_reference"] - expected) < high - low < 0.6 * expected


def test_online(tiny_model_dir, tmp_path):
    """The trainer's own rewards, penalties included, and its judge."""
    folder = tmp_path / "model"
    memoryless(tiny_model_dir, POLICY).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    trainer = online(
        folder, tmp_path, max_steps=1, length_penalty=0.5, eval_strategy="steps", eval_steps=1,
        trainer_kwargs={"reward_funcs": characters, "eval_dataset": prompts(4)},
    )  # fmt: skip
    metrics = ["mean_reward", "mean_length", "win_rate", "kl_to_reference"]
    trainer.add_callback(MetricsCallback(trainer, metrics, held_out(600), eval_on_start=True, batch_size=600))
    trainer.train()
    first, last = [entry for entry in trainer.state.log_history if "eval_samples/win_rate" in entry]
    mean_words = 0.8 * (1 - 0.8**8) / 0.2  # of at most 8, the default of these runs
    mean_tokens = mean_words + 1 - 0.8**8
    assert first["eval_samples/mean_length"] == pytest.approx(mean_tokens, rel=0.1)
    per_word = (3 * POLICY[" it"] + 5 * POLICY[" what"]) / 0.8
    assert first["eval_samples/mean_reward"] == pytest.approx(per_word * mean_words - 0.5 * mean_tokens, rel=0.1)
    assert (
        first["eval_samples/win_rate"] == pytest.approx(0.5, abs=0.05) and first["eval_samples/kl_to_reference"] == 0
    )
    assert last["eval_samples/kl_to_reference"] != 0
    assert steps_of(trainer, "eval_win_rate") == [1], "that of the trainer stands beside it"

    both = MetricsCallback(trainer, ["mean_reward", "win_rate"], held_out(40), judge=longer).measure()
    assert "samples/mean_reward" in both and both["samples/position_bias"] > 0

    judged = online(tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": None, "judge": longer})
    assert MetricsCallback(judged, ["win_rate"], held_out(40)).measure()["samples/position_bias"] > 0
    with pytest.raises(ValueError, match="`mean_reward` needs `reward_funcs`"):
        MetricsCallback(judged, ["mean_reward"], held_out(4))


def test_rewards_of_which_none_has_an_opinion(tiny_model_dir, tmp_path):
    some = lambda completions, **_: [None if index % 2 else 3.0 for index in range(len(completions))]  # noqa: E731
    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": some})
    found = MetricsCallback(trainer, ["mean_reward", "win_rate"], held_out(6)).measure()
    assert found["samples/mean_reward"] == 3.0 and found["samples/win_rate"] == 0.5
    none = online(
        tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": lambda completions, **_: [None] * len(completions)}
    )
    assert MetricsCallback(none, ["mean_reward", "win_rate"], held_out(6)).measure() == {}


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["kl"]}, "names 'kl', which is unknown. There are"),
        ({"metrics": ["winrate"]}, "Did you mean 'win_rate'"),
        ({"metrics": []}, "at least one of"),
        ({"metrics": "win_rate"}, "must be a list of names"),
        ({"metrics": ["mean_length"]}, "measured on held-out prompts: give `prompts=`, a dataset; got NoneType"),
        ({"metrics": ["mean_length"], "prompts": ["what"]}, "got list"),
        ({"metrics": ["length_bias"], "prompts": held_out(2), "pairs": PAIRS}, "reads `prompts`. Leave it out"),
        ({"metrics": ["mean_length"], "prompts": PAIRS.remove_columns("prompt")}, "a column 'prompt'"),
        ({"metrics": ["mean_length"], "prompts": held_out(0)}, "at least one row"),
        ({"metrics": ["mean_length"], "prompts": held_out(2, image=["a", "b"])}, "prompts with images"),
        ({"metrics": ["mean_length"], "prompts": held_out(2), "num_prompts": 3}, "`num_prompts=3`, and `prompts` has 2"),
        ({"metrics": ["mean_length"], "prompts": held_out(2), "num_prompts": 0}, "`num_prompts=0` must be a whole number"),
        ({"metrics": ["mean_length"], "prompts": held_out(2), "eval_steps": 0}, "`eval_steps=0` must be a whole number"),
        ({"metrics": ["mean_length"], "prompts": held_out(2), "max_new_tokens": 3000}, "more than the 2048 positions"),
        ({"metrics": ["mean_reward"], "prompts": held_out(2)}, "`mean_reward` needs `reward_funcs`"),
        ({"metrics": ["win_rate"], "prompts": held_out(2)}, "Give `judge`, or `reward_funcs`"),
        (
            {"metrics": ["win_rate"], "prompts": held_out(2), "judge": longer, "reward_funcs": characters},
            r"do not read \['reward_funcs'\]",
        ),
        ({"metrics": ["mean_length"], "prompts": held_out(2), "judge": longer}, r"do not read \['judge'\]"),
        (
            {"metrics": ["mean_length"], "prompts": held_out(2), "baseline": "gold", "reward_weights": [1.0]},
            r"do not read \['reward_weights', 'baseline'\]",
        ),
        (
            {"metrics": ["win_rate"], "prompts": held_out(2), "judge": longer, "baseline": "gold"},
            r"lacks \['gold'\]; its columns are \['prompt'\]",
        ),
        (
            {"metrics": ["win_rate"], "prompts": held_out(2, gold=["a", None]), "judge": longer, "baseline": "gold"},
            "Row 1: the answer in 'gold' is None",
        ),
        ({"metrics": ["length_bias"], "pairs": PAIRS.remove_columns("chosen")}, r"lacks \['chosen'\]"),
        ({"metrics": ["length_bias"], "pairs": held_out(2, chosen=["it"] * 2, rejected=["", "it"])}, "is empty"),
    ],
)  # fmt: skip
def test_refused(arguments, message, known):
    with pytest.raises(ValueError, match=message):
        MetricsCallback(known, **arguments)


def test_a_prompt_that_fills_the_row(tiny_model_dir, tmp_path):
    trainer = trainer_of(tiny_model_dir, tmp_path, max_length=12)
    pairs = Dataset.from_list([*PAIRS, {"prompt": "what" * 20, "chosen": " it", "rejected": " what"}])
    with pytest.raises(
        ValueError, match=r"In 1 of 5 `pairs` \(the first in row 4\) the prompt alone fills `max_length=12`"
    ):
        MetricsCallback(trainer, ["length_bias"], pairs=pairs)


def test_without_a_reference(tiny_model_dir, tmp_path):
    trainer = trainer_of(tiny_model_dir, tmp_path, reference=None, loss_type="simpo")
    data = {"prompts": held_out(2, gold=["it"] * 2), "judge": longer}
    for metrics in (["kl_to_reference"], ["win_rate"]):
        with pytest.raises(
            ValueError, match=f"{metrics[0]}.* need a reference model, and this run has none: none of its losses"
        ):
            MetricsCallback(trainer, metrics, data["prompts"], judge=longer if "win_rate" in metrics else None)
    with pytest.raises(ValueError, match="need a reference model"):
        MetricsCallback(trainer, ["preference_accuracy"], pairs=PAIRS)
    assert MetricsCallback(trainer, ["win_rate"], **data, baseline="gold", max_new_tokens=MOST).measure()
    precomputed = trainer_of(tiny_model_dir, tmp_path, reference=None, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` keeps its log-probabilities"):
        MetricsCallback(precomputed, ["kl_to_reference"], held_out(2))


def test_a_trainer_of_trls_own():
    with pytest.raises(ValueError, match="`trainer` is a str; expected a DPOTrainer or OnlineDPOTrainer of trl_ext"):
        MetricsCallback("trainer", ["mean_length"], held_out(2))
