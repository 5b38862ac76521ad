"""What a run says is well formed, counted right, and readable without a terminal."""

import io
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from ftjax import logs, peft
from ftjax.logs import plot, throughput, writers
from ftjax.types import Batch


def test_each_line_of_jsonl_is_an_object_and_not_a_number_is_null(tmp_path):
    log = writers.Jsonl(tmp_path / "metrics.jsonl")
    log.write(1, {"train/loss": np.float32(1.5), "train/grad_norm": float("nan")})
    log.text(1, "eval/sample", "two\nlines “and” quotes")
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and rows[0]["train/loss"] == 1.5 and rows[0]["train/grad_norm"] is None
    assert rows[1]["eval/sample"] == "two\nlines “and” quotes"


def test_a_resumed_log_holds_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = writers.Jsonl(path)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": float(step)})
    log.close()
    path.write_text(path.read_text() + '{"step": 4, "train/lo')  # a kill in the middle of a line
    log = writers.Jsonl(path, resume_step=2)
    log.write(3, {"train/loss": 30.0})
    log.close()
    assert [(row["step"], row["train/loss"]) for row in writers.read_jsonl(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_characters_that_end_a_line_elsewhere_end_none_here(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    log = writers.Jsonl(path)
    for step in (1, 2):
        log.row(step, {"completion": "one\u2028two\u2029three\x85four\x0cfive"})
    log.close()
    writers.Jsonl(path, resume_step=2).close()
    assert [row["completion"] for row in writers.read_jsonl(path)] == ["one\u2028two\u2029three\x85four\x0cfive"] * 2


def test_tensorboard_writes_an_event_file(tmp_path):
    board = writers.TensorBoard(tmp_path)
    board.write(1, {"train/loss": 1.0})
    board.text(1, "eval/sample", "hello")
    board.close()
    (file,) = tmp_path.iterdir()
    assert b"train/loss" in file.read_bytes() and b"hello" in file.read_bytes()


@pytest.mark.parametrize(("resume_step", "kept"), [(0, {"notes"}), (3, {"notes", "events.out.tfevents.1.host"})])
def test_the_event_files_of_a_start_that_left_no_checkpoint_go(resume_step, kept, tmp_path):
    for name in ("events.out.tfevents.1.host", "notes"):
        (tmp_path / name).write_text("")
    writers.TensorBoard(tmp_path, resume_step=resume_step).close()
    files = {path.name for path in tmp_path.iterdir()}
    assert kept < files and len(files) == len(kept) + 1


def test_wandb_that_is_not_installed_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'ftjax\[wandb\]'"):
        writers.Wandb(project="p", folder=tmp_path, config={}, name="n")


# A model of one layer, one head of width 2, d = 4, f = 8, v = 16.
SHAPES = {
    "embed_tokens": {"kernel": jnp.zeros((16, 4))},
    "layers": {"mlp": {"up_proj": {"kernel": jnp.zeros((1, 4, 8))}, "down_proj": {"kernel": jnp.zeros((1, 8, 4))}}},
    "norm": {"scale": jnp.zeros(4)},
}
CONFIG = SimpleNamespace(num_attention_heads=1, head_dim=2, windows=(None,))
BATCH = Batch(
    tokens=np.zeros((1, 6), np.int32),
    loss_mask=np.array([[0, 1, 1, 0, 1, 0]], np.float32),
    positions=np.array([[0, 1, 2, 0, 1, 0]], np.int32),
    segment_ids=np.array([[1, 1, 1, 2, 2, 0]], np.int32),
)


def test_flops_of_a_lora_step_are_those_counted_by_hand(key):
    """5 tokens, 3 of them supervised, documents of 3 and 2 tokens.

    trunk      5 · (4 · (32 + 32) + 6 · (4·2 + 2·8 + 8·2 + 2·4)) = 5 · (256 + 288) = 2720
    head       3 · 16 · 4 · 4 = 768
    attention  12 · 1 · 2 · (1 + 2 + 3 + 1 + 2) = 216
    """
    frozen, trainable = peft.lora("all-linear", rank=2).init(key, SHAPES)
    assert throughput.flops_per_batch(frozen, trainable, CONFIG, BATCH) == 2720 + 768 + 216


def test_flops_of_full_tuning_count_six_for_each_trained_weight(key):
    """trunk 5 · 6 · 64 = 1920, tied head 3 · 64 · 6 = 1152, attention 216."""
    frozen, trainable = peft.full(".*").init(key, SHAPES)
    assert throughput.flops_per_batch(frozen, trainable, CONFIG, BATCH) == 1920 + 1152 + 216


def test_a_window_bounds_the_keys_that_attention_counts(key):
    """With a window of 2 the keys are 1 + 2 + 2 + 1 + 2 = 8, so attention is 12 · 2 · 8 = 192 instead of 216."""
    frozen, trainable = peft.full("norm/scale").init(key, SHAPES)
    windowed = SimpleNamespace(num_attention_heads=1, head_dim=2, windows=(2,))
    difference = throughput.flops_per_batch(frozen, trainable, CONFIG, BATCH) - throughput.flops_per_batch(
        frozen, trainable, windowed, BATCH
    )
    assert difference == 216 - 192


def test_a_prompt_is_more_tokens_and_a_prefix_more_keys(key):
    """A prompt of 3: (5 + 3) · 4 · 64 = 2048, attention 24 · (9 + 5 · 3 + 1 + 2 + 3) = 720.

    A prefix of 2: 5 · 4 · 64 = 1280, 24 · (9 + 5 · 2) = 456.
    """
    prompt = {"prompt_tuning": {"prompt": {"embedding": jnp.zeros((3, 4))}}}
    prefix = {"prefix_tuning": {"layers": {"slots": {"prefix": {name: jnp.zeros((1, 2, 2)) for name in ("key", "value")}}}}}
    found = [throughput.flops_per_batch(SHAPES, trainable, CONFIG, BATCH) for trainable in (prompt, prefix)]
    assert found == [2048 + 720 + 768, 1280 + 456 + 768]


def test_shifted_groups_bound_the_keys_that_attention_counts(key):
    """In groups of 2 half of the heads see 1 + 2 + 1 + 1 + 2 = 7 keys, the others, shifted by one, 1 + 1 + 2 + 1 + 1 = 6: 12 · 2 · 6.5."""
    frozen, trainable = peft.full("norm/scale").init(key, SHAPES)
    flops = [throughput.flops_per_batch(frozen, trainable, CONFIG, BATCH, group_tokens=size) for size in (0, 2)]
    assert flops[0] - flops[1] == 216 - 156


def test_mfu_is_the_share_of_the_peak(monkeypatch):
    now = iter([10.0, 12.0, 12.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    meter = logs.Meter(peak=1e9)
    meter.add(tokens=300, flops=4e8)
    meter.add(tokens=300, flops=4e8)
    found = meter.read()
    assert found["tokens_per_second"] == 300 and math.isclose(found["mfu"], 0.4) and found["memory_gb"] > 0.05


def test_the_peak_of_a_known_device_is_its_data_sheets(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(device_kind="TPU v5 lite")] * 4)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert throughput.peak_flops("bfloat16") == 4 * 197e12


def test_the_peak_of_a_cpu_is_measured():
    assert 1e8 < throughput.measure_matmul("float32", size=128) < 1e14


def test_the_plan_names_rule_leaves_parameters_and_bytes(key):
    method = peft.chain(peft.lora("all-linear", rank=2, alpha=4), peft.full("norm/scale"))
    frozen, trainable = method.init(key, SHAPES)
    console = Console(file=io.StringIO(), width=140)
    console.print(logs.plan_table(method.plan(SHAPES), SHAPES, trainable))
    lines = console.file.getvalue().splitlines()
    lora = next(line for line in lines if line.strip().startswith("lora"))
    assert all(part in lora for part in ("all-linear", "rank 2", "alpha 4", " 2 ", "48"))
    assert any("full" in line and "norm/scale" in line and " 4 " in line for line in lines)
    assert any("all" in line and "52" in line and "of 132 parameters" in line for line in lines)


def test_names_in_brackets_are_printed_as_they_are(key):
    method = peft.lora(["up_proj", "down_proj"], rank=2)
    console = Console(file=io.StringIO(), width=140)
    terminal = logs.Terminal(console=console)
    terminal.say(logs.plan_table(method.plan(SHAPES), SHAPES, method.init(key, SHAPES)[1]))
    terminal.say("[/INST] :smile: [b]")
    terminal.say("[b]bold[/]", markup=True)
    out = console.file.getvalue()
    assert "[up_proj, down_proj]" in out and "[/INST] :smile: [b]\nbold\n" in out
    assert "[dim]" not in out and "[b]all" not in out


def test_progress_without_a_terminal_is_plain_lines():
    console = Console(file=io.StringIO(), width=40)
    terminal = logs.Terminal(console=console)
    terminal.start(200)
    terminal.advance(1)
    terminal.report(20, {"loss": 1.25, "tokens_per_second": 1234.5, "memory_gb": 2.5})
    terminal.stop()
    text = console.file.getvalue()
    assert text.startswith("step  20/200  loss 1.2500  1,234 tokens/s  2.50 GB  ") and text.endswith("left\n")
    assert "\x1b" not in text and text.count("\n") == 1


def test_progress_on_a_terminal_is_a_bar_with_the_numbers_in_it():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    terminal = logs.Terminal(console=console)
    terminal.start(200, done=10)
    terminal.report(20, {"loss": 1.25, "tokens_per_second": 1234.5, "memory_gb": 2.5})
    terminal.stop()
    text = console.file.getvalue()
    assert "20/200" in text and "loss 1.2500" in text and "1,234 tokens/s" in text and "━" in text


def test_the_loss_curve_is_a_png(tmp_path):
    rows = [{"step": step, "train/loss": 3 / step, "eval/loss": 3.2 / step if step % 5 == 0 else None} for step in range(1, 21)]
    plot.loss_curve(rows, tmp_path / "loss.png", title="tiny", subtitle="exact match 0 % → 90 %")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last picture."""
    figures = []
    monkeypatch.setattr(plot, "_write", lambda figure, path: figures.append(figure))
    return lambda: figures[-1].axes


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_rewards_have_a_panel_of_their_own_and_patterns_a_line_at_their_step(drawn):
    steps = range(1, 5)
    rows = [{"step": n, "train/loss": 0.5, "train/rewards/chosen": 0.1 * n, "train/rewards/margin": 0.3 * n} for n in steps]
    rows += [{"step": 3, "advice/saturation": "…"}, {"step": 3, "advice/no_spread": "…"}, {"step": 4, "eval/sample": "…"}]
    plot.loss_curve(rows, "", title="tiny")
    loss, rewards = drawn()
    assert list(lines(rewards)) == ["chosen 0.4", "margin 1.2"] and np.allclose(lines(rewards)["margin 1.2"], [0.3, 0.6, 0.9, 1.2])
    for axes in drawn():
        assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"] == [3]
    assert "saturation\nno spread" in [text.get_text() for text in loss.texts] and rewards.get_xlabel() == "step" and not loss.get_xlabel()


def test_a_run_that_compared_nothing_has_one_panel(drawn):
    plot.loss_curve([{"step": 1, "train/loss": 2.0, "train/rewards/exact_match": 0.5}], "", title="tiny", unit="nats per token")
    (axes,) = drawn()
    assert axes.get_ylabel() == "loss (nats per token)" and axes.get_xlabel() == "step" and axes.get_ylim()[0] == 0


@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_loss_below_zero_stays_in_the_picture(part, drawn):
    rows = [{"step": n, f"{part}/loss": value, f"{part}/loss/0": value} for n, value in enumerate([1.0, -3.0])]
    plot.loss_curve(rows, "", title="tiny")
    assert drawn()[0].get_ylim()[0] < -3 and drawn()[0].get_ylabel() == "loss"
    plot.sweep_curves(rows, "", labels=["0"], best=None, title="tiny")
    assert drawn()[0].get_ylim()[0] < -3 and drawn()[0].get_ylabel() == "loss"


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"rewards/accuracy": 0.75, "rewards/margin": 0.5}, "right 75%  margin 0.5"),
        ({"accuracy": 0.75, "rewards/desirable": 0.5}, "right 75%"),
        ({"accuracy": 0.75, "accuracy/wrong": 0.5}, "right 75%"),
        ({"accuracy": 0.75}, ""),
    ],
)
def test_a_line_of_progress_says_how_many_judgements_are_right(values, shown):
    console = Console(file=io.StringIO(), width=120)
    logs.Terminal(console=console).report(1, {"loss": 1.0, "tokens_per_second": 2.0, "memory_gb": 0.5} | values)
    assert f"loss 1.0000  {shown}{'  ' if shown else ''}2 tokens/s" in console.file.getvalue()


def test_the_curves_of_a_sweep_are_a_png_though_a_member_was_lost(tmp_path):
    rows = [{"step": step, "train/loss/0": 3 / step, "train/loss/1": None, "eval/loss/0": 3.1 / step} for step in range(1, 21)]
    plot.sweep_curves(rows, tmp_path / "loss.png", labels=["0  seed 0", "1  seed 1"], best=0, title="tiny", subtitle="best: member 0")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_the_loss_curve_goes_wherever_etils_can_write(monkeypatch):
    stored = {}
    bucket = SimpleNamespace(Path=lambda path: SimpleNamespace(write_bytes=lambda data: stored.update({path: data})))
    monkeypatch.setattr(plot, "epath", bucket)
    logs.loss_curve([{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}], "gs://bucket/loss.png", title="t")
    assert stored["gs://bucket/loss.png"].startswith(b"\x89PNG")


def test_a_curve_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="was nothing logged"):
        plot.loss_curve([{"step": 1}], tmp_path / "loss.png", title="")


def test_smoothing_keeps_the_ends_and_the_level():
    assert np.allclose(plot.smooth(np.full(30, 2.0)), 2.0)
    line = np.arange(30.0)
    assert np.allclose(plot.smooth(line), line)
