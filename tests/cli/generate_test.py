"""`ftjax generate`: files of prompts in, JSON lines out; errors that name the file and the line."""

import dataclasses
import io
import json
import re
import sys

import jax
import pytest

from ftjax import models, peft
from ftjax.cli import generate
from ftjax.cli.main import main
from ftjax.hf import adapter as hf_adapter
from ftjax.hf import peft as hf_peft
from ftjax.hf.tokenizer import byte_tokenizer
from ftjax.rollout import Encoder, Engine, beam_search, pad, settings


@pytest.fixture
def run(base, compiled):
    def command(*arguments):
        common = [f"--compile_cache={compiled}", "--max_tokens=4", "--dtype=float32"]
        return main(["generate", f"--model={base.folder}", *common, *arguments])

    return command


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts_becomes_a_line_each(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\nand another\n")
    assert run(f"--prompts={tmp_path}/prompts.txt", f"--output={tmp_path}/out.jsonl") == 0
    found = rows(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in found] == ["one", "and another"]
    assert all(set(row) == {"prompt", "completion"} and isinstance(row["completion"], str) for row in found)
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "out.jsonl"}


def test_one_prompt_streams_what_a_file_gets(run, tmp_path, capsys):
    assert run("--prompt=one", f"--output={tmp_path}/out.jsonl") == 0
    capsys.readouterr()
    assert run("--prompt=one") == 0
    assert capsys.readouterr().out == rows(tmp_path / "out.jsonl")[0]["completion"] + "\n"


def test_a_seed_draws_the_same_in_every_way(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("one\nand another\n")
    draws = ["--temperature=1", "--seed=5", "--max_tokens=12", "--repetition_penalty=1.3"]
    assert run("--prompt=one", *draws) == 0
    streamed = capsys.readouterr().out
    assert run("--prompt=one", *draws, f"--output={tmp_path}/one.jsonl") == 0
    assert run(f"--prompts={tmp_path}/p.txt", *draws, f"--output={tmp_path}/file.jsonl") == 0
    assert run(f"--prompts={tmp_path}/p.txt", *draws, "--num_samples=3", f"--output={tmp_path}/three.jsonl") == 0
    alone, both, three = (rows(tmp_path / f"{name}.jsonl") for name in ("one", "file", "three"))
    assert streamed == alone[0]["completion"] + "\n" and alone[0] == both[0]
    assert [row["completion"] for row in both] == [row["completions"][0] for row in three]
    assert all(len(set(row["completions"])) == 3 for row in three) and three[0]["completions"] != three[1]["completions"]
    assert run("--prompt=one", "--temperature=1", "--seed=6", "--max_tokens=12", f"--output={tmp_path}/other.jsonl") == 0
    assert rows(tmp_path / "other.jsonl")[0] != alone[0]


def test_what_is_asked_for_reaches_the_engine(base, run, tmp_path, monkeypatch):
    seen = []
    generate_of = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, params, requests: seen.extend(requests) or generate_of(self, params, requests))
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    given = [f"--{name}={value}" for name, value in penalties.items()]
    assert run("--prompt=one", *given, "--min_tokens=3", "--stop=zz", f"--output={tmp_path}/out.jsonl") == 0
    (request,) = seen
    assert request.sampling == settings(**penalties) and (request.min_tokens, request.max_tokens, request.stop) == (3, 4, ["zz"])
    streams = []
    monkeypatch.setattr(generate.rollout, "stream_text", lambda *_, sampling, **__: streams.append(sampling) or [])
    assert run("--prompt=one", *given) == 0 and streams == [settings(**penalties)]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--choice=yes", "--choice=no"], "yes|no"),
        (["--regex=[ab]{3}"], "[ab]{3}"),
        (['--json_schema={"type": "boolean"}'], "true|false"),
        (["--json_schema=FILE"], "true|false"),
    ],
)
def test_a_completion_is_what_its_grammar_says(given, wanted, run, tmp_path, capsys):
    if not given[0].startswith("--choice"):
        pytest.importorskip("outlines_core")
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    given = [one.replace("FILE", f"{tmp_path}/schema.json") for one in given]
    assert run("--prompt=one", *given, "--max_tokens=8") == 0
    assert re.fullmatch(wanted, json.loads(capsys.readouterr().out)["completion"])


def test_beams_are_those_of_the_search_best_first(base, run, tmp_path):
    (tmp_path / "p.txt").write_text("one\nand another\nthird")
    common = [f"--prompts={tmp_path}/p.txt", "--raw", "--num_beams=3", "--length_penalty=0.5", "--batch_size=6"]
    assert run(*common, "--num_samples=2", f"--output={tmp_path}/two.jsonl") == 0
    assert run(*common, f"--output={tmp_path}/one.jsonl") == 0
    encoder = Encoder(base.model, byte_tokenizer())
    for prompt, two, one in zip(["one", "and another", "third"], rows(tmp_path / "two.jsonl"), rows(tmp_path / "one.jsonl"), strict=True):
        options = {"num_beams": 3, "max_tokens": 4, "length_penalty": 0.5, "eos_ids": encoder.eos_ids}
        found = beam_search(base.model, base.params, *pad([encoder.encode(prompt)], width=16), **options)
        lines = [found.tokens[0, beam, : found.lengths[0, beam]].tolist() for beam in range(2)]
        assert two["completions"] == [byte_tokenizer().decode(line, skip_special_tokens=True) for line in lines]
        assert one["completion"] == two["completions"][0]


def test_an_adapter_of_a_workdir_is_found_and_acts(base, run, compiled, tmp_path, capsys):
    folder, model, params = base
    method = peft.lora("all-linear", rank=4, alpha=256)
    _, trainable = method.init(jax.random.key(2), params)
    trainable = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(3), x.shape), trainable)
    hf_peft.save_adapter(tmp_path / "run" / "adapter", model, trainable, method.plan(params), base_name=str(folder))
    run("--prompt=one")
    plain = capsys.readouterr().out
    run("--prompt=one", f"--adapter={tmp_path}/run")
    adapted = capsys.readouterr().out
    # Without --model the adapter's own base is taken.
    common = [f"--compile_cache={compiled}", "--max_tokens=4", "--dtype=float32"]
    main(["generate", *common, "--prompt=one", f"--adapter={tmp_path}/run/adapter"])
    assert capsys.readouterr().out == adapted != plain


def test_an_adapter_that_peft_has_no_place_for_acts_too(base, run, tmp_path, capsys):
    folder, model, params = base
    methods = [["parallel_bottleneck", {"width": 4}], ["tokens", {"ids": [101]}]]
    method = peft.chain(*(peft.METHODS[name](**options) for name, options in methods))
    trainable = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(3), x.shape), method.init(jax.random.key(2), params)[1])
    hf_adapter.save_adapter(tmp_path / "run" / "adapter", methods, trainable, base_name=str(folder))
    run("--prompt=one")
    plain = capsys.readouterr().out
    assert run("--prompt=one", f"--adapter={tmp_path}/run") == 0
    assert capsys.readouterr().out != plain


def test_the_template_of_the_adapters_tokenizer_is_used(base, run, tmp_path, monkeypatch):
    folder, model, params = base
    method, tokenizer = peft.lora(["q_proj"], rank=1), byte_tokenizer()
    tokenizer.chat_template = "Q: {{ messages[0]['content'] }} A:"
    trainable = method.init(jax.random.key(2), params)[1]
    hf_peft.save_adapter(tmp_path / "adapter", model, trainable, method.plan(params), base_name=str(folder), tokenizer=tokenizer)
    given = []
    monkeypatch.setattr(generate.rollout, "stream_text", lambda _m, _p, encoder, prompt, **_: given.append(encoder.encode(prompt)) or [])
    assert run("--prompt=one", f"--adapter={tmp_path}/adapter") == 0
    assert tokenizer.decode(given[0]) == "Q: one A:"


def test_template_variables_reach_the_template(base, run, tmp_path, monkeypatch):
    folder, model, params = base
    method, tokenizer = peft.lora(["q_proj"], rank=1), byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking %} thinks{% endif %}"
    trainable = method.init(jax.random.key(2), params)[1]
    hf_peft.save_adapter(tmp_path / "adapter", model, trainable, method.plan(params), base_name=str(folder), tokenizer=tokenizer)
    given = []
    monkeypatch.setattr(generate.rollout, "stream_text", lambda _m, _p, encoder, prompt, **_: given.append(encoder.encode(prompt)) or [])
    assert run("--prompt=one", f"--adapter={tmp_path}/adapter", '--template_variables={"enable_thinking": true}') == 0
    assert tokenizer.decode(given[0]) == "one thinks"


def test_a_chat_remembers_until_reset(run, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(generate.rollout, "stream_text", lambda model, params, encoder, prompt, **_: asked.append(prompt) or iter(["ok"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n/reset\n\nthird\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert run() == 0
    assert [[message["content"] for message in prompt] for prompt in asked] == [["first"], ["first", "ok", "second"], ["third"]]
    assert "(forgotten)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b", "answer": "c"}', ["a", "b"]),
        ("p.jsonl", '{"instruction": "add", "input": "1 1", "output": "2"}', ["add\n\n1 1"]),
        ("p.jsonl", '{"text": "once"}', ["once"]),
        ("p.csv", "prompt\na\n", ["a"]),
        ("p.jsonl", '{"prompt": [{"role": "user", "content": "a"}]}', [[{"role": "user", "content": "a"}]]),
        (
            "p.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            [[{"role": "user", "content": "a"}]],
        ),
    ],
)
def test_prompts_are_read_from_every_format(name, text, shown, tmp_path):
    (tmp_path / name).write_text(text)
    assert [asked.shown for asked in generate.read_prompts(f"{tmp_path}/{name}")] == shown


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "p.txt holds no prompt"),
        ("p.txt", "", "p.txt holds no prompt"),
        ("p.jsonl", "", "p.jsonl holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "p.jsonl:2: not JSON"),
        ("p.jsonl", '{"promt": "a"}', "p.jsonl:1: no known format has the columns 'promt'"),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl:1: column 'messages': must be a list"),
        ("p.doc", "a", "cannot tell what kind of file"),
    ],
)
def test_what_cannot_be_read_is_named(name, text, message, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main(["generate", f"--prompts={tmp_path}/{name}"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--promts=x"], 2, "Did you mean: prompt"),
        (["--prompt=a", "--prompts=b"], 1, "both given"),
        (["--prompts=nowhere.txt"], 1, "no file 'nowhere.txt'"),
        (["--prompt=a", "--temperature=-1"], 1, "temperature is at least 0"),
        (["--prompt=a", "--max_tokens=0"], 2, "max_tokens"),
        (["--prompt=a", "--repetition_penalty=0"], 1, "repetition_penalty is above 0"),
        (["--prompt=a", "--min_tokens=9", "--max_tokens=8"], 1, "--min_tokens=9 is more than --max_tokens=8"),
        (["--prompt=a", "--num_samples=2"], 1, "at temperature 0 all --num_samples completions are the same"),
        (["--prompt=a", "--num_samples=2", "--temperature=1", "--reward=x"], 1, "use --best_of instead"),
        (["--prompt=a", "--num_samples=2", "--temperature=1", "--reward=x", "--best_of=2"], 1, "mean nothing beside it"),
        (["--prompt=a", "--num_beams=2", "--temperature=1"], 1, "heeds no --temperature"),
        (["--prompt=a", "--num_beams=2", "--stop=x"], 1, "heeds no --stop"),
        (["--prompt=a", "--stop=x", "--stop="], 1, "--stop= is empty"),
        (["--prompt=a", "--num_beams=2", "--num_samples=3"], 1, "2 beams find no more than as many completions"),
        (["--prompt=a", "--length_penalty=2"], 1, "--length_penalty is of beams"),
        (["--prompt=a", "--choice=a", "--regex=b"], 1, "one grammar, not to --choice and --regex"),
        (["--prompt=a", "--choice=a", "--min_tokens=1"], 1, "--choice says itself how long"),
        (["--prompt=a", "--json_schema=nowhere.json"], 1, "no file 'nowhere.json'"),
        (["--prompt=a", "--template_variables={thinking: no}"], 1, "--template_variables: a JSON object is expected, not '{thinking: no}'"),
        (["--prompt=a", "--adapter=nowhere"], 1, "no folder 'nowhere'"),
        (["--prompt=a", "--adapter=gs://b/run"], 1, "--adapter: gs://b/run is not on this machine"),
        (["--prompt=a", "--output=gs://b/out.jsonl"], 1, "--output: gs://b/out.jsonl is not on this machine"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments, code, message, capsys):
    assert main(["generate", *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_chat_streams(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["generate", "--choice=a"]) == 1
    assert "a chat streams, and so has no --choice" in capsys.readouterr().err


def test_a_prompt_beyond_the_context_is_named_by_its_line(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("fine\n" + "x" * 5000)
    assert run(f"--prompts={tmp_path}/p.txt", f"--output={tmp_path}/out.jsonl") == 1
    assert "p.txt:2: 5,0" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_an_adapter_of_another_base_is_refused(base, run, tmp_path, capsys):
    other = models.build(dataclasses.replace(base.model.config, intermediate_size=48))
    params = jax.jit(other.init)(jax.random.key(0))
    method = peft.lora("all-linear", rank=4)
    _, trainable = method.init(jax.random.key(1), params)
    hf_peft.save_adapter(tmp_path / "adapter", other, trainable, method.plan(params))
    assert run("--prompt=a", f"--adapter={tmp_path}/adapter") == 1
    assert "does not fit this base model" in capsys.readouterr().err


def test_an_adapter_that_names_another_base_is_noted(base, run, tmp_path, capsys):
    folder, model, params = base
    method = peft.lora(["q_proj"], rank=1)
    _, trainable = method.init(jax.random.key(1), params)
    hf_peft.save_adapter(tmp_path / "adapter", model, trainable, method.plan(params), base_name="org/twin")
    assert run("--prompt=one", f"--adapter={tmp_path}/adapter") == 0
    assert f"names 'org/twin' as its base and is put on '{folder}'" in capsys.readouterr().err


@pytest.fixture
def adapters(base, tmp_path):
    """Two adapters of unequal rank and targets that change what the tiny model writes."""
    folder, model, params = base
    for n, (name, method) in enumerate({"a": peft.lora("all-linear", rank=4), "b": peft.lora(["q_proj", "down_proj"], rank=2)}.items()):
        trainable = method.init(jax.random.key(2), params)[1]
        moved = jax.tree.map(lambda x, n=n: x + (1 + n) * jax.random.normal(jax.random.key(n), x.shape), trainable)
        hf_peft.save_adapter(tmp_path / name, model, moved, method.plan(params), base_name=str(folder))
    return tmp_path


def test_each_row_is_completed_by_the_adapter_that_it_names(adapters, run, tmp_path):
    chosen = ["a", None, "b", "a", None]
    asked = [{"prompt": "one" + "!" * n, "adapter": name} for n, name in enumerate(chosen)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, asked)) + '\n{"prompt": "no column"}\n')
    common = [f"--prompts={tmp_path}/rows.jsonl", "--batch_size=4"]
    assert run(*common, f"--adapter=a={adapters}/a", f"--adapter=b={adapters}/b", f"--output={tmp_path}/mixed.jsonl") == 0
    mixed = rows(tmp_path / "mixed.jsonl")
    assert [row["adapter"] for row in mixed] == [*chosen, None]
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in mixed))
    alone = {}
    for name in (None, "a", "b"):
        given = [] if name is None else [f"--adapter={adapters}/{name}"]
        assert run(f"--prompts={tmp_path}/plain.jsonl", "--batch_size=4", *given, f"--output={tmp_path}/alone.jsonl") == 0
        alone[name] = [row["completion"] for row in rows(tmp_path / "alone.jsonl")]
    assert [row["completion"] for row in mixed] == [alone[name][n] for n, name in enumerate([*chosen, None])]
    assert len({alone[name][0] for name in alone}) == 3


NAMED = {
    "unknown": (["rows.jsonl"], ["alpha=a"], "rows.jsonl:1: there is no adapter 'alhpa'; nearest: 'alpha'"),
    "none": (["rows.jsonl"], [], "there is no adapter 'alhpa'; nearest: none"),
    "twice": (["rows.jsonl"], ["a=a", "a=b"], "a second one named 'a'"),
    "half": (["rows.jsonl"], ["a", "b=b"], "each needs a name"),
    "no rows": ([], ["a=a"], "adapters with names are for --prompts"),
}


@pytest.mark.parametrize("case", NAMED)
def test_adapters_that_nobody_can_mean_are_refused_before_the_model_is_loaded(case, adapters, run, tmp_path, monkeypatch, capsys):
    files, given, message = NAMED[case]
    monkeypatch.setattr(generate.pretrained, "load", lambda flags: pytest.fail("the model was loaded"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "adapter": "alhpa"}\n')
    asked = [f"--prompts={tmp_path}/{name}" for name in files] or ["--prompt=x"]
    named = [f"--adapter={name}{eq}{adapters}/{place}" for name, eq, place in (value.rpartition("=") for value in given)]
    assert run(*asked, *named) == 1
    assert message in capsys.readouterr().err
