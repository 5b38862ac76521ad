"""The GGUF container: read as `gguf` reads it, for every block type, and damage is an error and never a crash."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from ftjax.hf import gguf_file

GOLDENS = Path(__file__).parents[1] / "goldens" / "gguf"


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*.gguf")), ids=lambda path: path.stem)
def test_the_header_and_the_blocks_are_those_that_gguf_reads(path):
    ours, theirs = gguf_file.open_file(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        packed = ours.tensors[tensor.name]
        assert packed.shape == tuple(tensor.shape[::-1]) and packed.kind == tensor.tensor_type
        np.testing.assert_array_equal(packed.rows.reshape(-1), tensor.data.view(np.uint8).reshape(-1))


def write(path, fill=lambda writer: None, data=None):
    writer = gguf.GGUFWriter(str(path), "llama")
    fill(writer)
    writer.add_tensor("x.weight", np.ones((2, 32), np.float32) if data is None else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_kind_of_value_is_read(tmp_path):
    values = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -3, "uint32": 1 << 31, "int32": -3, "uint64": 1 << 63, "int64": -3}
    values |= {"float32": 0.5, "float64": 0.1, "bool": True, "string": "é\0x", "array": [1, 2, 3]}

    def fill(writer):
        for kind, value in values.items():
            getattr(writer, f"add_{kind}")(f"a.{kind}", value)
        writer.add_array("a.strings", ["a", "", "ß"])
        writer.add_array("a.floats", [0.5, -1.0])

    metadata = gguf_file.open_file(write(tmp_path / "x.gguf", fill)).metadata
    assert {kind: metadata[f"a.{kind}"] for kind in values} == values
    assert metadata["a.strings"] == ["a", "", "ß"] and metadata["a.floats"] == [0.5, -1.0]


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = write(tmp_path / "whole.gguf", lambda writer: writer.add_token_list(["a", "bc"])).read_bytes()
    for end in range(len(data)):
        (tmp_path / "cut.gguf").write_bytes(data[:end])
        if end == len(data.rstrip(b"\0")):
            break
        with pytest.raises(ValueError, match=r"cut\.gguf is not a complete GGUF file"):
            gguf_file.open_file(tmp_path / "cut.gguf")


def test_a_damaged_header_is_refused_or_read_but_never_crashes(tmp_path):
    data = bytearray(write(tmp_path / "whole.gguf", lambda writer: writer.add_token_list(["a", "bc"])).read_bytes())
    refused = 0
    for position in range(0, 200, 2):
        for value in (0x00, 0x7F, 0xFF):
            changed = data.copy()
            changed[position] = value
            (tmp_path / "x.gguf").write_bytes(changed)
            try:
                gguf_file.open_file(tmp_path / "x.gguf")
            except ValueError as error:
                refused += 1
                assert "is not a complete GGUF file" in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    ("offset", "number", "message"),
    [(0, b"GGML", "does not begin with 'GGUF'"), (4, struct.pack("<I", 1), "version 1"), (8, b"\xff" * 8, "a count of")],
)
def test_the_reason_is_told(tmp_path, offset, number, message):
    data = bytearray(write(tmp_path / "x.gguf").read_bytes())
    data[offset : offset + len(number)] = number
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        gguf_file.open_file(tmp_path / "x.gguf")
