"""
Step time and peak memory of both trainers against the straightforward implementation: padded, the whole batch in one
pass, logits at all positions.

All contenders take the trainer's own training step (forward, backward, clipping, optimizer) with the same weights on
the same texts and must return the same loss: there is no dropout, and the learning rate is too small to change a
weight. Rounds are interleaved, ratios are medians over rounds. Half of the texts have 8 to 24 tokens, half 60 to 400.

    python benchmarks/train.py                          # 36 M parameters, float32, this CPU
    python benchmarks/train.py --size paper --compile   # XLM-R-large + Mistral-7B dimensions, bfloat16, CUDA
    python benchmarks/train.py --parts contrastive_loss
"""

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import psutil
import torch
from encode import SIZES as ENCODE_SIZES
from encode import matmul_rate
from memory import peak_memory
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MistralConfig, XLMRobertaConfig
from transformers.utils import is_liger_kernel_available

from lusifer_hf import LusiferConfig, LusiferModel
from lusifer_hf.modeling_alignment import IGNORED, LMHead, LusiferForAlignment
from lusifer_hf.training.alignment import AlignmentTrainer
from lusifer_hf.training.arguments import AlignmentConfig, ModelArguments, RepresentationConfig
from lusifer_hf.training.gradcache import split_by_tokens
from lusifer_hf.training.loading import _with_lora, _without_lora
from lusifer_hf.training.losses import contrastive_loss
from lusifer_hf.training.representation import RepresentationTrainer


@dataclass
class Size:
    """
    Args:
        towers: fields of the two configs.
        vocabularies: of the encoder and the LLM. Small towers have small ones, which keeps their share of the work.
        tokens: of a batch that fits into memory in one pass, and of GradCache's batch and chunk.
        padded_tokens: (without padding) of the batch on which everything is compared with padding.
        growth: tokens of the batches whose peak memory is measured.
        logits: positions of the LLM's sequences, and its hidden size, for the alignment loss.
    """

    towers: dict
    vocabularies: tuple[int, int]
    tokens: int
    gradcache_tokens: int
    chunk: int
    padded_tokens: int
    growth: tuple[int, ...]
    logits: tuple[int, int]


TINY_TOWERS = {
    "encoder": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
    "llm": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
    },
}
SIZES = {
    "tiny": Size(TINY_TOWERS, (2000, 2000), 4096, 4096, 1024, 4096, (4096, 8192, 16384, 32768), (6144, 64)),
    "36M": Size(ENCODE_SIZES["small"], (2000, 2000), 4096, 4096, 1024, 4096, (2048, 4096, 8192, 16384), (6144, 512)),
    "paper": Size(
        ENCODE_SIZES["paper"],
        (250_002, 32_000),
        tokens=8192,
        gradcache_tokens=65_536,
        chunk=8192,
        padded_tokens=4096,
        growth=(8192, 16_384, 32_768, 65_536),
        logits=(16_384, 4096),
    ),
}
PARTS = ("steps", "memory", "alignment_loss", "contrastive_loss")
VOCABULARY = 128_256
PAD = 1


# The batches


def draw_lengths(tokens: int, group: int, seed: int = 0) -> list[int]:
    """Lengths of texts in groups of `group`, together at most `tokens`, but at least one group."""
    rng, lengths = random.Random(seed), []
    while True:
        more = [rng.randint(8, 24) if index % 2 else rng.randint(60, 400) for index in range(group)]
        if lengths and sum(lengths) + sum(more) > tokens:
            return lengths
        lengths += rng.sample(more, group)


def random_ids(lengths: list[int], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `(texts, L)`, padded on the right."""
    ids = [torch.randint(PAD + 1, vocabulary, (length,)) for length in lengths]
    ids = pad_sequence(ids, batch_first=True, padding_value=PAD)
    return ids, (ids != PAD).long()


def representation_batch(size: Size, tokens: int) -> dict:
    """As the collator makes it: rows of a query, a positive and two negatives."""
    ids, mask = random_ids(draw_lengths(tokens, group=4), size.vocabularies[0])
    count = len(ids) // 4
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "rows": torch.cat([torch.arange(count), torch.arange(count), torch.arange(count).repeat_interleave(2)]),
        "kinds": torch.tensor([0] * count + [1] * count + [2] * 2 * count),
        "text_ids": torch.arange(len(ids)),
        "dataset": 0,
        "in_batch_negatives": True,
        "ids": [("texts", row) for row in range(count)],
    }


def alignment_batch(size: Size, tokens: int) -> dict:
    """As the collator makes it; the LLM's text is as long as the encoder's, BOS included, `tokens` counts both."""
    lengths = draw_lengths(tokens // 2, group=2)
    ids, mask = random_ids(lengths, size.vocabularies[0])
    llm_ids, llm_mask = random_ids(lengths, size.vocabularies[1])
    llm_ids[:, 0] = MistralConfig().bos_token_id
    labels = llm_ids.masked_fill(llm_mask == 0, IGNORED)
    labels[:, 0] = IGNORED
    hidden, replaced = torch.rand(2, *labels.shape) < 0.5
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "llm_input_ids": llm_ids.masked_fill(replaced & (labels != IGNORED), PAD),
        "llm_attention_mask": llm_mask.masked_fill(hidden & (labels != IGNORED), 0),
        "labels": labels,
        "ids": [("texts", row) for row in range(len(ids))],
    }


# A trainer and its steps


class _Texts(torch.utils.data.Dataset):
    """What a trainer wants to know of its data; the batches are handed to it."""

    sources = (SimpleNamespace(name="texts"),)

    def __len__(self) -> int:
        return 1


class Bench:
    """A trainer of one stage around random weights, with an optimizer, ready for steps."""

    def __init__(self, stage: str, size_name: str, lora: bool):
        self.stage, self.lora, self.size = stage, lora, SIZES[size_name]
        self.device = "cuda" if size_name == "paper" else "cpu"
        llm_vocabulary = self.size.vocabularies[1]
        config = LusiferConfig(
            encoder_config=XLMRobertaConfig(
                vocab_size=self.size.vocabularies[0],
                max_position_embeddings=514,
                type_vocab_size=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **self.size.towers["encoder"],
            ),
            llm_config=MistralConfig(
                vocab_size=llm_vocabulary,
                max_position_embeddings=1024,
                sliding_window=None,
                **self.size.towers["llm"],
            ),
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            model_class = LusiferForAlignment if stage == "alignment" else LusiferModel
            dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
            self.model = model_class._from_config(config, dtype=dtype)
        self.embedder = self.model.base_model
        towers = ("encoder", "connector", "llm")
        self.parameters = {name: linear_parameters(getattr(self.embedder, name)) for name in towers}
        self.parameters["lm_head"] = linear_parameters(self.model) - linear_parameters(self.embedder)

        arguments = ModelArguments(model_name_or_path="random", lora_r=16 if lora else None)
        model = (_with_lora if lora else _without_lora)(self.model, stage, arguments)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

        config_class = AlignmentConfig if stage == "alignment" else RepresentationConfig
        trainer_class = AlignmentTrainer if stage == "alignment" else RepresentationTrainer
        with tempfile.TemporaryDirectory() as folder:
            training = config_class(
                output_dir=folder,
                learning_rate=1e-12,
                bf16=self.device == "cuda",
                use_cpu=self.device == "cpu",
                report_to="none",
            )
            self.trainer = trainer_class(model, training, _Texts(), list)
        self.trainer.create_optimizer()
        prepare = self.trainer.accelerator.prepare
        self.trainer.model_wrapped, self.trainer.optimizer = prepare(self.trainer.model, self.trainer.optimizer)

    def batch(self, tokens: int) -> dict:
        torch.manual_seed(0)
        make = alignment_batch if self.stage == "alignment" else representation_batch
        batch = make(self.size, tokens)
        return {
            # The chunks' sizes are read from the mask, which has to be on the CPU there.
            name: value.to(self.device) if torch.is_tensor(value) and self.stage == "alignment" else value
            for name, value in batch.items()
        }

    def step(self, batch: dict, padded: bool = False, full_logits: bool = False, chunk: int | None = None) -> float:
        """
        One step of training; returns the loss.

        Args:
            padded: run the towers on padded batches, with SDPA.
            full_logits: (alignment, padded) with the LLM's own forward and logits at all positions.
            chunk: (representation) GradCache with so many tokens in a pass; without it, all in one.
        """
        trainer = self.trainer
        for tower in (self.embedder.encoder, self.embedder.llm):
            tower.set_attn_implementation("sdpa" if padded else "packed")
        if full_logits:
            trainer.model.train()
            with trainer.accelerator.autocast():
                loss = full_logits_loss(self.model, batch)
            trainer.accelerator.backward(loss)
        else:
            labels = None
            if self.stage == "representation":
                trainer.args.gradcache_tokens = chunk
            else:
                labels = (batch["labels"] != IGNORED).sum()  # as `Trainer` counts them
            loss = trainer.training_step(trainer.model_wrapped, dict(batch), labels)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss.item()

    def tokens(self, batch: dict) -> int:
        """Of the texts, without padding and added tokens; in alignment of both sides."""
        text = int(batch["attention_mask"].sum())
        return 2 * text if self.stage == "alignment" else text

    def useful_flops(self, batch: dict, chunk: int | None = None) -> float:
        """
        Of the matrices of both towers on kept tokens, two operations a multiply-add: forward, gradient of the inputs,
        of the weights in full training, and GradCache's second forward. LoRA and attention are not counted.
        """
        per_parameter = 4 + (0 if self.lora else 2) + (0 if chunk is None else 2)
        text = int(batch["attention_mask"].sum())
        work = text * (self.parameters["encoder"] + self.parameters["connector"])
        work += self.tokens(batch) * self.parameters["llm"]
        if self.stage == "alignment":
            work += int((batch["labels"] != IGNORED).sum()) * self.parameters["lm_head"]
        return per_parameter * work


def linear_parameters(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def full_logits_loss(model: LusiferForAlignment, batch: dict) -> torch.Tensor:
    """
    The same loss as straightforward code has it: `[BOS, encoder's text, padding, added token, rest of the LLM's text]`
    through the stock towers, logits of all positions in float32, cross entropy with the other labels ignored.
    """
    embedder, mask, llm_mask = model.model, batch["attention_mask"], batch["llm_attention_mask"]
    states = embedder.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    states = embedder.connector(states)
    text = embedder.llm.get_input_embeddings()(batch["llm_input_ids"]).to(states)
    one = mask.new_ones(len(mask), 1)
    places = torch.cat([one, mask, one, torch.ones_like(llm_mask[:, 1:])], dim=1)
    hidden_states = embedder.llm(
        inputs_embeds=torch.cat([text[:, :1], states, text[:, 1:]], dim=1),
        attention_mask=torch.cat([llm_mask[:, :1], mask, one, llm_mask[:, 1:]], dim=1),
        position_ids=places.cumsum(dim=1) - 1,
        is_causal=False,
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden_states)  # (B, T, V)
    labels = batch["labels"]
    labels = torch.cat([labels[:, :1], labels.new_full(states.shape[:2], IGNORED), labels[:, 1:]], dim=1)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# Steps


def compare(bench: Bench, title: str, contenders: dict[str, tuple[dict, dict]], rounds: int, rate: float):
    """Print a table of contenders, each a batch and options of `Bench.step`, against the first."""
    seconds, losses, memory = {name: [] for name in contenders}, {}, {}
    for number in range(rounds + 1):  # the first warms up
        for name, (batch, options) in contenders.items():
            if bench.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            losses[name] = bench.step(batch, **options)
            if bench.device == "cuda":
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
            elapsed = time.perf_counter() - start
            if number:
                seconds[name].append(elapsed)
            elif bench.device == "cuda":
                print(f"first step of {name}: {elapsed:.0f} s", flush=True)

    first = next(iter(contenders))
    print(f"\n{title}\n")
    print(
        "| contender | texts | tokens | chunks | s | tokens/s | time a token / first | share of the matmul rate "
        "| loss | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    own = bench.tokens(contenders[first][0])
    for name, (batch, options) in contenders.items():
        chunk, tokens, median = options.get("chunk"), bench.tokens(batch), statistics.median(seconds[name])
        chunks = len(split_by_tokens(batch["attention_mask"].sum(dim=1), chunk)) if chunk else 1
        ratio = statistics.median(
            (mine / tokens) / (others / own) for mine, others in zip(seconds[name], seconds[first], strict=True)
        )
        print(
            f"| {name} | {len(batch['input_ids'])} | {tokens:,} | {chunks} | {median:.3g} | {tokens / median:,.0f} "
            f"| {ratio:.2f} | {bench.useful_flops(batch, chunk) / median / rate:.0%} | {losses[name]:.5f} "
            f"| {memory.get(name, float('nan')):.1f} |",
            flush=True,
        )


def steps(size_name: str, rounds: int, compiled: bool):
    size = SIZES[size_name]
    device = "cuda" if size_name == "paper" else "cpu"
    rate = matmul_rate(torch.bfloat16 if device == "cuda" else torch.float32, device)
    kinds = [("representation", True), ("representation", False), ("alignment", True)]
    if size_name == "paper":
        kinds.remove(("representation", False))  # weights, gradients and optimizer take 115 GB
    print(f"{size_name}, {device}, matmul rate {rate / 1e12:.3g} TFLOP/s")
    for stage, lora in kinds:
        start = time.perf_counter()
        bench = Bench(stage, size_name, lora)
        print(f"\nset up in {time.perf_counter() - start:.0f} s", flush=True)
        what = f"{stage.capitalize()}, {'LoRA' if lora else 'full training'}"
        padded, large, many = (
            bench.batch(tokens) for tokens in (size.padded_tokens, size.tokens, size.gradcache_tokens)
        )
        gradcache = {"GradCache": (many, {"chunk": size.chunk})} if stage == "representation" else {}
        straightforward = {"padded": (padded, {"padded": True})}
        if stage == "alignment":
            straightforward["padded, full logits"] = (padded, {"padded": True, "full_logits": True})
        if size.padded_tokens == size.tokens and not compiled:
            contenders = {"plain": (large, {}), **gradcache, **straightforward}
            compare(bench, what, contenders, rounds, rate)
            continue
        compare(bench, f"{what}, against padding", {"plain": (padded, {}), **straightforward}, rounds, rate)
        if compiled:
            # Cannot be undone, and gains the padded towers less.
            bench.embedder.compile_layers()
        title = f"{what}, {'compiled layers' if compiled else 'not compiled'}"
        compare(bench, title, {"plain": (large, {}), **gradcache}, rounds, rate)
        del bench
        release()


# Peak memory. On the CPU each figure comes from a process of its own, whose memory has no history.


def release():
    """Give back a bench's memory and its compiled layers: both stages together exceed torch's limit of graphs."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


def memory(size_name: str, rounds: int, compiled: bool):
    """Of a step against the tokens of its batch, beyond weights, gradients and optimizer."""
    size = SIZES[size_name]
    contenders = {
        "representation, plain": ("representation", {}),
        "representation, GradCache": ("representation", {"chunk": size.chunk}),
        "representation, padded": ("representation", {"padded": True}),
        "alignment, plain": ("alignment", {}),
        "alignment, padded, full logits": ("alignment", {"padded": True, "full_logits": True}),
    }
    if size_name == "paper":
        # The others do not fit at these sizes; where they do, the steps have said what they take.
        contenders = {name: value for name, value in contenders.items() if "GradCache" in name}
    print(f"\nMiB that a step takes (LoRA, chunks of {size.chunk:,} tokens), by tokens of the batch\n")
    print(f"| contender | {' | '.join(f'{tokens:,}' for tokens in size.growth)} |")
    print(f"|---{'|---' * len(size.growth)}|")
    bench = Bench("representation", size_name, lora=True) if size_name == "paper" else None
    if bench is not None and compiled:
        bench.embedder.compile_layers()
    for name, (stage, options) in contenders.items():
        cells = []
        for position, tokens in enumerate(size.growth):
            if "chunk" not in options and position > 1:
                cells.append("")  # gigabytes, to say again that they grow
                continue
            if bench is not None:
                batch = bench.batch(tokens)
                taken = take(lambda batch=batch, options=options: bench.step(batch, **options), "cuda")
            else:
                taken = apart("step", stage=stage, size_name=size_name, tokens=tokens, options=options)
            cells.append(f"{taken['bytes'] / 2**20:,.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def alignment_loss(size_name: str, rounds: int, compiled: bool):
    """Forward and backward of the LM head and its loss; half of the positions are the encoder's, half the LLM's."""
    positions, hidden = SIZES[size_name].logits
    device = "cuda" if size_name == "paper" else "cpu"
    own = "Liger's fused loss" if device == "cuda" and is_liger_kernel_available() else "in chunks"
    ways = {"full": "full logits", "labels": "label positions", "own": f"label positions, {own} (ours)"}
    taken = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            taken[way].append(measure("lm_head", device, way=way, positions=positions, hidden=hidden))
    print(f"\nAlignment loss, {VOCABULARY:,} vocabulary entries, {positions:,} positions, {positions // 2:,} labels\n")
    print("| way | s | MiB | time / full | memory / full | loss |")
    print("|---|---|---|---|---|---|")
    medians = {
        way: {name: statistics.median(run[name] for run in runs) for name in ("seconds", "bytes", "result")}
        for way, runs in taken.items()
    }
    for way, name in ways.items():
        median, full = medians[way], medians["full"]
        print(
            f"| {name} | {median['seconds']:.3g} | {median['bytes'] / 2**20:,.0f} "
            f"| {median['seconds'] / full['seconds']:.2f} | {median['bytes'] / full['bytes']:.2f} "
            f"| {median['result']:.4f} |",
            flush=True,
        )


def dense_loss(size_name: str, rounds: int, compiled: bool):
    """Forward and backward of the contrastive loss of 4,096 queries, a positive and six negatives each."""
    size = SIZES[size_name].towers["llm"]["hidden_size"]
    device = "cuda" if size_name == "paper" else "cpu"
    print(f"\nContrastive loss of 4,096 queries x (1 + 7) texts, embeddings of {size}\n")
    print("| similarity | s | MiB |")
    print("|---|---|---|")
    for similarity in ("l2", "cosine"):
        taken = measure("contrastive", device, queries=4096, texts=7, size=size, similarity=similarity)
        print(f"| {similarity} | {taken['seconds']:.3g} | {taken['bytes'] / 2**20:,.0f} |", flush=True)


def prepare_step(stage: str, size_name: str, tokens: int, options: dict) -> Callable[[], float]:
    bench = Bench(stage, size_name, lora=True)
    bench.step(bench.batch(0), **options)  # the optimizer's state
    batch = bench.batch(tokens)
    return lambda: bench.step(batch, **options)


def prepare_lm_head(device: str, way: str, positions: int, hidden: int) -> Callable[[], float]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    llm = MistralConfig(vocab_size=VOCABULARY, **SIZES["tiny"].towers["llm"] | {"hidden_size": hidden})
    head = LMHead(LusiferConfig(llm_config=llm)).to(device, dtype).requires_grad_(False)
    states = torch.randn(positions, hidden, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (positions,), device=device)
    chosen = torch.arange(positions // 2, positions, device=device)

    def run() -> float:
        if way == "full":
            ignored = labels.index_fill(0, torch.arange(positions // 2, device=device), IGNORED)
            loss = head._loss(states, ignored)
        else:
            loss = (head._loss if way == "labels" else head)(states[chosen], labels[chosen])
        loss = loss / len(chosen)
        loss.backward()
        return loss.item()

    return run


def prepare_contrastive(device: str, queries: int, texts: int, size: int, similarity: str) -> Callable[[], float]:
    torch.manual_seed(0)
    centres = torch.randn(queries, size, device=device)
    rows = torch.arange(queries, device=device).repeat(1 + texts)
    kinds = torch.tensor([0, 1] + [2] * (texts - 1), device=device).repeat_interleave(queries)
    embeddings = (centres[rows] + torch.randn(len(rows), size, device=device)).requires_grad_()
    text_ids = torch.arange(len(rows), device=device)

    def run() -> float:
        loss = contrastive_loss(
            embeddings, rows, kinds, similarity=similarity, miner_epsilon=0.25, text_ids=text_ids
        ).loss
        loss.backward()
        return loss.item()

    return run


PREPARE = {"step": prepare_step, "lm_head": prepare_lm_head, "contrastive": prepare_contrastive}


def measure(what: str, device: str, **options) -> dict:
    if device == "cpu":
        return apart(what, device=device, **options)
    run = PREPARE[what](device=device, **options)
    run()
    return take(run, device)


def apart(what: str, **options) -> dict:
    """`take` in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps({"what": what, "options": options})]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def take(run: Callable[[], float], device: str) -> dict:
    """Seconds, and bytes beyond what there was before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_memory()
    return {"seconds": time.perf_counter() - start, "bytes": peak - before, "result": result}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="36M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the layers of the larger steps")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(take(PREPARE[args.measure["what"]](**args.measure["options"]), "cpu")))
        return
    functions = dict(zip(PARTS, (steps, memory, alignment_loss, dense_loss), strict=True))
    for part in args.parts:
        functions[part](args.size, args.rounds, args.compile)


if __name__ == "__main__":
    main()
