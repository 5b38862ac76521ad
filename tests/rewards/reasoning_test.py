"""With a stand-in for reasoning-gym, which needs a C compiler: its interface, and a verifier that evaluates answers, as some do.

One test, a slow one, is with the library itself.
"""

import json

import pytest

from ftjax.rewards import reasoning, sandbox
from ftjax.rewards.reasoning import reasoning_gym
from ftjax.rewards.worker import NotStarted, Worker

STAND_IN = """
import os, time, types
factory = types.SimpleNamespace(DATASETS={"chain_sum": None, "evaluates": None})
def forge():  # a reply for the rows to come, to whatever is open
    for file in range(32):
        try:
            os.write(file, b'[{"value": 1.0}]\\n')
        except OSError:
            pass
def get_score_answer_fn(name):
    def score_answer(answer, entry):
        if name == "evaluates":
            return eval(answer, {"os": os, "time": time, "entry": entry, "forge": forge})
        return float(answer == entry["answer"]) or 0.01 * (entry["metadata"]["terms"] == 2)
    return score_answer
"""


@pytest.fixture
def stand_in(isolated, tmp_path, monkeypatch):
    tmp_path.chmod(0o755)  # in the jail nobody reads it
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    worker = Worker("reasoning", "reasoning_gym", isolated=True)
    monkeypatch.setattr(reasoning, "_VERIFIER", worker)
    yield tmp_path
    worker.close()


def test_the_task_verifies_the_answer_block_or_all_the_text(stand_in):
    row = {"source_dataset": "chain_sum", "terms": 2}
    completions = ["<think>4</think> <answer> 5 </answer>", "5\n", "it is 5", "5"]
    found = reasoning_gym(["Q"] * 4, completions, answer=["5"] * 4, metadata=[row, json.dumps(row), row, None])
    assert found == [1.0, 1.0, 0.01, None]
    with pytest.raises(ValueError, match="no task 'chain_sums'"):
        reasoning_gym(["Q"], ["5"], answer=["5"], metadata=[{"source_dataset": "chain_sums"}])


def test_an_answer_that_is_run_reaches_nothing_and_spoils_nothing(stand_in):
    attacks = [
        f"os.path.exists({str(__file__)!r})",
        f"open({str(stand_in / 'left')!r}, 'w').write('x')",
        "os.system('exit 0') or 1/0",
        "time.sleep(100)",
        "os.kill(os.getppid(), 9)",
        "entry.clear() or 0.0",
        "forge() or 0.0",
        "1.0 if entry['answer'] == '5' else 0.0",
    ]
    rows = [{"source_dataset": "evaluates"}] * len(attacks)
    found = reasoning_gym([""] * len(attacks), attacks, answer=["5"] * len(attacks), metadata=rows, seconds=1.0)
    assert found == [0.0] * 7 + [1.0]
    assert [path.name for path in stand_in.iterdir()] == ["reasoning_gym"]


def test_where_nothing_is_isolated_nothing_is_verified(stand_in, monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: "no namespaces")
    with pytest.raises(sandbox.NoIsolation, match="no namespaces"):
        reasoning_gym(["Q"], ["5"], answer=["5"], metadata=[{"source_dataset": "chain_sum", "terms": 2}])


def test_a_library_that_does_not_load_is_an_error_and_no_score(stand_in):
    (stand_in / "reasoning_gym" / "__init__.py").write_text("raise OSError('no compiler')")
    with pytest.raises(NotStarted, match="no compiler"):
        reasoning_gym(["Q"], ["5"], answer=["5"], metadata=[{"source_dataset": "chain_sum", "terms": 2}])


# Of every kind: numbers and words, boards that are tuples, formulas for sympy, code that is evaluated, moves, partial credit.
TASKS = "arc_1d arc_agi basic_arithmetic binary_matrix chain_sum complex_arithmetic countdown family_relationships gcd gsm_symbolic \
    knights_knaves maze n_queens number_sorting polynomial_equations rearc simple_integration sokoban spell_backward string_insertion \
    sudoku tower_of_hanoi word_ladder word_sorting zebra_puzzles"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of the library's data
def test_the_library_itself_gives_right_answers_1_and_others_less(isolated):
    """As from a file, the metadata in JSON; a wrong answer is the right one backwards with a question mark."""
    library = pytest.importorskip("reasoning_gym")
    tasks = TASKS.split()
    entries = [entry for task in tasks for entry in library.create_dataset(task, size=1, seed=3)]
    columns = {
        "answer": [entry["answer"] for entry in entries],
        "metadata": [json.dumps(entry["metadata"]) for entry in entries],
        "question": [entry["question"] for entry in entries],
    }
    right = [f"<think>So.</think><answer>{entry['answer']}</answer>" for entry in entries]
    assert dict(zip(tasks, reasoning_gym([""] * len(tasks), right, **columns), strict=True)) == dict.fromkeys(tasks, 1.0)
    wrong = [f"<answer>{entry['answer'][::-1]}?</answer>" for entry in entries]
    for task, score in zip(tasks, reasoning_gym([""] * len(tasks), wrong, **columns), strict=True):
        assert 0 <= score < 1, task


@pytest.mark.slow
def test_the_library_itself_verifies_answers_of_which_it_knows_none(isolated):
    """A colouring of a graph: any that is one will do."""
    library = pytest.importorskip("reasoning_gym")
    (entry,) = library.create_dataset("graph_color", size=1, seed=3)
    colors = entry["metadata"]["possible_answer"]
    said = [json.dumps(colors), json.dumps(dict.fromkeys(colors, 1))]
    found = reasoning_gym([""] * 2, said, answer=[entry["answer"]] * 2, metadata=[json.dumps(entry["metadata"])] * 2)
    assert found[0] == 1 > found[1]
