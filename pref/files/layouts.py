"""The layouts of preference data: one reader each.

A reader turns a row into two complete conversations (or, where a row has several scored responses,
into `Candidates`). Its docstring is the layout's entry in `prep_data.py --help` and ends with an
example row, which tests read. To add a layout, write a reader and add it to LAYOUTS;
CONTRIBUTING.md has the steps.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pref.files.columns import filled, squeezed
from pref.files.console import UserError
from pref.files.messages import Drop, as_messages
from pref.files.rankings import SCORE_COLUMNS, Candidates, as_number, read_candidates

# The first of these that a row has is its prompt.
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query", "input")
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
LIST_COLUMNS = ("completions", "responses", "answers", "generations", "all_generated_responses")
TIES = ("tie", "draw", "equal", "bothbad", "both_bad", "both bad", "neither")


class Branches(NamedTuple):
    """The two conversations of a row, as message lists; each ends with the assistant's response."""

    chosen: list[dict]
    rejected: list[dict]
    tools: object = None  # schemas, where they are not in a column of their own


# ---- readers -------------------------------------------------------------------------------------


def read_sharegpt(row: dict) -> Branches:
    """ShareGPT: the conversation up to the user's last message, and two responses.

    {"conversations": [{"from": "human", "value": "Hi"}],
     "chosen": {"from": "gpt", "value": "Hello!"}, "rejected": {"from": "gpt", "value": "No."}}
    """
    return answer_with(as_messages(row["conversations"], "user"), row["chosen"], row["rejected"])


def read_openai(row: dict) -> Branches:
    """OpenAI's preference format (also Azure, Together, Fireworks).

    {"input": {"messages": [{"role": "user", "content": "Hi"}]},
     "preferred_output": [{"role": "assistant", "content": "Hello!"}],
     "non_preferred_output": [{"role": "assistant", "content": "No."}]}
    """
    prompt = as_messages(row["input"], "user")
    branches = answer_with(prompt, row["preferred_output"], row["non_preferred_output"])
    tools = row["input"].get("tools") if isinstance(row["input"], dict) else None
    return branches._replace(tools=tools)


def read_alpaca_eval(row: dict) -> Branches:
    """AlpacaEval annotations. `preference`: 1 = output_1 is better, 2 = output_2, 1.5 = tie; any
    other number between 1 and 2 counts as the nearer of the two. Ties are dropped.

    {"instruction": "Hi", "output_1": "Hello!", "output_2": "No.", "preference": 1}
    """
    preference = as_number(row["preference"])
    if preference is None:
        raise Drop("preference is not a number")
    if preference in (0, 1.5):  # 0: a tie in old files
        raise Drop("tie")
    if not 1 <= preference <= 2:
        raise Drop("preference is not between 1 and 2")
    return rank(row, "output_1", "output_2", first_wins=preference < 1.5)


def read_choice(row: dict) -> Branches:
    """Two responses and the better one. `choice` (or `winner`, `preferred`): a or b (also A,
    completion_a, model_a, or the model's name in the column model_a), 0 for a, 1 for b, or tie.
    Ties are dropped. The responses may be completion_a, response_a, output_a, answer_a.

    {"prompt": "Hi", "completion_a": "Hello!", "completion_b": "No.", "choice": "a"}
    """
    columns = LAYOUTS["choice"].columns.split()[1:]
    first, second, label = (first_of(row, group) for group in columns)
    return rank(row, first, second, first_wins=a_wins(row, label))


def read_arena(row: dict) -> Branches:
    """Chatbot Arena: two whole conversations and the winner (model_a, model_b, or a tie, which is
    dropped).

    {"winner": "model_a",
     "conversation_a": [{"role": "user", "content": "Hi"},
                        {"role": "assistant", "content": "Hello!"}],
     "conversation_b": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]}
    """
    chosen, rejected = row["conversation_a"], row["conversation_b"]
    if not a_wins(row, "winner"):
        chosen, rejected = rejected, chosen
    return Branches(as_messages(chosen, "transcript"), as_messages(rejected, "transcript"))


def read_arena_votes(row: dict) -> Branches:
    """Chatbot Arena's votes as a table: turns as lists, and 1 in the column of the winner.

    {"prompt": "[\\"Hi\\"]", "response_a": "[\\"Hello!\\"]", "response_b": "[\\"No.\\"]",
     "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    """
    votes = [str(row[f"winner_model_{side}"]).strip() in ("1", "1.0", "True") for side in "ab"]
    if votes[0] == votes[1]:
        raise Drop("tie")
    chosen, rejected = ("response_a", "response_b") if votes[0] else ("response_b", "response_a")
    return Branches(
        chosen=interleave(row["prompt"], row[chosen]),
        rejected=interleave(row["prompt"], row[rejected]),
    )


def read_safe_rlhf(row: dict) -> Branches:
    """PKU-SafeRLHF: two responses and the number of the better one. For the safer one instead:
    --columns better_response_id=safer_response_id.

    {"prompt": "Hi", "response_0": "Hello!", "response_1": "No.", "better_response_id": 0}
    """
    better = str(row["better_response_id"]).strip().removesuffix(".0")
    if better not in ("0", "1"):
        raise Drop("tie" if better == "-1" else "better_response_id is not 0 or 1")
    return rank(row, "response_0", "response_1", first_wins=better == "0")


def read_helpsteer(row: dict) -> Branches:
    """HelpSteer3: `overall_preference` from -3, the first response is much better, to 3, the second
    is. 0 is a tie and is dropped. HelpSteer2 has prompt, response_1, response_2 and
    preference_strength.

    {"context": [{"role": "user", "content": "Hi"}], "response1": "Hello!", "response2": "No.",
     "overall_preference": -2}
    """
    columns = LAYOUTS["helpsteer"].columns.split()
    prompt, first, second, label = (first_of(row, group) for group in columns)
    strength = as_number(row[label])
    if strength is None:
        raise Drop(f"{label} is not a number")
    if not -3 <= strength <= 3:
        raise Drop(f"{label} is not between -3 and 3")
    if strength == 0:
        raise Drop("tie")
    chosen, rejected = (first, second) if strength < 0 else (second, first)
    return answer_with(as_messages(row[prompt], "user"), row[chosen], row[rejected])


def read_prompt(row: dict) -> Branches:
    """A prompt and two responses, as text or messages (TRL's explicit form, UltraFeedback, axolotl,
    NeMo). Alpaca's `input` is appended to its instruction; `history`, [[question, answer], ...],
    comes before the prompt. Other names: chosen_response, rejected_response; response_j (better)
    and response_k (Stack Exchange).

    {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
    """
    _, chosen, rejected = (first_of(row, group) for group in LAYOUTS["prompt"].columns.split())
    return answer_with(prompt_messages(row), row[chosen], row[rejected])


def read_messages(row: dict) -> Branches:
    """The conversation up to the user's last message as `messages`, and two responses (axolotl,
    oumi).

    {"messages": [{"role": "user", "content": "Hi"}], "chosen": {"role": "assistant",
     "content": "Hello!"}, "rejected": {"role": "assistant", "content": "No."}}
    """
    prompt = as_messages(row["messages"], "user")
    if prompt and prompt[-1]["role"] == "assistant":  # the chosen response is there already
        if prompt[-1:] != as_messages(row["chosen"], "assistant")[-1:]:
            raise Drop("the last of the messages is not the chosen response")
        prompt.pop()
    return answer_with(prompt, row["chosen"], row["rejected"])


def read_swift(row: dict) -> Branches:
    """ms-swift: `messages` with the better response, and the worse one as `rejected_response` or as
    `rejected_messages`.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
     "rejected_response": "No."}
    """
    rejected = first_of(row, LAYOUTS["swift"].columns.split()[1])
    chosen = as_messages(row["messages"], "transcript")
    return Branches(chosen=chosen, rejected=converse(chosen[:-1], row[rejected]))


def read_scored(row: dict) -> Candidates:
    """Several responses with scores or ranks; --rule says which become pairs, --min_margin how far
    apart they are at least. A list of texts (responses, generations ...) with a list of `scores`
    (or ratings, rewards, ranks), or of objects that have both (UltraFeedback's completions,
    Nectar's answers). Rank 1 is the best.

    {"prompt": "Hi", "responses": ["No.", "Hello!"], "scores": [1, 5]}
    """
    conversation = first_of(row, "context|messages|conversations|contents")
    prompt = as_messages(row[conversation], "user") if conversation else prompt_messages(row)
    return read_candidates(prompt, row, first_of(row, "|".join(LIST_COLUMNS)))


def read_conversations(row: dict) -> Branches:
    """Two complete conversations with the same prompt, as message lists (argilla/dpo-mix-7k) or as
    Anthropic HH transcripts ("\\n\\nHuman: Hi\\n\\nAssistant: Hello!").

    {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
     "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]}
    """
    return Branches(
        chosen=as_messages(row["chosen"], "transcript"),
        rejected=as_messages(row["rejected"], "transcript"),
    )


# ---- the table of layouts ------------------------------------------------------------------------


class Layout(NamedTuple):
    columns: str  # columns that a row must have; "a|b": one of these
    read: Callable[[dict], Branches | Candidates]
    also: str = ""  # columns that it uses where they are there
    lists: str = ""  # columns of lists other than messages, which a CSV holds as text


PROMPT = "|".join(PROMPT_COLUMNS)
CHOICE = (
    f"{PROMPT} completion_a|response_a|output_a|answer_a completion_b|response_b|output_b|answer_b "
    "choice|winner|preferred|preference"
)
# The first layout whose columns are all present is taken, so the more specific ones come first.
LAYOUTS = {
    "sharegpt": Layout("conversations chosen rejected", read_sharegpt),
    "openai": Layout("input preferred_output non_preferred_output", read_openai),
    "alpaca_eval": Layout("instruction output_1 output_2 preference", read_alpaca_eval),
    "choice": Layout(CHOICE, read_choice, "model_a model_b history", "history"),
    "arena": Layout("conversation_a conversation_b winner", read_arena, "model_a model_b"),
    "arena_votes": Layout(
        "prompt response_a response_b winner_model_a winner_model_b",
        read_arena_votes,
        also="winner_tie",
        lists="prompt response_a response_b",
    ),
    "safe_rlhf": Layout("prompt response_0 response_1 better_response_id", read_safe_rlhf),
    "helpsteer": Layout(
        "context|prompt response1|response_1 response2|response_2 "
        "overall_preference|preference_strength",
        read_helpsteer,
    ),
    "prompt": Layout(
        f"{PROMPT} chosen|chosen_response|response_j|response "
        "rejected|rejected_response|response_k",
        read_prompt,
        also="history",
        lists="history",
    ),
    "messages": Layout("messages chosen rejected", read_messages),
    "swift": Layout("messages rejected_response|rejected_messages", read_swift),
    "scored": Layout(
        f"{PROMPT}|context|messages|conversations|contents {'|'.join(LIST_COLUMNS)}",
        read_scored,
        also=f"history {' '.join(SCORE_COLUMNS)}",
        lists=f"history {' '.join(LIST_COLUMNS)} {' '.join(SCORE_COLUMNS)}",
    ),
    "conversations": Layout("chosen rejected", read_conversations),
}
# Columns that every layout uses where they are there.
COMMON = ("|".join(SYSTEM_COLUMNS), "tools", "dataset", "source")


def find_layout(columns: Iterable[str]) -> str | None:
    """Name of the first layout in LAYOUTS that has these columns, or None."""
    columns = set(columns)
    for name, layout in LAYOUTS.items():
        if all(set(group.split("|")) & columns for group in layout.columns.split()):
            return name
    return None


def used_columns(columns: Iterable[str], name: str) -> set[str]:
    """Those of `columns` that the layout `name` uses."""
    columns, layout = list(columns), LAYOUTS[name]
    groups = [*layout.columns.split(), *layout.also.split(), *COMMON]
    used = {column for group in groups if (column := first_of(columns, group))}
    if "instruction" in used:
        used |= {"input"} & set(columns)
    return used


def known_columns() -> set[str]:
    """Every column name that some layout uses."""
    groups = [g for layout in LAYOUTS.values() for g in f"{layout.columns} {layout.also}".split()]
    return {name for group in [*groups, *COMMON] for name in group.split("|")}


def columns_text(layout: Layout) -> str:
    """The first name of each column: 'prompt|question chosen' -> 'prompt, chosen'."""
    return ", ".join(group.split("|")[0] for group in layout.columns.split())


def unknown_layout(columns: list[str], place: str) -> UserError:
    """The error for columns that no layout has."""
    known = "\n".join(f"  {name}: {columns_text(layout)}" for name, layout in LAYOUTS.items())
    names = set(columns)
    hint = ""
    one = {"completion", "response", "output", "answer"}
    if names & one and "label" in names:
        hint = "\nOne response and a label is unpaired data (KTO); this toolkit needs pairs."
    elif names & {*one, "messages", "conversations", "text"} and not any(map(is_one_of_two, names)):
        hint = "\nThere is one response only; a pair needs a better and a worse one."
    return UserError(
        f"{place}: unknown layout with columns {', '.join(columns)}. Say what they are: "
        f"--columns prompt=NAME,chosen=NAME,rejected=NAME (--help shows a row of each layout), or "
        f"add yours to LAYOUTS in pref/files/layouts.py:\n{known}{hint}"
    )


def is_one_of_two(name: str) -> bool:
    """Whether a column seems to hold one of two responses, or says which of them is better."""
    pattern = r"chosen|reject|accept|prefer|winner|better|worse|good|bad|[ _]?[ab012]$"
    return bool(re.search(pattern, name.lower()))


# ---- helpers of the readers ----------------------------------------------------------------------


def first_of(columns: Iterable[str], group: str) -> str:
    """The first name of 'a|b' that is in `columns`; '' if none is."""
    return next((name for name in group.split("|") if name in columns), "")


def prompt_messages(row: dict) -> list[dict]:
    """The prompt column as messages: Alpaca's `input` below it, `history` before it."""
    column = first_of(row, PROMPT)
    value = row[column or "prompt"]
    if column == "instruction" and filled(row.get("input")):
        if not isinstance(value, str) or not isinstance(row["input"], str):
            raise Drop("instruction and input are not both text")
        value = f"{value}\n\n{row['input']}"
    messages = as_messages(value, "user")
    # An HH prompt ends with '\n\nAssistant:', which parses as an empty answer.
    if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return with_history(messages, row.get("history"))


def with_history(messages: list[dict], history) -> list[dict]:
    """`messages` after the turns of `history`: [[question, answer], ...], messages, or its text."""
    if not filled(history):
        return messages
    if not isinstance(history, list):
        raise Drop("history is not a list of [question, answer]")
    if all(isinstance(item, dict) for item in history):
        turns = as_messages(history, "user")
    else:
        turns = []
        for item in history:
            if not (isinstance(item, list) and [type(text) for text in item] == [str, str]):
                raise Drop("history is not a list of [question, answer]")
            turns += [{"role": "user", "content": item[0]}]
            turns += [{"role": "assistant", "content": item[1]}]
    system = [m for m in messages[:1] if m["role"] == "system"]
    return [*system, *turns, *messages[len(system) :]]


def a_wins(row: dict, label: str) -> bool:
    """Whether the column `label` names a. Raises Drop for a tie and what names neither, UserError
    for 2: then 1 may mean a in this file, and reading it as b would reverse every preference.
    """
    choice = row[label]
    names = [row.get("model_a"), row.get("model_b")]
    if isinstance(choice, str) and choice in names and names[0] != names[1]:
        return choice == names[0]
    text = str(choice).strip().lower().removesuffix(".0")
    prefixed = re.fullmatch(
        r"(?:completion|model|response|output|answer|assistant)[_ ]([ab])", text
    )
    text = prefixed[1] if prefixed else text
    if text == "2":
        raise UserError(
            f"{label} is 2, but numbers are read as 0 = a and 1 = b; write the choices as a and b"
        )
    if text.startswith("tie") or text in TIES:
        raise Drop("tie")
    if text not in ("a", "b", "0", "1"):
        raise Drop(f"{label} is not one of a, b, 0, 1, tie")
    return text in ("a", "0")


def interleave(prompts, responses) -> list[dict]:
    """A conversation from the list of the user's messages and that of the assistant's."""
    turns = (prompts, responses)
    if not all(isinstance(texts, list) for texts in turns) or len(prompts) != len(responses):
        raise Drop("prompt and response are not lists of the same number of turns")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text if isinstance(text, str) else ""}
        for exchange in zip(*turns)
        for role, text in zip(roles, exchange)
    ]


def rank(row: dict, first: str, second: str, first_wins: bool) -> Branches:
    """The prompt with the responses in the columns `first` and `second`, the better one chosen."""
    chosen, rejected = (first, second) if first_wins else (second, first)
    return answer_with(prompt_messages(row), row[chosen], row[rejected])


def answer_with(prompt: list[dict], chosen, rejected) -> Branches:
    """The prompt followed by each of the two responses."""
    return Branches(chosen=converse(prompt, chosen), rejected=converse(prompt, rejected))


def converse(prompt: list[dict], response) -> list[dict]:
    """Prompt and response joined, unless the response is a complete conversation already
    (UltraFeedback has both). Raises Drop if the two disagree.
    """
    is_transcript = isinstance(response, str) and is_hh(response) and len(prompt) > 0
    answer = as_messages(response, "transcript" if is_transcript else "assistant")
    begins = prompt and [message["role"] for message in answer[:1]] == ["assistant"]
    if "user" not in [message["role"] for message in answer] or begins:
        if len(answer) > 1:
            raise Drop("a response of several messages: only single ones can be trained")
        return prompt + answer
    if problem := disagreement(prompt, answer):
        raise Drop(problem)
    return answer


def is_hh(text: str) -> bool:
    """Whether a response is a whole HH transcript, which has both speakers."""
    return text.lstrip().startswith("Human:") and "\nAssistant:" in text


def disagreement(prompt: list[dict], conversation: list[dict]) -> str | None:
    """How the prompt column contradicts a conversation that has its own prompt; None if all that
    the column says is in the conversation.
    """
    own = [m for m in conversation[:-1] if m["role"] == "system"]
    system = [m for m in prompt if m["role"] == "system" and m["content"].strip()]
    if system and [squeezed(m["content"]) for m in own] != [squeezed(m["content"]) for m in system]:
        return "the prompt column has a system message that the conversation lacks"
    said = [squeezed(m["content"]) for m in conversation]
    texts = [squeezed(m["content"]) for m in prompt if m["role"] != "system"]
    texts = [text for text in texts if text]
    if all(text in said for text in texts):
        return None
    if len(texts) == 1 and is_rendered(texts[0], said[:-1]):
        return None
    return "the prompt column differs from the conversation"


def is_rendered(text: str, parts: list[str]) -> bool:
    """Whether a text is these messages one after the other, with names of roles and punctuation
    between them and nothing else.
    """
    between = r"(?:user|assistant|human|system|model|[\W_])*"
    pattern = between.join(["", *map(re.escape, parts), ""])
    return bool(re.fullmatch(pattern, text, re.IGNORECASE))
