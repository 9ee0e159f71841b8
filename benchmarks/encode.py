"""
Speed of `model.encode` against the padded loop of the research code and against stock sentence-transformers.

Every contender embeds the same texts with the same weights and must return the same vectors; rounds are interleaved
(but for the compiled layers, which cannot be undone and so come last) and figures are ratios of medians.

    python benchmarks/encode.py                       # 36 M parameters, float32 and bfloat16, this CPU
    python benchmarks/encode.py --size paper          # XLM-R-large + Mistral-7B dimensions, bfloat16, CUDA
    python benchmarks/encode.py --memory              # peak memory against the number of texts
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from memory import peak_memory
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, MistralConfig, XLMRobertaConfig

from lusifer_hf import LusiferConfig, LusiferModel
from lusifer_hf.quickstart import SENTENCES, make_tiny_backbones


SIZES = {
    "small": {
        "encoder": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536},
        "llm": {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 1536,
        },
    },
    "paper": {
        "encoder": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        "llm": {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
        },
    },
}


def build_model(size: str, dtype: torch.dtype, device: str, folder: Path) -> LusiferModel:
    """Random weights of the given size, saved with a tokenizer so that sentence-transformers can load the folder."""
    encoder, _ = make_tiny_backbones(folder)
    config = LusiferConfig(
        encoder_config=XLMRobertaConfig(
            vocab_size=2000, max_position_embeddings=514, type_vocab_size=1, **SIZES[size]["encoder"]
        ),
        llm_config=MistralConfig(
            vocab_size=2000, max_position_embeddings=1024, sliding_window=None, **SIZES[size]["llm"]
        ),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LusiferModel._from_config(config, dtype=dtype).eval()
    model.tokenizer_source = {"pretrained_model_name_or_path": encoder}
    return model


def make_texts(tokenizer, count: int, seed: int = 0) -> list[str]:
    """Half of 8 to 24 tokens, half of 60 to 400, in random order, from the words of our own sentences."""
    rng = random.Random(seed)
    words = [word for sentences in SENTENCES.values() for text in sentences for word in text.split()]
    cost = {word: len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words}
    texts = []
    for index in range(count):
        target = rng.randint(8, 24) if index % 2 else rng.randint(60, 400)
        chosen, length = [], 2
        while length < target:
            word = rng.choice(words)
            chosen.append(word)
            length += cost[word]
        texts.append(" ".join(chosen))
    rng.shuffle(texts)
    return texts


class PaddedLoop:
    """What the research code does: 32 texts in the given order, padded to a multiple of 8, stock towers on SDPA."""

    def __init__(self, model: LusiferModel):
        self.tokenizer, self.device = model.tokenizer, model.device
        towers = []
        for tower in (model.encoder, model.llm):
            config = type(tower.config).from_dict(tower.config.to_dict())
            config.is_causal = False
            with torch.device("meta"):
                stock = AutoModel.from_config(config, attn_implementation="sdpa", dtype=model.dtype)
            if hasattr(stock, "pooler"):
                stock.pooler = None
            stock.load_state_dict(tower.state_dict(), assign=True)
            for (_, buffer), (name, own) in zip(tower.named_buffers(), stock.named_buffers(), strict=True):
                module, _, attribute = name.rpartition(".")
                setattr(stock.get_submodule(module), attribute, buffer)
                del own
            towers.append(stock.eval())
        self.encoder, self.llm = towers
        self.connector, self.projection = model.connector, model.projection

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int = 32) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(
                texts[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=512,
                pad_to_multiple_of=8,
                return_tensors="pt",
            ).to(self.device)
            mask = batch["attention_mask"]
            states = self.connector.mlp(self.encoder(**batch).last_hidden_state)
            added = self.connector.added_tokens.expand(len(mask), -1, -1)
            states = torch.cat([states, added], dim=1)
            # The added token after the pads, but at the position after the text, so that the vectors are ours.
            positions = torch.arange(mask.shape[1], device=self.device).expand_as(mask)
            positions = torch.cat([positions, mask.sum(dim=1, keepdim=True)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            states = self.llm(
                inputs_embeds=states, attention_mask=mask, position_ids=positions, is_causal=False, use_cache=False
            ).last_hidden_state
            weights = mask.unsqueeze(2)
            pooled = ((states.float() * weights).sum(dim=1) / weights.sum(dim=1)).to(states.dtype)
            vectors.append(self.projection(pooled).float().cpu())
        return torch.cat(vectors).numpy()


def useful_flops(model: LusiferModel, lengths: list[int]) -> float:
    """Multiply-adds (as two operations) of the matrices and of attention, on kept tokens only."""
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    encoder, llm = model.config.encoder_config, model.config.llm_config

    def linear(module: nn.Module) -> int:
        return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))

    flops = 2 * tokens * (linear(model.encoder) + linear(model.connector) + linear(model.llm))
    return flops + 4 * squares * (
        encoder.num_hidden_layers * encoder.hidden_size + llm.num_hidden_layers * llm.hidden_size
    )


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large square product on random data, best of five."""
    size = 8192 if device == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        repeats = 10 if device == "cuda" else 2
        for _ in range(repeats):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, repeats * 2 * size**3 / (time.perf_counter() - start))
    return best


def compare(size: str, dtype: torch.dtype, device: str, count: int, rounds: int, compiled: bool):
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(size, dtype, device, Path(folder))
        texts = make_texts(model.tokenizer, count)
        lengths = [len(row) for row in model.tokenizer(texts, truncation=True, max_length=512)["input_ids"]]
        contenders = {"model.encode": lambda: model.encode(texts), "padded loop": PaddedLoop(model)}
        contenders["padded loop"] = lambda loop=contenders["padded loop"]: loop.encode(texts)
        stock = None
        if size == "small":  # saving 15 GB to load them again would measure the disk
            model.save_pretrained(Path(folder) / "model")
            stock = SentenceTransformer(str(Path(folder) / "model"), device=device, model_kwargs={"dtype": dtype})
            contenders["sentence-transformers"] = lambda: stock.encode(texts, batch_size=32)
        seconds, vectors, memory = {name: [] for name in contenders}, {}, {}

        def measure(name: str):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            vectors[name] = contenders[name]()
            seconds[name].append(time.perf_counter() - start)
            if device == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() / 2**30

        for name in contenders:  # warm up
            contenders[name]()
        for _ in range(rounds):
            for name in contenders:
                measure(name)
        if compiled:
            start = time.perf_counter()
            model.encode(texts[: len(texts) // 4], compile_layers=True)
            print(f"compiled the layers in {time.perf_counter() - start:.0f} s")
            contenders["compiled"], seconds["compiled"] = contenders["model.encode"], []
            contenders["compiled"]()
            for _ in range(rounds):
                measure("compiled")

        rate, flops = matmul_rate(dtype, device), useful_flops(model, lengths)
        own = statistics.median(seconds["model.encode"])
        print(
            f"\n{size}, {str(dtype).removeprefix('torch.')}, {device}: {count} texts, {sum(lengths):,} tokens, "
            f"matmul rate {rate / 1e12:.3g} TFLOP/s"
        )
        print("| contender | tokens/s | time / model.encode | share of the matmul rate | least cosine | peak GiB |")
        print("|---|---|---|---|---|---|")
        reference = vectors["padded loop"]
        for name in contenders:
            median = statistics.median(seconds[name])
            cosine = (vectors[name] * reference).sum(1) / np.linalg.norm(vectors[name], axis=1)
            cosine /= np.linalg.norm(reference, axis=1)
            print(
                f"| {name} | {sum(lengths) / median:,.0f} | {median / own:.2f} | {flops / median / rate:.0%} "
                f"| {cosine.min():.5f} | {memory.get(name, float('nan')):.1f} |"
            )


def measure_memory(counts: list[int]):
    """Peak resident memory of one `encode` over short texts, each count in a process of its own."""
    print("| texts | peak MiB | result MiB |")
    print("|---|---|---|")
    for count in counts:
        code = "import sys; sys.path.insert(0, sys.argv[1]); import encode; encode.memory_process(int(sys.argv[2]))"
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(count)]
        peak, result = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
        print(f"| {count:,} | {peak} | {result} |")


def memory_process(count: int):
    with tempfile.TemporaryDirectory() as folder:
        encoder, llm = make_tiny_backbones(folder)
        model = LusiferModel.from_backbones(str(encoder), str(llm))
        sentences = [text for texts in SENTENCES.values() for text in texts]
        texts = [sentences[index % len(sentences)] for index in range(count)]
        vectors = model.encode(texts)
    print(peak_memory() // 2**20, vectors.nbytes // 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--texts", type=int, help="number of texts (128; 2,880 at paper size)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also measure compile_layers=True")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of speed")
    args = parser.parse_args()
    if args.memory:
        measure_memory([20_000, 100_000, 300_000])
    elif args.size == "paper":
        compare("paper", torch.bfloat16, "cuda", args.texts or 2880, args.rounds, args.compile)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            compare("small", dtype, "cpu", args.texts or 128, args.rounds, args.compile)


if __name__ == "__main__":
    main()
