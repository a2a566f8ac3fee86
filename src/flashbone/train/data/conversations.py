"""Conversations in rows: roles and keys of their turns, what is learned of them, and the example that they become."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from flashbone.errors import FormatError
from flashbone.train.data.content_blocks import as_functions, expanded_turns

# Names of roles in data, and what chat templates call them. OpenAI's `developer` is a `system` of newer models.
ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",  # the value is a call, as JSON
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call")

# Keys that go to the chat template as they are. Templates have several names for what a model thinks.
REASONING = ("reasoning_content", "reasoning", "thinking", "tool_plan")
PASSED = ("name", "tool_call_id", *REASONING)
FLAGS = ("train", "training", "trainable", "learn", "loss")  # true or false: whether a turn is learned
KEYS = {"tool_calls", "function_call", "weight", *FLAGS, *PASSED}
SPEAKERS = ("user", "assistant")
NAMED = {"role": "content", "from": "value", "speaker": "text"}  # keys of who speaks, with the usual ones of what
CONTENTS = ("content", "value", "text", "parts")
PART_KEYS = {"type", "text"}
TEXT_PARTS = ("text", "input_text", "output_text")

Turn = dict[str, Any]

# What decides how a conversation is rendered, in transformers' call; a row gives values to the template alone.
_NOT_FOR_TEMPLATES = {"conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
_NOT_FOR_TEMPLATES |= {"padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
_NOT_FOR_TEMPLATES |= {"return_assistant_tokens_mask"}


def conversation(
    turns: Any, context: int = 1, system: Any = None, tools: Any = None, kwargs: Any = None
) -> dict[str, Any]:
    """An example of the turns of a row.

    Args:
        turns: Messages with role and content, or in another form that `as_turns` reads.
        context: So many turns are never learned.
        system: A system prompt that goes before the turns.
        tools: Descriptions of tools for the chat template: a list, or JSON text.
        kwargs: Other variables of the chat template.

    Raises:
        FormatError: a turn is malformed, or nothing would be learned.
    """
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"the conversation is {kind(turns)}; a list of turns was wanted")
    messages = [_message(number, turn) for number, turn in enumerate(turns, 1)]
    last = messages[-1]["role"]
    if last != "assistant" or len(messages) < 2:
        raise FormatError(
            f"a conversation must end with the assistant's answer, not with the {last}; take the rest out"
        )
    learned = [_is_learned(i + 1, turn, messages[i]["role"]) and i >= context for i, turn in enumerate(turns)]
    if not is_blank(system):
        text = _text_of("'system'", system)
        if messages[0]["role"] != "system":
            messages, learned = [{"role": "system", "content": text}, *messages], [False, *learned]
        elif messages[0]["content"] != text:
            raise FormatError("'system' differs from the conversation's own system prompt; leave one of them out")
    talk: dict[str, Any] = {"messages": messages, "learned": learned}
    if not is_blank(tools):
        talk["tools"] = as_functions(_listed("tools", tools))
    if not is_blank(kwargs):
        if not isinstance(kwargs, dict):
            raise FormatError(f"'chat_template_kwargs' is {kind(kwargs)}; names and values were wanted")
        if ours := sorted(_NOT_FOR_TEMPLATES & kwargs.keys()):
            raise FormatError(f"'chat_template_kwargs' has {', '.join(ours)}, which rows cannot set; leave them out")
        talk["chat_template_kwargs"] = kwargs
    return {"conversation": talk}


def packed(example: dict[str, Any], turns: str) -> dict[str, Any]:
    """The example with its conversation, if it has one, as text: Arrow would give all rows the same keys and types.

    Args:
        example: An example.
        turns: Which answers are learned: all, or the last.

    Raises:
        FormatError: none is learned.
    """
    talk = example.get("conversation")
    if talk is None:
        return example
    if turns == "last":
        last = max(i for i, message in enumerate(talk["messages"]) if message["role"] == "assistant")
        talk["learned"] = [is_learned and i == last for i, is_learned in enumerate(talk["learned"])]
    if not any(talk["learned"]):
        raise FormatError("no answer of the conversation is learned; weights and other marks leave all of them out")
    try:
        return {**example, "conversation": json.dumps(talk, ensure_ascii=False, allow_nan=False)}
    except ValueError:
        raise FormatError("holds a number that is too large, or none (NaN)") from None
    except TypeError as error:
        raise FormatError(f"holds what JSON has no form for: {error}") from None


def answers(text: str) -> list[dict[str, Any]]:
    """A prompt and completion for each learned answer of a conversation.

    Each prompt is the conversation up to that answer, which is what the model sees when it gives it; masking one
    long sequence instead would need a chat template that marks the answers, and few do.
    """
    talk = json.loads(text)
    messages, tools = talk["messages"], talk.get("tools")
    along = {"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}
    ends = [number for number, is_learned in enumerate(talk["learned"]) if is_learned]
    return [{"prompt": messages[:i], "completion": [messages[i]], **along} for i in ends]


def as_turns(value: Any) -> Any:
    """The turns in a column, one object for each, also out of JSON text; anything else as it is.

    A list of texts is what the user and the assistant say in turns. An object with `input` and `output` is what both
    say. An object of lists is what datasets makes of a list of objects.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, dict) and value and all(isinstance(items, list) for items in value.values()):
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        return value
    if value and all(isinstance(turn, str) for turn in value):
        return [{"role": SPEAKERS[number % 2], "content": text} for number, text in enumerate(value)]
    return [turn for item in value for said in _said(item) for turn in expanded_turns(said)]


def _said(item: Any) -> list[Any]:
    """The turns of one item: two where it holds an input and an output."""
    if not isinstance(item, dict) or not {"input", "output"} <= item.keys() or item.keys() & NAMED.keys():
        return [item]
    answer = {key: value for key, value in item.items() if key not in ("input", "output")}
    user, assistant = SPEAKERS
    return [{"role": user, "content": item["input"]}, {**answer, "role": assistant, "content": item["output"]}]


def unread_keys(turns: Any) -> Iterator[str]:
    """The keys of turns, and of the parts of their contents, that nothing reads."""
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict):
            said = keys_of(turn)
            yield from (key for key in turn if key not in KEYS and key not in said)
            content = turn.get(said[1])
            parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
            yield from (f"{said[1]}.{key}" for part in parts for key in part if key not in PART_KEYS)


def is_blank(value: Any) -> bool:
    """Whether this is nothing: null, an empty list or mapping, or a text of spaces."""
    return value is None or (isinstance(value, str) and not value.strip()) or value == [] or value == {}


def is_prose(value: Any) -> bool:
    """Whether this is a text, and not JSON."""
    return isinstance(value, str) and not value.lstrip().startswith(("[", "{"))


def kind(value: Any) -> str:
    """What a value is, for an error."""
    if isinstance(value, str) and value.isspace():
        return "blank"
    return "empty" if is_blank(value) else f"of type {type(value).__name__} ({' '.join(str(value).split())[:40]})"


def _message(number: int, turn: Any) -> Turn:
    """The turn as the chat template sees it."""
    where = f"turn {number}"
    if not isinstance(turn, dict):
        raise FormatError(f"{where} is {kind(turn)}; an object with role and content was wanted")
    keys = keys_of(turn)
    calls = _calls(where, turn)
    if keys[0] not in turn or (keys[1] not in turn and not calls):
        raise FormatError(f"{where} needs {keys[0]!r} and {keys[1]!r}")
    name, content = turn[keys[0]], turn.get(keys[1])
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise FormatError(f"{where}: unknown {keys[0]} {name!r}; one of {', '.join(ROLES)}")
    if name.lower() in CALLS:
        calls, content = _wrapped(where, _listed(f"{where}: {keys[1]!r}", content)), None
    if calls and role != "assistant":
        raise FormatError(f"{where}: the {role} calls a tool; only the assistant can")
    passed = {key: turn[key] for key in PASSED if not is_blank(turn.get(key))}
    message = {"role": role, "content": _text_of(f"{where}: {keys[1]!r}", content)}
    if calls:
        passed["tool_calls"] = calls
    may_be_blank = role in ("system", "tool") or passed.keys() - {"name"}
    if not message["content"].strip() and not may_be_blank:
        raise FormatError(f"{where}: {keys[1]!r} is {kind(content)}; text was wanted")
    return message | passed


def keys_of(turn: Turn) -> tuple[str, str]:
    """The keys of a turn that say who speaks, and what."""
    who = next((key for key in NAMED if key in turn), "role")
    return who, next((key for key in (NAMED[who], *CONTENTS) if key in turn), NAMED[who])


def _text_of(where: str, content: Any) -> str:
    """A content as text: of a list of parts, those of all."""
    if isinstance(content, dict) and content.keys() <= {"role", "parts"}:  # a system prompt of Gemini's
        content = content.get("parts")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FormatError(f"{where} is {kind(content)}; text was wanted")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") not in TEXT_PARTS:
            raise FormatError(f"{where} has a part of type {part['type']!r}; only text is read")
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise FormatError(f"{where} has a part that is {kind(text)}; text was wanted")
        texts.append(text)
    return "".join(texts)


def _calls(where: str, turn: Turn) -> list[Turn]:
    """The calls of a turn, in today's form; `function_call` is OpenAI's older one."""
    calls = turn.get("tool_calls")
    older = turn.get("function_call")
    calls = [] if is_blank(calls) else _listed(f"{where}: 'tool_calls'", calls)
    return _wrapped(where, calls if is_blank(older) else [*calls, *_listed(f"{where}: 'function_call'", older)])


def _wrapped(where: str, calls: list[Turn]) -> list[Turn]:
    """Calls as chat templates read them: under `function`, with arguments that are objects, which templates write as
    JSON themselves; OpenAI's are JSON text."""
    whole = []
    for call in calls:
        call = call if "function" in call else {"type": "function", "function": call}
        function = call["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FormatError(f"{where}: a call of a tool has no name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(f"{where}: the arguments of {function['name']}", arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            raise FormatError(f"{where}: the arguments of {function['name']} are {kind(arguments)}, not an object")
        whole.append({**call, "function": {**function, "arguments": arguments or {}}})
    return whole


def _listed(where: str, value: Any) -> list[Turn]:
    """Objects in a list, one object, or either as JSON text."""
    value = _parsed(where, value) if isinstance(value, str) else value
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise FormatError(f"{where} is {kind(value)}; a list of objects was wanted")
    return value


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise FormatError(f"{where} is {kind(text)}; JSON was wanted") from None


def _is_learned(number: int, turn: Turn, role: str) -> bool:
    """Whether a turn is an answer that no mark leaves out."""
    marks = {key: turn[key] for key in FLAGS if turn.get(key) is not None}
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise FormatError(f"turn {number}: 'weight' is {weight!r}; 0 (not learned) or 1 was wanted")
    for key, mark in marks.items():
        if mark not in (True, False):
            raise FormatError(f"turn {number}: {key!r} is {mark!r}; true or false was wanted")
        if mark and role != "assistant":
            raise FormatError(f"turn {number}: {key!r} is true, but only the assistant's turns are learned")
    return role == "assistant" and weight != 0 and all(marks.values())
