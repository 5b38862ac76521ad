import gzip
import json

import pytest
from etils import epath

from ftjax.data import RowError
from ftjax.data import rows as rows_module
from ftjax.data.files import open_file

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
    assert read_all(open_file(epath.Path(path))) == ROWS


def test_parquet_is_read_by_row_group(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    source = open_file(epath.Path(tmp_path / "a.parquet"))
    assert [source.read(i) for i in (4, 0, 2)] == [ROWS[4], ROWS[0], ROWS[2]] and source.where(4).endswith("a.parquet: row 5")


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\n\r\nTwo.\n")
    assert read_all(open_file(epath.Path(tmp_path / "a.txt"))) == [{"text": "One.\n\nTwo.\n"}]


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
    source = open_file(epath.Path(path))
    assert source.size == 3 and source.read(0) == source.read(2) == {"text": "fine"}
    with pytest.raises(RowError) as error:
        source.read(1)
    assert str(error.value).startswith(f"{path}:2: {BAD_LINES[line]}")


def test_a_row_without_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 50)
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "\n" + json.dumps({"text": "x" * 100}))
    with pytest.raises(RowError, match="a.jsonl:2: .* bytes in one row"):
        open_file(epath.Path(path)).read(1)


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
        open_file(epath.Path(path))
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
    source = open_file(epath.Path(path))
    assert source.read(0)["text"].strip() == source.read(2)["text"] == "fine"
    with pytest.raises(RowError) as error:
        source.read(1)
    assert str(error.value) == f"{path}{reason}"
