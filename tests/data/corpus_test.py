import json

import numpy as np
import pytest

from ftjax import data
from ftjax.data import Report, RowError, inspect
from tests.data.families import byte_tokenizer

ROWS = [
    {"prompt": "Q", "completion": "A"},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"instruction": "Q", "input": "", "output": "A"},
    {"question": "Q", "answer": "A"},
]


@pytest.fixture
def encoder():
    return data.make_encoder(byte_tokenizer("qwen2.5"), max_tokens=120)


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return {"path": str(path)}


def test_a_file_may_mix_formats(tmp_path, encoder):
    sequences = data.encode(data.read(write(tmp_path / "a.jsonl", ROWS)), encoder)
    documents = {tuple(part) for part in np.split(sequences.tokens, sequences.starts[1:-1])}
    assert len(sequences.lengths) == 5 and len(documents) == 1


def test_a_bad_row_stops_the_run_or_is_counted(tmp_path, encoder):
    spec = write(tmp_path / "a.jsonl", [ROWS[0], '{"prompt": "Q"', {"prompt": "Q", "completion": 7}, ROWS[1], {"messages": []}])
    with pytest.raises(RowError, match="a.jsonl:2: not JSON"):
        data.load({"a": spec}, encoder, batch_size=1)
    _, reports = data.load({"a": spec}, encoder, batch_size=1, bad_rows="skip")
    report = reports["a"]
    assert (report.rows, report.examples, report.sequences, sum(report.skipped.values())) == (5, 2, 2, 3)
    assert report.first_errors[1].endswith("a.jsonl:3: column 'completion': must be a string, got a number")


def test_rows_that_train_nothing_are_counted_or_stop_the_run(tmp_path, encoder):
    silent = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]}
    spec = write(tmp_path / "a.jsonl", [ROWS[0], silent, {"messages": [{"role": "user", "content": "Q"}]}])
    _, reports = data.load({"a": spec}, encoder, batch_size=1)
    assert reports["a"].sequences == 1 and sum(reports["a"].skipped.values()) == 2
    with pytest.raises(RowError, match="a.jsonl:2: no token of it would be trained"):
        data.load({"a": spec}, encoder, batch_size=1, unsupervised="raise")


@pytest.mark.parametrize("options", [{}, {"bad_rows": "skip"}])
def test_a_data_set_that_trains_nothing_is_always_an_error(tmp_path, encoder, options):
    silent = {"messages": [{"role": "user", "content": "Q"}]}
    with pytest.raises(ValueError, match="of 2 examples no token would be trained: 2 x no token of it"):
        data.load({"a": write(tmp_path / "a.jsonl", [silent, silent])}, encoder, batch_size=1, **options)


def test_policies_are_checked(tmp_path, encoder):
    with pytest.raises(ValueError, match="not 'skipp'; nearest: 'skip'"):
        data.load({"a": write(tmp_path / "a.jsonl", ROWS)}, encoder, batch_size=1, bad_rows="skipp")


def test_huge_rows_are_cut_and_counted(tmp_path, encoder):
    rows = [{"prompt": "Q" * 200_000, "completion": "A"}, {"prompt": "Q", "completion": "A" * 200_000}]
    loader, reports = data.load({"a": write(tmp_path / "a.jsonl", rows)}, encoder, batch_size=1)
    assert (reports["a"].cut_prompts, reports["a"].cut_responses, reports["a"].tokens) == (1, 1, 240)
    (short,) = [batch for batch in loader.epoch() if batch.loss_mask.sum() < 100]
    assert encoder.tokenizer.decode(short.tokens[0]).endswith("Q<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n")


@pytest.mark.parametrize("packing", ["best_fit", "wrapped", "none"])
def test_long_documents_lose_nothing(tmp_path, encoder, packing):
    (tmp_path / "a.txt").write_text("".join(map(str, range(500))))
    loader, reports = data.load({"a": {"path": str(tmp_path)}}, encoder, batch_size=2, packing=packing)
    assert sum(int((batch.segment_ids > 0).sum()) for batch in loader.epoch()) == reports["a"].tokens == 10 + 180 + 1200 + 1


def test_reports_add():
    one, two = Report(rows=1, first_errors=["a"]), Report(rows=2, first_errors=["b"])
    one.skip("why", "c")
    total = one + two
    assert (total.rows, dict(total.skipped), total.first_errors) == (3, {"why": 1}, ["a", "c", "b"])


def test_a_sequence_is_shown_as_runs_of_text(encoder):
    sequences = data.encode(data.read({"path": "tasks:sort", "split": "train[:3]"}), encoder)
    runs = inspect.sequence_runs(encoder.tokenizer, sequences, 1)
    assert [trained for _, trained in runs] == [False, True, False] and runs[1][0].endswith("<|im_end|>") and runs[2][0] == "\n"
    assert inspect.runs(encoder.tokenizer, np.zeros(0, np.int32), np.zeros(0)) == []


def test_the_histogram_counts_every_length():
    lengths = np.random.default_rng(0).integers(5, 200, 1000)
    classes = inspect.histogram(lengths)
    assert sum(count for *_, count in classes) == 1000 and len(classes) <= 10
    assert all(count == ((lengths >= low) & (lengths <= high)).sum() for low, high, count in classes)
    assert inspect.histogram(np.array([7])) == [(7, 7, 1)]


def test_problems_are_named(tmp_path, encoder):
    rows = [
        ROWS[0],
        ROWS[0],
        {"prompt": "Q", "completion": ""},
        {"prompt": "Q", "completion": "A<|im_end|>"},
        {"prompt": "Q", "completion": "A" * 500},
    ]
    report = Report()
    sequences = data.encode(data.read(write(tmp_path / "a.jsonl", [*rows, "{"]), bad_rows="skip", report=report), encoder, report=report)
    found = "; ".join(inspect.problems(report, sequences, encoder.tokenizer))
    for text in (
        "1 left out: not JSON",
        "1 of 5 responses were cut",
        "1 of 5 sequences train a single",
        "1 of 5 sequences are exact",
        "1 of 5 examples write special tokens",
        "1 of 5 sequences train a special",
    ):
        assert text in found
    clean = Report()
    good = data.encode(
        data.read({"path": "tasks:records", "split": "train[:3]"}), data.make_encoder(encoder.tokenizer, max_tokens=500), report=clean
    )
    assert inspect.problems(clean, good, encoder.tokenizer) == []
