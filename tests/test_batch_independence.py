"""
Contract P2: a text's vector depends on that text alone. Not on the other texts of its batch, their order, the batch
size, the padding side, how much padding there is, or holes in the mask; to 1e-5 in float32.
"""

import pytest
import torch
from conftest import assert_distinct, assert_same, pad, random_texts, read_lines, tiny_model

from lusifer_hf import LusiferModel


ATTENTION = [None, "sdpa", "eager"]
LANGUAGES = "en ru el fa hi bn te ta ka ko ja zh th am".split()
LENGTHS = [5, 12, 1, 30, 5, 2, 17]


def batches(rows: list[torch.Tensor], size: int) -> list[list[torch.Tensor]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def embed_rows(model, rows, size: int, **padding) -> torch.Tensor:
    return torch.cat([model(**pad(batch, **padding)).pooler_output for batch in batches(rows, size)])


@pytest.fixture(params=ATTENTION, ids=str)
def attn_implementation(request):
    return request.param


class TestForward:
    @pytest.fixture(params=[0, 1, 3], ids="added={}".format)
    def model(self, attn_implementation, request):
        return tiny_model(attn_implementation=attn_implementation, num_added_tokens=request.param)

    @pytest.fixture
    def alone(self, model):
        embeddings = embed_rows(model, random_texts(LENGTHS), size=1)
        assert_distinct(embeddings)
        return embeddings

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("extra", [0, 9])
    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_batch_size_and_padding(self, model, alone, size, side, extra):
        assert_same(embed_rows(model, random_texts(LENGTHS), size, side=side, extra=extra), alone)

    def test_order(self, model, alone):
        order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1))
        rows = random_texts(LENGTHS)
        assert_same(embed_rows(model, [rows[index] for index in order], size=3), alone[order])

    def test_other_texts(self, model, alone):
        """The same text beside two different batches of others."""
        rows = random_texts(LENGTHS)
        for seed in (1, 2):
            batch = [*random_texts([40, 3], seed=seed), rows[1], *random_texts([8], seed=seed + 2)]
            with torch.no_grad():
                assert_same(model(**pad(batch)).pooler_output[2], alone[1])

    def test_what_stands_under_the_padding(self, model, alone):
        inputs = pad(random_texts(LENGTHS), side="left")
        padding = inputs["attention_mask"] == 0
        inputs["input_ids"][padding] = random_texts([int(padding.sum())], seed=5)[0]
        with torch.no_grad():
            assert_same(model(**inputs).pooler_output, alone)

    @pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.float32])
    def test_holes_in_the_mask(self, model, alone, dtype):
        """A position with mask 0 is dropped, wherever it stands: between tokens too."""
        generator = torch.Generator().manual_seed(3)
        input_ids = torch.randint(5, 90, (len(LENGTHS), 45), generator=generator)
        mask = torch.zeros_like(input_ids)
        for index, row in enumerate(random_texts(LENGTHS)):
            places = torch.randperm(45, generator=generator)[: len(row)].sort().values
            input_ids[index, places] = row
            mask[index, places] = 1
        with torch.no_grad():
            assert_same(model(input_ids=input_ids, attention_mask=mask.to(dtype)).pooler_output, alone)

    def test_no_mask(self, model, alone):
        rows = random_texts(LENGTHS)
        with torch.no_grad():
            assert_same(model(input_ids=torch.stack([rows[0], rows[4]])).pooler_output, alone[[0, 4]])

    def test_padding_beyond_the_positions_of_the_model(self, model, alone):
        extra = model.max_positions + 20 - max(LENGTHS)
        assert_same(embed_rows(model, random_texts(LENGTHS), size=7, extra=extra), alone)


@pytest.mark.parametrize("what", ["an empty row", "a long row"])
def test_refused_rows(attn_implementation, what):
    model = tiny_model(attn_implementation=attn_implementation)
    lengths = [3, 0, 4] if what == "an empty row" else [3, model.max_positions + 1]
    message = "Row 1 has no token" if what == "an empty row" else f"longer than the {model.max_positions} positions"
    with pytest.raises(ValueError, match=message):
        model(**pad(random_texts(lengths)))


class TestAfterPadding:
    """`added_token_positions="after_padding"`, the research code's choice, breaks the contract, and only it does."""

    fields = {"added_token_positions": "after_padding", "num_added_tokens": 2}

    def test_depends_on_the_padded_length(self, attn_implementation):
        model = tiny_model(attn_implementation=attn_implementation, **self.fields)
        rows = random_texts(LENGTHS)
        difference = (embed_rows(model, rows, 1) - embed_rows(model, rows, 1, extra=20)).abs().amax(dim=1)
        assert (difference > 1e-3).all()

    def test_does_not_depend_on_anything_else(self, attn_implementation):
        model = tiny_model(attn_implementation=attn_implementation, **self.fields)
        rows = random_texts(LENGTHS)
        together = embed_rows(model, rows, size=7)
        assert_distinct(together)
        one_by_one = [embed_rows(model, [row], size=1, extra=max(LENGTHS) - len(row)) for row in rows]
        assert_same(torch.cat(one_by_one), together)
        assert_same(embed_rows(model, rows, size=7, side="left"), together)

    def test_equals_contiguous_without_padding(self, attn_implementation):
        model = tiny_model(attn_implementation=attn_implementation, **self.fields)
        contiguous = tiny_model(attn_implementation=attn_implementation, num_added_tokens=2)
        rows = random_texts(LENGTHS)
        assert_same(embed_rows(model, rows, size=1), embed_rows(contiguous, rows, size=7))


class TestEncode:
    """The same through `encode`, on text."""

    def check(self, model, texts, **options):
        alone = torch.stack([torch.from_numpy(model.encode(text, **options)) for text in texts])
        assert_distinct(alone)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1)).tolist()
        shuffled = [texts[index] for index in order]
        for batching in (
            {},
            {"batch_size": 1},
            {"batch_size": 7},
            {"max_tokens_per_batch": 1},
            {"max_tokens_per_batch": 100},
            {"batch_size": 3, "max_tokens_per_batch": 50},
        ):
            assert_same(model.encode(shuffled, **batching, **options), alone[order])

    @pytest.fixture
    def model(self, tiny_repository, attn_implementation):
        return LusiferModel.from_pretrained(tiny_repository, attn_implementation=attn_implementation)

    @pytest.mark.parametrize("options", [{}, {"instruction": "Find the same sentence:"}], ids=["plain", "prompt"])
    def test_sentences(self, model, sentences, options):
        self.check(model, sentences, **options)

    def test_real_text(self, model, shared_folder):
        """More than 200 lines in 13 scripts, as they come: from a word to far more than the model takes."""
        folder = shared_folder / "data" / "raw"
        languages = [language for language in LANGUAGES if (folder / f"{language}.txt.gz").exists()]
        assert len(languages) >= 8
        texts = [line for language in languages for line in read_lines(folder / f"{language}.txt.gz", count=16)]
        texts = list(dict.fromkeys(texts))
        assert len(texts) >= 200
        # The tiny tokenizer does not know these scripts.
        model.tokenizer = model.tokenizer.train_new_from_iterator(texts, vocab_size=4000)
        torch.manual_seed(0)
        model.resize_token_embeddings(len(model.tokenizer))
        self.check(model, texts)
