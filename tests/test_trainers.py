"""
The contract of train.py and the trainers in one process: what is logged and kept, what a checkpoint holds (P13), that
a failure stops cleanly with the last checkpoint whole, and that the same command goes on from there.
"""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from conftest import assert_same
from safetensors.torch import load_file
from training_runs import ROOT, losses, make_backbones, weights, write_config
from transformers import Trainer

from lusifer_hf import LusiferForAlignment, LusiferModel
from lusifer_hf.training.trainer import COMPLETE, last_complete_checkpoint


spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

STAGES = ("alignment", "representation")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return make_backbones(tmp_path_factory.mktemp("backbones"), dropout=0.1)


@pytest.fixture
def config(tmp_path, backbones):
    """Writes a config of 4 steps with a checkpoint after every second."""

    def write(stage, **fields):
        defaults = {"max_steps": 4, "save_steps": 2, "disable_tqdm": True}
        return str(write_config(tmp_path, stage, backbones, **{**defaults, **fields}))

    return write


def failure(path, capsys, *flags) -> str:
    """What `train.py` says when it fails."""
    with pytest.raises(SystemExit) as error:
        train.main([path, *flags])
    assert str(error.value).startswith("error: ")
    return str(error.value)


def test_what_is_logged_and_kept(config, tmp_path):
    train.main([config("representation", gradcache_rows=4, max_steps=8)])
    output = tmp_path / "output"
    state = json.loads((output / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logs] == list(range(1, 9))
    metrics = {"loss", "positive_similarity", "negative_similarity", "mined_pairs", "negatives_per_query"}
    seen = set()
    for entry in logs:
        assert metrics | {"grad_norm", "learning_rate", "tokens_per_second"} <= entry.keys()
        assert entry["tokens_per_second"] > 0 and 0 < entry["mined_pairs"] <= 1
        assert -1 <= entry["negative_similarity"] <= 1 and 0 < entry["negatives_per_query"] <= 10 - 1 + 10 + 20
        (dataset,) = {name for name in ("first", "second") if f"{name}/loss" in entry}
        assert all(entry[f"{dataset}/{name}"] == pytest.approx(entry[name], rel=1e-3) for name in metrics)
        seen.add(dataset)
    assert seen == {"first", "second"}
    # The two newest checkpoints, each with its picture, and what a user wants.
    names = {path.name for path in output.iterdir()}
    assert names == {"checkpoint-6", "checkpoint-8", "final", "run.yaml", "trainer_state.json", "training.png"}
    assert (output / "checkpoint-8" / "training.png").stat().st_size > 10_000
    assert LusiferModel.from_pretrained(output / "final").encode("a text").shape == (64,)


def test_the_mean_over_several_steps_is_logged(config, tmp_path):
    train.main([config("representation")])
    every = json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"][:4]
    shutil.rmtree(tmp_path / "output")
    train.main([config("representation", logging_steps=4)])
    (entry,) = json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"][:1]
    for name in ("loss", "positive_similarity", "mined_pairs"):
        assert entry[name] == pytest.approx(sum(step[name] for step in every) / 4, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_lora_checkpoint_holds_no_frozen_weight(stage, config, tmp_path):
    train.main([config(stage, lora_r=32)])
    checkpoint = tmp_path / "output" / "checkpoint-4"
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    trained = ("lora_", "connector.", "projection.") if stage == "representation" else ("lora_", "connector.")
    assert all(any(part in name for part in trained) for name in tensors)
    assert stage == "representation" or not any("llm." in name or "lm_head" in name for name in tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    files = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    models = [count for name, count in files.items() if name.endswith((".safetensors", ".bin")) and "args" not in name]
    assert sum(models) <= 1.1 * size
    assert sum(files.values()) - files["training.png"] <= 3.5 * size


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_no_number_names_step_and_rows(stage, config, tmp_path, monkeypatch, capsys):
    path = config(stage)
    model = LusiferForAlignment if stage == "alignment" else LusiferModel
    forward, calls = model.forward, []

    def broken(self, *args, **kwargs):
        calls.append(1)
        output = forward(self, *args, **kwargs)
        if len(calls) > 3:
            output["loss" if stage == "alignment" else "pooler_output"] *= float("nan")
        return output

    monkeypatch.setattr(model, "forward", broken)
    message = failure(path, capsys)
    step = 2 if stage == "alignment" and len(calls) == 4 else 4
    assert re.match(rf"error: The loss of step {step} is nan, on the rows (first|second) \d+, ", message)
    assert re.search(
        r"learning rate \(now \S+\)\. The last complete checkpoint is \S+checkpoint-\d\.|is None\.", message
    )
    assert not (tmp_path / "output" / "final").exists()

    # The same command goes on, to the losses of a run that never failed.
    monkeypatch.undo()
    train.main([path])
    resumed = losses(tmp_path / "output")
    shutil.rmtree(tmp_path / "output")
    train.main([path])
    assert resumed == losses(tmp_path / "output")


def test_a_stream_goes_on(config, tmp_path, monkeypatch, capsys):
    path = config("alignment", streaming=True, max_steps=8)  # in which both data sets begin again
    train.main([path])
    expected = losses(tmp_path / "output")
    assert len(expected) == 8
    shutil.rmtree(tmp_path / "output")
    forward, calls = LusiferForAlignment.forward, []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 14:  # two in a step
            raise OSError("stopped")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LusiferForAlignment, "forward", stopped)
    assert failure(path, capsys) == "error: stopped"
    monkeypatch.undo()
    train.main([path])
    assert losses(tmp_path / "output") == expected


@pytest.mark.parametrize("file", ["optimizer", "model", "run.yaml", "final"])
def test_a_full_disk(file, config, tmp_path, monkeypatch, capsys):
    path = config("representation")
    train.main([path])
    expected_losses, expected_weights = losses(tmp_path / "output"), weights(tmp_path / "output")
    shutil.rmtree(tmp_path / "output")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def full_later(original, count=1):
        calls = []

        def save(*args, **kwargs):
            calls.append(1)
            return full() if len(calls) > count else original(*args, **kwargs)

        return save

    if file == "optimizer":
        monkeypatch.setattr(
            Trainer, "_save_optimizer_and_scheduler", full_later(Trainer._save_optimizer_and_scheduler)
        )
    elif file == "model":
        monkeypatch.setattr(Trainer, "save_model", full_later(Trainer.save_model))
    elif file == "final":
        monkeypatch.setattr(LusiferModel, "save_pretrained", full)
        monkeypatch.setattr(train, "save_final", full)
    else:
        monkeypatch.setattr(train.Run, "begin", full)
    message = failure(path, capsys)
    assert "No space left on device" in message
    last = last_complete_checkpoint(tmp_path / "output")
    if file in ("optimizer", "model"):
        assert last.name == "checkpoint-2"
        assert "checkpoint-4 could not be written" in message and f"{last} is complete" in message
        assert not (tmp_path / "output" / "checkpoint-4").exists()
    monkeypatch.undo()
    train.main([path])
    assert losses(tmp_path / "output") == expected_losses
    for name, tensor in weights(tmp_path / "output").items():
        assert_same(tensor, expected_weights[name], tolerance=0)


def test_checkpoints_to_resume_from(config, tmp_path, capsys):
    path = config("representation")
    train.main([path])
    output = tmp_path / "output"
    assert "output/final exists: this run is finished." in failure(path, capsys)
    shutil.rmtree(output / "final")
    (output / "checkpoint-4" / COMPLETE).unlink()
    message = failure(path, capsys, "--resume_from_checkpoint", str(output / "checkpoint-4"))
    assert f"checkpoint-4 is no complete checkpoint; the newest of {output} is {output}/checkpoint-2." in message
    assert "another learning_rate (0.001, now 0.002)" in failure(path, capsys, "--learning_rate", "2e-3")
    expected = losses(output)
    train.main([path, "--resume_from_checkpoint", str(output / "checkpoint-2")])
    assert losses(output) == expected


def test_the_best_checkpoint_is_kept(config, tmp_path):
    """Scores rise, then fall: the model of the middle is the one that is finished."""
    rows = [{"_id": str(i), "text": f"text {i}"} for i in range(4)]
    folder = tmp_path / "eval"
    folder.mkdir()
    for name in ("queries", "corpus"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{i}\t{i}\t1\n" for i in range(4)))
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    scores, snapshots = iter([0.1, 0.8, 0.3, 0.2]), {}

    def evaluate(model, *args, **kwargs):
        score = next(scores)
        snapshots[score] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return {"eval_ndcg@10": score, "mean": score}

    path = config("representation", eval_data=[{"path": str(folder), "kind": "retrieval"}], **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lusifer_hf.training.trainer.evaluate_sources", evaluate)
        train.main([path])
    final = weights(tmp_path / "output")
    assert {"checkpoint-2", "checkpoint-4"} <= {entry.name for entry in (tmp_path / "output").iterdir()}
    for name, tensor in final.items():
        assert_same(tensor, snapshots[0.8][name], tolerance=0)
    assert any(not torch.equal(tensor, snapshots[0.2][name]) for name, tensor in final.items())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"global_batch_size": 30}, "The data set first has 26 of its 26 rows an epoch, which do not fill a global"),
        ({"max_length": 5000}, "max_length=5000 is more than the 512 positions of the model"),
        ({"max_length": 3}, "max_length=3 leaves no room for text"),
        (
            {"model_name_or_path": "tests", "encoder": None, "llm": None},
            "tests is a model of type None, not LUSIFER",
        ),
        ({"lora_r": 2, "lora_target_modules": "layers"}, "matches none of the"),
    ],
)
def test_errors_before_any_work(fields, message, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if "global_batch_size" in fields:  # before the model is read, which may take minutes
        monkeypatch.setattr(train, "load_for_stage", None)
    assert message in failure(config("representation", **fields), capsys)
    assert not (tmp_path / "output").exists()


def test_an_error_in_the_data_names_file_line_and_field(config, tmp_path, capsys):
    path = config("alignment")
    with open(tmp_path / "second.jsonl", "a") as file:
        file.write('{"query": 3, "positive": ["a"]}\n')
    assert re.search(r'second\.jsonl, line 30, field "query".* not a string', failure(path, capsys).replace("\n", " "))
    assert not (tmp_path / "output").exists()
