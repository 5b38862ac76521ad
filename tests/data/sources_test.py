import gzip
import json

import datasets
import pytest

from ftjax.data import open_source

ROWS = [{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(5)]


def lines(rows=ROWS, end="\n"):
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end


def read_all(source):
    return [source.read(i) for i in range(source.size)]


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
