import inspect
import pathlib

import pytest

from ftjax import rewards
from ftjax.rewards import REWARDS, build, judge, needed, sandbox
from ftjax.rewards.registry import OPTIONS

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


def words(completions, least=1, **kwargs):
    """As TRL's examples have it: no prompts, an option with a default, and everything else that is known of the rows."""
    assert kwargs["prompts"] == ["p", "p"]
    return [float(len(completion.split()) >= least) for completion in completions]


async def likes(prompts, completions, answer=None):
    """It names what it reads, as TRL's do with a default, and nothing else is passed to it."""
    return [float(wanted in completion) for wanted, completion in zip(answer, completions, strict=True)]


def test_a_function_of_ones_own_is_a_reward_by_any_name_and_with_its_options():
    panel = build({"short": words, "long": words, "likes": likes, "right": "exact_match"}, {"long": {"least": 3}})
    columns = {"answer": ["a b", "c"], "level": [1, 2]}
    judged = judge(panel, (), ["p", "p"], ["a b", "a b c"], columns)
    assert {name: scores.tolist() for name, scores in judged.scores.items()} == {
        "short": [1, 1], "long": [0, 1], "likes": [1, 1], "right": [1, 0],
    }  # fmt: skip
    assert judge({"long": panel["long"]}, (), ["p", "p"], ["a b", "a b c"], {"least": [0, 9]}).rewards.tolist() == [0, 1]


@pytest.mark.parametrize(
    "chosen, options, message",
    [
        ({"short": words}, {"short": {"leest": 3}}, "'short' has no option 'leest'; nearest: 'least'"),
        ({"short": words}, {"short": {"prompts": 3}}, "'short' has no option 'prompts'"),
        ({"right": "exact_mach"}, {}, "there is no 'exact_mach'; nearest: 'exact_match'"),
        ({"right": 3.0}, {}, "'right' is 3.0, which is no function and no name of one"),
        (["target_length"], {}, "'target_length' needs the option 'target_tokens'"),
        ({"far": "target_length"}, {"far": {}}, "'far' needs the option 'target_tokens'"),
        (["soft_overlong"], {"soft_overlong": {"max_tokens": 9}}, "'soft_overlong' needs the option 'soft_tokens'"),
        (["judge_model"], {}, "'judge_model' needs the option 'ask'"),
        (["cosine"], {"cosine": {"max_tokens": 9, "correct": "target_length"}}, "'target_length' needs the option 'target_tokens'"),
    ],
)
def test_what_a_reward_cannot_do_without_is_asked_for_when_it_is_built(chosen, options, message):
    with pytest.raises(ValueError, match=message):
        build(chosen, options)


def test_what_says_which_answers_are_right_is_bound_as_a_reward_is():
    def right(completions, *, level):
        return [float(one == "yes") * level[0] for one in completions]

    options = {"brevity": {"correct": right}, "cosine": {"correct": "code", "max_tokens": 4}}
    made = build(["brevity", "cosine"], options)
    assert needed(made["brevity"]) == ["completion_ids", "level"] and needed(made["cosine"]) == ["completion_ids", "tests"]
    assert needed(build(["brevity"])["brevity"]) == ["completion_ids", "answer"]
    columns = {"completion_ids": [[1], [1, 2]], "level": [1, 1], "answer": ["no", "no"]}
    assert made["brevity"](["?", "?"], ["yes", "yes"], **columns)[0] > 0


def test_what_has_no_default_is_an_option_or_a_column():
    columns = {"prompts", "completions", "answer", "tests", "schema", "metadata", "completion_ids", "episode_rewards"}
    found = {p.name for one in REWARDS.values() for p in inspect.signature(one).parameters.values() if p.default is p.empty}
    assert found - {"columns"} == columns | OPTIONS


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
