"""`ftjax inspect` shows what would be trained, how long things are, and what is wrong with them."""

import json
import pathlib

from ftjax.cli import main

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"


def test_inspect_marks_the_trained_tokens_and_counts(capsys):
    assert main.main(["inspect", f"--config={CONFIG}", "--rows=1", "--compile_cache=off"]) == 0
    out = capsys.readouterr().out
    assert "⟦" in out and "<|im_end|>⟧" in out and "steps an epoch" in out and "█" in out and "none found" in out
    assert out.count("<|im_start|>assistant") == 1


def test_inspect_names_the_problems_of_the_data(tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a"}, {"prompt": "a", "completion": "long " * 100}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [f"--config.data.sources.tasks.path={tmp_path / 'rows.jsonl'}", "--config.data.sources.tasks.split=train"]
    assert main.main(["inspect", f"--config={CONFIG}", *more, "--config.data.bad_rows=skip", "--compile_cache=off"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "rows.jsonl" in out and "exact copies" in out and "responses were cut" in out


def test_inspect_counts_prompts_that_the_template_ends_otherwise_than_it_begins_an_answer(capsys):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:({% endif %}"
    )
    assert main.main(["inspect", f"--config={CONFIG}", f"--config.data.template={template}", "--compile_cache=off"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "64 of the first 64 examples have something else before the answer than the template's generation prompt" in out


def test_inspect_stops_at_a_bad_row_unless_told_to_skip(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    more = [f"--config.data.sources.tasks.path={tmp_path / 'rows.jsonl'}", "--config.data.sources.tasks.split=train"]
    assert main.main(["inspect", f"--config={CONFIG}", *more, "--compile_cache=off"]) == 1
    assert "rows.jsonl" in capsys.readouterr().err


def test_inspect_shows_prompts_beside_the_answers_that_rewards_see(capsys):
    grpo = CONFIG.replace("quickstart", "grpo_smollm2_sums")
    assert main.main(["inspect", f"--config={grpo}", "--config.data.template=auto", "--rows=1", "--compile_cache=off"]) == 0
    out = capsys.readouterr().out
    assert "an experience is 2 prompts × 4 samples, and gives 1 step" in out and "answer: " in out and "█" in out
    assert out.count("<|im_start|>assistant") == 1
