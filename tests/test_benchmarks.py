"""
The contract of the benchmarks: the tasks, languages and instructions of the published benchmark, each task restricted
to the subsets of its languages; `mteb.get_benchmark` finds them; a wrong name is an error that says the nearest one.
"""

import json

import mteb
import pytest
from mteb.models.abs_encoder import get_prompt_name
from mteb.types import PromptType

from lusifer_hf import LusiferConfig
from lusifer_hf.evaluation.benchmarks import (
    BENCHMARKS,
    CROSS_LINGUAL,
    LANGUAGE_CODES,
    PAPER_LANGUAGES,
    QUICK,
    TASKS,
    get_benchmark,
    get_tasks,
)
from lusifer_hf.prompts import INSTRUCTIONS


@pytest.fixture(scope="module")
def facts(shared_folder) -> dict:
    return json.loads((shared_folder / "facts/benchmark.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def published(facts) -> dict[str, dict[str, str]]:
    """For each language its tasks with their instructions."""
    english = {task: text for family in facts["english"].values() for task, text in family.items()}
    return {**facts["multilingual"], "en": english}


def subsets(benchmark: mteb.Benchmark) -> dict[str, list[str]]:
    return {task.metadata.name: task.hf_subsets for task in benchmark.tasks}


# The table


def test_tasks_and_languages_are_the_published_ones(facts, published):
    assert {language: names.split() for language, names in TASKS.items()} == {
        language: list(tasks) for language, tasks in published.items()
    }
    assert LANGUAGE_CODES.keys() == facts["language_codes"].keys()
    # Beside these, the standard member of a macro language.
    assert all(set(codes) <= set(LANGUAGE_CODES[language]) for language, codes in facts["language_codes"].items())
    assert list(PAPER_LANGUAGES) == facts["paper_languages"]
    assert CROSS_LINGUAL.split() == list(facts["cross_lingual"])
    # The published list lacks a comma.
    assert "".join(QUICK.split()) == "".join(facts["quick"])


def test_instructions_are_the_published_ones(facts, published):
    tables = [*published.values(), facts["cross_lingual"]]
    assert len({name for table in tables for name in table}) == 180
    for table in tables:
        for name, instruction in table.items():
            metadata = mteb.get_task(name).metadata
            searched = metadata.type in ("Retrieval", "Reranking")
            for prompt_type in PromptType if searched else (None, *PromptType):
                assert INSTRUCTIONS[get_prompt_name(INSTRUCTIONS, metadata, prompt_type)] == instruction


def test_documents_have_their_template_where_texts_are_searched():
    prompts = LusiferConfig(instructions=INSTRUCTIONS).prompts()
    for name in {name for names in TASKS.values() for name in names.split()}:
        metadata = mteb.get_task(name).metadata
        searched = metadata.type in ("Retrieval", "Reranking")
        for prompt_type in PromptType:
            prompt = prompts[get_prompt_name(prompts, metadata, prompt_type)]
            assert prompt.endswith(" Candidate:\n") == (searched and prompt_type == PromptType.document), name


def test_every_prompt_is_needed():
    names = {name for names in TASKS.values() for name in names.split()}
    types = {mteb.get_task(name).metadata.type for name in names} | {"BitextMining"}
    assert {name.removesuffix("-query").removesuffix("-document") for name in INSTRUCTIONS} <= names | types


# The benchmarks


def test_mteb_finds_the_benchmarks():
    for name in BENCHMARKS:
        assert subsets(mteb.get_benchmark(name)) == subsets(get_benchmark(name))


def test_multilingual_is_the_paper_by_default():
    tasks = subsets(get_benchmark("LUSIFER(multilingual)"))
    assert len(tasks) == 133
    assert list(tasks) == list(dict.fromkeys(name for language in PAPER_LANGUAGES for name in TASKS[language].split()))
    assert len(get_benchmark("LUSIFER(multilingual)", list(LANGUAGE_CODES)).tasks) == 180


@pytest.mark.parametrize("language", LANGUAGE_CODES)
def test_a_language_has_its_subsets_alone(language):
    benchmark = get_benchmark("LUSIFER(multilingual)", [language])
    assert list(subsets(benchmark)) == TASKS[language].split()
    paired = {"IndicCrosslingualSTS", *(("STS17",) if language in ("fr", "de") else ())}
    for task in benchmark.tasks:
        for subset in task.hf_subsets:
            codes = {langscript[:3] for langscript in task.metadata.hf_subsets_to_langscripts[subset]}
            assert codes & set(LANGUAGE_CODES[language])
            if task.metadata.name not in paired:
                assert codes <= set(LANGUAGE_CODES[language])


def test_a_task_of_several_languages_stands_once_with_their_subsets():
    tasks = subsets(get_benchmark("LUSIFER(multilingual)", ["es", "hi", "fr"]))
    assert sorted(tasks["MTOPIntentClassification"]) == ["es", "fr", "hi"]
    assert sorted(tasks["STS17"]) == ["es-es", "fr-en"]  # no fr-fr in STS17
    assert tasks["IndicCrosslingualSTS"] == ["en-hi"]
    # XQuAD is no French task of the benchmark.
    assert sorted(tasks["XQuADRetrieval"]) == ["es", "hi"]


def test_cross_lingual_pairs_two_languages():
    benchmark = get_benchmark("LUSIFER(cross-lingual)")
    assert list(subsets(benchmark)) == CROSS_LINGUAL.split()
    for task in benchmark.tasks:
        for subset in task.hf_subsets:
            assert len({code[:3] for code in task.metadata.hf_subsets_to_langscripts[subset]}) == 2
    selected = subsets(get_benchmark("LUSIFER(cross-lingual)", ["es", "en"]))
    assert selected == {
        "MLQARetrieval": ["eng-spa", "spa-eng"],
        "BelebeleRetrieval": ["spa_Latn-eng_Latn", "eng_Latn-spa_Latn"],
        "STS17": ["es-en"],
        "STS22.v2": ["es-en"],
    }
    # Of Swahili mteb has the macro language in some tasks, its standard member in others.
    swahili = subsets(get_benchmark("LUSIFER(cross-lingual)", ["sw", "en"]))
    assert swahili == {"BelebeleRetrieval": ["swh_Latn-eng_Latn", "eng_Latn-swh_Latn"]}


def test_quick_is_a_part_of_multilingual():
    quick, whole = (subsets(get_benchmark(name)) for name in ("LUSIFER(quick)", "LUSIFER(multilingual)"))
    assert set(quick) == set(QUICK.split())
    assert all(whole[name] == wanted for name, wanted in quick.items())


def test_single_tasks():
    assert [task.hf_subsets for task in get_tasks(["STS17"], ["es"])] == [["es-es"]]
    [banking] = get_tasks(["BornholmBitextMining"])  # of no language of the benchmark
    assert banking.metadata.name == "BornholmBitextMining"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: get_benchmark("LUSIFER(multi)"), r"no benchmark 'LUSIFER\(multi\)': did you mean LUSIFER\(multi"),
        (lambda: get_benchmark("LUSIFER(quick)", ["xx"]), "no language 'xx': choose from en, es"),
        (lambda: get_benchmark("LUSIFER(quick)", ["eng"]), "no language 'eng': did you mean en"),
        (lambda: get_benchmark("LUSIFER(cross-lingual)", ["es"]), "no task in es"),
        (lambda: get_tasks(["STS71"]), "'STS71' not found. Did you mean: 'STS17'"),
        (lambda: get_tasks(["BornholmBitextMining"], ["te"]), "BornholmBitextMining has no data in te"),
    ],
)
def test_wrong_names(call, message):
    with pytest.raises(ValueError, match=message):
        call()
