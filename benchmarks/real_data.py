"""
The four training steps on real text, on a CPU: from two pretrained backbones to an embedding model, and its scores.

The text is in the folder `shared` beside the repository (LUSIFER_SHARED names another place). Aligning backbones of
random weights would prove nothing, so two tiny ones are pretrained first: a multilingual XLM-R and an English Mistral.

    python benchmarks/real_data.py --work FOLDER                    # everything; finished parts are not done again
    python benchmarks/real_data.py --work FOLDER --only backbones
    python benchmarks/real_data.py --work FOLDER --alignment_attention prefix_lm    # compared with bidirectional

FOLDER then holds results.json and results.md, a folder for each of the two kinds of alignment with the YAML files and
the runs (each with the picture of its losses), and the log of every part.
"""

import argparse
import gzip
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from lusifer_hf import LusiferModel
from lusifer_hf.composing import compose
from lusifer_hf.quickstart import SIZE, byte_level_tokenizer, unigram_tokenizer
from lusifer_hf.training.evaluation import EvalSource, evaluate_sources, load_eval_sources


REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LUSIFER_SHARED", REPOSITORY.parent / "shared")).resolve()
EVAL = SHARED / "data" / "eval"
PARTS = ["backbones", "compose", "train", "evaluate", "report"]
ALIGNMENT_ATTENTIONS = ("bidirectional", "prefix_lm")
# Of the paper's languages, those that the evaluation sets are in.
LANGUAGES = ("en", "es", "ru", "vi", "ar", "hi", "sw")

BLOCK = 128  # tokens of a pretraining row
EVAL_LENGTH = 128
HELD_OUT = 300  # lines of each language that the backbones do not see
# Two or three minutes each on one core.
ENCODER = {"steps": 600, "rows": 8, "learning_rate": 1e-3, "vocabulary": 16_000}
LLM = {"steps": 200, "rows": 8, "learning_rate": 1e-3, "vocabulary": 6_000}
# A narrow LLM would blur the encoder's words before it has learned anything.
LLM_SIZE = SIZE | {"hidden_size": 768, "intermediate_size": 768, "head_dim": 64}
CHARACTERS = 1_400_000  # of each language, as many as the smallest file has
TOKENIZER_CHARACTERS = 500_000
PRETRAINED = "pretraining.json"  # written last
TRAIN_SETS = ("squad_sent", "medquad", "wiki_qa", "snli", "wiki_split")  # whose texts the LLM reads, beside raw/en


# Text


def read_rows(path: Path) -> list:
    """The lines of a gzipped file: dicts of JSON Lines, else strings."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) if ".jsonl" in path.name else line.rstrip("\n") for line in file]


def raw_text(language: str) -> tuple[list[str], list[str]]:
    """Lines to train on and lines held out."""
    lines = read_rows(SHARED / "data" / "raw" / f"{language}.txt.gz")
    return lines[HELD_OUT:], lines[:HELD_OUT]


def up_to(lines: list[str], characters: int) -> list[str]:
    """The first lines that together have at most so many characters."""
    lengths = np.cumsum([len(line) for line in lines])
    return lines[: int(np.searchsorted(lengths, characters, side="right"))]


# Backbones


def packed_rows(lines: list[str], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Texts one after the other, in rows of `BLOCK` tokens."""
    ids = tokenizer(lines)["input_ids"]
    end = tokenizer.eos_token_id
    ids = np.concatenate([row if row[-1] == end else [*row, end] for row in ids])
    rows = ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)
    return Dataset.from_dict({"input_ids": rows})


class MaskedLanguageTrainer(Trainer):
    """Computes the vocabulary's scores at the masked positions only: three quarters of a step would go there."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        masked = labels != -100
        states = model.roberta(**inputs).last_hidden_state[masked]
        loss = nn.functional.cross_entropy(model.lm_head(states), labels[masked])
        return (loss, {"loss": loss}) if return_outputs else loss


def copied_labels(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of the causal LLM, whose tokenizer has no padding token, which transformers' collator wants."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def pretrain(trainer_class, model, tokenizer, collator, rows: Dataset, held_out: dict, recipe: dict, folder: str):
    """Train on `rows` once at most; writes the backbone and its held-out losses before and after."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=recipe["steps"],
        per_device_train_batch_size=recipe["rows"],
        per_device_eval_batch_size=16,
        learning_rate=recipe["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        weight_decay=0.01,
        adam_beta2=0.98,
        prediction_loss_only=True,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = trainer_class(model, arguments, train_dataset=rows, eval_dataset=held_out, data_collator=collator)

    def losses() -> dict[str, float]:
        torch.manual_seed(0)  # the same positions masked before and after
        metrics = trainer.evaluate()
        return {name: round(metrics[f"eval_{name}_loss"], 3) for name in held_out}

    before, start = losses(), time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {
        "parameters": model.num_parameters(),
        "tokens_available": len(rows) * BLOCK,
        "tokens_seen": recipe["steps"] * recipe["rows"] * BLOCK,
        "training_seconds": round(seconds),
        "loss_before": before,
        "loss_after": losses(),
    }
    report["perplexity_after"] = {name: round(math.exp(loss), 1) for name, loss in report["loss_after"].items()}
    print(json.dumps(report))
    (Path(folder) / PRETRAINED).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def pretrain_encoder(folder: str):
    text = {language: raw_text(language) for language in LANGUAGES}
    lines, few = (
        [line for train, _ in text.values() for line in up_to(train, count)]
        for count in (CHARACTERS, TOKENIZER_CHARACTERS)
    )
    random.Random(0).shuffle(lines)
    tokenizer = unigram_tokenizer(few, ENCODER["vocabulary"])
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    rows = packed_rows(lines, tokenizer)
    torch.manual_seed(0)
    model = XLMRobertaForMaskedLM(
        XLMRobertaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **SIZE
        )
    )
    model.roberta.embeddings.position_embeddings.weight.data *= 0.1  # as in the quickstart
    # Begin with the tokens' frequencies, which a fifth of the training would go into.
    counts = np.bincount(np.array(rows["input_ids"]).ravel(), minlength=len(tokenizer)) + 0.1
    model.lm_head.bias.data = torch.tensor(np.log(counts / counts.sum()), dtype=torch.float32)
    held_out = {language: packed_rows(lines, tokenizer) for language, (_, lines) in text.items()}
    # Of many masked tokens there is more to learn in a short time than of few.
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)
    pretrain(MaskedLanguageTrainer, model, tokenizer, collator, rows, held_out, ENCODER, folder)


def pretrain_llm(folder: str):
    lines, held_out = raw_text("en")
    for name in TRAIN_SETS:
        for row in read_rows(SHARED / "data" / "train" / f"{name}.jsonl.gz"):
            lines += [row["query"], *row["positive"][:1]]
    random.Random(0).shuffle(lines)
    tokenizer = byte_level_tokenizer(up_to(lines, 4 * TOKENIZER_CHARACTERS), LLM["vocabulary"])
    # Four characters a token, so that little more is tokenized than is trained on.
    rows = packed_rows(up_to(lines, 5 * LLM["steps"] * LLM["rows"] * BLOCK), tokenizer)
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            num_key_value_heads=2,
            max_position_embeddings=1024,
            sliding_window=None,
            **LLM_SIZE,
        )
    )
    held_out = {"en": packed_rows(held_out, tokenizer)}
    pretrain(Trainer, model, tokenizer, copied_labels, rows, held_out, LLM, folder)


# The four steps

# Short, since a tiny model takes long to learn to look past what all texts share.
QUESTION, MEDICAL, ENTAILED, BANKING, ASSISTANT = "Answer:", "Medical answer:", "Entailed:", "Banking:", "Intent:"
TOPIC, SIMILAR = "Topic:", "Similar:"
# By mteb's names: the model carries those that it is trained with.
INSTRUCTIONS = dict.fromkeys(("Classification", "Clustering"), TOPIC) | dict.fromkeys(("BitextMining", "STS"), SIMILAR)
INSTRUCTIONS |= {"banking77-classification": BANKING, "clinc150-classification": ASSISTANT}
INSTRUCTIONS |= {f"{kind}-{side}": QUESTION for kind in ("Retrieval", "Reranking") for side in ("query", "document")}

STEPS = ("1_reconstruction", "2_reconstruction_completion", "3_retrieval", "4_all")


def step_configs(work: Path, runs: Path, alignment_attention: str) -> dict[str, dict]:
    """The YAML of each step."""

    def train(name: str, instruction: str = "", **fields) -> dict:
        return {"path": str(SHARED / "data" / "train" / f"{name}.jsonl.gz"), "instruction": instruction, **fields}

    retrieval = [
        train("squad_sent", QUESTION),
        train("wiki_qa", QUESTION),
        train("medquad", MEDICAL),
        train("science", QUESTION),
        train("tldr_pages", QUESTION),
        train("wiki_split", SIMILAR),
    ]
    others = [
        train("snli", ENTAILED),
        train("banking77", BANKING, in_batch_negatives=False),
        train("clinc150", ASSISTANT, in_batch_negatives=False),
    ]
    text = {"path": str(work / "data" / "text.jsonl"), "task": "reconstruction"}
    alignment = {
        "stage": "alignment",
        "alignment_attention": alignment_attention,
        "mask_probability": 0.5,
        "max_length": 64,
        "global_batch_size": 64,
        "learning_rate": 3e-4,
        "max_steps": 60,
    }
    representation = {
        "stage": "representation",
        "loss": "infonce",
        "similarity": "cosine",
        "max_length": 64,
        "gradcache_tokens": 8192,
        "max_positives": 1,
        "eval_strategy": "steps",
        "eval_steps": 50,
        "eval_data": [eval_set("retrieval", "xquad/en", QUESTION, max_samples=100)],
    }
    common = {"warmup_steps": 0.1, "logging_steps": 10, "save_steps": 150, "seed": 0, "use_cpu": True}
    finals = [work / "composed", *(runs / step / "final" for step in STEPS)]
    steps = [
        alignment | {"data": [text]},
        alignment
        | {
            "num_added_tokens": 1,
            "data": [
                text | {"max_samples": 20_000},
                *(source | {"task": "passage_to_query"} for source in retrieval),
            ],
        },
        # A batch of 64 has too few negatives: with four times as many a row teaches more.
        representation
        | {"data": retrieval, "max_negatives": 0, "global_batch_size": 256, "learning_rate": 5e-4, "max_steps": 300},
        representation
        | {"data": [*retrieval, *others], "max_negatives": 3, "global_batch_size": 64}
        | {"learning_rate": 1e-4, "max_steps": 100},
    ]
    return {
        name: {"model_name_or_path": str(start), "output_dir": str(runs / name), **common, **step}
        for name, start, step in zip(STEPS, finals, steps, strict=False)
    }


def write_text(path: Path):
    """What step 1 reconstructs: the English lines and the passages of the retrieval sets."""
    lines, _ = raw_text("en")
    for name in ("squad_sent", "wiki_qa", "medquad"):
        lines += [row["positive"][0] for row in read_rows(SHARED / "data" / "train" / f"{name}.jsonl.gz")]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"query": line}) + "\n" for line in lines), encoding="utf-8")


# Evaluation


class MeanPooledEncoder(nn.Module):
    """The encoder by itself, without prompts, in the form that `evaluate_sources` takes."""

    class config:
        @staticmethod
        def prompt(prompt_name=None, instruction=None) -> str:
            return ""

    def __init__(self, folder: str):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None]
        return SimpleNamespace(pooler_output=(states * mask).sum(1) / mask.sum(1))


def eval_set(kind: str, path: str, instruction: str, **fields) -> dict:
    """An entry of `eval_data:`."""
    path = EVAL / kind / path
    return {"path": str(path), "kind": kind, "instruction": instruction, **fields}


def eval_sets() -> list[dict]:
    sets = []
    for language in LANGUAGES:
        for name, queries in (("xquad", 400), ("xquad_r", 400), ("tldr", 100)):
            if (EVAL / "retrieval" / name / language).is_dir():
                sets.append(eval_set("retrieval", f"{name}/{language}", QUESTION, max_samples=queries))
        sets.append(eval_set("classification", f"sib200/{language}.tsv", TOPIC))
    pairs = sorted((EVAL / "bitext" / "tatoeba").glob("*.tsv"))
    sets += [eval_set("bitext", f"tatoeba/{path.name}", SIMILAR) for path in pairs]
    return [*sets, eval_set("classification", "banking77/en.tsv", BANKING, max_samples=1500)]


def score(folder: str, output: str):
    """Write the scores of a LUSIFER model, or of an encoder alone."""
    is_encoder = (Path(folder) / PRETRAINED).exists()
    model = MeanPooledEncoder(folder) if is_encoder else LusiferModel.from_pretrained(folder)
    loaded = load_eval_sources([EvalSource(**fields) for fields in eval_sets()])
    scores = evaluate_sources(model, model.tokenizer, loaded, max_length=EVAL_LENGTH)
    Path(output).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


# The parts in order


def compose_tiny(work: str):
    work = Path(work)
    backbones = [str(work / "backbones" / name) for name in ("encoder", "llm")]
    # Fresh weights so large that states keep their size: what a tiny LLM adds would drown smaller ones.
    fields = {"num_added_tokens": 0, "initializer_range": 0.07, "instructions": INSTRUCTIONS}
    compose(*backbones, work / "composed", seed=0, **fields)


CALL = """
import sys
sys.path.insert(0, sys.argv[1])
import real_data
getattr(real_data, sys.argv[2])(*sys.argv[3:])
"""


class Runner:
    """Runs each part in a process of its own, notes its wall time and peak memory, and skips what is finished."""

    def __init__(self, work: Path):
        self.work, self.path = work, work / "measured.json"
        self.measured = json.loads(self.path.read_text()) if self.path.exists() else {}
        (work / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: list[str], output: Path, processes: int = 1):
        if output.exists():
            print(f"{name}: finished before ({output})")
            return
        log = self.work / "logs" / f"{name.replace('/', '-')}.log"
        print(f"{name}: running, see {log}", flush=True)
        start = time.perf_counter()
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY)
            # Of this child and its own children; `getrusage` has but one maximum over all children so far.
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status != 0 or not output.exists():
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            sys.exit("\n".join([f"{name} failed. The end of {log}:", *tail]))
        self.measured[name] = {
            "seconds": round(seconds),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
            "peak_mib": usage.ru_maxrss // 1024,  # the largest process's
            "processes": processes,
        }
        self.path.write_text(json.dumps(self.measured, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {self.measured[name]}", flush=True)

    def call(self, name: str, output: Path, function: Callable, *arguments: Path):
        """A function of this file, on paths."""
        here = str(Path(__file__).resolve().parent)
        command = [sys.executable, "-c", CALL, here, function.__name__, *map(str, arguments)]
        self.run(name, command, output)


def make_backbones(runner: Runner):
    for name, function in (("encoder", pretrain_encoder), ("llm", pretrain_llm)):
        folder = runner.work / "backbones" / name
        runner.call(f"pretrain {name}", folder / PRETRAINED, function, folder)


def train_steps(runner: Runner, alignment_attention: str, processes: int, threads: int):
    text, runs = runner.work / "data" / "text.jsonl", runner.work / alignment_attention
    if not text.exists():
        write_text(text)
    for name, config in step_configs(runner.work, runs, alignment_attention).items():
        path = runs / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False, width=119), encoding="utf-8")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
        command += ["--num_processes", str(processes), "--num_cpu_threads_per_process", str(threads)]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "train.py", str(path)]
        runner.run(f"{alignment_attention}/{name}", command, runs / name / "final" / "config.json", processes)


def contenders(work: Path, alignment_attention: str) -> dict[str, Path]:
    """Name and folder of every model that is evaluated."""
    models = {"encoder": work / "backbones" / "encoder", "composed": work / "composed"}
    return models | {f"{alignment_attention}/{step}": work / alignment_attention / step / "final" for step in STEPS}


def score_all(runner: Runner, alignment_attention: str):
    (runner.work / "scores").mkdir(exist_ok=True)
    for name, folder in contenders(runner.work, alignment_attention).items():
        output = scores_path(runner.work, name)
        runner.call(f"evaluate {name}", output, score, folder, output)


def write_baseline(source: str, output: str):
    """The encoder alone as sentence-transformers has it, mean-pooled."""
    encoder = Transformer(source)
    SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())]).save(output)


def report_with_mteb(runner: Runner, alignment_attention: str):
    """`lusifer-hf evaluate` on all local files: the trained model, its untrained self, the encoder alone."""
    baseline, output = runner.work / "encoder" / "mean_pooled", runner.work / "evaluation"
    runner.call("baseline", baseline / "modules.json", write_baseline, runner.work / "backbones" / "encoder", baseline)
    trained = contenders(runner.work, alignment_attention)[f"{alignment_attention}/{STEPS[-1]}"]
    command = [sys.executable, "-m", "lusifer_hf.cli", "evaluate", "--model", str(trained), "--local", str(EVAL)]
    command += ["--baseline", str(runner.work / "composed"), str(baseline), "--output", str(output)]
    command += ["--max-length", str(EVAL_LENGTH)]
    runner.run("report", command, output / "report" / "report.md")


def scores_path(work: Path, name: str) -> Path:
    return work / "scores" / f"{name.replace('/', '-')}.json"


# Report


def report(work: Path, measured: dict):
    """Write results.json and results.md of everything that is there."""
    scores, curves = {}, {}
    for alignment_attention in ALIGNMENT_ATTENTIONS:
        for name, folder in contenders(work, alignment_attention).items():
            if (path := scores_path(work, name)).exists():
                scores[name] = json.loads(path.read_text())
            if (state := folder.parent / "trainer_state.json").exists():
                curves[name] = [
                    {key: entry[key] for key in ("step", "loss", "eval_mean") if key in entry}
                    for entry in json.loads(state.read_text())["log_history"]
                    if "loss" in entry or "eval_mean" in entry
                ]
    pretraining = {
        name: json.loads(path.read_text())
        for name in ("encoder", "llm")
        if (path := work / "backbones" / name / PRETRAINED).exists()
    }
    results = {"pretraining": pretraining, "measured": measured, "curves": curves, "scores": scores}
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (work / "results.md").write_text("\n".join(markdown(results)) + "\n", encoding="utf-8")
    print(f"\nresults.json and results.md are in {work}")


def markdown(results: dict) -> list[str]:
    lines = ["| part | wall time | CPU time | peak memory | processes |", "|---|---|---|---|---|"]
    for name, part in results["measured"].items():
        lines.append(
            f"| {name} | {part['seconds']} s | {part['cpu_seconds']} s | {part['peak_mib']} MiB "
            f"| {part['processes']} |"
        )
    lines += ["", "| run | first loss | last loss | evaluation while training |", "|---|---|---|---|"]
    for name, curve in results["curves"].items():
        losses = [entry["loss"] for entry in curve if "loss" in entry]
        means = [f"{entry['eval_mean']:.3f}" for entry in curve if "eval_mean" in entry]
        lines.append(f"| {name} | {losses[0]:.3f} | {losses[-1]:.3f} | {', '.join(means)} |")

    scores = results["scores"]
    lines += ["", f"| score (%) | {' | '.join(scores)} |", "|---|" + "---:|" * len(scores)]
    for name, values in score_rows(scores).items():
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    return lines


def score_rows(scores: dict[str, dict[str, float]]) -> dict[str, list[float]]:
    """A row for each set, one value per model, and before them the means over sets and over other languages."""
    main = ("_ndcg@10", "_accuracy", "_f1")
    names = [name for name in next(iter(scores.values()), {}) if name.endswith(main)]
    groups = {}
    for kind, ending in (("retrieval", "ndcg@10"), ("classification", "accuracy"), ("bitext", "f1")):
        members = [name for name in names if name.endswith(f"_{ending}")]
        english = [name for name in members if f"-en_{ending}" in name]
        groups[f"**{kind}, English** ({ending})"] = english
        groups[f"**{kind}, other languages** ({ending})"] = [name for name in members if name not in english]
    groups |= {name.replace("_", " "): [name] for name in sorted(names)}
    return {
        label: [float(np.mean([values[name] for name in group])) for values in scores.values()]
        for label, group in groups.items()
        if group
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder for everything that is made")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="do these parts alone")
    parser.add_argument("--alignment_attention", choices=ALIGNMENT_ATTENTIONS, default="bidirectional")
    parser.add_argument("--processes", type=int, default=1, help="of training")
    parser.add_argument("--threads", type=int, help="of each process of training; by default they share the cores")
    args = parser.parse_args()
    if not (SHARED / "data" / "train").is_dir():
        sys.exit(f"No data in {SHARED}: set LUSIFER_SHARED to the folder that holds data/train, data/raw, data/eval.")
    runner = Runner(args.work.resolve())
    if "backbones" in args.only:
        make_backbones(runner)
    if "compose" in args.only:
        runner.call("compose", runner.work / "composed" / "config.json", compose_tiny, runner.work)
    if "train" in args.only:
        threads = args.threads or max(1, os.cpu_count() // args.processes)
        train_steps(runner, args.alignment_attention, args.processes, threads)
    if "evaluate" in args.only:
        score_all(runner, args.alignment_attention)
    if "report" in args.only:
        report_with_mteb(runner, args.alignment_attention)
    report(runner.work, runner.measured)


if __name__ == "__main__":
    main()
