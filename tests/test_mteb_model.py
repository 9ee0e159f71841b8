"""
The contract of the mteb encoder: the texts that reach the tokenizer have the prompt of their task, in monolingual and
multilingual tasks of every family, and are the same through our encoder and through SentenceTransformer; so are the
scores, in every run. All on mteb's own mock tasks, offline.
"""

import json

import mteb
import numpy as np
import pytest
from conftest import assert_distinct
from mteb.mocks import mock_tasks
from mteb.models import ModelMeta
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from lusifer_hf import LusiferConfig, LusiferModel
from lusifer_hf.composing import compose
from lusifer_hf.evaluation.model import TRAINING_DATASETS, LusiferEncoder, model_meta
from lusifer_hf.prompts import CATEGORY, INSTRUCTIONS, QUESTION, SIMILAR


# By mteb's name of the mock task: the instruction of its family, and whether its documents have their own template.
FAMILIES = {
    "MockBitextMiningTask": (SIMILAR, False),
    "MockMultilingualBitextMiningTask": (SIMILAR, False),
    "MockClassificationTask": (CATEGORY, False),
    "MockMultilingualClassificationTask": (CATEGORY, False),
    "MockMultilabelClassification": (CATEGORY, False),
    "MockMultilingualMultilabelClassification": (CATEGORY, False),
    "LegacyMockClusteringFastTask": (CATEGORY, False),
    "MockMultilingualClusteringFastTask": (CATEGORY, False),
    "MockPairClassificationTask": (SIMILAR, False),
    "MockMultilingualPairClassificationTask": (SIMILAR, False),
    "MockRerankingTask": (QUESTION, True),
    "MockMultilingualRerankingTask": (QUESTION, True),
    "MockRetrievalTask": (QUESTION, True),
    "MockMultilingualRetrievalTask": (QUESTION, True),
    "MockSTSTask": (SIMILAR, False),
    "MockMultilingualSTSTask": (SIMILAR, False),
    "MockSummarizationTask": (SIMILAR, False),
    "MockMultilingualSummarizationTask": (SIMILAR, False),
}


@pytest.fixture(scope="module")
def encoder(prompted_repository) -> LusiferEncoder:
    return LusiferEncoder(str(prompted_repository), device="cpu")


@pytest.fixture(scope="module")
def sentence_transformer(prompted_repository) -> SentenceTransformer:
    return SentenceTransformer(str(prompted_repository), device="cpu")


def evaluate(model, task) -> list[dict]:
    """All scores of a task, without the times."""
    [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False).task_results
    return [score for split in result.scores.values() for score in split]


def spy_on(tokenizer, monkeypatch) -> list[str]:
    """The texts that a tokenizer is called with, from now on."""
    seen = []
    call = type(tokenizer).__call__

    def spy(self, text, *args, **kwargs):
        if self is tokenizer:  # a prompt without a text, of which the tokens are counted, ends in a line break
            seen.extend(one for one in ([text] if isinstance(text, str) else text) if not one.endswith("\n"))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    return seen


def assert_same_scores(first: list[dict], second: list[dict]):
    numbers = [
        [(name, value) for score in scores for name, value in sorted(score.items()) if isinstance(value, float)]
        for scores in (first, second)
    ]
    assert [name for name, _ in numbers[0]] == [name for name, _ in numbers[1]] != []
    values = [[value for _, value in found] for found in numbers]
    np.testing.assert_allclose(*values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_and_scores(name, encoder, sentence_transformer, monkeypatch):
    instruction, has_documents = FAMILIES[name]
    query, document = f"{instruction}\n", f"{instruction} Candidate:\n"
    mock = next(mock for mock in vars(mock_tasks).values() if getattr(mock, "__name__", "") == name)
    scores, texts = [], []
    for model, tokenizer in (
        (encoder, encoder.model.tokenizer),
        (sentence_transformer, sentence_transformer.tokenizer),
    ):
        with monkeypatch.context() as patch:
            seen = spy_on(tokenizer, patch)
            scores.append(evaluate(model, mock()))
        texts.append(sorted(seen))
    assert texts[0] == texts[1]
    assert all(text.startswith((query, document)) for text in texts[0])
    assert any(text.startswith(query) for text in texts[0])
    assert any(text.startswith(document) for text in texts[0]) == has_documents
    assert_same_scores(*scores)


def test_a_task_has_its_own_instruction_before_that_of_its_type(encoder, monkeypatch):
    class ArguAna(mock_tasks.MockRetrievalTask):
        metadata = mock_tasks.MockRetrievalTask.metadata.model_copy(update={"name": "ArguAna"})

    seen = spy_on(encoder.model.tokenizer, monkeypatch)
    evaluate(encoder, ArguAna())
    instruction = INSTRUCTIONS["ArguAna-query"]
    assert "claim" in instruction
    assert {text.partition("\n")[0] for text in seen} == {instruction, f"{instruction} Candidate:"}


def test_both_sides_of_a_pair_are_queries_though_mteb_calls_one_a_document(encoder, monkeypatch):
    class Pairs(mock_tasks.MockPairClassificationTask):  # as TERRa.V2
        input1_prompt_type, input2_prompt_type = PromptType.document, PromptType.query

    seen = spy_on(encoder.model.tokenizer, monkeypatch)
    evaluate(encoder, Pairs())
    assert {text.partition("\n")[0] for text in seen} == {SIMILAR}


def test_a_task_of_another_type_has_the_default_instruction(encoder, monkeypatch):
    seen = spy_on(encoder.model.tokenizer, monkeypatch)
    evaluate(encoder, mock_tasks.MockInstructionRetrieval())
    default = LusiferConfig().default_instruction
    assert {text.partition("\n")[0] for text in seen} == {default, f"{default} Candidate:"}


def test_two_runs_give_the_same_scores(encoder):
    for mock in (mock_tasks.LegacyMockClusteringFastTask, mock_tasks.MockRetrievalTask):
        assert_same_scores(evaluate(encoder, mock()), evaluate(encoder, mock()))


def test_embeddings_are_those_of_encode(encoder, sentences):
    task = mock_tasks.MockSTSTask()
    inputs = [{"text": sentences[:5]}, {"text": sentences[5:]}]
    embeddings = encoder.encode(inputs, task_metadata=task.metadata, hf_split="test", hf_subset="default")
    assert embeddings.dtype == np.float32
    assert_distinct(embeddings)
    np.testing.assert_array_equal(embeddings, encoder.model.encode(sentences, instruction=SIMILAR))


# Where the prompts are written


def test_the_prompts_file_holds_the_task_names(tiny_backbones, tmp_path):
    compose(*map(str, tiny_backbones), tmp_path / "composed", seed=0)
    prompts = json.loads((tmp_path / "composed/config_sentence_transformers.json").read_text())["prompts"]
    assert set(prompts) == {"query", "document", *INSTRUCTIONS}
    assert prompts["STS"] == f"{SIMILAR}\n"
    assert prompts["Retrieval-document"] == f"{QUESTION} Candidate:\n"
    assert prompts["query"] == LusiferConfig().prompt("query")


def test_the_prompts_survive_loading_and_saving(prompted_repository, tmp_path):
    LusiferModel.from_pretrained(prompted_repository).save_pretrained(tmp_path / "again")
    for name in ("config_sentence_transformers.json", "config.json"):
        assert (tmp_path / "again" / name).read_text() == (prompted_repository / name).read_text()


def test_a_model_without_the_table_in_its_config(tiny_repository, encoder):
    old = LusiferEncoder(str(tiny_repository), device="cpu")
    assert old.model.config.instructions is None
    assert set(json.loads((tiny_repository / "config_sentence_transformers.json").read_text())["prompts"]) == {
        "query",
        "document",
    }
    assert old.instructions == encoder.instructions


# What mteb's registry is told


def test_model_meta_is_complete(encoder):
    meta = model_meta(
        encoder.model,
        "organisation/model",
        "abc",
        license="mit",
        release_date="2025-01-01",
        training_datasets=TRAINING_DATASETS,
    )
    assert isinstance(meta, ModelMeta)
    assert meta.loader is LusiferEncoder
    assert meta.embed_dim == encoder.model.encode("text").shape[0]
    assert meta.n_parameters == sum(p.numel() for p in encoder.model.parameters())
    assert meta.memory_usage_mb == pytest.approx(meta.n_parameters * 4 / 2**20, abs=0.1)
    assert meta.reference == "https://arxiv.org/abs/2501.00874"
    assert "LusiferEncoder" in meta.to_python()
    # mteb counts a task as seen in training by these names.
    assert not meta.is_zero_shot_on([mteb.get_task("FEVER")])
    assert meta.is_zero_shot_on([mteb.get_task("XQuADRetrieval")])


def test_training_data_have_names_of_mteb():
    assert [mteb.get_task(name).metadata.name for name in sorted(TRAINING_DATASETS)] == sorted(TRAINING_DATASETS)


def test_mteb_loads_the_model_by_its_meta(prompted_repository):
    meta = model_meta(LusiferModel.from_pretrained(prompted_repository), "organisation/model", "abc")
    loaded = meta.loader(str(prompted_repository), None, device="cpu", max_length=32)
    assert loaded.options["max_length"] == 32
