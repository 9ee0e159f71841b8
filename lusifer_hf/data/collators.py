"""
From the rows of a mixture to the batches of a stage.

Whatever is drawn for a row (which positives and negatives, which task, which masks) is drawn from a generator of its
own, made of (seed, epoch, data set, row): the same row gives the same in any batch, on any process and after a resume.

Shapes: B rows, M texts (queries, positives and negatives of all rows), L padded length in tokens, S that of the LLM's
tokenizer.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..configuration_lusifer import LusiferConfig
from .mixture import DataSource


RECONSTRUCT = "Please reconstruct the following text."
WRITE_QUESTION = "Please write a question based on this passage."
IGNORED = -100


class RepresentationCollator:
    """
    Batches of the representation stage: the texts of rows of one data set, the query, some positives and negatives.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): `model.tokenizer`, the encoder's.
        config ([`LusiferConfig`]): Has the prompt templates.
        sources (sequence of [`DataSource`]): Those of the mixture, in its order.
        max_length (`int`): Texts are cut to so many tokens, prompt and special tokens included.
        max_positives, max_negatives (`int`): Of a row that has more, so many are drawn anew in every epoch.
        seed (`int`, *optional*, defaults to 0)

    Returns a `dict` of `input_ids` and `attention_mask` `(M, L)`, queries first, then positives, then negatives,
    padded on the right; `rows` `(M,)`, the row of the batch that a text belongs to; `kinds` `(M,)`, 0 for a query, 1
    for a positive, 2 for a negative; `text_ids` `(M,)`, equal for equal texts anywhere; `dataset`, the number of the
    source; its `in_batch_negatives`; and `ids`, data set and row number of each of the B rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: LusiferConfig,
        sources: Sequence[DataSource],
        max_length: int,
        max_positives: int = 3,
        max_negatives: int = 32,
        seed: int = 0,
    ):
        # Not `tokenizer`, which `Trainer` would write into every checkpoint.
        self.encoder_tokenizer, self.sources, self.max_length = tokenizer, list(sources), max_length
        self.max_positives, self.max_negatives, self.seed = max_positives, max_negatives, seed
        self.prompts = [
            tuple(config.prompt(name, source.instruction) for name in ("query", "document", "document"))
            for source in sources
        ]
        for source, prompts in zip(sources, self.prompts, strict=True):
            _check_room(tokenizer, prompts, max_length, source)
            if max_negatives == 0 and not source.in_batch_negatives:
                raise ValueError(
                    f"max_negatives=0 leaves {source.name}, which has no in-batch negatives, without any."
                )

    def __call__(self, items: Sequence[dict]) -> dict:
        (dataset,) = {item["dataset"] for item in items}  # the sampler's batches hold one
        source, prompts = self.sources[dataset], self.prompts[dataset]
        queries = [(row, 0, item["query"]) for row, item in enumerate(items)]
        positives, negatives = [], []
        for row, item in enumerate(items):
            rng = _generator(self.seed, item)
            positives += [(row, 1, text) for text in _draw(item["positive"], self.max_positives, rng)]
            negatives += [(row, 2, text) for text in _draw(item["negative"], self.max_negatives, rng)]
        rows, kinds, texts = zip(*queries, *positives, *negatives, strict=True)
        prompted = [prompts[kind] + text for kind, text in zip(kinds, texts, strict=True)]
        ids = self.encoder_tokenizer(prompted, truncation=True, max_length=self.max_length)["input_ids"]
        return {
            **_pad(ids, self.encoder_tokenizer),
            "rows": torch.tensor(rows),
            "kinds": torch.tensor(kinds),
            "text_ids": torch.tensor([text_id(text) for text in texts]),
            "dataset": dataset,
            "in_batch_negatives": source.in_batch_negatives,
            "ids": [(source.name, item["row"]) for item in items],
        }


class AlignmentCollator:
    """
    Batches of the alignment stage: what the encoder reads, and what the LLM then has to write.

    By the `task` of its data set, a row becomes (shares and instructions are the published ones)

    - `"reconstruction"`: the query is to be written again;
    - `"passage_to_query"`: 42 % a question about a positive, 28 % the positive again, 30 % the query's positive;
    - `"query_to_passage"`: 90 % the query's positive, 10 % the query again.

    A row with an `answer` is always that of its query. The encoder reads an instruction before the text, and where
    this text is to be written again, so is the instruction.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): `model.tokenizer`, the encoder's.
        llm_tokenizer (`PreTrainedTokenizerBase`): The LLM's.
        config ([`LusiferConfig`]): Has the prompt templates and `alignment_attention`.
        sources (sequence of [`DataSource`]): Those of the mixture, in its order.
        max_length (`int`): Texts of either side are cut to so many tokens, special tokens included.
        mask_probability (`float`, *optional*, defaults to 0.5):
            A token of the LLM's text is hidden from attention (not with `alignment_attention="prefix_lm"`, where no
            token sees itself before it is written), and replaced by a mask token, each with this probability. BOS
            never is.
        seed (`int`, *optional*, defaults to 0)

    Returns a `dict` of `input_ids` and `attention_mask` `(B, L)`; `llm_input_ids`, `llm_attention_mask` and `labels`
    `(B, S)`, the ids before masking and -100 at BOS and at padding; and `ids`, data set and row number of each row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        llm_tokenizer: PreTrainedTokenizerBase,
        config: LusiferConfig,
        sources: Sequence[DataSource],
        max_length: int,
        mask_probability: float = 0.5,
        seed: int = 0,
    ):
        self.encoder_tokenizer, self.llm_tokenizer, self.config = tokenizer, llm_tokenizer, config
        self.sources, self.max_length, self.seed = list(sources), max_length, seed
        self.mask_probability = mask_probability
        ids = {name: getattr(llm_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "mask", "unk", "pad")}
        self.bos, self.eos = ([ids[name]] if ids[name] is not None else [] for name in ("bos", "eos"))
        self.mask = next((ids[name] for name in ("mask", "unk", "pad", "eos") if ids[name] is not None), None)
        if self.mask is None:
            raise ValueError("The LLM's tokenizer has no mask, unk, pad or eos token to mask others with: set one.")
        for source in sources:
            prompts = [config.prompt("query", text) for text in (source.instruction, RECONSTRUCT, WRITE_QUESTION)]
            _check_room(tokenizer, prompts, max_length, source)

    def __call__(self, items: Sequence[dict]) -> dict:
        generators = [_generator(self.seed, item) for item in items]
        texts, targets = [], []
        for item, rng in zip(items, generators, strict=True):
            instruction, text, target = alignment_task(item, self.sources[item["dataset"]], rng)
            texts.append(self.config.prompt("query", instruction) + text)
            targets.append(texts[-1] if target is None else target)
        ids = self.encoder_tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        llm_ids = self._llm_ids(targets)

        masked = [self._masked(row, rng) for row, rng in zip(llm_ids, generators, strict=True)]
        llm_inputs = _pad([inputs for inputs, _ in masked], self.llm_tokenizer)
        # BOS, which comes first of all, is predicted by nothing: `Trainer` counts labels to average the loss.
        labels = [torch.tensor([IGNORED] * len(self.bos) + row[len(self.bos) :]) for row in llm_ids]
        return {
            **_pad(ids, self.encoder_tokenizer),
            "llm_input_ids": llm_inputs["input_ids"],
            "llm_attention_mask": pad_sequence([mask for _, mask in masked], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "ids": [(self.sources[item["dataset"]].name, item["row"]) for item in items],
        }

    def _llm_ids(self, texts: list[str]) -> list[list[int]]:
        room = self.max_length - len(self.bos) - len(self.eos)
        # Special tokens are added here: few tokenizers of LLMs end a text with EOS, and some begin it with nothing.
        options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": True, "max_length": room}
        return [self.bos + ids + self.eos for ids in self.llm_tokenizer(texts, **options)["input_ids"]]

    def _masked(self, ids: list[int], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and attention of a row of the LLM's text."""
        hidden, replaced = torch.from_numpy(rng.random((2, len(ids))) < self.mask_probability)
        if self.config.alignment_attention == "prefix_lm":
            hidden[:] = False
        hidden[: len(self.bos)] = replaced[: len(self.bos)] = False
        inputs = torch.tensor(ids)
        inputs[replaced] = self.mask
        return inputs, (~hidden).long()


def alignment_task(item: dict, source: DataSource, rng: np.random.Generator) -> tuple[str, str, str | None]:
    """An instruction, the text that the encoder reads after it, and what is to be written: None for the same again."""
    query = item["query"]
    if item["answer"] is not None:
        return source.instruction, query, item["answer"]
    if source.task == "reconstruction":
        return RECONSTRUCT, query, None
    positive = item["positive"][rng.integers(len(item["positive"]))]
    draw = rng.random()
    if source.task == "query_to_passage":
        return (RECONSTRUCT, query, None) if draw < 0.1 else (source.instruction, query, positive)
    if draw < 0.3:
        return source.instruction, query, positive
    return (RECONSTRUCT, positive, None) if draw < 0.58 else (WRITE_QUESTION, positive, query)


def text_id(text: str) -> int:
    """63 bits that are the same for the same text, in any process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _generator(seed: int, item: dict) -> np.random.Generator:
    return np.random.default_rng((seed, item["epoch"], item["dataset"], item["row"]))


def _draw(texts: list[str], number: int, rng: np.random.Generator) -> list[str]:
    if len(texts) <= number:
        return texts
    return [texts[index] for index in rng.choice(len(texts), number, replace=False)]


def _check_room(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int, source: DataSource):
    used = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    if used >= max_length:
        raise ValueError(
            f"max_length={max_length} leaves no room for text beside {used} tokens of prompt of the data set "
            f"{source.name}: raise it, or shorten the instruction."
        )


def _pad(ids: Sequence[Sequence[int] | torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Padded on the right, whichever side the tokenizer is set to, and without a padding token of its own with 0."""
    rows = [torch.as_tensor(row) for row in ids]
    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_sequence(rows, batch_first=True, padding_value=padding)
    return {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()}
