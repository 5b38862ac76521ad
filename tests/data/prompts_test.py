"""Prompts come by index, end where the policy writes, and keep their row for the reward."""

import numpy as np
import pytest

from ftjax import data
from ftjax.data.prompts import prompts
from ftjax.hf.tokenizer import byte_tokenizer

ENCODER = data.make_encoder(byte_tokenizer(), max_tokens=96)


def read(rows, **options) -> list[data.Example]:
    source = data.Source("rows", len(rows), lambda i: rows[i], lambda i: f"row {i}")
    return list(prompts(source, **options))


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"prompt": "1 + 1?", "answer": "2"}, "1 + 1?", "2"),
        ({"prompt": "1 + 1?", "completion": "It is 2."}, "1 + 1?", "It is 2."),
        ({"prompt": "1 + 1?", "completion": "It is 2.", "answer": "2"}, "1 + 1?", "2"),
        ({"prompt": "1 - 1?", "completion": "It is nothing.", "answer": 0}, "1 - 1?", 0),
        ({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, "1 + 1?", None),
        ({"question": "1 + 1?", "answer": "so #### 2"}, "1 + 1?", "so #### 2"),
        ({"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}]}, "1 + 1?", None),
        ({"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}, "1 + 1?", "2"),
    ],
)
def test_a_row_is_asked_without_its_answer_which_a_reward_sees(row, text, answer):
    (prompt,) = data.prompts.encode(read([row]), ENCODER, max_tokens=8)
    shown = ENCODER.tokenizer.decode(prompt.tokens.tolist())
    assert shown.endswith("assistant\n") and text in shown and (answer is None or str(answer) not in shown)
    assert prompt.text == text and prompt.columns == {**row, "answer": answer}
    system = isinstance(row.get("prompt"), list)
    assert prompt.asked == (row["prompt"] if system else text)


def test_rows_without_a_question_are_refused_by_name():
    for row, reason in (({"prompt": [{"role": "assistant", "content": "2"}]}, "nothing to answer"), ({"prompt": 3}, "must be a string")):
        with pytest.raises(data.RowError, match=f"row 0: column 'prompt': .*{reason}"):
            read([row])


def test_what_leaves_no_room_for_an_answer_is_left_out_and_counted():
    report, rows = data.Report(), [{"prompt": "a" * length} for length in (10, 80)]
    assert len(data.prompts.encode(read(rows, report=report), ENCODER, max_tokens=40, report=report)) == 1
    assert report.sequences == 1 and sum(report.skipped.values()) == 1 and "row 1" in report.first_errors[0]
    with pytest.raises(ValueError, match="none can be used: .*do not fit"):
        data.prompts.encode(read(rows[1:]), ENCODER, max_tokens=40)


def test_prompts_are_functions_of_the_index_and_each_comes_once_an_epoch():
    spec = {"tasks": {"path": "tasks:compare", "split": "train[:10]"}}
    options = {"count": 4, "max_tokens": 4, "seed": 3}
    encoder = data.make_encoder(byte_tokenizer(), max_tokens=256)
    found, reports = data.load_prompts(spec, encoder, **options)
    again, _ = data.load_prompts(spec, encoder, **options)
    drawn = [prompt.text for index in range(5) for prompt in found.at(index)]
    assert drawn == [prompt.text for index in range(5) for prompt in again.at(index)] and len(drawn) == 20
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(prompt.text for prompt in found.prompts) and drawn[:10] != drawn[10:]
    assert [prompt.text for prompt in found.at(0, round=1)] == [prompt.text for prompt in again.at(0, round=1)] != drawn[:4]
    assert found.steps_per_epoch == 3 and reports["tasks"].sequences == 10
    assert all(np.asarray(prompt.tokens).dtype == np.int32 for prompt in found.prompts)
