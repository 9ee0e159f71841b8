"""P6: two processes compute what one does: losses and weights of whole runs, under DDP and FSDP2, in both stages."""

import pytest
from conftest import assert_same
from training_runs import losses, make_backbones, run, weights, write_config


# Two data sets, texts of unequal lengths on each process, two negatives or more. SGD: Adam would divide small
# gradients by their own size, and with them the rounding.
STAGES = {
    "representation": {"gradcache_tokens": 64, "max_negatives": 3, "optim": "sgd", "learning_rate": 0.05},
    "alignment": {"mask_probability": 0.5, "optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": 5},
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return make_backbones(tmp_path_factory.mktemp("backbones"), dropout=0.0)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(stage, tmp_path, backbones):
    outputs = {}
    for launcher in (None, "ddp", "fsdp2"):
        folder = tmp_path / str(launcher)
        folder.mkdir()
        run(write_config(folder, stage, backbones, max_steps=4, **STAGES[stage]), launcher)
        outputs[launcher] = folder / "output"
    expected_losses, expected_weights = losses(outputs[None]), weights(outputs[None])
    assert len(expected_losses) == 4 and expected_losses[0] != expected_losses[-1]
    for launcher in ("ddp", "fsdp2"):
        assert_same(losses(outputs[launcher]), expected_losses, tolerance=1e-4)
        actual = weights(outputs[launcher])
        assert actual.keys() == expected_weights.keys()
        for name, tensor in expected_weights.items():
            assert_same(actual[name], tensor, tolerance=1e-4)
