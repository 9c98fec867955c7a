"""Conversations for tests of turns: messages, and the tokens of a rendered conversation piece by piece."""


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def header(message):
    return f"<|im_start|>{message['role']}\n"


def pieces(prompt, completion):
    """Of a conversation in the tests' template the pieces of text, each with the turn that its tokens should have, from the completion on."""
    text = "".join(f"{header(message)}{message['content']}<|im_end|>\n" for message in prompt) + header(completion[0])
    parts, turn = [(text, None)], 0
    for place, message in enumerate(completion):
        if place:
            parts.append((header(message), -1))
        is_turn = message["role"] == "assistant"
        parts.append((f"{message['content']}<|im_end|>\n", turn if is_turn else -1))
        turn += is_turn
    return parts


def by_hand(tokenizer, prompt, completion):
    """Token ids of the prompt and of the completion, and turns of the latter, each piece tokenized by itself."""
    (text, _), *rest = pieces(prompt, completion)
    encoded = [(tokenizer(part)["input_ids"], turn) for part, turn in rest]
    ids = [number for numbers, _ in encoded for number in numbers]
    return tokenizer(text)["input_ids"], ids, [turn for numbers, turn in encoded for _ in numbers]


def rows():
    """Four pairs of trajectories: of two turns against three, one against two, two against two, with tools, and one against one."""
    return [
        {
            "prompt": [user("what a film")],
            "chosen": [assistant("good it was"), user("why"), assistant("because the plot was great")],
            "rejected": [assistant("bad"), user("why so"), assistant("dull"), user("and"), assistant("very slow")],
        },
        {
            "prompt": [{"role": "system", "content": "short"}, user("how was it")],
            "chosen": [assistant("funny")],
            "rejected": [assistant("sad"), user("what"), assistant("it was sad")],
        },
        {
            "prompt": [user("what scene"), assistant("this"), user("think")],
            "chosen": [assistant("start"), tool("music"), assistant("end")],
            "rejected": [assistant("start"), tool("story"), assistant("long end")],
        },
        {"prompt": [user("so")], "chosen": [assistant("liked")], "rejected": [assistant("hated it")]},
    ]
