"""From prompts to tokens, in each way that completions are sampled, and from completions to what is judged."""

import json
import shutil
import types

import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build
from tests.online.runs import Scripted, batch, conversations, online
from trl_ext.generation import Completions
from trl_ext.trainers.online.rewards import Scores, call_reward_model
from trl_ext.trainers.online.selection import Selection, build_table


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
TOOL_TEMPLATE = "{%- if tools %}{{- 'tools: ' + tools[0].function.name + ' ' }}{%- endif %}"


def bos_folder(model_dir, folder, ends=False):
    """The tiny model with a tokenizer that adds a BOS to plain text, and with `ends` an EOS too."""
    shutil.copytree(model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|im_start|>"
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|eos|>")]
    single = "<|im_start|> $A <|eos|>" if ends else "<|im_start|> $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bos_dir(tiny_model_dir, tmp_path):
    return bos_folder(tiny_model_dir, tmp_path / "bos")


# Special tokens


@pytest.mark.parametrize("ends", [False, True])
def test_plain_prompts_are_those_of_offline_training(ends, tiny_model_dir, tmp_path):
    folder = bos_folder(tiny_model_dir, tmp_path / "model", ends)
    rows = preference_rows(4)
    offline = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, folder, tmp_path, dataset=Dataset.from_list(rows))
    trainer = online(folder, tmp_path)
    completions = trainer.generate(trainer.model, {"prompt": [row["prompt"] for row in rows]})
    assert [row.tolist() for row in completions.prompt_ids] == offline.train_dataset["prompt_ids"][:]
    assert {int(row[0]) for row in completions.prompt_ids} == {trainer.processing_class.bos_token_id}


def test_the_model_samples_after_these_tokens(bos_dir, tmp_path):
    """Of two prompts of different lengths: padded on the left, BOS first."""
    trainer = online(bos_dir, tmp_path)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.generate(trainer.model, {"prompt": ["so what", "what is it that we like"]})
    tokenizer = trainer.processing_class
    long, short = (tokenizer(text)["input_ids"] for text in ("what is it that we like", "so what"))
    gap = len(long) - len(short)
    # The last token of the prompts runs with the samples
    assert seen[0]["input_ids"].tolist() == [[tokenizer.pad_token_id] * gap + short[:-1], long[:-1]]
    assert seen[0]["attention_mask"].tolist() == [[0] * gap + [1] * (len(short) - 1), [1] * (len(long) - 1)]


def test_a_template_writes_its_own_special_tokens(bos_dir, tmp_path):
    trainer = online(bos_dir, tmp_path, trainer_kwargs={"train_dataset": conversations()})
    inputs = batch(trainer)
    completions = trainer.generate(trainer.model, inputs)
    tokenizer = trainer.processing_class
    for messages, row in zip(inputs["prompt"], completions.prompt_ids, strict=True):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row.tolist() == expected and expected.count(tokenizer.bos_token_id) == 2


# Templates


def test_thinking_on_and_off(tiny_model_dir, tmp_path):
    seen = []

    def judge(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0]))
        return [float(len(c[0]["content"])) for c in completions]

    kwargs = {"train_dataset": conversations(), "reward_funcs": judge}
    trainer = online(tiny_model_dir, tmp_path, loss_type="bias_variance", trainer_kwargs=kwargs, max_steps=1)
    inputs = batch(trainer)
    on, off = (trainer._render(inputs, 0, thinking) for thinking in (True, False))
    assert on.endswith("<|im_start|>assistant\n") and off == on + "<think>\n\n</think>\n\n"
    on, off = (trainer.generate(trainer.model, inputs, thinking).prompt_ids[0].tolist() for thinking in (True, False))
    assert off == on + trainer.processing_class("<think>\n\n</think>\n\n")["input_ids"]
    trainer.train()
    assert seen[0][0][0]["role"] == "user" and seen[0][1][0]["role"] == "assistant"


def test_a_template_argument_of_the_dataset(tiny_model_dir, tmp_path):
    data = conversations(chat_template_kwargs={"enable_thinking": False})
    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs={"train_dataset": data})
    completions = trainer.generate(trainer.model, batch(trainer))
    assert trainer.processing_class.decode(completions.prompt_ids[0]).endswith("</think>\n\n")


@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS)], ids=["list", "json"])
def test_tools_of_the_dataset(written, tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path)
    trainer.processing_class.chat_template = TOOL_TEMPLATE + trainer.processing_class.chat_template
    inputs = {"prompt": conversations()["prompt"][:2], "tools": [written] * 2}
    for thinking in (True, False):
        completions = trainer.generate(trainer.model, inputs, thinking)
        assert trainer.processing_class.decode(completions.prompt_ids[1]).startswith("tools: look <|im_start|>user")


def test_the_answer_alone_is_scored(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, loss_type="bias_variance")
    encode = lambda text: torch.tensor(trainer.processing_class(text)["input_ids"])  # noqa: E731
    texts = ["<think> so what</think> a film<|eos|>", " a film<|eos|>", "<think> so what"]
    assert trainer._texts(["p"], [encode("p")], [encode(text) for text in texts]) == ["a film", " a film", ""]
    # The first of two prompts has opened the trace itself, so that what was cut holds no mark of it
    prompts, texts = [encode("p<think>\n"), encode("q")], ["so what", "so what", "so</think> a film", "a film"]
    found = trainer._texts(["p", "q"], prompts, [encode(text) for text in texts])
    assert found == ["", "so what", "a film", "a film"]


# Long prompts


def test_long_prompts_lose_their_beginning():
    """The longer answer of each prompt decides, for both; where it fills the row, nothing is left of the prompt."""
    ids = [[31, 32], [41], [33, 34, 35], [42, 43, 44, 45, 46, 47, 48, 49]]
    completions = Completions(
        prompts=["p", "q"],
        texts=["t"] * 4,
        prompt_ids=[torch.arange(10, 16), torch.arange(20, 23)],
        ids=[torch.tensor(row) for row in ids],
        ended=torch.ones(4, dtype=torch.bool),
    )
    selection = Selection(completions, Scores(torch.zeros(2, 2)), torch.tensor([[2, 0], [1, 3]]))
    rows, plan, (place,) = build_table([selection], {}, 7, 99)
    ids, attention = rows.inputs["input_ids"], rows.inputs["attention_mask"]
    assert [row[mask.bool()].tolist() for row, mask in zip(ids, attention, strict=True)] == [
        [12, 13, 14, 15, 31, 32],
        [41],
        [12, 13, 14, 15, 33, 34, 35],
        [42, 43, 44, 45, 46, 47, 48],
    ]
    assert rows.completion_mask.tolist() == [
        [0, 0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1], [1] * 7,
    ]  # fmt: skip
    assert ids[1].tolist() == [41, 99, 99, 99, 99, 99, 99]
    assert rows.prompt.tolist() == [0, 1, 0, 1] and place.tolist() == [0, 1, 2, 3]
    assert plan.pairs.tolist() == [[2, 0], [1, 3]] and plan.count == 2


# Reward models


@pytest.fixture
def reward_dir(bos_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bos_dir)
    torch.manual_seed(1)
    config = Qwen3Config.from_pretrained(bos_dir, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def reward(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


def test_a_reward_model_reads_what_it_was_trained_on(reward_dir, tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": str(reward_dir)}, max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    inputs = batch(trainer)
    completions = Scripted.generate(trainer, trainer.model, inputs)
    scores = trainer.score(inputs, completions)
    for k in range(2):
        for row, prompt in enumerate(completions.prompts):
            text = tokenizer(prompt + completions.texts[4 * k + row], add_special_tokens=False)["input_ids"]
            ids = [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
            assert scores.values[row, k].item() == pytest.approx(
                reward(trainer.reward_funcs[0], ids), rel=1e-4, abs=1e-6
            )
    trainer.train()
    assert "rewards/rm/mean" in trainer.state.log_history[0]


def test_a_reward_model_reads_conversations_with_their_tools(reward_dir):
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    tokenizer.chat_template = TOOL_TEMPLATE + tokenizer.chat_template
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    prompts = [[{"role": "user", "content": text}] for text in ("so", "what is it")]
    answers = [[{"role": "assistant", "content": text}] for text in ("a film", "good")]
    values = call_reward_model(model, tokenizer, prompts, answers, "cpu", tools=[json.dumps(TOOLS), None])
    for value, prompt, answer, start in zip(values, prompts, answers, ("tools: look ", ""), strict=True):
        text = (
            f"{start}<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n"
            f"<|im_start|>assistant\n{answer[0]['content']}<|im_end|>\n"
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert value.item() == pytest.approx(reward(model, ids), rel=1e-4, abs=1e-6)


def test_the_trainer_hands_tools_to_a_reward_model(reward_dir, tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": str(reward_dir)})
    tokenizer = trainer.reward_processing_classes[0]
    tokenizer.chat_template = TOOL_TEMPLATE + tokenizer.chat_template
    inputs = {"prompt": conversations()["prompt"][:2]}
    completions = trainer.generate(trainer.model, inputs)
    plain, with_tools = (
        trainer.score({**inputs, **more}, completions).values for more in ({}, {"tools": [TOOLS, []]})
    )
    torch.testing.assert_close(plain[1], with_tools[1])
    assert not torch.isclose(plain[0], with_tools[0], rtol=1e-4).any()


def test_a_reward_that_is_no_number(reward_dir):
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    with pytest.raises(ValueError, match="returned nan for the completion ' a' of the prompt 'p'"):
        call_reward_model(model, tokenizer, ["p"], [" a"], "cpu")


# vLLM, with stand-ins of its engine and of its server


class Engine:
    """Answers `n` completions per prompt, each of two tokens: the prompt's last, and the number of the answer so far."""

    def __init__(self):
        self.asked, self.answers = [], 0

    def answer(self, ids):
        self.answers += 1
        return [ids[-1], 200 + self.answers]

    def generate(self, inputs, config, use_tqdm):
        self.asked += inputs
        return [
            types.SimpleNamespace(
                prompt_token_ids=each["prompt_token_ids"],
                outputs=[types.SimpleNamespace(token_ids=self.answer(each["prompt_token_ids"])) for _ in range(2)],
            )
            for each in inputs
        ]


class Server(Engine):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def generate(self, prompts, n, **kwargs):
        self.asked += prompts
        return {
            "completion_ids": [self.answer(self.tokenizer(text)["input_ids"]) for text in prompts for _ in range(n)]
        }


def served(trainer, mode):
    engine = Server(trainer.processing_class) if mode == "server" else Engine()
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, mode, trainer.state.global_step
    trainer.generation_config = types.SimpleNamespace(max_tokens=4)
    trainer.llm = trainer.vllm_client = engine
    return engine


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_vllm_gives_blocks(mode, count, bos_dir, tmp_path):
    trainer = online(bos_dir, tmp_path, num_generations=count)
    engine = served(trainer, mode)
    prompts = [" what is a film", " so long", " it was"]
    completions = trainer.generate(trainer.model, {"prompt": prompts})
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    assert [row.tolist() for row in completions.prompt_ids] == ids
    assert len(completions.ids) == 3 * count and trainer.num_generations == count
    assert [int(row[0]) for row in completions.ids] == [row[-1] for row in ids] * count
    numbers = [int(row[1]) for row in completions.ids]
    assert len(set(numbers)) == 3 * count  # no answer twice
    assert len(engine.asked) == (3 if count == 2 else 6)
    if mode == "colocate":
        assert engine.asked[:3] == [{"prompt_token_ids": row} for row in ids]
    else:
        assert engine.asked[:3] == prompts  # the server adds the BOS


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_reads_conversations_with_their_tools_and_one_bos(mode, bos_dir, tmp_path):
    trainer = online(bos_dir, tmp_path)
    tokenizer = trainer.processing_class
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- if add_generation_prompt %}",
        "{%- if tools %}{{- tools[0].function.name }}{%- endif %}{%- if add_generation_prompt %}",
    )
    engine = served(trainer, mode)
    inputs = {"prompt": conversations()["prompt"][:2], "tools": [json.dumps(TOOLS), None]}
    completions = trainer.generate(trainer.model, inputs)
    text = "<|im_start|>user\n" + inputs["prompt"][0][0]["content"] + "<|im_end|>\nlook<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert completions.prompt_ids[0].tolist() == ids
    if mode == "colocate":
        assert engine.asked[0] == {"prompt_token_ids": ids}
    else:
        assert tokenizer(engine.asked[0])["input_ids"] == ids


def test_a_server_that_would_add_a_token_is_refused(bos_dir, tmp_path):
    """A template without BOS, and a tokenizer that adds one to all text."""
    trainer = online(bos_dir, tmp_path)
    trainer.processing_class.chat_template = "{{ messages[0].content }}"
    served(trainer, "server")
    with pytest.raises(ValueError, match=r"with other special tokens than training.*vllm_mode='colocate'"):
        trainer.generate(trainer.model, {"prompt": conversations()["prompt"][:2]})


def test_the_reference_samples_without_vllm(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, max_new_tokens=3)
    engine = served(trainer, "colocate")
    completions = trainer.generate(trainer.model, {"prompt": ["so what"]}, reference=True)
    assert len(completions.ids) == 1 and 0 < len(completions.ids[0]) <= 3 and not engine.asked
