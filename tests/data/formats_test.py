import pytest

from ftjax.data import RowError, parse
from ftjax.data.formats import FORMATS, detect

PAIR = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})
SYSTEM = {"role": "system", "content": "S"}

ROWS = {
    "messages": ({"messages": [SYSTEM, *PAIR]}, (SYSTEM, *PAIR)),
    "messages with parts": ({"messages": [PAIR[0] | {"content": [{"type": "text", "text": "Q"}]}, PAIR[1]]}, PAIR),
    "messages with weights": ({"messages": [PAIR[0], PAIR[1] | {"weight": 0}]}, (PAIR[0], PAIR[1] | {"weight": 0})),
    "messages with nulls": ({"messages": [PAIR[0] | {"weight": None, "name": None}, PAIR[1]]}, PAIR),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, PAIR),
    "sharegpt with system": (
        {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        (SYSTEM, *PAIR),
    ),
    "sharegpt with roles": ({"conversations": list(PAIR)}, PAIR),
    "prompt_completion": ({"prompt": "Q", "completion": "A", "task": "t"}, PAIR),
    "prompt_completion of messages": (
        {"prompt": [*PAIR, PAIR[0]], "completion": [PAIR[1]]},
        (PAIR[0], PAIR[1] | {"weight": 0}, PAIR[0], PAIR[1]),
    ),
    "prompt_completion of both": ({"prompt": [SYSTEM, PAIR[0]], "completion": "A"}, (SYSTEM, *PAIR)),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, PAIR),
    "alpaca with input": ({"instruction": "Q", "input": "I", "output": "A"}, (PAIR[0] | {"content": "Q\n\nI"}, PAIR[1])),
    "dolly": ({"instruction": "Q", "context": "I", "response": "A", "category": "c"}, (PAIR[0] | {"content": "Q\n\nI"}, PAIR[1])),
    "question_answer": ({"question": "Q", "answer": "A"}, PAIR),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_detected_and_read(name):
    row, messages = ROWS[name]
    (example,) = parse(row, where="a.jsonl:7")
    assert example.messages == messages and example.columns == row and example.where == "a.jsonl:7"


def test_text_and_self_instruct_rows():
    assert parse({"text": "T"})[0].text == "T"
    row = {"instruction": "Q", "instances": [{"input": "", "output": "A"}, {"input": "I", "output": "B"}]}
    assert [example.messages[1]["content"] for example in parse(row)] == ["A", "B"]


def test_columns_can_be_renamed_and_formats_named():
    assert parse({"q": "Q", "a": "A"}, columns={"prompt": "q", "completion": "a"})[0].messages == PAIR
    assert parse({"text": "T", "messages": []}, format="text")[0].text == "T"
    assert set(FORMATS) >= {detect(row) for row, _ in ROWS.values()}


WRONG = {
    "no known format has the columns 'x'": {"x": 1},
    "column 'messages': must be a list, got a string": {"messages": "Q"},
    "column 'messages': is an empty list": {"messages": []},
    "column 'messages[0]': must be an object with role and content, got a string": {"messages": ["Q"]},
    "column 'messages[0].role': is missing": {"messages": [{"content": "Q"}]},
    "column 'messages[0].role': unknown role 'asistant'; nearest: 'assistant'": {"messages": [{"role": "asistant", "content": "Q"}]},
    "column 'messages[0].content': must be a string, got null": {"messages": [{"role": "user", "content": None}]},
    "column 'messages[0].content[0]': only parts of type 'text'": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "column 'messages[1].weight': must be 0 or 1, got 0.5": {"messages": [PAIR[0], PAIR[1] | {"weight": 0.5}]},
    "column 'messages[0].tool_calls[0].function.arguments': is not JSON": {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    },
    "column 'tools': must be a list, got an object": {"messages": list(PAIR), "tools": {}},
    "column 'conversations[0].from': unknown speaker 'humam'; nearest: 'human'": {"conversations": [{"from": "humam", "value": "Q"}]},
    "column 'conversations[0].value': must be a string, got a number": {"conversations": [{"from": "human", "value": 1}]},
    "column 'completion': must be a string, got a number": {"prompt": "Q", "completion": 42},
    "column 'prompt': must be a string, got null": {"prompt": None, "completion": "A"},
    "column 'output': must be a string, got a boolean": {"instruction": "Q", "output": True},
    "column 'input': must be a string, got a list": {"instruction": "Q", "input": ["I"], "output": "A"},
    "column 'instances[0].output': is missing": {"instruction": "Q", "instances": [{}]},
    "column 'answer': must be a string, got a list": {"question": "Q", "answer": []},
    "column 'text': must be a string, got an object": {"text": {}},
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_wrong_type_names_place_column_and_reason(reason):
    with pytest.raises(RowError) as error:
        parse(WRONG[reason], where="a.jsonl:7")
    assert str(error.value).startswith(f"a.jsonl:7: {reason}")


def test_a_missing_column_names_the_nearest():
    with pytest.raises(RowError, match="a.jsonl:7: column 'qestion': is missing; the row has 'question', 'answer'; nearest: 'question'"):
        parse({"question": "Q", "answer": "A"}, columns={"prompt": "qestion"}, where="a.jsonl:7")
    with pytest.raises(RowError, match="column 'completion': is missing"):
        parse({"prompt": "Q"}, format="prompt_completion")
    with pytest.raises(ValueError, match="no format 'sharegtp'; nearest: 'sharegpt'"):
        parse({}, format="sharegtp")


def test_an_end_marker_is_taken_off_answers_and_texts_alone():
    row = {"prompt": "Say <end>", "completion": "yes <end> no<end>"}
    (example,) = parse(row, end_marker="<end>")
    assert [message["content"] for message in example.messages] == ["Say <end>", "yes <end> no"]
    assert parse({"text": "all<end>"}, end_marker="<end>")[0].text == "all"
    assert parse(row)[0].messages[-1]["content"] == "yes <end> no<end>"
