"""
Contract: a run is what its YAML and flags say, every value of its field's type, or an error that names the key, the
value and what to do, before anything is loaded. An output folder goes on with the run it holds, and with no other.
"""

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from lusifer_hf.data.mixture import Task
from lusifer_hf.training import arguments
from lusifer_hf.training.arguments import AlignmentConfig, ModelArguments, RepresentationConfig, parse_run


ROOT = Path(__file__).parents[1]
RUNS = sorted([*ROOT.glob("configs/paper/*.yaml"), *ROOT.glob("configs/quickstart/*.yaml")])
MODEL = {"representation": {"model_name_or_path": "someone/model"}, "alignment": {"encoder": "a/b", "llm": "c/d"}}


@pytest.fixture(autouse=True)
def one_process(monkeypatch, tmp_path):
    """As without `accelerate launch`, in a folder of its own."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(stage: str = "representation", text: str = "", **fields) -> str:
    """A config with all that is needed; `text` is added as it is."""
    source = {"path": "a/b"} if stage == "representation" else {"path": "a/b", "task": "reconstruction"}
    fields = {"stage": stage, **MODEL[stage], "output_dir": "out", "data": [source], **fields}
    Path("run.yaml").write_text(yaml.safe_dump(fields) + text, encoding="utf-8")
    return "run.yaml"


def parse(stage: str = "representation", *flags: str, text: str = "", **fields):
    return parse_run([write(stage, text, **fields), *flags])


def test_types_of_yaml_and_flags():
    text = """
learning_rate: 1e-4
min_learning_rate: 1e-6
eval_strategy: no
save_strategy: "no"
bf16: no
miner_epsilon: null
false_negative_threshold:
max_steps: 1000
warmup_steps: 0.1
matryoshka_dims: [64, 16]
report_to: [tensorboard, trackio]
run_name: 0012
optim_args: null
encoder_overrides: {attention_probs_dropout_prob: 0, layer_norm_eps: 1e-5, is_decoder: false, hidden_act: relu}
"""
    run = parse("representation", text=text)
    training = run.training
    assert (training.learning_rate, training.min_learning_rate, training.warmup_steps) == (1e-4, 1e-6, 0.1)
    assert training.eval_strategy.value == training.save_strategy.value == "no"
    assert training.bf16 is False and training.max_steps == 1000 and type(training.max_steps) is int
    assert training.miner_epsilon is None and training.false_negative_threshold is None
    assert training.matryoshka_dims == [64, 16] and training.report_to == ["tensorboard", "trackio"]
    assert training.run_name == "0012" and training.optim_args is None
    overrides = {"attention_probs_dropout_prob": 0, "layer_norm_eps": 1e-5, "is_decoder": False, "hidden_act": "relu"}
    assert run.model.encoder_overrides == overrides

    flags = ("--learning-rate=2e-4", "--miner_epsilon", "0.5", "--min_learning_rate", "null", "--matryoshka_dims", "8")
    flags += ("--seed", "7", "--gather_across_devices", "false", "--bf16_full_eval=0", "--compile_layers")
    run = parse("representation", *flags, "--lora_r", "4", text=text)
    assert (run.training.learning_rate, run.training.miner_epsilon) == (2e-4, 0.5)
    assert run.training.min_learning_rate is None
    assert run.training.matryoshka_dims == [8] and run.training.seed == run.training.data_seed == 7
    assert run.training.gather_across_devices is False
    assert run.model.compile_layers is True and run.model.lora_r == 4

    flags = ("--lr_scheduler_kwargs", '{"min_lr": 1e-6, "num_cycles": 2}', "--lr_scheduler_type=cosine_with_min_lr")
    training = parse("alignment", *flags).training
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-6, "num_cycles": 2} and training.schedule is None
    assert training.lr_scheduler_type == "cosine_with_min_lr"
    text = "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\nnum_train_epochs: 2.5\n"
    training = parse("alignment", text=text).training
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-6} and training.num_train_epochs == 2.5


def test_data_sources():
    text = """
eval_strategy: steps
eval_data:
  - {path: held/out, kind: retrieval, max_samples: 50}
"""
    data = [
        {"path": "a/b", "instruction": "no", "weight": "5e-1", "columns": {"query": "1"}},
        {"path": "c/d", "in_batch_negatives": "no", "max_samples": 1000, "subset": None, "name": "null"},
    ]
    run = parse("representation", text=text, data=data)
    first, second = run.data
    assert (first.path, first.name, first.instruction, first.weight) == ("a/b", "b", "no", 0.5)
    assert first.columns == {"query": "1"} and first.in_batch_negatives is True
    assert (second.in_batch_negatives, second.max_samples, second.subset, second.name) == (False, 1000, None, "null")
    assert run.eval_data[0].max_samples == 50 and run.eval_data[0].instruction is None
    run = parse("representation", "--data", "[{path: x/y, weight: 2}]", "--eval_data", "null", "--eval_strategy", "no")
    assert [(source.path, source.weight) for source in run.data] == [("x/y", 2.0)] and run.eval_data == []


def test_own_defaults():
    training = parse("representation").training
    assert training.schedule == "cosine_annealing_with_floor" and training.lr_scheduler_type is None
    assert training.report_to == [] and training.remove_unused_columns is False
    assert training.ddp_find_unused_parameters is False and training.logging_nan_inf_filter is False
    assert (training.logging_steps, training.save_total_limit, training.weight_decay) == (10, 2, 0.0)
    assert (training.loss, training.similarity) == ("ntxent", "l2")
    assert (training.temperature, training.miner_epsilon) == (0.05, 0.25)
    assert training.label_names == ["labels"] and training.data_seed == training.seed
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 10}
    training = parse("representation", eval_data=[{"path": "x", "kind": "retrieval"}], **best).training
    assert training.metric_for_best_model == "mean" and training.greater_is_better is True


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_parses(path):
    run = parse_run([str(path), "--use_cpu", "true"])
    assert run.stage == ("alignment" if path.stem[0] in "12" else "representation")
    assert run.output_dir == Path("outputs", path.parent.name, path.stem)
    if path.stem[0] != "1":  # each step starts where the one before ends
        before = RUNS[RUNS.index(path) - 1]
        assert run.model.model_name_or_path == str(parse_run([str(before), "--use_cpu", "true"]).final)


def test_there_are_four_steps_of_each():
    assert [path.stem[0] for path in RUNS] == list("1234" * 2)


def test_paper_configs_are_the_published_ones(shared_folder):
    recipe, facts = (
        json.loads((shared_folder / "facts" / name).read_text()) for name in ("recipe.json", "training_data.json")
    )
    sets, alignment, representation = facts["datasets"], facts["alignment"], facts["representation"]
    tasks = [(task, path) for task in get_args(Task) for path in alignment[task]]
    retrieval = representation["retrieval_en"]
    expected = [
        tasks[: len(alignment["reconstruction"])],
        tasks,
        [(None, path) for path in retrieval],
        [(None, path) for path in retrieval + representation["non_retrieval_en"]],
    ]
    lora = recipe["common"]["lora"]
    for path, step, data in zip(RUNS[:4], recipe["steps"], expected, strict=True):
        run = parse_run([str(path), "--use_cpu", "true"])
        training = run.training
        assert [(source.task, source.path) for source in run.data] == data
        for source in run.data:
            if source.task != "reconstruction":  # which has an instruction of its own
                assert source.instruction == sets[source.path]["instruction"], source.path
            if run.stage == "representation":
                assert source.in_batch_negatives == sets[source.path]["in_batch_negatives"], source.path
            else:
                assert source.max_samples == step["samples_per_dataset"]
        for name in ("learning_rate", "min_learning_rate", "max_steps", "seed"):
            assert getattr(training, name) == step[name], (path.stem, name)
        assert training.global_batch_size == step["global_batch"] and training.bf16 and training.gradient_checkpointing
        assert all(getattr(run.model, f"lora_{name}") == lora[name] for name in ("r", "alpha", "dropout"))
        assert (training.max_grad_norm, training.weight_decay, training.max_length) == (1.0, 0.0, 512)
        if run.stage == "alignment":
            assert training.per_device_train_batch_size == step["micro_batch"]
            assert run.model.num_added_tokens == step["num_added_tokens"] and training.mask_probability == 0.5
        else:
            assert training.gradcache_rows == step["gradcache_rows"]
            assert (training.max_positives, training.max_negatives) == (step["positives"], step["negatives"])
    first = parse_run([str(RUNS[0]), "--use_cpu", "true"]).model
    assert (first.encoder, first.llm) == (recipe["backbones"]["encoder"], "mistralai/Mistral-7B-v0.1")


@pytest.mark.parametrize("name", ["single_gpu", "ddp", "fsdp2"])
def test_accelerate_configs(name):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))  # refuses unknown keys
    assert config.mixed_precision == "no"
    if name == "fsdp2":
        flags = launch_command_parser()._option_string_actions
        assert {f"--{key}" for key in config.fsdp_config} <= set(flags)
        assert config.fsdp_config["fsdp_version"] == 2 and config.fsdp_config["fsdp_activation_checkpointing"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--learning_rat", "1"), "there is no 'learning_rat'. Did you mean 'learning_rate'?"),
        (("--lora-dropouts", "4"), "there is no 'lora_dropouts'. Did you mean 'lora_dropout'?"),
        (("--learning", "1"), "there is no 'learning'"),
        (
            ("--mask_probability", "0.1"),
            "mask_probability belongs to stage: alignment. This is stage: representation.",
        ),
        (("--train_encoder", "false"), "train_encoder belongs to stage: alignment"),
        (("--learning_rate", "fast"), "--learning_rate.*invalid float value: 'fast'"),
        (("--max_steps", "1e3"), "--max_steps.*invalid int value: '1e3'"),
        (("--loss", "triplet"), "--loss.*invalid choice: 'triplet'"),
        (("--seed", "null"), "seed cannot be null"),
        (("--seed", "1", "2"), "seed takes one value, not a list"),
        (("--eval_strategy", "sometimes"), "sometimes"),
        (("more.yaml",), "Give one YAML file, then flags; the files given are: run.yaml, more.yaml."),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message if "*" in message else re.escape(message)):
        parse("representation", *flags)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "there is no 'learning_rat'. Did you mean 'learning_rate'?"),
        ("seed: 1\nseed: 2", "'seed' stands twice"),
        ("seed: [1, 2]", "seed takes one value, not a list"),
        ("seed: {a: 1}", "seed is not a mapping"),
        ("seed: 1: 2", "run.yaml: mapping values are not allowed"),
        ("matryoshka_dims: []", "--matryoshka_dims.*expected at least one argument"),
        ("matryoshka_dims: [8, x]", "--matryoshka_dims.*invalid int value: 'x'"),
    ],
)
def test_wrong_yaml(text, message):
    with pytest.raises(ValueError, match=message if "*" in message else re.escape(message)):
        parse("representation", text=text + "\n")


def test_yaml_that_is_none():
    Path("empty.yaml").touch()
    with pytest.raises(ValueError, match=r"empty\.yaml has no keys"):
        parse_run(["empty.yaml"])
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        parse_run(["gone.yaml"])
    with pytest.raises(ValueError, match="stage='align' is not one of 'alignment', 'representation'"):
        parse("representation", "--stage", "align")


@pytest.mark.parametrize(
    "stage, fields, message",
    [
        # the model
        ("representation", {"model_name_or_path": None}, "Say in one way what to start from"),
        ("representation", {"encoder": "a/b"}, "Say in one way what to start from"),
        ("alignment", {"llm": None}, "Say in one way what to start from"),
        ("representation", {"pooling": "cls"}, "pooling cannot be changed in someone/model"),
        ("alignment", {"pooling": "max"}, "pooling='max' is not one of 'mean'"),
        ("alignment", {"prompt_template": "mine"}, "prompt_template='mine' is not one of 'default', 'research'"),
        ("alignment", {"model_revision": "main"}, "model_revision belongs to model_name_or_path"),
        ("alignment", {"num_added_tokens": -1}, "num_added_tokens=-1 must be 0 or more"),
        ("alignment", {"encoder_overrides": {"a": 1}}, "encoder_overrides needs model_name_or_path"),
        ("alignment", {"lora_alpha": 16}, "lora_alpha has no effect without lora_r"),
        ("alignment", {"lora_dropout": 0.1, "merge_adapters": False}, "lora_dropout, merge_adapters has no effect"),
        ("alignment", {"lora_r": 0}, "lora_r=0 must be 1 or more"),
        ("alignment", {"lora_r": 4, "lora_dropout": 1.0}, "lora_dropout=1.0 must be from 0 to less than 1"),
        ("alignment", {"lora_r": 4, "train_encoder": False}, "train_encoder=false contradicts lora_r"),
        # both stages
        ("representation", {"output_dir": None}, "output_dir is missing"),
        (
            "representation",
            {"remove_unused_columns": True},
            "remove_unused_columns=True is not supported: the collators",
        ),
        ("representation", {"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported"),
        ("representation", {"max_length": 0}, "max_length=0 must be 1 or more"),
        ("representation", {"learning_rate": 0}, "learning_rate=0.0 must be greater than 0"),
        ("representation", {"min_learning_rate": 1}, "min_learning_rate=1.0 must be from 0 to learning_rate=5e-05"),
        ("representation", {"schedule": "cosine"}, "schedule='cosine' is not one of 'cosine_with_floor'"),
        (
            "representation",
            {"schedule": "cosine_with_floor", "num_cycles": 2},
            "num_cycles=2 must be 1 or more, and 1",
        ),
        (
            "representation",
            {"schedule": "cosine_with_floor", "lr_scheduler_type": "linear"},
            "schedule and lr_scheduler_type=linear exclude each other",
        ),
        (
            "representation",
            {"lr_scheduler_type": "linear", "min_learning_rate": 1e-6},
            "min_learning_rate and lr_sched",
        ),
        ("representation", {"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs needs lr_scheduler_type"),
        ("representation", {"eval_strategy": "steps"}, "eval_strategy=steps needs eval_data"),
        (
            "representation",
            {"eval_data": [{"path": "x", "kind": "retrieval"}]},
            "eval_data is given, but not when to evaluate: set eval_strategy",
        ),
        # alignment
        ("alignment", {"mask_probability": 1.0}, "mask_probability=1.0 must be from 0 to less than 1"),
        ("alignment", {"mask_probability": -0.1}, "mask_probability=-0.1 must be from 0 to less than 1"),
        ("alignment", {"streaming": True}, "streaming=true needs max_steps"),
        (
            "alignment",
            {"streaming": True, "max_steps": 5, "dataloader_num_workers": 2},
            "dataloader_num_workers=2 with streaming=true: every worker would read the whole stream",
        ),
        # representation
        ("representation", {"temperature": 0}, "temperature=0.0 must be greater than 0"),
        (
            "representation",
            {"gradcache_rows": 4, "gradcache_tokens": 512},
            "gradcache_rows and gradcache_tokens are two",
        ),
        ("representation", {"gradcache_rows": 0}, "gradcache_rows=0 must be 1 or more"),
        ("representation", {"max_positives": 0}, "max_positives=0 must be 1 or more"),
        ("representation", {"max_negatives": -1}, "max_negatives=-1 must be 0 or more"),
        ("representation", {"miner_epsilon": -1}, "miner_epsilon=-1.0 must be 0 or more, or null"),
        ("representation", {"false_negative_threshold": 2}, "false_negative_threshold=2.0 must be a difference"),
        ("representation", {"matryoshka_dims": [8, 0]}, "matryoshka_dims=[8, 0] must be 1 or more"),
        (
            "representation",
            {"gradient_accumulation_steps": 2, "gradcache_rows": 4},
            "gradient_accumulation_steps=2: texts of one accumulated batch would be no negatives in another",
        ),
        (
            "representation",
            {"deepspeed": '{"zero_optimization": {"stage": 3}}'},
            "DeepSpeed ZeRO-3 is not supported in this stage: GradCache embeds a batch twice",
        ),
        # data
        ("representation", {"data": []}, "list at least one data set"),
        ("representation", {"data": None}, "list at least one data set"),
        ("representation", {"data": {"path": "a/b"}}, "data must be a list of data sets"),
        ("representation", {"data": ["a/b"]}, "data[0] must be a data set with a path, not 'a/b'"),
        ("representation", {"data": [{"path": "a/b"}, {"name": "x"}]}, "data[1] must be a data set with a path"),
        (
            "representation",
            {"data": [{"path": "a/b", "instructions": "x"}]},
            "data[0] (a/b): there is no 'instructions'. Did you mean 'instruction'?",
        ),
        (
            "representation",
            {"data": [{"path": "a/b", "weight": "x"}]},
            "data[0] (a/b): argument --weight: invalid float",
        ),
        ("representation", {"data": [{"path": "a/b", "weight": 0}]}, "data[0] (a/b): weight=0.0"),
        ("representation", {"data": [{"path": "a/b"}, {"path": "c/b"}]}, "Two data sets have the name 'b'"),
        (
            "representation",
            {"data": [{"path": "a/b", "task": "reconstruction"}]},
            "has a task, which only alignment has",
        ),
        ("alignment", {"data": [{"path": "a/b"}]}, "has no task, which alignment needs"),
        (
            "alignment",
            {"data": [{"path": "a/b", "task": "copy"}]},
            "data[0] (a/b): argument --task: invalid choice: 'copy'",
        ),
        (
            "representation",
            {"eval_strategy": "steps", "eval_data": [{"path": "x"}]},
            "eval_data[0] (x): kind is missing",
        ),
        (
            "representation",
            {"eval_strategy": "steps", "eval_data": [{"path": "x", "kind": "sts"}]},
            "eval_data[0] (x): argument --kind: invalid choice: 'sts'",
        ),
    ],
)
def test_what_does_not_fit(stage, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(stage, **fields)


def test_bfloat16_where_there_is_none(monkeypatch):
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="bf16=true, but no accelerator here computes in bfloat16: set bf16 to false"):
        parse("representation", bf16=True)
    assert parse("representation", bf16=True, use_cpu=True).training.mixed_precision == "bf16"


def test_zero_3_of_accelerate_launch(monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(RepresentationConfig, "n_gpu", 0)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    RepresentationConfig(output_dir="out")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ValueError, match="ZeRO-3"):
        RepresentationConfig(output_dir="out")
    Path("zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero.json")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(ValueError, match="ZeRO-3"):
        RepresentationConfig(output_dir="out")
    AlignmentConfig(output_dir="out")


def test_two_kinds_of_activation_checkpointing(monkeypatch):
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert not parse("representation").training.gradient_checkpointing
    with pytest.raises(ValueError, match="set --gradient_checkpointing false"):
        parse("representation", gradient_checkpointing=True)


def test_several_gpus_in_one_process(monkeypatch):
    monkeypatch.setattr(AlignmentConfig, "n_gpu", 4)
    with pytest.raises(ValueError, match=r"One process sees 4 GPUs.*accelerate launch --num_processes 4"):
        parse("alignment")


@pytest.mark.parametrize(
    "stage, processes, fields, expected",
    [
        ("representation", 1, {"global_batch_size": 32}, (32, 1, 32)),
        ("representation", 4, {"global_batch_size": 32}, (8, 1, 32)),
        ("representation", 4, {"per_device_train_batch_size": 3}, (3, 1, 12)),
        ("alignment", 4, {"global_batch_size": 256, "per_device_train_batch_size": 16}, (16, 4, 256)),
        ("alignment", 2, {"global_batch_size": 10}, (5, 1, 10)),
        ("alignment", 1, {"global_batch_size": 10}, (5, 2, 10)),
        ("alignment", 1, {"global_batch_size": 7, "per_device_train_batch_size": 4}, (1, 7, 7)),
        ("alignment", 2, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, (3, 2, 12)),
    ],
)
def test_batch_sizes(stage, processes, fields, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: None)  # it waits for the others
    monkeypatch.setattr(arguments.CONFIGS[stage], "n_gpu", 0)
    training = arguments.CONFIGS[stage](output_dir="out", **fields)
    actual = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.global_batch_size)
    assert actual == expected


@pytest.mark.parametrize(
    "stage, processes, fields, message",
    [
        ("representation", 3, {"global_batch_size": 32}, "global_batch_size=32 cannot be divided among 3 processes"),
        ("alignment", 4, {"global_batch_size": 2}, "global_batch_size=2 cannot be divided among 4 processes"),
        (
            "alignment",
            2,
            {"global_batch_size": 64, "gradient_accumulation_steps": 8},
            "global_batch_size=64 is not 128, as per_device_train_batch_size=8 and gradient_accumulation_steps=8",
        ),
    ],
)
def test_batch_sizes_that_do_not_fit(stage, processes, fields, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=message):
        parse(stage, **fields)


def test_missing_files():
    for name in ("rows.jsonl", "rows.jsonl.gz", "some/rows.parquet", "./folder", "a/b/c", "/data/rows"):
        with pytest.raises(FileNotFoundError, match=rf"data\[1\]: {re.escape(name)} does not exist"):
            parse(data=[{"path": "hub/id"}, {"path": name, "name": "x"}]).check_files()
    parse(data=[{"path": "hub/id"}, {"path": "squad"}]).check_files()  # Hub ids
    with pytest.raises(FileNotFoundError, match="model_name_or_path: outputs/run/final does not exist"):
        parse(model_name_or_path="outputs/run/final").check_files()
    with pytest.raises(FileNotFoundError, match=r"eval_data\[0\]: xquad/en does not exist"):
        parse(eval_strategy="steps", eval_data=[{"path": "xquad/en", "kind": "retrieval"}]).check_files()
    parse("representation", "--resume_from_checkpoint", "true").check_files()
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint: out/checkpoint-5/trainer_state\.json"):
        parse(resume_from_checkpoint="out/checkpoint-5").check_files()
    Path("out").touch()
    with pytest.raises(FileExistsError, match="output_dir=out is a file"):
        parse().check_files()


def test_output_folder_of_a_finished_run():
    parse().begin()
    parse().check_files()
    Path("out/final").mkdir()
    with pytest.raises(
        FileExistsError, match=r"out/final exists: this run is finished.*--resume_from_checkpoint false"
    ):
        parse().check_files()
    parse("representation", "--resume_from_checkpoint", "false").check_files()


def test_output_folder_of_another_run():
    first = {"learning_rate": 1e-3, "lora_r": 4, "global_batch_size": 32, "matryoshka_dims": [8, 4]}
    parse(**first).begin()
    parse(**first | {"learning_rate": 2e-3}).check_files()  # without a checkpoint nothing is lost
    Path("out/checkpoint-5").mkdir()
    parse(**first).check_files()
    # What changes speed, memory, logs and checkpoints may change.
    may_change = {"gradcache_rows": 4, "compile_layers": True, "merge_adapters": False, "dataloader_num_workers": 2}
    may_change |= {"save_steps": 3, "logging_steps": 1, "report_to": "wandb", "eval_strategy": "no"}
    parse(**first, **may_change).check_files()

    changes = {
        "learning_rate": (2e-3, "0.001, now 0.002"),
        "lora_r": (8, "4, now 8"),
        "weight_decay": (0.1, "0.0, now 0.1"),
        "temperature": (0.1, "0.05, now 0.1"),
        "max_length": (64, "512, now 64"),
        "model_name_or_path": ("other/model", "'someone/model', now 'other/model'"),
        "matryoshka_dims": (None, r"\[8, 4\], now None"),
        "global_batch_size": (16, "32, now 16"),
        "lora_target_modules": ("x", "None, now 'x'"),
    }
    for name, (value, message) in changes.items():
        with pytest.raises(FileExistsError, match=rf"checkpoints of a run with another {name} \({message}\)\. Take"):
            parse(**first | {name: value}).check_files()
    with pytest.raises(FileExistsError, match=r"of a run with another data, data_seed .*, lora_r"):
        parse(**first | {"lora_r": 1, "seed": 2, "data": [{"path": "a/b", "weight": 2}]}).check_files()
    with pytest.raises(FileExistsError, match=r"another .*stage \('representation', now 'alignment'\)"):
        parse("alignment").check_files()
    # Also where the checkpoint is in the folder of that other run.
    Path("out/checkpoint-5/trainer_state.json").touch()
    elsewhere = {"output_dir": "new", "resume_from_checkpoint": "out/checkpoint-5"}
    parse(**first | elsewhere).check_files()
    with pytest.raises(FileExistsError, match=r"out holds checkpoints of a run with another lora_r"):
        parse(**first | elsewhere | {"lora_r": 8}).check_files()
    Path("out/run.yaml").unlink()
    with pytest.raises(FileExistsError, match=r"holds checkpoints but no run\.yaml"):
        parse(**first).check_files()


def test_beginning_anew_removes_the_old_run_and_nothing_else():
    run = parse()
    run.begin()
    for name in ("checkpoint-5", "checkpoint-10", "final", "mine"):
        Path("out", name).mkdir()
    Path("out/mine/notes.txt").touch()
    run = parse("representation", "--resume_from_checkpoint", "false", "--seed", "3")
    run.check_files()
    assert Path("out/checkpoint-5").exists()
    run.begin()
    assert sorted(path.name for path in Path("out").iterdir()) == ["mine", "run.yaml"]
    assert yaml.safe_load(Path("out/run.yaml").read_text())["seed"] == 3


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_record_is_a_config_of_the_same_run(path):
    run = parse_run([str(path), "--use_cpu", "true", "--output_dir", "out"])
    run.begin()
    again = parse_run(["out/run.yaml", "--use_cpu", "true", "--output_dir", "out"])
    assert again.deciding() == run.deciding()
    Path("out/checkpoint-1").mkdir()
    again._check_output_dir()


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit):
        parse_run(["--help"])
    shown = capsys.readouterr().out
    names = [field.name for cls in (ModelArguments, RepresentationConfig) for field in fields(cls)]
    assert "learning_rate" in names and all(f"--{name}" in shown for name in names)
