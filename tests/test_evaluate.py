"""
The contract of `lusifer-hf evaluate`: the scores of `mteb.evaluate`; what is finished is not run again and never lost,
whatever fails or stops; scores of other weights, data or options are not mixed up; a user's mistake is one line.
"""

import json
import logging
import multiprocessing
import shutil

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from local_files import TEXTS, write_local_files, write_retrieval
from mteb.results import TaskResult
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from torch.utils.data import DataLoader

from lusifer_hf import LusiferModel
from lusifer_hf.cli import main
from lusifer_hf.evaluation import running
from lusifer_hf.evaluation.caching import CachedEncoder
from lusifer_hf.evaluation.examples import load_examples
from lusifer_hf.evaluation.local import local_tasks
from lusifer_hf.evaluation.model import LusiferEncoder
from lusifer_hf.evaluation.results import find_evaluation
from lusifer_hf.evaluation.running import find_model, run, select_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_local_files(tmp_path_factory.mktemp("local"))


@pytest.fixture
def small(folder, tmp_path):
    """Two tasks, one of them in two languages."""
    for kind in ("retrieval", "sts"):
        shutil.copytree(folder / kind, tmp_path / "small" / kind)
    return tmp_path / "small"


@pytest.fixture
def embedded(monkeypatch) -> list[tuple[str, str]]:
    """The tasks and subsets for which our encoder embeds something, from now on."""
    seen = []
    encode = LusiferEncoder.encode

    def spy(self, inputs, *, task_metadata, hf_subset, **kwargs):
        seen.append((task_metadata.name, hf_subset))
        return encode(self, inputs, task_metadata=task_metadata, hf_subset=hf_subset, **kwargs)

    monkeypatch.setattr(LusiferEncoder, "encode", spy)
    return seen


@pytest.fixture(scope="module")
def baseline(tiny_backbones, tmp_path_factory):
    """A model that sentence-transformers makes of the encoder alone."""
    folder = tmp_path_factory.mktemp("models") / "baseline"
    transformer = Transformer(str(tiny_backbones[0]))
    SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())]).save(str(folder))
    return folder


def scores(results) -> dict[tuple[str, str], float]:
    return {
        (result.task_name, score["hf_subset"]): score["main_score"]
        for result in results
        for score in result.scores["test"]
    }


def evaluate(model, tasks) -> dict[tuple[str, str], float]:
    return scores(mteb.evaluate(model, tasks, cache=None, show_progress_bar=False, co2_tracker=False).task_results)


def test_the_command_gives_the_scores_of_mteb(prompted_repository, folder, tmp_path, capsys):
    model, out = str(prompted_repository), tmp_path / "out"
    assert main(["evaluate", "--model", model, "--local", str(folder), "--output", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report'}\n"
    ours = {}
    for path in out.glob("results/*/*/*-*.json"):
        ours |= scores([TaskResult.from_disk(path)])
    # Which are those of our encoder in test_mteb_model.
    expected = evaluate(SentenceTransformer(model, device="cpu"), local_tasks(folder))
    assert ours == pytest.approx(expected, abs=1e-6)

    # The report, and what the bootstrap over examples needs, are there.
    assert (out / "report/report.md").is_file()
    predictions = {path.name for path in out.glob("predictions/*/*/*.json")}
    assert predictions == {f"{task.metadata.name}_predictions.json" for task in local_tasks(folder)}


def test_predictions_end_where_the_score_does(prompted_repository, tmp_path):
    write_retrieval(tmp_path / "files/retrieval/all/en", TEXTS)
    [task] = local_tasks(tmp_path / "files")
    found, _, _ = run([str(prompted_repository)], [task], tmp_path / "out")
    [[result]] = found.values()
    assert result.scores["test"][0]["recall_at_1000"] == 1  # all of the corpus was ranked
    [path] = tmp_path.glob("out/predictions/*/*/*.json")
    rankings = json.loads(path.read_text())["en"]["test"]
    assert len(rankings) == len(TEXTS) > 20
    assert {len(ranking) for ranking in rankings.values()} == {20}  # nDCG@10
    evaluation = find_evaluation(tmp_path / "out")
    [examples] = load_examples(evaluation, [result], tmp_path / "out/predictions", [task]).values()
    assert examples.size == len(TEXTS)


def test_a_baseline_has_its_own_prompts(prompted_repository, baseline, small, tmp_path):
    results, failures, _ = run([str(prompted_repository), str(baseline)], local_tasks(small), tmp_path)
    assert failures == []
    ours, others = map(scores, results.values())
    assert others == pytest.approx(evaluate(SentenceTransformer(str(baseline), device="cpu"), local_tasks(small)))
    assert ours != others


def test_a_failure_loses_nothing(prompted_repository, small, tmp_path, embedded, monkeypatch, capsys):
    command = [
        "evaluate",
        "--model",
        str(prompted_repository),
        "--local",
        str(small),
        "--output",
        str(tmp_path / "out"),
    ]
    pairs = small / "sts/pairs/ru.tsv"
    good = pairs.read_text()
    pairs.write_text(good + "a line with one cell\n")
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "error: 1 evaluations failed; the same command runs them again." in error
    assert "on pairs-sts: ValueError: " in error and "ru.tsv, line 8: 1 cells, but the header has 3." in error
    assert dict.fromkeys(embedded) == dict.fromkeys([("find-retrieval", "en"), ("find-retrieval", "sw")])

    embedded.clear()
    pairs.write_text(good)
    assert main(command) == 0
    assert dict.fromkeys(embedded) == dict.fromkeys([("pairs-sts", "ru")])

    # With nothing left to do, no model is loaded.
    monkeypatch.setattr(running, "load_encoder", None)
    assert main(command) == 0


def test_an_interrupted_task_goes_on_with_the_missing_language(
    prompted_repository, small, tmp_path, embedded, monkeypatch
):
    tasks = local_tasks(small)
    whole, _, _ = run([str(prompted_repository)], tasks, tmp_path / "whole")

    encode = LusiferEncoder.encode

    def stop(self, inputs, *, hf_subset, **kwargs):
        if hf_subset == "sw":
            raise KeyboardInterrupt
        return encode(self, inputs, hf_subset=hf_subset, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LusiferEncoder, "encode", stop)
        with pytest.raises(KeyboardInterrupt):
            run([str(prompted_repository)], tasks, tmp_path / "out")
    [predictions] = (tmp_path / "out/predictions").rglob("find-retrieval_predictions.json")
    predictions.write_text(predictions.read_text()[:-9])  # as if it was killed while mteb wrote it
    embedded.clear()
    resumed, _, _ = run([str(prompted_repository)], tasks, tmp_path / "out")
    assert dict.fromkeys(embedded) == dict.fromkeys([("find-retrieval", "sw"), ("pairs-sts", "ru")])
    assert [scores(found) for found in resumed.values()] == [scores(found) for found in whole.values()]


def test_results_hold_the_languages_that_were_asked_for(prompted_repository, small, tmp_path):
    for wanted in (["en", "sw"], ["sw"]):
        task = local_tasks(small)[0].filter_languages(None, hf_subsets=wanted)
        results, _, _ = run([str(prompted_repository)], [task], tmp_path)
        [found] = results.values()
        assert [subset for _, subset in scores(found)] == wanted


# What belongs to another revision


def test_other_weights_are_another_revision(prompted_repository, small, tmp_path, embedded, caplog):
    model = tmp_path / "a/model"
    shutil.copytree(prompted_repository, model)
    task = local_tasks(small)[-1]
    first, _, _ = run([str(model)], [task], tmp_path / "out")

    (model / "README.md").write_text("Another card.")
    shutil.copytree(model, tmp_path / "moved/a/model")
    embedded.clear()
    run([str(tmp_path / "moved/a/model")], [task], tmp_path / "out")
    assert embedded == []

    changed = LusiferModel.from_pretrained(model)
    torch.nn.init.normal_(next(changed.projection.parameters()))
    changed.save_pretrained(model)
    with caplog.at_level(logging.WARNING):
        second, _, _ = run([str(model)], [task], tmp_path / "out")
    assert "holds results of other revisions of the model, which are not used" in caplog.text
    assert scores(first["a/model"]) != scores(second["a/model"])


def test_options_that_change_scores_are_in_the_revision(prompted_repository):
    plain = find_model(str(prompted_repository)).revision
    assert find_model(str(prompted_repository), dtype="bfloat16").revision == f"{plain}-dtype=bfloat16"
    assert running._kept({"dtype": "bfloat16", "max_length": 64, "trust_remote_code": True}) == {
        "dtype": "bfloat16",
        "max_length": 64,
    }
    assert running._kept({"dtype": "auto", "max_length": None}) == {}


def test_dtype_and_length_reach_the_model(prompted_repository, small, tmp_path):
    options = {"dtype": "bfloat16", "max_length": 60, "max_tokens_per_batch": 100}
    encoder = running.load_encoder(find_model(str(prompted_repository)), devices=["cpu"], **options)
    assert str(encoder.model.dtype) == "torch.bfloat16"
    assert encoder.options == {"max_length": 60, "max_tokens_per_batch": 100}
    _, failures, _ = run([str(prompted_repository)], local_tasks(small), tmp_path, **options)
    assert failures == []
    [meta] = tmp_path.glob("results/*/*/model_meta.json")
    assert json.loads(meta.read_text())["revision"].endswith("-dtype=bfloat16-max_length=60")


def test_other_data_are_evaluated_again(prompted_repository, small, tmp_path, embedded):
    run([str(prompted_repository)], local_tasks(small), tmp_path / "out")
    embedded.clear()
    with open(small / "sts/pairs/ru.tsv", "a") as file:
        file.write("One more\tpair\t1\n")
    run([str(prompted_repository)], local_tasks(small), tmp_path / "out")
    assert dict.fromkeys(embedded) == dict.fromkeys([("pairs-sts", "ru")])


# Options


@pytest.fixture
def texts(monkeypatch) -> list[tuple[str, str]]:
    """The prompts and the texts that a model embeds, from now on."""
    seen = []
    encode = LusiferModel.encode

    def spy(self, texts, *, prompt_name=None, instruction=None, **kwargs):
        seen.extend((self.config.prompt(prompt_name, instruction), text) for text in texts)
        return encode(self, texts, prompt_name=prompt_name, instruction=instruction, **kwargs)

    monkeypatch.setattr(LusiferModel, "encode", spy)
    return seen


def test_the_cache_embeds_a_text_once(prompted_repository, small, tmp_path, texts):
    shutil.copytree(small / "retrieval/find", small / "retrieval/again")  # a second task of the same texts
    tasks = local_tasks(small)
    without, _, _ = run([str(prompted_repository)], tasks, tmp_path / "without")
    expected = set(texts)
    assert len(expected) < len(texts)
    texts.clear()
    first, _, _ = run([str(prompted_repository)], tasks, tmp_path / "out", cache=True)
    assert len(texts) == len(expected) and set(texts) == expected  # titles come before documents once

    shutil.rmtree(tmp_path / "out/results")
    texts.clear()
    second, _, _ = run([str(prompted_repository)], tasks, tmp_path / "out", cache=True)
    assert texts == []
    for found in (first, second):
        for ours, others in zip(found.values(), without.values(), strict=True):
            assert scores(ours) == pytest.approx(scores(others), abs=1e-6)


def test_the_cache_after_a_kill(prompted_repository, small, tmp_path, texts, caplog):
    tasks = local_tasks(small)
    first, _, _ = run([str(prompted_repository)], tasks, tmp_path, cache=True)
    [damaged, *_] = indices = sorted(tmp_path.glob("embeddings/*/*/*/index.json"))
    lost = len(json.loads(damaged.read_text()))
    assert len(indices) == 3  # queries and documents of retrieval, and sts
    damaged.write_text(damaged.read_text()[:50])
    shutil.rmtree(tmp_path / "results")
    texts.clear()
    second, failures, _ = run([str(prompted_repository)], tasks, tmp_path, cache=True)
    assert failures == [] and len(texts) == lost and f"Removing {damaged}" in caplog.text
    for ours, others in zip(second.values(), first.values(), strict=True):
        assert scores(ours) == pytest.approx(scores(others), abs=1e-6)


@pytest.mark.parametrize("case", ["baseline", "ours"])
def test_the_cache_keeps_prompts_apart(baseline, prompted_repository, small, tmp_path, case):
    model = {"baseline": baseline, "ours": prompted_repository}[case]
    encoder = running.load_encoder(find_model(str(model)))
    cached = CachedEncoder(encoder, tmp_path / "cache")
    options = {"hf_split": "test", "hf_subset": "default"}
    for prompt_type in (None, PromptType.query, PromptType.document):
        for name in ("STS12", "NQ"):
            batches = DataLoader(Dataset.from_dict({"text": ["The same text.", "Another.", "The same text."]}))
            options |= {"task_metadata": mteb.get_task(name).metadata, "prompt_type": prompt_type}
            np.testing.assert_allclose(
                cached.encode(batches, **options), encoder.encode(batches, **options), atol=1e-6
            )


def test_several_devices(tiny_repository, small, tmp_path):
    tasks = local_tasks(small)
    alone, _, _ = run([str(tiny_repository)], tasks, tmp_path / "alone")
    # Two processes, and a folder whose prompts file has no instructions of tasks.
    together, failures, _ = run([str(tiny_repository)], tasks, tmp_path / "together", devices=["cpu", "cpu"])
    assert failures == [] and multiprocessing.active_children() == []
    for ours, others in zip(together.values(), alone.values(), strict=True):
        assert scores(ours) == pytest.approx(scores(others), abs=1e-6)


def test_a_task_of_two_benchmarks_is_run_once():
    tasks = select_tasks(["LUSIFER(multilingual)", "LUSIFER(cross-lingual)"], ["STS17"], languages=["es", "en"])
    [task] = [task for task in tasks if task.metadata.name == "STS17"]
    assert sorted(task.hf_subsets) == ["en-en", "es-en", "es-es"]


def test_languages_of_local_files(folder):
    chosen = {task.metadata.name: task.hf_subsets for task in select_tasks(local=folder, languages=["sw", "es"])}
    assert chosen == {"find-retrieval": ["sw"], "find-reranking": ["spa-Latn"], "said-bitext": ["swh-eng"]}
    assert len(select_tasks(local=folder)) == len(local_tasks(folder))


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "There is nothing to evaluate: name a benchmark, a task, or a folder of local files."),
        (["--benchmark", "LUSIFER"], "There is no benchmark 'LUSIFER': did you mean LUSIFER(quick)"),
        (["--benchmark", "LUSIFER(quick)", "--languages", "xx"], "There is no language 'xx': choose from en, es"),
        (["--tasks", "STS71"], "mteb has no such task: 'STS71' not found. Did you mean: 'STS17'?"),
        (["--local", "nowhere"], "nowhere is no folder."),
    ],
)
def test_nothing_to_evaluate(options, message, prompted_repository, capsys):
    assert main(["evaluate", "--model", str(prompted_repository), *options]) == 1
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert "Traceback" not in error


def test_wrong_models(tiny_backbones, prompted_repository, small, tmp_path, capsys):
    command = ["evaluate", "--local", str(small), "--output", str(tmp_path / "out"), "--model"]
    assert main([*command, str(tiny_backbones[0])]) == 1
    assert (
        "is neither a LUSIFER model nor one of sentence-transformers: it lacks modules.json" in capsys.readouterr().err
    )
    assert main([*command, str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    # Known before the first model is evaluated.
    assert main([*command, str(prompted_repository), "--baseline", str(tiny_backbones[0])]) == 1
    assert main([*command, str(prompted_repository), "--baseline", str(prompted_repository)]) == 1
    assert "Two models are called " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
