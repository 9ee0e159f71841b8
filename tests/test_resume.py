"""
P7: a run that was killed at any moment goes on as if it had not been: the same losses, to the last step.

Everything random is on: dropout, masking, LoRA's dropout, shuffling. SIGKILL reaches all processes of a run at once.
"""

import random
from pathlib import Path

import pytest
from training_runs import losses, make_backbones, run, run_and_kill, write_config

from lusifer_hf.training.trainer import COMPLETE, last_complete_checkpoint


STAGES = {
    "representation": {"gradcache_rows": 3, "lora_r": 4, "lora_dropout": 0.1},
    "alignment": {"per_device_train_batch_size": 5},
}
STEPS = 14  # into the third epoch


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return make_backbones(tmp_path_factory.mktemp("backbones"), dropout=0.1)


def last_step(output: Path) -> int:
    checkpoint = last_complete_checkpoint(output)
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def is_saving(output: Path) -> bool:
    """Whether a checkpoint is half-written, and another is complete."""
    return last_step(output) > 0 and any(not (path / COMPLETE).exists() for path in output.glob("checkpoint-*"))


def two_runs(tmp_path: Path, stage: str, backbones, launcher: str | None, moments) -> None:
    fields = {"max_steps": STEPS, "save_steps": 1, "save_strategy": "steps", "save_total_limit": 2, **STAGES[stage]}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run(write_config(whole, stage, backbones, **fields), launcher)
    config, output = write_config(killed, stage, backbones, **fields), killed / "output"
    for moment in moments:
        run_and_kill(config, lambda moment=moment: moment(output), launcher)
        assert 0 < last_step(output) < STEPS, "the run was not killed on its way"
    log = run(config, launcher)
    assert "resum" in log.lower()
    expected = losses(whole / "output")
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    assert losses(output) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_steps(stage, tmp_path, backbones):
    first, second = sorted(random.Random(stage).sample(range(1, STEPS - 2), 2))
    moments = [lambda output, step=step: last_step(output) >= step for step in (first, second)]
    two_runs(tmp_path, stage, backbones, None, moments)


def test_killed_during_a_save(tmp_path, backbones):
    two_runs(tmp_path, "representation", backbones, None, [is_saving])


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_the_second_epoch_of_two_processes(stage, tmp_path, backbones):
    two_runs(tmp_path, stage, backbones, "ddp", [lambda output: last_step(output) >= 7])
