import inspect
import pathlib

import pytest

from ftjax import rewards
from ftjax.rewards import REWARDS, build, judge, sandbox

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "online.md"


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_has_the_signature_of_trl(name):
    parameters = inspect.signature(REWARDS[name]).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    assert list(parameters)[:2] == ["prompts", "completions"] and kinds[-1] is inspect.Parameter.VAR_KEYWORD
    assert set(kinds[2:-1]) <= {inspect.Parameter.KEYWORD_ONLY}
    for parameter in parameters:
        assert f"\n      {'**' * (parameter == 'columns')}{parameter}: " in REWARDS[name].__doc__, f"{parameter} is not documented"


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_stands_on_its_page(name):
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


def test_a_config_becomes_rewards():
    names, options = ("cosine", "repetition"), {"cosine": {"max_tokens": 4, "correct": "numeric_match"}, "repetition": {"ngram_tokens": 1}}
    columns = {"answer": ["7", "8"], "completion_ids": [[1, 1], [1, 2, 3, 4]]}
    judged = judge(build(names, options), (1.0, 0.5), ["p"] * 2, ["a 7", "a 7"], columns)
    assert judged.rewards.tolist() == pytest.approx([0.75 - 0.25, -0.5])


def test_a_column_does_not_replace_an_option_of_its_name():
    options = {"json_schema": {"schema": {"type": "array"}}, "choice": {"letters": "AB"}}
    columns = {"schema": [{"type": "object"}], "letters": ["XY"], "partial": [0.5], "answer": ["B"]}
    judged = judge(build(["json_schema", "choice"], options), (), ["p"], ["[]"], columns)
    assert judged.scores["json_schema"] == [1.0] and judged.scores["choice"] == [0.0]
    with pytest.raises(ValueError, match="'json_schema' needs 'schema'"):
        judge(build(["json_schema"]), (), ["p"], ["[]"], {"partial": [0.5]})


@pytest.mark.parametrize(
    "names, options, message",
    [
        (("exact",), {}, "there is no 'exact'; nearest: 'exact_match'"),
        (("repetition",), {"repetition": {"ngram": 2}}, "no option 'ngram'; nearest: 'ngram_tokens'"),
        (("repetition",), {"cosine": {}}, "options for 'cosine', which is not among"),
        (("cosine",), {"cosine": {"max_tokens": 4, "correct": "numeric"}}, "there is no 'numeric'; nearest: 'numeric_match'"),
        ((), {}, "at least one"),
        (("cosine", "cosine"), {}, "each once"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_nearest(names, options, message):
    with pytest.raises(ValueError, match=message):
        build(names, options)


@pytest.mark.parametrize("name, extra", [("maths", "maths"), ("json_schema", "json"), ("reasoning_gym", "reasoning")])
def test_a_missing_library_is_found_when_the_run_is_built(monkeypatch, name, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ImportError, match=rf"pip install 'ftjax\[{extra}\]'"):
        build([name])


def test_a_machine_without_isolation_is_found_when_the_run_is_built(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: "no namespaces")
    for names, options in ((["code"], {}), (["cosine"], {"cosine": {"correct": "code"}})):
        with pytest.raises(rewards.NoIsolation, match="no namespaces"):
            build(names, options)
