"""Methods that steer the optimiser go through the command line, and a stopped run of them goes on bit for bit."""

from ftjax.checkpoint import Checkpoints
from ftjax.cli import main
from ftjax.cli.stop import Stop
from tests.cli.train_test import assert_bitwise_equal, stored

MORE = (
    '--config.methods=("adalora","relora","delta_lora")',
    '--config.adalora.targets=".*(q|k)_proj/kernel"',
    '--config.relora.targets=".*mlp/.*_proj/kernel"',
    '--config.delta_lora.targets=".*(v|o)_proj/kernel"',
    "--config.delta_lora.start_steps=3",
    "--config.lora.dropout=0.0",
)


def test_a_stopped_run_goes_on_bit_for_bit_across_a_ranking_a_restart_and_a_start(arguments, tmp_path, monkeypatch, capsys):
    assert main.main(arguments(tmp_path / "whole", *MORE)) == 0
    with monkeypatch.context() as patch:

        def stop(self, step):
            self.reason = "SIGTERM" if step == 3 else None
            return step == 3

        patch.setattr(Stop, "at", stop)
        assert main.main(arguments(tmp_path / "parts", *MORE)) == 0
    assert Checkpoints(tmp_path / "parts" / "checkpoints").steps()[-1] == 3
    assert main.main(arguments(tmp_path / "parts", *MORE)) == 0
    assert "going on from step 3" in capsys.readouterr().out
    whole = stored(tmp_path / "whole")
    assert_bitwise_equal(stored(tmp_path / "parts"), whole)
    trained = {path: array for path, array in whole.items() if "trainable" in path}
    assert all(array.any() for path, array in trained.items() if "past" in path or "start" in path or "ratio" in path)
    kept = [(array != 0).sum() for path, array in trained.items() if path.endswith("['e']")]
    assert sum(kept) == sum(array.size for path, array in trained.items() if path.endswith("['e']")) // 2
