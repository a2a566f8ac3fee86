"""Messages whose content is a list of blocks, as Anthropic's API has them, in the form of chat templates."""

from typing import Any

from flashbone.errors import FormatError

Turn = dict[str, Any]

_CALL, _RESULT, _THINKING = "tool_use", "tool_result", "thinking"
_KEYS = {
    _CALL: {"type", "id", "name", "input", "cache_control"},
    _RESULT: {"type", "tool_use_id", "content", "cache_control"},
    _THINKING: {"type", "thinking", "signature"},
}
_SPEAKERS = {_CALL: "assistant", _RESULT: "user", _THINKING: "assistant"}


def expanded_turns(turn: Any) -> list[Any]:
    """The turns that a message of blocks means: results of tools as turns of their own, before what the user says to
    them; calls and thoughts beside the text of their turn. Other messages are left as they are.

    Raises:
        FormatError: a block has a key that nothing reads, or is in another's turn.
    """
    content = turn.get("content") if isinstance(turn, dict) else None
    blocks = [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []
    if not any(block.get("type") in _KEYS for block in blocks):
        return [turn]
    role = turn.get("role")
    of: dict[str, list[Turn]] = {kind: [block for block in blocks if block.get("type") == kind] for kind in _KEYS}
    for kind, inside in of.items():
        if inside and role != _SPEAKERS[kind]:
            raise FormatError(f"a turn of the {role} has a block of type {kind}, which is the {_SPEAKERS[kind]}'s")
        if unread := [key for block in inside for key, value in block.items() if value and key not in _KEYS[kind]]:
            raise FormatError(f"a block of type {kind} has {unread[0]!r}, which nothing reads; take it out")
    results = [
        {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content") or ""}
        for block in of[_RESULT]
    ]
    rest: Turn = {**turn, "content": [block for block in content or () if _kind_of(block) not in _KEYS]}
    if thoughts := [str(block.get("thinking") or "") for block in of[_THINKING]]:
        rest["reasoning_content"] = "\n".join(thoughts)
    if of[_CALL]:
        rest["tool_calls"] = [
            {"type": "function", "id": block.get("id"), "function": _call(block)} for block in of[_CALL]
        ]
    return [*results, rest] if rest["content"] or role == "assistant" else results


def _kind_of(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _call(block: Turn) -> Turn:
    return {"name": block.get("name"), "arguments": block.get("input") or {}}


def as_functions(tools: list[Turn]) -> list[Turn]:
    """Descriptions of tools as chat templates read them; Anthropic's have an `input_schema`."""
    return [
        {"type": "function", "function": {"parameters": tool["input_schema"], **_without(tool, "input_schema")}}
        if "input_schema" in tool
        else tool
        for tool in tools
    ]


def _without(tool: Turn, name: str) -> Turn:
    return {key: value for key, value in tool.items() if key not in (name, "cache_control")}
