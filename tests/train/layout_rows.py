"""A small row of every layout: its format, the texts that are learned of it, and those that are context."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayoutRow:
    """A row.

    Attributes:
        row: The row as a file has it.
        format: The format that it is read as.
        learned: What is learned of it, in order.
        context: Texts that are seen and not learned.
        asked: The format that the user names.
    """

    row: dict[str, Any]
    format: str
    learned: tuple[str, ...]
    context: tuple[str, ...] = ()
    asked: str = "auto"


def talk(*turns: tuple[str, str], **more: Any) -> list[dict[str, Any]]:
    """Messages of these roles and contents; `more` goes to the last."""
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    messages[-1].update(more)
    return messages


ASKED = ("user", "where was the cat ?")
FIRST, SECOND = "on the mat .", "under a tree ."
TOOLS = [{"type": "function", "function": {"name": "look", "description": "to find", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "id": "c1", "function": {"name": "look", "arguments": '{"where": "tree"}'}}
TWICE = [ASKED, ("assistant", FIRST), ("user", "and the dog ?"), ("assistant", SECOND)]

LAYOUT_ROWS = {
    "text": LayoutRow({"text": "the cat sat ."}, "text", ("the cat sat .",)),
    "prompt and completion": LayoutRow(
        {"prompt": "where was the cat ?", "completion": FIRST}, "prompt-completion", (FIRST,), ("where was the cat ?",)
    ),
    "query and response": LayoutRow(
        {"query": "the cat ?", "response": FIRST}, "query-response", (FIRST,), ("the cat ?",)
    ),
    "prompt and response": LayoutRow(
        {"prompt": "the cat ?", "response": FIRST}, "prompt-response", (FIRST,), ("the cat ?",)
    ),
    "context, question, answer": LayoutRow(
        {"context": "a cat sat on a mat .", "question": "the cat ?", "answer": FIRST},
        "question-answer",
        (FIRST,),
        ("a cat sat on a mat .\n\nthe cat ?",),
    ),
    "Dolly": LayoutRow(
        {"instruction": "the cat ?", "context": "the cat sat .", "response": FIRST, "category": "closed_qa"},
        "instruction-response",
        (FIRST,),
        ("the cat ?\n\nthe cat sat .",),
    ),
    "instruction, input, response": LayoutRow(
        {"instruction": "find the cat", "input": "the cat sat .", "response": FIRST},
        "instruction-response",
        (FIRST,),
        ("find the cat\n\nthe cat sat .",),
    ),
    "Alpaca": LayoutRow(
        {"instruction": "find the cat", "input": "the cat sat .", "output": FIRST},
        "alpaca",
        (FIRST,),
        ("paired with an input", "### Instruction:\nfind the cat\n\n### Input:\nthe cat sat .\n\n### Response:"),
    ),
    "Alpaca with history and system": LayoutRow(
        {
            "instruction": "and the dog ?",
            "input": "",
            "output": SECOND,
            "system": "be short .",
            "history": [["where was the cat ?", FIRST]],
        },
        "alpaca",
        (SECOND,),
        (
            "be short .\n\n### Instruction:\nwhere was the cat ?\n\n### Response:" + FIRST,
            "### Instruction:\nand the dog ?\n\n### Response:",
        ),
    ),
    "messages": LayoutRow(
        {"messages": talk(("system", "be short ."), *TWICE)}, "messages", (FIRST, SECOND), ("be short .", ASKED[1])
    ),
    "messages and images": LayoutRow(
        {"messages": talk(*TWICE[:2]), "images": ["cat.png"]}, "images", (FIRST,), (TWICE[0][1],)
    ),
    "messages with weights": LayoutRow(
        {"messages": [*talk(*TWICE[:2], weight=0), *talk(*TWICE[2:], weight=1)]}, "messages", (SECOND,), (FIRST,)
    ),
    "messages with train marks": LayoutRow(
        {"messages": [*talk(*TWICE[:2], train=False), *talk(*TWICE[2:])]}, "messages", (SECOND,), (FIRST,)
    ),
    "messages of parts": LayoutRow(
        {
            "messages": [
                {"role": "developer", "content": "be short ."},
                {"role": "user", "content": [{"type": "text", "text": "where was "}, {"type": "text", "text": "it ?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": FIRST}]},
            ]
        },
        "messages",
        (FIRST,),
        ("be short .", "where was it ?"),
    ),
    "messages with tools": LayoutRow(
        {
            "messages": [
                *talk(ASKED),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "a cat", "tool_call_id": "c1", "name": "look"},
                {"role": "assistant", "content": SECOND, "reasoning_content": "it is it"},
            ],
            "tools": TOOLS,
        },
        "messages",
        ('{"where": "tree"}', "it is it", SECOND),
        ("to find", "a cat"),
    ),
    "ShareGPT": LayoutRow(
        {"conversations": [{"from": "human", "value": "the cat ?"}, {"from": "gpt", "value": FIRST}], "id": "7"},
        "sharegpt",
        (FIRST,),
        ("the cat ?",),
    ),
    "ShareGPT with system and tools": LayoutRow(
        {
            "system": "be short .",
            "tools": '[{"name": "look", "description": "to find"}]',
            "conversations": [
                {"from": "human", "value": "the cat ?"},
                {"from": "function_call", "value": '{"name": "look", "arguments": {"where": "tree"}}'},
                {"from": "observation", "value": "a cat"},
                {"from": "gpt", "value": SECOND},
            ],
        },
        "sharegpt",
        ('{"where": "tree"}', SECOND),
        ("be short .", "the cat ?", "a cat", "to find"),
    ),
    "prompt and completion of turns": LayoutRow(
        {"prompt": talk(*TWICE[:3]), "completion": talk(TWICE[3])}, "prompt-completion", (SECOND,), (FIRST, ASKED[1])
    ),
    "OpenOrca": LayoutRow(
        {"system_prompt": "be short .", "question": "the cat ?", "response": FIRST, "id": "1"},
        "question-response",
        (FIRST,),
        ("be short .\n\nthe cat ?",),
    ),
    "columns in other letters": LayoutRow(
        {"Prompt": "the cat ?", " Completion": FIRST}, "prompt-completion", (FIRST,), ("the cat ?",)
    ),
    "instruction and completion": LayoutRow(
        {"instruction": "the cat ?", "completion": FIRST}, "instruction-completion", (FIRST,), ("the cat ?",)
    ),
    "instruction and answer": LayoutRow(
        {"instruction": "the cat ?", "answer": FIRST}, "instruction-answer", (FIRST,), ("the cat ?",)
    ),
    "Hendrycks' MATH": LayoutRow(
        {"problem": "1 + 1 ?", "solution": "it is 2", "level": "1"}, "problem-solution", ("it is 2",), ("1 + 1 ?",)
    ),
    "OpenMathInstruct": LayoutRow(
        {"problem": "1 + 1 ?", "generated_solution": "it is 2", "expected_answer": "2"},
        "problem-generated_solution",
        ("it is 2",),
        ("1 + 1 ?",),
    ),
    "user, assistant and system": LayoutRow(
        {"user": "the cat ?", "assistant": FIRST, "system": "be short ."},
        "user-assistant",
        (FIRST,),
        ("be short .\n\nthe cat ?",),
    ),
    "human and assistant": LayoutRow(
        {"human": "the cat ?", "assistant": FIRST}, "human-assistant", (FIRST,), ("the cat ?",)
    ),
    "natural instructions": LayoutRow(
        {"definition": "find it", "inputs": "the cat ?", "targets": FIRST},
        "inputs-targets",
        (FIRST,),
        ("find it\n\nthe cat ?",),
    ),
    "input and output": LayoutRow({"input": "the cat ?", "output": FIRST}, "input-output", (FIRST,), ("the cat ?",)),
    "xLAM": LayoutRow(
        {
            "query": "the cat ?",
            "tools": '[{"name": "look", "description": "to find"}]',
            "answers": '[{"name": "look", "arguments": {"where": "tree"}}]',
        },
        "query-answers",
        ('{"where": "tree"}',),
        ("the cat ?", "to find"),
    ),
    "glaive's calls": LayoutRow(
        {
            "system": "SYSTEM: be short .",
            "chat": "USER: the cat ?\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\n"
            "FUNCTION RESPONSE: a cat\n\n\nASSISTANT: on the mat . <|endoftext|>\n\n\n",
        },
        "system-chat",
        ("<functioncall> {}", FIRST),
        ('"be short ."', "the cat ?", '"a cat"'),
    ),
    "RWKV's chats": LayoutRow(
        {
            "text": f"System: be short .\n\nUser: the cat ?\n\nAssistant: {FIRST}\n\n"
            f"User: the dog ?\n\nAssistant: {SECOND}"
        },
        "rwkv",
        (FIRST, SECOND),
        ("be short .", "the cat ?", "the dog ?"),
        asked="rwkv",
    ),
    "LIMA": LayoutRow({"conversations": ["the cat ?", FIRST], "source": "s"}, "sharegpt", (FIRST,), ("the cat ?",)),
    "Capybara": LayoutRow(
        {"conversation": [{"input": "the cat ?", "output": FIRST}, {"input": "the dog ?", "output": SECOND}]},
        "messages",
        (FIRST, SECOND),
        ("the cat ?", "the dog ?"),
    ),
    "ShareGPT with speakers and texts": LayoutRow(
        {"items": [{"speaker": "human", "text": "the cat ?"}, {"speaker": "bot", "text": FIRST}]},
        "messages",
        (FIRST,),
        ("the cat ?",),
    ),
    "Gemini": LayoutRow(
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "be short ."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "the "}, {"text": "cat ?"}]},
                {"role": "model", "parts": [{"text": FIRST}]},
            ],
        },
        "messages",
        (FIRST,),
        ("be short .", "the cat ?"),
    ),
    "messages and a system prompt": LayoutRow(
        {"messages": talk(*TWICE[:2]), "system_prompt": "be short ."}, "messages", (FIRST,), ("be short .", ASKED[1])
    ),
    "messages as JSON text": LayoutRow({"messages": json.dumps(talk(*TWICE[:2]))}, "messages", (FIRST,), (ASKED[1],)),
    "messages as lists of keys": LayoutRow(
        {"messages": {"role": ["user", "assistant"], "content": [ASKED[1], FIRST]}}, "messages", (FIRST,), (ASKED[1],)
    ),
    "a prompt of turns and a text": LayoutRow(
        {"prompt": talk(ASKED), "completion": FIRST}, "prompt-completion", (FIRST,), (ASKED[1],)
    ),
    "a text and a completion of turns": LayoutRow(
        {"prompt": ASKED[1], "completion": talk(TWICE[1])}, "prompt-completion", (FIRST,), (ASKED[1],)
    ),
    "SQuAD": LayoutRow(
        {
            "id": "7",
            "title": "cats",
            "context": "a cat sat on a mat .",
            "question": "where was it ?",
            "answers": {"text": [FIRST, SECOND], "answer_start": [12, 0]},
        },
        "question-answers",
        (FIRST,),
        ("a cat sat on a mat .\n\nwhere was it ?",),
    ),
    "s1K": LayoutRow(
        {"question": "1 + 1 ?", "thinking_trajectories": ["it is it"], "attempt": "it is 2", "cot": None},
        "question-attempt",
        ("it is it", "it is 2"),
        ("1 + 1 ?",),
    ),
    "Anthropic's blocks": LayoutRow(
        {
            "system": "be short .",
            "tools": [{"name": "look", "description": "to find", "input_schema": {"type": "object"}}],
            "messages": [
                {"role": "user", "content": "where was the cat ?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "it is it", "signature": "a"},
                        {"type": "text", "text": FIRST},
                        {"type": "tool_use", "id": "c1", "name": "look", "input": {"where": "tree"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "a cat"}]},
                        {"type": "text", "text": "and the dog ?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": SECOND}]},
            ],
        },
        "messages",
        ("it is it", FIRST, '{"where": "tree"}', SECOND),
        ("be short .", "to find", '"parameters": {"type": "object"}', "a cat", "and the dog ?"),
    ),
    "summaries of articles": LayoutRow(
        {"id": "7", "article": "the cat sat on a mat .", "highlights": FIRST},
        "document-summary",
        (FIRST,),
        ("the cat sat on a mat .",),
    ),
    "SAMSum": LayoutRow(
        {"dialogue": "Ann: hi\nBob: [waves]", "summary": FIRST},
        "document-summary",
        (FIRST,),
        ("Ann: hi\nBob: [waves]",),
    ),
    "a question, thoughts and a response": LayoutRow(
        {"Question": "1 + 1 ?", "Complex_CoT": "it is it", "Response": "it is 2"},
        "question-response",
        ("it is it", "it is 2"),
        ("1 + 1 ?",),
    ),
    "tokens": LayoutRow({"input_ids": [5, 6, 7]}, "tokens", ()),
}
