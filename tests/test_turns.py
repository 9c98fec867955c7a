"""Which tokens of a conversation are the assistant's, and in which of its turns: pieces tokenized one by one."""

import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.conftest import CHAT_TEMPLATE
from tests.conversations import assistant, by_hand, rows, tool, user
from trl_ext.data.turns import checked_turns, number_turns, range_of_turns


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def chosen(tokenizer, prompt, completion, **columns):
    """The turns of a completion, and its tokens as text, from where it begins."""
    example = {"prompt": prompt, "chosen": completion, "rejected": [assistant("no")], **columns}
    turns = number_turns(example, 7, tokenizer, "train")["chosen_turns"]
    tools, kwargs = columns.get("tools"), columns.get("chat_template_kwargs") or {}
    tools = json.loads(tools) if isinstance(tools, str) else tools
    ids = tokenizer.apply_chat_template([*prompt, *completion], tools=tools, return_dict=True, **kwargs)["input_ids"]
    assert len(turns) == len(ids)
    return turns, ids


def spoken(tokenizer, prompt, completion, **columns):
    """Runs of tokens with one turn, as text."""
    turns, ids = chosen(tokenizer, prompt, completion, **columns)
    runs = []
    for turn, number in zip(turns, ids, strict=True):
        if not runs or runs[-1][0] != turn:
            runs.append((turn, []))
        runs[-1][1].append(number)
    return [(turn, tokenizer.decode(numbers)) for turn, numbers in runs]


def say(template="{{ message.content }}<|im_end|>\n", header="<|im_start|>{{ message.role }}\n", end="", marks=None):
    """A template of one part for each message; `marks` stand around what the assistant says."""
    said = template if marks is None else f"{marks[0]}{template}{marks[1]}"
    return (
        f"{{% for message in messages %}}{header}"
        f"{{% if message.role == 'assistant' %}}{said}{{% else %}}{{{{ message.content }}}}<|im_end|>\n{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% else %}}{end}{{% endif %}}"
    )


GENERATION = ("{% generation %}", "{% endgeneration %}")
# What it writes of a turn depends on whether it is the last: earlier reasoning is dropped
DROPS = "{% if loop.last %}<think>so</think>{% endif %}{{ message.content }}<|im_end|>\n"


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_by_hand(row, side, tokenizer):
    example = rows()[row]
    prompt, ids, turns = by_hand(tokenizer, example["prompt"], example[side])
    example = {**example, "chosen": example[side]}
    numbers = number_turns(example, 0, tokenizer, "train")["chosen_turns"]
    if len(example[side]) == 1:
        assert numbers == []  # one turn, whatever TRL scores
        return
    whole = tokenizer.apply_chat_template([*example["prompt"], *example[side]], return_dict=True)["input_ids"]
    assert whole == prompt + ids  # the pieces are those of the conversation
    assert numbers[len(prompt) :] == turns
    assert max(numbers) == sum(message["role"] == "assistant" for message in example[side]) - 1


def test_the_first_turn_begins_with_the_completion(tokenizer):
    """Wherever TRL finds that: what stands before it is cut off with the prompt."""
    turns, _ = chosen(tokenizer, [user("what")], [assistant("good"), user("why"), assistant("so")])
    assert turns[0] == 0 and turns[-1] == 1


def test_other_orders_of_roles(tokenizer):
    messages = [user("what"), assistant("good"), assistant("great"), user("why")]
    assert spoken(tokenizer, [user("a")], messages) == [
        (-1, "<|im_start|>user\na<|im_end|>\n<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n"),
        (0, "good<|im_end|>\n"),
        (-1, "<|im_start|>assistant\n"),
        (1, "great<|im_end|>\n"),
        (-1, "<|im_start|>user\nwhy<|im_end|>\n"),
    ]


def test_a_turn_without_a_token_is_none(tokenizer):
    """A template that writes nothing at all of an empty message: the turns behind it are numbered on."""
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{% if message.content %}<|im_end|>{% endif %}{% endfor %}"
    )
    messages = [assistant("good"), user("why"), assistant(""), user("how"), assistant("end")]
    runs = spoken(tokenizer, [user("what")], messages)
    assert runs == [
        (0, "what<|im_end|>good<|im_end|>"), (-1, "why<|im_end|>how<|im_end|>"), (1, "end<|im_end|>"),
    ]  # fmt: skip


@pytest.mark.parametrize("marks", [None, GENERATION], ids=["plain", "generation"])
def test_templates_with_and_without_marks(marks, tokenizer):
    """The same turns: marks that leave the line break out change nothing where boundaries can be seen."""
    if marks is not None:
        marks = (marks[0], marks[1] + "{{ '\n' }}")
    tokenizer.chat_template = say("{{ message.content }}<|im_end|>" + ("\n" if marks is None else ""), marks=marks)
    assert spoken(tokenizer, [user("what")], [assistant("good"), user("why"), assistant("so")])[1:] == [
        (-1, "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"),
        (1, "so<|im_end|>\n"),
    ]


def test_a_template_that_closes_conversations(tokenizer):
    """As Phi's, with the end of sequence: it belongs to the last turn, where TRL scores it."""
    tokenizer.chat_template = say(end="{{ eos_token }}")
    runs = spoken(tokenizer, [user("what")], [assistant("good"), user("why"), assistant("so")])
    assert [text for turn, text in runs if turn >= 0][1:] == ["so<|im_end|>\n<|eos|>"]
    assert runs[0][1].endswith("good<|im_end|>\n")


def test_a_generation_prompt_that_conversations_do_not_have(tokenizer):
    """As in TRL a turn begins where the two part."""
    tokenizer.chat_template = say().replace(
        "<|im_start|>assistant\n{% else %}", "<|im_start|>assistant\n<think>{% else %}"
    )
    runs = spoken(tokenizer, [user("what")], [assistant("good"), user("why"), assistant("so")])
    assert runs[1:] == [(-1, "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"), (1, "so<|im_end|>\n")]


def test_a_template_that_drops_earlier_reasoning(tokenizer):
    """Its own marks are taken, for the turns in the middle as they stand; without them it is refused."""
    messages = [assistant("good"), user("why"), assistant("so"), user("and"), assistant("end")]
    # The line break stands behind the marks: of the last turn alone it is scored, as TRL scores one
    tokenizer.chat_template = say(DROPS.removesuffix("\n"), marks=(GENERATION[0], GENERATION[1] + "{{ '\n' }}"))
    runs = spoken(tokenizer, [user("what"), assistant("this"), user("how")], messages)
    assert runs[0][1].startswith("<|im_start|>user\nwhat") and runs[0][1].endswith("good<|im_end|>")
    assert runs[1:] == [
        (-1, "\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"),
        (1, "so<|im_end|>"),
        (-1, "\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n"),
        (2, "<think>so</think>end<|im_end|>\n"),
    ]
    for template in (
        say(DROPS),
        # What a user says depends on whether it is the last message
        say().replace("{{ message.content }}<|im_end|>\n{% endif %}", "{{ message.content }}{% if loop.last %} now{% endif %}<|im_end|>\n{% endif %}"),
        # Two marked parts in one message
        say(DROPS.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %} {% generation %}")
            + "{% endgeneration %}"),
    ):  # fmt: skip
        tokenizer.chat_template = template
        with pytest.raises(
            ValueError, match=r"^Row 7 of the train dataset: 'chosen' has several messages.*get_training_chat_t"
        ):
            chosen(tokenizer, [user("what")], messages)
    # The last turn of each completion can be told all the same
    assert (
        number_turns({"prompt": [user("a")], "chosen": messages[:1], "rejected": messages[:1]}, 0, tokenizer, "train")[
            "chosen_turns"
        ]
        == []
    )


def test_tokens_that_merge_where_messages_meet(tokenizer):
    """Without special tokens between them: ` good` and `good` are other tokens."""
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"Row 7 of the train dataset: 'chosen'.*tokens merge where messages meet"):
        chosen(tokenizer, [user("what")], [assistant("go"), user("od"), assistant("so")])


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_arguments_of_the_template(as_json, tokenizer):
    """What is rendered before the messages, and inside of them, follows from them."""
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}<think>{{ tool.name }}{% endfor %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ shout | default('') }}"
        "{% for call in message.tool_calls or [] %}call {{ call.function.name }}{% endfor %}{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ shout | default('') }}{% endif %}"
    )
    tools = [{"name": "film"}, {"name": "music"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "film"}}]}
    messages = [call, tool("great"), assistant("it was great")]
    runs = spoken(
        tokenizer, [user("what")], messages, tools=json.dumps(tools) if as_json else tools, chat_template_kwargs={"shout": "very"}
    )  # fmt: skip
    assert runs == [
        (
            0,
            "<think>film<think>music<|im_start|>user\nverywhat<|im_end|>\n<|im_start|>assistant\nverycall film<|im_end|>\n",
        ),
        (-1, "<|im_start|>tool\nverygreat<|im_end|>\n<|im_start|>assistant\nvery"),
        (1, "it was great<|im_end|>\n"),
    ]


def test_no_message_of_the_assistant(tokenizer):
    with pytest.raises(
        ValueError, match=r"Row 7 of the train dataset: 'chosen' has no message of the assistant.*\['user', 'tool'\]"
    ):
        chosen(tokenizer, [user("what")], [user("good"), tool("so")])


@pytest.mark.parametrize("name", ["chosen_turns", "rejected_turns"])
def test_columns_that_are_made_here(name, tokenizer):
    with pytest.raises(ValueError, match=rf"The train dataset has messages and the columns \['{name}'\]"):
        number_turns({**rows()[0], name: [0]}, 0, tokenizer, "train")


# Given by the user, with token ids


TOKENS = {"prompt_ids": [1], "chosen_ids": [2, 3, 4, 5], "rejected_ids": [6, 7]}


def given(chosen_turns, rejected_turns=(0, -1), **others):
    good = {**TOKENS, "chosen_turns": [0, 0, -1, 1], "rejected_turns": [0, -1]}
    return Dataset.from_list(
        [good, {**TOKENS, "chosen_turns": chosen_turns, "rejected_turns": rejected_turns, **others}]
    )


@pytest.mark.parametrize("turns", [[0, 0, 0, 0], [-1, 0, 1, 2], [0, -1, 0, 1], [-1, -1, -1, 0]], ids=str)
def test_given_turns(turns):
    data = given(turns)
    assert checked_turns(data, "train") is data
    assert list(checked_turns(data.to_iterable_dataset(), "train")) == data.to_list()
    assert range_of_turns(data) == (-1, max(*turns, 1))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([0, 0, 0], r"has 3 numbers in 'chosen_turns' and 4 tokens in 'chosen_ids'"),
        ([], r"has 0 numbers in 'chosen_turns'"),
        (None, r"has no list in 'chosen_turns'"),
        ([1, 1, 1, 2], r"\[1, 1, 1, 2\] in 'chosen_turns'; expected whole numbers"),
        ([0, 2, 2, 2], r"none left out"),
        ([0, 1, 0, 1], r"in their order"),
        ([0, -2, 0, 0], r"expected whole numbers"),
        ([-1, -1, -1, -1], r"At least one token must be scored"),
        ([0, None, 0, 0], r"expected whole numbers"),
    ],
    ids=str,
)
def test_turns_that_are_none(turns, message):
    data = given(turns)
    for each in (data, data.to_iterable_dataset()):
        with pytest.raises(ValueError, match=rf"^Row 1 of the train dataset .*{message}"):
            list(checked_turns(each, "train"))


def test_turns_that_are_no_whole_numbers():
    for values in ([0.0, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [False, False, True, True]):
        row = {**TOKENS, "chosen_turns": values, "rejected_turns": [0, 0]}
        with pytest.raises(ValueError, match=r"Row 0 .* in 'chosen_turns'; expected whole numbers"):
            checked_turns(Dataset.from_list([row]), "train")


def test_turns_of_one_side_alone():
    with pytest.raises(ValueError, match="Row 0 of the eval dataset has no list in 'rejected_turns'"):
        checked_turns(given([0, 0, 0, 0]).remove_columns("rejected_turns"), "eval")


def test_the_template_of_the_tests_has_no_marks():
    assert "generation %}" not in CHAT_TEMPLATE
