"""
A tiny LUSIFER trained in minutes, on any machine, with nothing to download.

In three steps: (1) `prepare` makes two tiny backbones and a data set, (2) train.py makes the four steps of
configs/quickstart, (3) the result is loaded in every way, scored on what was held out, and searched with.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from .modeling_lusifer import LusiferModel
from .publishing import new_folder
from .quickstart_data import write_docstring_data
from .training.evaluation import EvalSource, evaluate_sources, load_eval_sources


# What the configs name; relative, as they are, to a checkout.
FOLDER, CONFIGS = Path("outputs/quickstart"), Path("configs/quickstart")
STEPS = ("1_reconstruction", "2_reconstruction_completion", "3_retrieval", "4_all")
BACKBONES = ("tiny-xlm-roberta", "tiny-mistral")
INSTRUCTION = "Find:"
# Of both backbones: so small that random weights learn something in minutes on a CPU.
SIZE = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 48, "intermediate_size": 384}
SIZE |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Searched for when the model is finished.
QUERIES = ("read a compressed file", "send an email message", "remove an item from a dictionary")

# The same three sentences in the paper's 14 languages, written for this package.
SENTENCES = {
    "en": [
        "The train to the sea leaves at seven every morning.",
        "Our neighbour grows tomatoes on her balcony.",
        "How long does it take to learn a new language?",
    ],
    "es": [
        "El tren hacia el mar sale a las siete todas las mañanas.",
        "Nuestra vecina cultiva tomates en su balcón.",
        "¿Cuánto tiempo se tarda en aprender un idioma nuevo?",
    ],
    "ru": [
        "Поезд к морю отправляется каждое утро в семь часов.",
        "Наша соседка выращивает помидоры на балконе.",
        "Сколько времени нужно, чтобы выучить новый язык?",
    ],
    "fr": [
        "Le train pour la mer part tous les matins à sept heures.",
        "Notre voisine cultive des tomates sur son balcon.",
        "Combien de temps faut-il pour apprendre une nouvelle langue ?",
    ],
    "vi": [
        "Chuyến tàu ra biển khởi hành lúc bảy giờ mỗi sáng.",
        "Cô hàng xóm của chúng tôi trồng cà chua trên ban công.",
        "Mất bao lâu để học một ngôn ngữ mới?",
    ],
    "fa": [
        "قطار دریا هر روز صبح ساعت هفت حرکت می‌کند.",
        "همسایهٔ ما در بالکن خانه‌اش گوجه‌فرنگی پرورش می‌دهد.",
        "یاد گرفتن یک زبان تازه چقدر طول می‌کشد؟",
    ],
    "id": [
        "Kereta ke laut berangkat pukul tujuh setiap pagi.",
        "Tetangga kami menanam tomat di balkonnya.",
        "Berapa lama waktu yang dibutuhkan untuk belajar bahasa baru?",
    ],
    "ar": [
        "يغادر القطار المتجه إلى البحر في السابعة من كل صباح.",
        "تزرع جارتنا الطماطم في شرفتها.",
        "كم من الوقت يستغرق تعلم لغة جديدة؟",
    ],
    "fi": [
        "Juna merelle lähtee joka aamu kello seitsemän.",
        "Naapurimme kasvattaa tomaatteja parvekkeellaan.",
        "Kuinka kauan uuden kielen oppiminen kestää?",
    ],
    "ko": [
        "바다로 가는 기차는 매일 아침 일곱 시에 출발합니다.",
        "우리 이웃은 발코니에서 토마토를 키웁니다.",
        "새로운 언어를 배우는 데 얼마나 걸리나요?",
    ],
    "hi": [
        "समुद्र की ओर जाने वाली ट्रेन हर सुबह सात बजे निकलती है।",
        "हमारी पड़ोसन अपनी बालकनी में टमाटर उगाती है।",
        "नई भाषा सीखने में कितना समय लगता है?",
    ],
    "bn": [
        "সমুদ্রের ট্রেনটি প্রতিদিন সকাল সাতটায় ছাড়ে।",
        "আমাদের প্রতিবেশী তার বারান্দায় টমেটো চাষ করেন।",
        "একটি নতুন ভাষা শিখতে কত সময় লাগে?",
    ],
    "te": [
        "సముద్రానికి వెళ్ళే రైలు ప్రతి ఉదయం ఏడు గంటలకు బయలుదేరుతుంది.",
        "మా పొరుగామె తన బాల్కనీలో టమాటాలు పెంచుతుంది.",
        "కొత్త భాష నేర్చుకోవడానికి ఎంత సమయం పడుతుంది?",
    ],
    "sw": [
        "Treni ya kwenda baharini huondoka saa moja kila asubuhi.",
        "Jirani yetu hulima nyanya kwenye roshani yake.",
        "Inachukua muda gani kujifunza lugha mpya?",
    ],
}


def prepare(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write what configs/quickstart trains on, `backbones` and `data`; returns the numbers of rows."""
    with new_folder(folder) as partial:
        counts = write_docstring_data(partial / "data")
        lines = (partial / "data" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["query"] for line in lines]
        make_tiny_backbones(
            partial / "backbones", seed, texts, vocabularies=(3600, 2400), **SIZE, initializer_range=0.02
        )
    return counts


def score(model: LusiferModel, folder: Path) -> float:
    """nDCG@10 on the held-out pairs in `folder`, what `prepare` wrote."""
    source = EvalSource(str(folder / "data" / "held_out"), "retrieval", instruction=INSTRUCTION)
    return evaluate_sources(model, model.tokenizer, load_eval_sources([source]), max_length=48)["mean"]


def search(model: SentenceTransformer, folder: Path, queries: Sequence[str]) -> list[list[str]]:
    """The three documents in `folder`, of those trained on, that are nearest to each query, the nearest first."""
    lines = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["positive"][0] for line in lines]
    similarities = model.similarity(
        model.encode_query(list(queries), show_progress_bar=False),
        model.encode_document(documents, show_progress_bar=False),
    )
    return [[documents[index] for index in row] for row in similarities.topk(3).indices.tolist()]


def make_tiny_backbones(
    folder: str | Path,
    seed: int = 0,
    texts: Sequence[str] = (),
    vocabularies: tuple[int, int] = (1200, 800),
    **fields,
) -> tuple[Path, Path]:
    """
    An XLM-R and a Mistral with random weights, and tokenizers trained on `SENTENCES` and `texts`; returns the folders.

    `fields` are of both configs. By default the weights are wide (standard deviation 0.2), so that vectors of
    different texts differ visibly.
    """
    folder = Path(folder)
    texts = [*(text for sentences in SENTENCES.values() for text in sentences), *texts]
    encoder_tokenizer = unigram_tokenizer(texts, vocabularies[0])
    llm_tokenizer = byte_level_tokenizer(texts, vocabularies[1])
    encoder_fields = {
        "vocab_size": len(encoder_tokenizer),
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.2,
    }
    llm_fields = {
        "vocab_size": len(llm_tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "max_position_embeddings": 1024,
        "sliding_window": None,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = XLMRobertaModel(XLMRobertaConfig(**encoder_fields | fields))
        llm = MistralForCausalLM(MistralConfig(**llm_fields | fields))
    # Words say more than their places: large, these would take long to be learned around.
    encoder.embeddings.position_embeddings.weight.data *= 0.1
    paths = tuple(folder / name for name in BACKBONES)
    for path, model, tokenizer in zip(paths, (encoder, llm), (encoder_tokenizer, llm_tokenizer), strict=True):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def embed_in_every_way(folder: Path, scratch: Path) -> dict[str, np.ndarray]:
    """Embed `SENTENCES` with the model in `folder`, loaded in every way; returns embeddings by way."""
    texts = [text for sentences in SENTENCES.values() for text in sentences]
    return {
        "AutoModel": AutoModel.from_pretrained(folder).encode(texts, show_progress_bar=False),
        "SentenceTransformer": SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False),
        **_embed_with_remote_code(folder, texts, scratch),
    }


def _embed_with_remote_code(folder: Path, texts: list[str], scratch: Path) -> dict[str, np.ndarray]:
    """The same in a fresh process that cannot import this package and does not go online."""
    source, result = scratch / "texts.json", scratch / "embeddings.npz"
    source.write_text(json.dumps(texts), encoding="utf-8")
    # -I: neither the current folder nor the environment can provide the package.
    command = [sys.executable, "-I", "-c", _REMOTE_CODE_SCRIPT, str(folder.resolve()), str(source), str(result)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    finished = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise OSError(f"Loading the model as remote code failed:\n{finished.stderr}")
    with np.load(result) as vectors:
        return {f"{way} with trust_remote_code=True, without this package": vectors[way] for way in vectors}


# Runs without this package, as someone else's machine would. Arguments: folder, texts (JSON), result (.npz).
_REMOTE_CODE_SCRIPT = """
import json, sys

sys.modules["lusifer_hf"] = None  # importing it is an error from here on

import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

folder, texts, result = sys.argv[1:]
texts = json.loads(open(texts, encoding="utf-8").read())
auto_model = AutoModel.from_pretrained(folder, trust_remote_code=True)
sentence_transformer = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
np.savez(result, AutoModel=auto_model.encode(texts), SentenceTransformer=sentence_transformer.encode(texts))
"""


def unigram_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """As XLM-R's, trained on `texts`."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]  # XLM-R's ids 0 to 3
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
    )


def byte_level_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """As Mistral's, trained on `texts`: it has neither a padding nor a mask token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=1024
    )
