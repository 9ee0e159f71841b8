"""
A batch holds the ids that `model.encode` reads, and whatever is drawn for a row (texts, task, masks) depends on
(seed, epoch, data set, row) alone: not on the batch, the process or the worker.
"""

import copy
import json
from collections import Counter, defaultdict

import datasets
import numpy as np
import pytest
import torch
from golden import expected_values, golden_case, needs_golden, read_json
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lusifer_hf import LusiferConfig, LusiferModel
from lusifer_hf.data.collators import (
    RECONSTRUCT,
    WRITE_QUESTION,
    AlignmentCollator,
    RepresentationCollator,
    alignment_task,
    text_id,
)
from lusifer_hf.data.mixture import DataSource, load_mixture
from lusifer_hf.encoding_lusifer import keep_special_strings_as_text
from lusifer_hf.quickstart import SENTENCES


TEXTS = [text for sentences in SENTENCES.values() for text in sentences]
INSTRUCTION = "Find the answer."
SOURCES = [
    DataSource("plain.jsonl"),
    DataSource("asked.jsonl", instruction=INSTRUCTION, in_batch_negatives=False),
]


def rows_of(dataset: int, number: int = 4, epoch: int = 0) -> list[dict]:
    """Row i has 1 + i positives and 2i negatives."""
    return [
        {
            "dataset": dataset,
            "row": 10 * i,
            "epoch": epoch,
            "query": TEXTS[i],
            "positive": [f"{TEXTS[i + 1]} +{j}" for j in range(1 + i)],
            "negative": [f"{TEXTS[i + 2]} -{j}" for j in range(2 * i)],
            "answer": None,
            "cluster": None,
        }
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def model(tiny_repository) -> LusiferModel:
    return LusiferModel.from_pretrained(tiny_repository)


@pytest.fixture(scope="module")
def tokenizers(model):
    return model.tokenizer, AutoTokenizer.from_pretrained(**model.llm_tokenizer_source)


def ids_of(batch: dict, prefix: str = "") -> list[list[int]]:
    """Each row without its padding, which stands on the right."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    lengths = mask.sum(dim=1)
    assert ids.shape == mask.shape and ids.shape[1] == lengths.max()
    assert torch.equal(mask, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def encoded_ids(model, monkeypatch, texts, **options) -> list[list[int]]:
    """What `model.encode` feeds its towers with."""
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(model, "_embed", lambda ids: read.extend(ids) or torch.zeros(len(ids), 64))
        for text in texts:  # it sorts by length
            model.encode([text], **options)
    return read


# Representation


def representation(tokenizer, config=None, sources=SOURCES, **options) -> RepresentationCollator:
    return RepresentationCollator(tokenizer, config or LusiferConfig(), sources, **{"max_length": 64, **options})


def test_representation_batch(tokenizers):
    items = rows_of(1)
    batch = representation(tokenizers[0], max_positives=2, max_negatives=3)(items)
    kinds, rows = batch["kinds"].tolist(), batch["rows"].tolist()
    assert kinds == sorted(kinds)  # queries, positives, negatives
    assert Counter(zip(kinds, rows, strict=True)) == {
        **{(0, row): 1 for row in range(4)},
        **{(1, row): min(2, 1 + row) for row in range(4)},
        **{(2, row): min(3, 2 * row) for row in range(1, 4)},
    }
    assert rows[:4] == [0, 1, 2, 3]
    assert batch["dataset"] == 1 and batch["in_batch_negatives"] is False
    assert batch["ids"] == [("asked", 0), ("asked", 10), ("asked", 20), ("asked", 30)]
    tensors = [value for value in batch.values() if torch.is_tensor(value)]
    assert len(tensors) == 5 and all(tensor.dtype == torch.int64 for tensor in tensors)
    # Each text belongs to its row and kind.
    known = {text_id(text): (0, i) for i, item in enumerate(items) for text in [item["query"]]}
    known |= {text_id(text): (1, i) for i, item in enumerate(items) for text in item["positive"]}
    known |= {text_id(text): (2, i) for i, item in enumerate(items) for text in item["negative"]}
    assert [known[i] for i in batch["text_ids"].tolist()] == list(zip(kinds, rows, strict=True))
    assert len(set(batch["text_ids"].tolist())) == len(kinds)
    assert representation(tokenizers[0])(rows_of(0))["in_batch_negatives"] is True


@pytest.mark.parametrize("template", ["default", "research"])
@pytest.mark.parametrize("dataset", [0, 1])
def test_ids_are_those_of_encode(model, monkeypatch, template, dataset):
    monkeypatch.setattr(model.config, "prompt_template", template)
    long = rows_of(dataset, 1)[0] | {"query": "na " * 100, "negative": ["a </s> b", "<s>"], "row": 7}
    items = [*rows_of(dataset), long]
    batch = representation(model.tokenizer, model.config, max_negatives=99, max_length=40)(items)
    read = ids_of(batch)
    texts = {
        0: [item["query"] for item in items],
        1: [text for item in items for text in item["positive"]][:-1],
        2: [text for item in items for text in item["negative"]],
    }
    instruction = SOURCES[dataset].instruction
    for kind, name in enumerate(("query", "document", "document")):
        own = [ids for ids, k in zip(read, batch["kinds"], strict=True) if k == kind]
        options = {"prompt_name": name, "instruction": instruction, "max_length": 40}
        if not instruction and template == "default":
            options = {"max_length": 40}
        expected = encoded_ids(model, monkeypatch, texts[kind], **options)
        if kind == 1:  # of the fourth row three of four, in an order that is drawn
            assert own[:6] == expected[:6] and all(ids in expected[6:] for ids in own[6:9]) and len(own) == 10
        else:
            assert own == expected
    assert len(read[4]) == 40 and read[4][-1] == model.tokenizer.eos_token_id


def chosen(batch: dict, row: int) -> list[int]:
    return batch["text_ids"][(batch["rows"] == row) & (batch["kinds"] > 0)].tolist()


def test_drawn_texts_depend_on_the_row_alone(tokenizers):
    items = rows_of(1, 12)
    collator = representation(tokenizers[0], max_positives=3, max_negatives=4)
    together = collator(items)
    for row, item in enumerate(items):
        assert chosen(collator([item]), 0) == chosen(together, row)
    assert chosen(collator(items[::-1]), 1) == chosen(together, 10)
    # Fewer than the maximum come as they are; more are drawn anew each epoch, without repetition.
    assert chosen(together, 2) == [text_id(text) for text in items[2]["positive"] + items[2]["negative"]]
    draws = {tuple(chosen(collator([items[11] | {"epoch": epoch}]), 0)) for epoch in range(20)}
    assert len(draws) > 15 and all(len(set(draw)) == 7 for draw in draws)
    assert chosen(collator([items[11]]), 0) != chosen(
        representation(tokenizers[0], max_positives=3, max_negatives=4, seed=1)([items[11]]), 0
    )
    counts = Counter(i for epoch in range(600) for i in chosen(collator([items[11] | {"epoch": epoch}]), 0)[:3])
    assert len(counts) == 12 and all(110 < count < 190 for count in counts.values())  # 150 expected


def test_text_ids():
    assert text_id("") == 0xE4A6A0577479B2B4 >> 1  # not python's `hash`, which differs from process to process
    assert text_id("Übung") == 7609794746554354688 != text_id("U\u0308bung")
    assert all(0 <= text_id(str(i)) < 2**63 for i in range(1000))


def test_errors(tokenizers):
    tokenizer, llm_tokenizer = tokenizers
    with pytest.raises(ValueError, match=r"max_length=6 leaves no room .* of prompt of the data set asked"):
        representation(tokenizer, max_length=6)
    representation(tokenizer, sources=SOURCES[:1], max_length=6)
    with pytest.raises(ValueError, match="max_negatives=0 leaves asked, which"):
        representation(tokenizer, max_negatives=0)
    with pytest.raises(ValueError, match=r"max_length=6 leaves no room .* of prompt of the data set plain"):
        AlignmentCollator(tokenizer, llm_tokenizer, LusiferConfig(), SOURCES[:1], 6)
    bare = copy.deepcopy(llm_tokenizer)
    bare.unk_token = bare.eos_token = None
    with pytest.raises(ValueError, match="has no mask, unk, pad or eos token"):
        AlignmentCollator(tokenizer, bare, LusiferConfig(), SOURCES[:1], 64)


# Alignment

ALIGNMENT = [
    DataSource("wiki.jsonl", task="reconstruction"),
    DataSource("passages.jsonl", task="passage_to_query", instruction=INSTRUCTION),
    DataSource("labels.jsonl", task="query_to_passage", instruction=INSTRUCTION),
]


def alignment(tokenizers, config=None, sources=ALIGNMENT, **options) -> AlignmentCollator:
    options = {"max_length": 64, **options}
    return AlignmentCollator(*tokenizers, config or LusiferConfig(), sources, **options)


def test_tasks_and_shares():
    """The shares and instructions of the published run."""

    def draw(dataset, number=4000):
        item = rows_of(dataset)[1]
        draws = (np.random.default_rng((1, epoch, dataset, item["row"])) for epoch in range(number))
        counts = Counter(alignment_task(item, ALIGNMENT[dataset], rng) for rng in draws)
        return {task: count / number for task, count in counts.items()}

    query, (first, second) = rows_of(0)[1]["query"], rows_of(0)[1]["positive"]
    assert draw(0) == {(RECONSTRUCT, query, None): 1.0}
    shares = {}
    for positive in (first, second):
        shares[INSTRUCTION, query, positive] = 0.3 / 2
        shares[RECONSTRUCT, positive, None] = 0.28 / 2
        shares[WRITE_QUESTION, positive, query] = 0.42 / 2
    assert draw(1) == pytest.approx(shares, abs=0.03)
    shares = {(INSTRUCTION, query, first): 0.45, (INSTRUCTION, query, second): 0.45, (RECONSTRUCT, query, None): 0.1}
    assert draw(2) == pytest.approx(shares, abs=0.03)
    for dataset in range(3):
        item = rows_of(dataset)[1] | {"answer": "so"}
        assert alignment_task(item, ALIGNMENT[dataset], None) == (ALIGNMENT[dataset].instruction, query, "so")


def test_published_shares(shared_folder):
    facts = read_json(shared_folder / "facts" / "training_data.json")["alignment"]
    assert facts["instructions"] == {"reconstruct": RECONSTRUCT, "question_from_passage": WRITE_QUESTION}
    # Those of `test_tasks_and_shares`.
    assert list(facts["passage_to_query_shares"].values()) == [0.3, 0.28, 0.42]
    assert list(facts["query_to_passage_shares"].values()) == [0.1, 0.9]


@needs_golden
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("MSMarco", "passage_to_query"),
        ("Banking77", "query_to_passage"),
        ("wikitext-103-filtered", "reconstruction"),
    ],
)
def test_tasks_of_the_research_code(name, task):
    """What its data set makes of each row is among what ours makes of it, over many epochs all of it."""
    golden = read_json(golden_case("data_datasets") / "expected.json")
    facts = read_json(golden_case("data_datasets").parents[1] / "facts" / "training_data.json")
    instruction = facts["datasets"][f"Hieuman/{name}"]["instruction"]
    theirs, ours = defaultdict(set), defaultdict(set)
    rows = golden["local"][f"Hieuman/{name}"]
    for case, items in golden.items():
        if case.startswith(f"alignment::Hieuman/{name}"):
            for number, item in enumerate(items):
                theirs[number].add((item["instruction"], item["query"], item.get("answer")))
    source = DataSource(name, task=task, instruction=instruction)
    for number, row in enumerate(rows):
        for epoch in range(60):
            rng = np.random.default_rng((777, epoch, 0, number))
            ours[number].add(alignment_task({"answer": None, **row}, source, rng))
    assert len(theirs) == len(rows) and all(theirs[number] <= ours[number] for number in theirs)
    assert max(len(tasks) for tasks in ours.values()) == {"passage_to_query": 6, "query_to_passage": 3}.get(task, 1)


def test_alignment_batch(tokenizers):
    tokenizer, llm_tokenizer = tokenizers
    items = [rows_of(0)[0], rows_of(1)[3] | {"answer": "Forty-two </s> <unk>"}, rows_of(0)[2]]
    batch = alignment(tokenizers, mask_probability=0.0)(items)
    assert set(batch) == {"input_ids", "attention_mask", "llm_input_ids", "llm_attention_mask", "labels", "ids"}
    assert batch["ids"] == [("wiki", 0), ("passages", 30), ("wiki", 20)]
    read, written = ids_of(batch), ids_of(batch, "llm_")
    texts = [f"{RECONSTRUCT}\n{TEXTS[0]}", f"{INSTRUCTION}\n{TEXTS[3]}", f"{RECONSTRUCT}\n{TEXTS[2]}"]
    assert read == tokenizer(texts)["input_ids"]
    # The instruction is to be written again, an answer stands alone; with BOS and EOS, which a text cannot hold.
    targets = [texts[0], "Forty-two </s> <unk>", texts[2]]
    assert [llm_tokenizer.decode(ids[1:-1]) for ids in written] == targets
    bos, eos = llm_tokenizer.bos_token_id, llm_tokenizer.eos_token_id
    assert all(ids[0] == bos and ids[-1] == eos and not {bos, eos} & set(ids[1:-1]) for ids in written)
    predicted = batch["llm_attention_mask"].bool()
    predicted[:, 0] = False
    assert torch.equal(batch["labels"] != -100, predicted) and not predicted.all(dim=0)[1:].all()
    assert torch.equal(batch["labels"][predicted], batch["llm_input_ids"][predicted])


def test_truncation_keeps_eos(tokenizers):
    items = [rows_of(0)[0] | {"query": "ab " * 200}]
    batch = alignment(tokenizers, max_length=50, mask_probability=0.0)(items)
    for prefix, tokenizer in zip(("", "llm_"), tokenizers, strict=True):
        (ids,) = ids_of(batch, prefix)
        assert len(ids) == 50 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


def test_masks(tokenizers):
    collator = alignment(tokenizers, mask_probability=0.3)
    items = [item | {"epoch": epoch} for epoch in range(30) for item in rows_of(0, 20)]
    batch = collator(items)
    labels, inputs, attention = batch["labels"], batch["llm_input_ids"], batch["llm_attention_mask"]
    plain = alignment(tokenizers, mask_probability=0.0)(items)
    assert torch.equal(labels, plain["labels"]) and torch.equal(batch["input_ids"], plain["input_ids"])
    assert attention[:, 0].all() and (inputs[:, 0] == tokenizers[1].bos_token_id).all()
    text = labels != -100
    assert (attention[:, 1:][~text[:, 1:]] == 0).all() and torch.equal(inputs[~text], plain["llm_input_ids"][~text])
    hidden, replaced = attention[text] == 0, inputs[text] != labels[text]
    assert (inputs[text][replaced] == tokenizers[1].unk_token_id).all()  # it has no mask token
    # Two independent draws for each token.
    number, close = len(hidden), 4 * (0.3 * 0.7 / len(hidden)) ** 0.5
    assert number > 10_000
    assert abs(hidden.float().mean() - 0.3) < close and abs(replaced.float().mean() - 0.3) < close
    assert abs((hidden & replaced).float().mean() - 0.09) < close
    places = torch.nonzero(text)[:, 1]
    assert (hidden[places == 1].float().mean() - 0.3).abs() < 0.1  # the first token too


def test_masks_depend_on_the_row_alone(tokenizers):
    def masks(collator, items):
        batch = collator(items)
        lengths = 1 + (batch["labels"] != -100).sum(dim=1)
        names = ("llm_input_ids", "llm_attention_mask", "labels")
        return [[batch[name][row, :length].tolist() for name in names] for row, length in enumerate(lengths)]

    collator = alignment(tokenizers)
    items = [item for dataset in range(3) for item in rows_of(dataset, 8)]
    together = masks(collator, items)
    assert [masks(collator, [item])[0] for item in items] == together
    assert masks(collator, items[::-1]) == together[::-1]
    for others in ([item | {"epoch": 1} for item in items], [item | {"row": item["row"] + 1} for item in items]):
        assert all(a != b for a, b in zip(masks(collator, others), together, strict=True))
    assert all(a != b for a, b in zip(masks(alignment(tokenizers, seed=1), items), together, strict=True))
    # Another data set with the same text and row number has other masks.
    assert masks(alignment(tokenizers, sources=ALIGNMENT[:1] * 2), [rows_of(1)[2]]) != masks(collator, [rows_of(0)[2]])


def test_prefix_lm_hides_nothing_from_attention(tokenizers):
    items = rows_of(0, 20)
    both = alignment(tokenizers)(items)
    batch = alignment(tokenizers, LusiferConfig(alignment_attention="prefix_lm"))(items)
    assert torch.equal(batch["llm_attention_mask"][:, 1:] == 0, batch["labels"][:, 1:] == -100)
    assert torch.equal(batch["llm_input_ids"], both["llm_input_ids"])
    assert (batch["llm_input_ids"] != batch["labels"])[batch["labels"] != -100].float().mean() > 0.3


def test_workers_change_nothing(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = [{"query": text, "positive": TEXTS[i + 1 : i + 4]} for i, text in enumerate(TEXTS[:-4])]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [DataSource(str(tmp_path / "x.jsonl"), task="passage_to_query")]
    mixture, collator = load_mixture(sources, "alignment"), alignment(tokenizers, sources=sources)
    order = [[(epoch, index) for index in range(i, i + 6)] for epoch in range(2) for i in range(0, 36, 6)]
    loaders = [DataLoader(mixture, batch_sampler=order, collate_fn=collator, num_workers=n) for n in (0, 2)]
    for here, there in zip(*loaders, strict=True):
        assert here.pop("ids") == there.pop("ids")
        assert all(torch.equal(here[name], there[name]) for name in here)


# The research code's collators


def research_tokenizer(name: str):
    return AutoTokenizer.from_pretrained(golden_case("data_collators") / "backbones" / name)


def encoder_tokenizer(name: str):
    tokenizer = research_tokenizer(name)
    keep_special_strings_as_text(tokenizer)
    return tokenizer


def assert_same_but_eos(ours: list[int], theirs: list[int], max_length: int, bos: list[int], eos: list[int]):
    """Equal id for id; only where the research code cuts EOS off, or adds none, ours has it."""
    if len(theirs) == max_length or theirs[-1:] != eos:
        theirs = (bos + theirs)[: max_length - 1] + eos
    assert ours == theirs


@needs_golden
@pytest.mark.parametrize("llm", ["mistral-tiny", "llama-tiny", "qwen2-tiny"])
@pytest.mark.parametrize("encoder", ["xlmr-tiny", "mt5-tiny"])
def test_alignment_ids_of_the_research_code(encoder, llm):
    case = golden_case("data_collators")
    config, golden = read_json(case / "config.json"), expected_values(case)
    run = f"pretraining::{encoder}::{llm}::mask0.0"
    tokenizer, llm_tokenizer = encoder_tokenizer(encoder), research_tokenizer(llm)
    sources = [
        DataSource(str(i), task="query_to_passage", instruction=row["instruction"])
        for i, row in enumerate(config["pretraining_examples"])
    ]
    items = [
        # With an answer its row is that of its query; without, the research code's are all reconstructions.
        {"dataset": i, "row": i, "epoch": 0, "query": row["query"], "answer": row.get("answer"), "positive": []}
        for i, row in enumerate(config["pretraining_examples"])
    ]
    for source, item in zip(sources, items, strict=True):
        if item["answer"] is None:
            source.task = "reconstruction"
            assert source.instruction == RECONSTRUCT
    template = LusiferConfig(prompt_template="research")
    options = {"max_length": config["runs"][run]["max_seq_length"], "mask_probability": 0.0}
    batch = AlignmentCollator(tokenizer, llm_tokenizer, template, sources, **options)(items)
    for name, theirs, tok in (("", "universal_learner_", tokenizer), ("llm_", "lm_", llm_tokenizer)):
        special = config["runs"][run]["lm_special_tokens"] if name else {"bos": True, "eos": True}
        bos = [tok.bos_token_id] if tok.bos_token_id is not None and "bos" not in special else []
        rows = zip(golden[f"{run}::{theirs}input_ids"], golden[f"{run}::{theirs}attention_mask"], strict=True)
        for ours, (ids, mask) in zip(ids_of(batch, name), rows, strict=True):
            assert_same_but_eos(ours, ids[mask.bool()].tolist(), options["max_length"], bos, [tok.eos_token_id])


@needs_golden
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("encoder", ["xlmr-tiny", "mt5-tiny"])
def test_representation_ids_of_the_research_code(encoder, seed):
    case = golden_case("data_collators")
    config, golden = read_json(case / "config.json"), expected_values(case)
    run = f"replearning::{encoder}::seed{seed}"
    tokenizer, length = encoder_tokenizer(encoder), config["runs"][run]["max_seq_length"]
    rows = zip(config["replearning_examples"], config["runs"][run]["chosen"], strict=True)
    for number, (row, texts) in enumerate(rows):
        # There rows of several data sets may share a batch.
        source = DataSource("x", instruction=row["instruction"])
        item = {"dataset": 0, "row": number, "epoch": 0, "query": row["query"], **texts}
        template, names = LusiferConfig(prompt_template="research"), ("query", "pos", "neg")
        batch = representation(tokenizer, template, [source], max_length=length)([item])
        assert len(batch["kinds"]) == 1 + len(texts["positive"]) + len(texts["negative"])
        ids = [golden[f"{run}::{name}_input_ids"][number].reshape(-1, length) for name in names]
        masks = [golden[f"{run}::{name}_attention_mask"][number].reshape(-1, length) for name in names]
        for ours, theirs, mask in zip(ids_of(batch), torch.cat(ids), torch.cat(masks), strict=True):
            assert_same_but_eos(ours, theirs[mask.bool()].tolist(), length, [], [tokenizer.eos_token_id])


@needs_golden
@pytest.mark.parametrize("llm", ["mistral-tiny", "llama-tiny", "qwen2-tiny"])
def test_masks_of_the_research_code(llm):
    """The same rule for what is masked, but for BOS, which theirs masks and ours does not; the draws differ."""
    golden = expected_values(golden_case("data_collators"))
    plain, masked = (
        {name: golden[f"pretraining::xlmr-tiny::{llm}::mask{p}::lm_{name}"] for name in ("input_ids", "labels")}
        for p in ("0.0", "0.5")
    )
    text = plain["labels"] != -100
    assert torch.equal(plain["labels"], masked["labels"])
    assert torch.equal(masked["input_ids"][~text], plain["input_ids"][~text])  # padding stays
    replaced = masked["input_ids"] != plain["input_ids"]
    assert 0.4 < replaced[text].float().mean() < 0.6
    ours = AlignmentCollator(encoder_tokenizer("xlmr-tiny"), research_tokenizer(llm), LusiferConfig(), ALIGNMENT, 40)
    mask_id = read_json(golden_case("data_collators") / "config.json")["tokenizers"][llm]["mask_token_id"]
    assert (masked["input_ids"][replaced] == mask_id).all()
    if llm != "llama-tiny":  # there theirs is a reserved token, ours EOS
        assert ours.mask == mask_id


def test_real_rows(model, monkeypatch, shared_folder, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    path = str(shared_folder / "data" / "train" / "wiki_qa.jsonl.gz")
    sources = [DataSource(path, instruction=INSTRUCTION, max_samples=32)]
    mixture = load_mixture(sources, "representation")
    items = [mixture[0, index] for index in range(32)]
    batch = representation(model.tokenizer, model.config, sources, max_length=128)(items)
    queries = [ids for ids, kind in zip(ids_of(batch), batch["kinds"], strict=True) if kind == 0]
    options = {"prompt_name": "query", "instruction": INSTRUCTION, "max_length": 128}
    assert queries == encoded_ids(model, monkeypatch, [item["query"] for item in items], **options)
    for row, item in enumerate(items):
        kinds = batch["kinds"][batch["rows"] == row].tolist()
        assert kinds.count(1) == min(3, len(item["positive"])) and kinds.count(2) == min(32, len(item["negative"]))
