import gzip
import json

import datasets
import pytest

from ftjax.data import RowError, open_source
from ftjax.data import rows as rows_module

ROWS = [{"prompt": f"Q{i} é 你", "completion": f"A{i}"} for i in range(5)]


def lines(rows=ROWS, end="\n"):
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end


def csv_text(delimiter=","):
    return "\n".join(delimiter.join(row) for row in [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)])


FILES = {
    "a.jsonl": lines(),
    "a.ndjson": lines(),
    "crlf.jsonl": lines(end="\r\n"),
    "bom.jsonl": "\ufeff" + lines(),
    "blank.jsonl": "\n \n" + lines(end="\n\n\n"),
    "open.jsonl": lines().rstrip("\n"),
    "list.json": json.dumps(ROWS, indent=2),
    "data.json": json.dumps({"data": ROWS, "more": [1]}),
    "lines.json": lines(),
    "bom.json": "\ufeff" + json.dumps(ROWS),
    "a.csv": csv_text(),
    "bom.csv": "\ufeff" + csv_text(),
    "crlf.csv": csv_text().replace("\n", "\r\n"),
    "a.tsv": csv_text("\t"),
}


def read_all(source):
    return [source.read(i) for i in range(source.size)]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, zipped):
    raw = FILES[name].encode()
    path = tmp_path / (name + ".gz" if zipped else name)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    assert read_all(open_source(str(path))) == ROWS


def test_parquet_is_read_by_row_group(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "a.parquet"))
    assert [source.read(i) for i in (4, 0, 2)] == [ROWS[4], ROWS[0], ROWS[2]] and source.where(4).endswith("a.parquet: row 5")


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\n\r\nTwo.\n")
    assert read_all(open_source(str(tmp_path / "a.txt"))) == [{"text": "One.\n\nTwo.\n"}]


def test_a_folder_is_its_files_and_a_split_those_with_its_name(tmp_path):
    (tmp_path / "train-0.jsonl").write_text(lines(ROWS[:2]))
    (tmp_path / "train-1.json").write_text(json.dumps(ROWS[2:4]))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[4:]).encode()))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.jsonl").write_text("not data")
    assert read_all(open_source(str(tmp_path))) == ROWS[:4]
    assert read_all(open_source(str(tmp_path), split="test")) == ROWS[4:]
    with pytest.raises(ValueError, match="no file in .* has 'validation' in its name"):
        open_source(str(tmp_path), split="validation")
    source = open_source(str(tmp_path))
    assert source.where(1).endswith("train-0.jsonl:2") and source.where(2).endswith("train-1.json:1")


def test_a_folder_without_split_names_is_all_for_training(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text(lines([{"text": name}]))
    assert read_all(open_source(str(tmp_path))) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    "split, rows", [("train[:2]", ROWS[:2]), ("train[2:4]", ROWS[2:4]), ("train[:60%]", ROWS[:3]), ("train[60%:]", ROWS[3:])]
)
def test_a_split_can_be_sliced(tmp_path, split, rows):
    (tmp_path / "a.jsonl").write_text(lines())
    source = open_source(str(tmp_path / "a.jsonl"), split=split)
    assert read_all(source) == rows and source.where(0).endswith(f":{ROWS.index(rows[0]) + 1}")


def test_what_datasets_saved_is_read(tmp_path):
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))
    saved.save_to_disk(tmp_path / "saved")
    assert read_all(open_source(str(tmp_path / "saved"))) == ROWS
    assert read_all(open_source(str(tmp_path / "saved"), split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match="no split 'tests'; nearest: 'test'"):
        open_source(str(tmp_path / "saved"), split="tests")


def test_a_hub_id_goes_to_datasets(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, name, split: datasets.Dataset.from_list([{"text": f"{path} {name} {split}"}])
    )
    source = open_source("openai/gsm8k", split="test[:1]", name="main")
    assert source.read(0) == {"text": "openai/gsm8k main test"} and source.where(0) == "openai/gsm8k: row 1"


GOOD = '{"text": "fine"}'
BAD_LINES = {
    b'{"text": "a",}': "not JSON: ",
    b'{"text": NaN}': "not JSON: NaN is not a JSON number",
    b'{"text": -Infinity}': "not JSON: -Infinity is not a JSON number",
    b'{"text": 1e999}': "not JSON: 1e999 is too large",
    b'{"text": "a", "text": "b"}': "not JSON: key 'text' appears twice",
    b'{"a": {"b": 1, "b": 2}}': "not JSON: key 'b' appears twice",
    b'{"text": "a"} {"text": "b"}': "not JSON: Extra data",
    b'{"text": "a': "not JSON: Unterminated string",
    b"[1, 2]": "a row must be an object with named columns, got a list",
    b'"text"': "a row must be an object with named columns, got a string",
    b"null": "a row must be an object with named columns, got null",
    b'{"text": "\xff\xfe"}': "not UTF-8 at byte 10",
    b'{"text": "\\ud800"}': "a lone surrogate \\ud800 is not text",
    b'{"text": "\x00"}': "not JSON: Invalid control character",
    b"\x00\x01\x02": "not JSON: ",
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested too deeply",
    b'{"text": ' + b"9" * 5000 + b"}": "not JSON: ",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:24]))
def test_a_bad_line_names_its_place_and_reason_and_spares_the_others(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    source = open_source(str(path))
    assert source.size == 3 and source.read(0) == source.read(2) == {"text": "fine"}
    with pytest.raises(RowError) as error:
        source.read(1)
    assert str(error.value).startswith(f"{path}:2: {BAD_LINES[line]}")


def test_a_row_without_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 50)
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "\n" + json.dumps({"text": "x" * 100}))
    with pytest.raises(RowError, match="a.jsonl:2: .* bytes in one row"):
        open_source(str(path)).read(1)


BAD_FILES = {
    "a.json": [
        ('[{"text": "a"},\n{"text": "b"},\n]', ":3: not JSON: expected an object (is there a comma after the last?)"),
        ('[{"text": "a"}\n{"text": "b"}]', ":2: not JSON: expected ',' or ']'"),
        ('[{"text": "a"},\n1]', ":2: not JSON: expected an object"),
        ('[{"text": "a"},\n{"text": ]', ":2: not JSON: Expecting value"),
        ('[{"text": "a"}] {', ":1: not JSON: something follows the list"),
        ('[{"text": "a"},', ":1: not JSON: expected an object"),
        ("[" * 100_000, ":1: not JSON: expected an object"),
        ('[{"a": ' + "[" * 100_000, ":1: not JSON: "),
        ('"text"', ":1: expected a list of objects"),
    ],
    "a.csv": [
        ('text\n"a\nb', "not CSV: unexpected end of data"),
        ("text,text\na,b", ":1: a column name appears twice"),
    ],
    "a.jsonl.gz": [("plain", "not gzip")],
    "a.parquet": [("plain", "not Parquet")],
}


@pytest.mark.parametrize("name, text, reason", [(name, *case) for name, cases in BAD_FILES.items() for case in cases])
def test_a_bad_file_names_its_place_and_reason(tmp_path, name, text, reason):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RowError) as error:
        open_source(str(path))
    assert str(error.value).startswith(str(path)) and reason in str(error.value)


BAD_ROWS = [
    ("a.csv", b"text,n\nfine,1\nb\xffd,2\nfine,3", ":3: not UTF-8 (byte 0xff)"),
    ("a.csv", b"text,n\nfine,1\nbad\nfine,3", ":3: 1 fields under 2 column names"),
    ("a.csv", b'text,n\n"fine\n\n",1\nb,2,3\nfine,3', ":5: 3 fields under 2 column names"),
    ("a.json", b'[{"text": "fine"},\n{"text": "b\xffd"},\n{"text": "fine"}]', ":2: not UTF-8 (byte 0xff)"),
    ("a.json", b'[{"text": "fine"},\n{"text": 1, "text": 2},\n{"text": "fine"}]', ":2: not JSON: key 'text' appears twice"),
]


@pytest.mark.parametrize("name, raw, reason", BAD_ROWS)
def test_a_bad_row_of_a_parsed_file_spares_the_others(tmp_path, name, raw, reason):
    path = tmp_path / name
    path.write_bytes(raw)
    source = open_source(str(path))
    assert source.read(0)["text"].strip() == source.read(2)["text"] == "fine"
    with pytest.raises(RowError) as error:
        source.read(1)
    assert str(error.value) == f"{path}{reason}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_file_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="has no rows|expected a list"):
        open_source(str(tmp_path / name))


def test_nothing_there_is_an_error_that_says_what_was_tried(tmp_path):
    with pytest.raises(ValueError, match="there is no file or folder '.*none.jsonl'"):
        open_source(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match="cannot tell what kind of file"):
        open_source(str(tmp_path / "a.docx"))
    with pytest.raises(ValueError, match="has no file that can be read"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="split 'train\\[' is not like"):
        open_source(str(tmp_path), split="train[")
    with pytest.raises(ValueError, match="there is no task 'sorting'; nearest: 'sort"):
        open_source("tasks:sorting")
    with pytest.raises(ValueError, match="no split 'tset'; nearest: 'test'"):
        open_source("tasks:sort", split="tset")
