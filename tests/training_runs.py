"""Runs of train.py as a user starts them: a small data set, a config, one process or two, killed or not."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig

from lusifer_hf.quickstart import make_tiny_backbones


ROOT = Path(__file__).parents[1]
ON_GPUS = torch.cuda.device_count() > 1
WORDS = "river stone lamp window bread garden cloud train paper coat apple bridge salt candle horse boat".split()


def make_backbones(folder: Path, dropout: float) -> tuple[Path, Path]:
    """Tiny backbones; without dropout two processes compute what one does, with it resuming is put to the test."""
    encoder, llm = make_tiny_backbones(folder)
    config = AutoConfig.from_pretrained(encoder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    config.save_pretrained(encoder)
    return encoder, llm


def write_rows(path: Path, count: int, seed: int, negatives: int = 2) -> Path:
    """Rows with texts of 1 to 30 words, so that processes get unequal numbers of tokens."""
    random_words = random.Random(seed)

    def text() -> str:
        return " ".join(random_words.choices(WORDS, k=random_words.randint(1, 30)))

    rows = [
        {"query": text(), "positive": [text()], "negative": [text() for _ in range(negatives)]} for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path, stage: str, backbones: tuple[Path, Path], **fields) -> Path:
    """A run of two data sets of 26 and 19 rows: four global batches of 10 a epoch in stage 2, and rows left over."""
    data = []
    for name, count, seed in (("first", 26, 1), ("second", 29, 2)):
        source = {"path": str(write_rows(folder / f"{name}.jsonl", count, seed)), "instruction": f"Retrieve {name}."}
        data.append({**source, "task": "passage_to_query"} if stage == "alignment" else source)
    encoder, llm = backbones
    config = {
        "stage": stage,
        "encoder": str(encoder),
        "llm": str(llm),
        "composition_seed": 0,
        "data": data,
        "output_dir": str(folder / "output"),
        "global_batch_size": 10,
        "max_length": 64,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 5,
        "use_cpu": not ON_GPUS,
        **fields,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(config: Path, launcher: str | None = None, arguments: tuple[str, ...] = ()) -> list[str]:
    """One process, or two with a config of configs/accelerate ("ddp", "fsdp2")."""
    # accelerate itself leaves FSDP out where there is no accelerator.
    script = ROOT / ("tests/fsdp_on_cpu.py" if launcher == "fsdp2" and not ON_GPUS else "train.py")
    train = [str(script), str(config), *arguments]
    if launcher is None:
        return [sys.executable, *train]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--mixed_precision=no"]
    port = random.randint(20_000, 60_000)
    options = [f"--config_file={ROOT}/configs/accelerate/{launcher}.yaml", f"--main_process_port={port}"]
    return [*accelerate, *options, *train]


def run(config: Path, launcher: str | None = None, *arguments: str, fails: bool = False) -> str:
    """Run to the end; returns what was logged."""
    finished = subprocess.run(
        command(config, launcher, arguments), env=_environment(launcher), capture_output=True, text=True, check=False
    )
    output = finished.stdout + finished.stderr
    assert (finished.returncode != 0) == fails, output[-30000:]
    return output


def run_and_kill(config: Path, when: Callable[[], bool], launcher: str | None = None, timeout: float = 120):
    """Start a run and kill all its processes with SIGKILL as soon as `when()` is true."""
    log = config.with_name("killed.log")
    with open(log, "w") as file:
        process = subprocess.Popen(command(config, launcher), env=_environment(launcher), stdout=file, stderr=file)
    deadline = time.monotonic() + timeout
    try:
        while not when():
            assert process.poll() is None, f"the run ended before it was killed: {log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"the run did not get there: {log.read_text()[-6000:]}"
            time.sleep(0.001)
    finally:
        # The launcher first, which would end its workers more gently; these have sessions of their own.
        workers = psutil.Process(process.pid).children(recursive=True)
        for victim in (process, *workers):
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        process.wait()
        psutil.wait_procs(workers)


def losses(output_dir: Path) -> list[tuple[int, float]]:
    """Every logged step with its loss."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def weights(output_dir: Path) -> dict:
    return load_file(output_dir / "final" / "model.safetensors")


def _environment(launcher: str | None) -> dict[str, str]:
    one_gpu = {"CUDA_VISIBLE_DEVICES": "0"} if launcher is None and ON_GPUS else {}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, **one_gpu, "OMP_NUM_THREADS": "1"}
