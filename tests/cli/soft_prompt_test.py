"""A prompt trained from the command line: a folder that `generate` and `eval` read, and that nothing merges."""

import json

import numpy as np
import safetensors.numpy

from ftjax.cli.main import main


def test_a_trained_prompt_generates_is_evaluated_and_is_not_merged(base, arguments, compiled, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", "--config.methods=prompt_tuning", "--config.prompt_tuning.num_tokens=3")) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("prompt_tuning")]
    assert str(3 * base.model.config.hidden_size) in rows[0].split()  # trained numbers, in the table of what is trained
    adapter = f"--adapter={tmp_path / 'run'}"
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 3)
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    safetensors.numpy.save_file({"prompt_embeddings": 9 * safetensors.numpy.load_file(file)["prompt_embeddings"]}, file)

    common = [f"--model={base.folder}", "--dtype=float32", "--max_tokens=4", f"--compile_cache={compiled}"]
    assert main(["generate", "--prompt=one", *common, adapter]) == 0
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a", "completion": "bcd"}))
    losses = []
    for more in ([], [adapter]):
        assert main(["eval", f"--data={tmp_path}/d.jsonl", f"--output={tmp_path}/r.json", "--row_tokens=64", *common, *more]) == 0
        losses.append(json.loads((tmp_path / "r.json").read_text())["loss"])
    assert np.isfinite(losses).all() and losses[0] != losses[1]

    capsys.readouterr()
    for command in ("merge", "export"):
        assert main([command, f"--model={base.folder}", adapter, f"--output={tmp_path / 'merged'}"]) == 1
        assert "no matrix to merge it into" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
