"""Conversations as [{role, content}], from the ways in which preference data writes them.

The readers in layouts.py are built on `as_messages`. What it cannot read it reports as Drop.

A message has `role` and `content`, which is text. Where the data has them, it also has `tool_calls`
(the assistant's), `tool_call_id` and `name` (of a tool's result) and `reasoning_content` (the
assistant's thoughts before the answer), as chat templates take them.
"""

import ast
import io
import json
import re
import tokenize

# What other tools call the four roles. Any other name is kept, and pairs.check_pair rejects it.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "tool_result": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: a message that is a call, as JSON
ROLE_KEYS = ("role", "from", "speaker", "author")
TEXT_KEYS = ("content", "value", "text", "parts", "message")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts")
CALL_KEYS = ("tool_calls", "function_call")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# Keys of a message that are read; any other is reported as a column that is not used.
KNOWN_KEYS = {*ROLE_KEYS, *TEXT_KEYS, *REASONING_KEYS, *CALL_KEYS, *MEDIA, "tool_call_id"}

# A list of messages, or one message, that a CSV holds as JSON or as Python wrote it.
SERIALISED = re.compile(
    r"""\s*(\[|array\(\s*\[)?\s*\{\s*['"](role|from|content|value|tool_calls)['"]\s*:"""
)
ROLE_KEY = re.compile(r"""['"](?:role|from)['"]\s*:""")
# A transcript opens with the user's name; the blank lines before it are often lost.
TRANSCRIPT_OPENING = re.compile(r"\s*Human:")


class Drop(Exception):
    """A row that is not a usable pair; the message is the reason that dropped.jsonl records."""


def as_messages(value, role: str) -> list[dict]:
    """`value` as messages: a message list, one message, or text spoken by `role`.

    Text is parsed as an HH transcript where a whole `transcript` is expected, and where a `user`
    prompt opens with 'Human:'. Raises Drop for any other value.
    """
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        text = first_value(value, TEXT_KEYS)
        value = [value] if first_value(value, ROLE_KEYS) or text is None else content_text(text)
    if isinstance(value, list):
        return [as_message(item) for item in value]
    if value is not None and not isinstance(value, str):
        raise Drop("neither text nor a list of messages")
    text = value or ""
    if role == "transcript" or (role == "user" and TRANSCRIPT_OPENING.match(text)):
        return parse_transcript(text)
    return [{"role": role, "content": text}]


def as_message(item) -> dict:
    """A message that may also be written {from, value}. Raises Drop if it holds anything else than
    text and tool calls.
    """
    if not isinstance(item, dict):
        raise Drop("neither text nor a list of messages")
    role, content = first_value(item, ROLE_KEYS), first_value(item, TEXT_KEYS)
    if not isinstance(role, str):
        raise Drop("a message without a role")
    if media := next((key for key in MEDIA if item.get(key)), None):
        raise Drop(f"has {media}: only text can be trained")
    if not {*TEXT_KEYS, *CALL_KEYS} & item.keys():
        raise Drop(f"a message without content (its keys: {', '.join(item)})")
    role = role.strip().lower()
    if role in CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": read_calls(content)}
    message = {"role": ROLES.get(role, role), "content": content_text(content)}
    calls = first_value(item, CALL_KEYS)
    if calls:
        message["tool_calls"] = read_calls(calls)
    if message["role"] == "tool":
        names = {key: item.get(key) for key in ("tool_call_id", "name")}
        message |= {key: name for key, name in names.items() if isinstance(name, str) and name}
    if message["role"] == "assistant" and (thoughts := first_value(item, REASONING_KEYS)):
        message["reasoning_content"] = content_text(thoughts)
    return message


def first_value(item: dict, keys: tuple[str, ...]):
    """The first of `keys` that has a value: tables fill the columns of other rows with None."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def content_text(content) -> str:
    """Text of a message's content, which may be a list of text parts: these become paragraphs.

    Raises Drop for any other kind of part (images, audio, files).
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type") if isinstance(part, dict) else "text"
        if kind not in (None, "text", "input_text", "output_text"):
            raise Drop(f"has a part of type '{kind}': only text can be trained")
        if not isinstance(text, str):
            raise Drop("a message with content that is not text")
        texts.append(text)
    return "\n".join(texts)


# ---- tools ---------------------------------------------------------------------------------------


def read_calls(value) -> list[dict]:
    """Tool calls as templates take them: {"type": "function", "function": {"name", "arguments"}}
    with `arguments` an object. Raises Drop if that cannot be made of `value`.
    """
    calls = parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    return [read_call(call) for call in calls]


def read_call(call) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = parsed(function.get("arguments", {})) if isinstance(function, dict) else None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise Drop("a tool call without a name, or whose arguments are not an object")
    head = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    arguments = without_null(arguments)
    return {
        **head,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def read_tools(value) -> list[dict]:
    """The `tools` of a row, which may be JSON text, as a list of schemas that templates take.

    A bare {"name", "parameters"} (LLaMA-Factory) is wrapped. Raises Drop for anything else.
    """
    tools = parsed(value) if value else []
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Drop("tools are not a list of schemas")
    wrapped = [
        tool if tool.get("function") else {"type": "function", "function": tool} for tool in tools
    ]
    if not all(isinstance(tool["function"].get("name"), str) for tool in wrapped):
        raise Drop("a tool without a name")
    return without_null(wrapped)


def without_null(value):
    """`value` without keys that are null: in a table every tool has the keys of all tools."""
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def parsed(value):
    """The value of JSON text; any other value, and text that is not JSON, unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


# ---- text that holds more than one message -------------------------------------------------------


def unserialise(value, is_list: bool = False):
    """The messages of a text such as '[{"role": ...', in which a CSV holds a list; any other value
    unchanged. is_list: the column holds lists of any kind. Raises Drop for messages as text that
    cannot be parsed, because they were cut off.
    """
    if is_list and isinstance(value, str) and value.lstrip().startswith("["):
        result = parse_literal(value)
        return value if result is None else result
    if not isinstance(value, str) or not SERIALISED.match(value):
        return value
    result = parse_literal(value)
    if result is None and value.lstrip().startswith("[") and ROLE_KEY.search(value):
        raise Drop("a list of messages as text that cannot be parsed (cut off?)")
    # Any other JSON is text: what somebody asked for, and the answer.
    return result if holds_messages(result) else value


def holds_messages(value) -> bool:
    """Whether a parsed text is a message or a list of them, and no other JSON."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(
        isinstance(item, dict) and isinstance(first_value(item, ROLE_KEYS), str) for item in items
    )


def parse_literal(text: str):
    """The list or dict that `text` writes as JSON or as Python does, or None."""
    try:
        value = json.loads(text)
    except RecursionError:
        return None
    except ValueError:
        # NumPy's arrays, in which pandas keeps lists, print without commas between the elements.
        text = re.sub(r"\}\s*\n\s*\{", "}, {", text.strip())
        text = re.sub(r"\A\[?array\((.*?)(, dtype=object)?\)\]?\Z", r"\1", text, flags=re.DOTALL)
        if joins_texts(text):
            return None
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return value if isinstance(value, list | dict) else None


def joins_texts(text: str) -> bool:
    """Whether a list has texts without a comma between them, as NumPy prints them. Python would
    read these as one.
    """
    if not re.search(r"""['"]\s+['"]""", text):
        return False
    before = None
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == before == tokenize.STRING:
                return True
            before = before if token.type in (tokenize.NL, tokenize.NEWLINE) else token.type
    except (tokenize.TokenError, SyntaxError):
        pass
    return False


def parse_transcript(text: str) -> list[dict]:
    """Messages of an Anthropic HH transcript. The space around each turn is part of the format."""
    # "\n\nHuman: Hi\n\nAssistant: Hello!" -> "", "Human", " Hi", "Assistant", " Hello!"
    before, *turns = re.split(r"(?:\A\s*|\n[^\S\n]*\n)(Human|Assistant):", text)
    if "Assistant" not in turns[::2] and re.search(r"\nAssistant:", text):
        # Single line ends throughout. Elsewhere such a line is part of a turn.
        before, *turns = re.split(r"(?:\A\s*|\n)(Human|Assistant):", text)
    if before.strip() or not turns:
        raise Drop("not a Human/Assistant transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": body.strip()}
        for speaker, body in zip(turns[::2], turns[1::2])
    ]
