"""
Run models over tasks; what is finished is kept, what is interrupted goes on.

The output folder holds `results/` (mteb's `ResultCache`: a file for each model, revision and task), `predictions/` in
the same order, with `cache` also `embeddings/`. A task whose result is there is not run again; of one that was
interrupted only the missing languages are. The revision of a model in a folder is made from the content of its files,
so that weights that were trained further never get old scores; changed files of a local task are run again too.
"""

import copy
import hashlib
import heapq
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import datasets
import mteb
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.results import TaskResult
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm
from transformers.utils import cached_file

from ..configuration_lusifer import LusiferConfig
from .benchmarks import get_benchmark, get_tasks
from .caching import CachedEncoder, remove_damaged
from .local import local_tasks
from .model import LusiferEncoder, model_prompts
from .results import LANGUAGES


logger = logging.getLogger(__name__)


class Failure(NamedTuple):
    """A task that raised an error, which did not stop the run."""

    model: str
    task: str
    error: str


class Source(NamedTuple):
    """Where a model is, and the name and the revision that its results are filed under."""

    path: str
    name: str
    revision: str
    is_lusifer: bool

    @property
    def folder(self) -> Path:
        return Path(self.name.replace("/", "__"), self.revision)


def select_tasks(
    benchmarks: Sequence[str] = (),
    tasks: Sequence[str] = (),
    local: str | Path | None = None,
    languages: Sequence[str] | None = None,
) -> list[AbsTask]:
    """
    The tasks of benchmarks, single ones of mteb, and local files, each once.

    Args:
        benchmarks, tasks (sequences of `str`):
            Names, of [`get_benchmark`] and of mteb.
        local (`str` or `Path`, *optional*):
            A folder for [`local_tasks`].
        languages (sequence of `str`, *optional*):
            Keys of `LANGUAGE_CODES`; see [`get_benchmark`] and [`get_tasks`]. By default all local files are taken;
            a pair with English counts for the other language.

    Raises:
        `OSError`, `ValueError`: naming what does not exist, with the nearest name.
    """
    found = [task for name in benchmarks for task in get_benchmark(name, languages).tasks]
    found += get_tasks(tasks, languages)
    for task in local_tasks(local) if local is not None else ():
        task.hf_subsets = [subset for subset in task.hf_subsets if _is_wanted(task, subset, languages)]
        found += [task] if task.hf_subsets else []
    if not found:
        raise ValueError("There is nothing to evaluate: name a benchmark, a task, or a folder of local files.")
    merged: dict[str, AbsTask] = {}
    for task in found:
        first = merged.setdefault(task.metadata.name, copy.copy(task))
        first.hf_subsets = list(dict.fromkeys([*first.hf_subsets, *task.hf_subsets]))
    return list(merged.values())


def run(
    models: Sequence[str],
    tasks: Sequence[AbsTask],
    output: str | Path,
    *,
    devices: Sequence[str] = (),
    batch_size: int = 32,
    cache: bool = False,
    **options,
) -> tuple[dict[str, list[TaskResult]], list[Failure], dict[str, str]]:
    """
    Evaluate each model on each task.

    Args:
        models (sequence of `str`):
            Hub ids or folders of LUSIFER models or of any other for sentence-transformers.
        tasks (sequence of `AbsTask`):
            As [`select_tasks`] returns them, or any of mteb.
        output (`str` or `Path`):
            The folder for all results; give it again to go on.
        devices, cache, options:
            As in [`load_encoder`]; with `cache` embeddings are kept in the folder, and a text that comes again with
            the same prompt, in whatever task, is not embedded again.
        batch_size (`int`, *optional*, defaults to 32):
            Texts in a batch of a model that is no LUSIFER model, and on several devices.

    Returns:
        The results by the model's name, the tasks that failed, and the revisions by the model's name.

    Raises:
        `OSError`, `ValueError`: before anything is run, if a model is none, or two have one name.
    """
    sources = [find_model(model, **_kept(options)) for model in models]
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            raise ValueError(f"Two models are called {source.name}: put one into a folder of another name.")
    output = Path(output)
    datasets.disable_progress_bars()  # there is one bar, over the whole run
    finished: dict[str, list[TaskResult]] = {}
    failures = []
    with tqdm(total=len(sources) * len(tasks), desc="Evaluating", unit="task") as progress:
        for source in sources:
            with ExitStack() as stack:
                load = partial(_load, source, output, stack, cache, devices=devices, **options)
                finished[source.name], failed = _run_model(source, tasks, output, load, batch_size, progress)
            failures += failed
    return finished, failures, {source.name: source.revision for source in sources}


def _run_model(
    source: Source, tasks: Sequence[AbsTask], output: Path, load: Callable, batch_size: int, progress: tqdm
) -> tuple[list[TaskResult], list[Failure]]:
    results = mteb.ResultCache(output)
    meta = ModelMeta.create_empty({"name": source.name, "revision": source.revision})
    _note_other_revisions(output / "results" / source.folder)
    encoder = None  # loaded when the first task needs it
    finished, failures = [], []
    for task in tasks:
        progress.set_description(f"{source.name}: {task.metadata.name}")
        result = results.load_task_result(task.metadata.name, meta)
        is_current = result is not None and result.is_mergeable(task)
        if not is_current or result.get_missing_evaluations(task):
            encoder = encoder or load()
            try:
                predictions = output / "predictions" / source.folder
                result = _evaluate(encoder, task, results, predictions, batch_size, only_missing=is_current)
            except Exception as error:
                # Whatever it is, the other tasks can still run; what failed is reported at the end.
                logger.debug("", exc_info=True)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                logger.error(f"{source.name} failed on {task.metadata.name}. {reason}")
                failures.append(Failure(source.name, task.metadata.name, reason))
                result = None
        if result is not None:
            finished.append(result.validate_and_filter_scores(task))
        progress.update()
    return finished, failures


def find_model(model: str, **options) -> Source:
    """
    Look up a model without loading it.

    Args:
        model (`str`):
            Hub id or folder.
        options:
            What changes its scores beside its files, and so belongs to the revision, such as `dtype`.

    Raises:
        `OSError`, `ValueError`: if there is no model, or none that embeds texts.
    """
    folder = Path(model)
    files = {}
    for name in ("config.json", "modules.json"):
        # None where the repository lacks the file; an error where there is no repository
        files[name] = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    config = json.loads(Path(files["config.json"]).read_text(encoding="utf-8")) if files["config.json"] else {}
    is_lusifer = config.get("model_type") == "lusifer"
    if not is_lusifer and files["modules.json"] is None:
        raise ValueError(
            f"{model} is neither a LUSIFER model nor one of sentence-transformers: it lacks modules.json, which says "
            "how to make one embedding of a text."
        )
    if folder.is_dir():
        name, revision = "/".join(["local", *folder.resolve().parts][-2:]), _fingerprint(folder)
    else:
        name, revision = model, Path(files["config.json"] or files["modules.json"]).parent.name
    suffix = [f"{key}={value}" for key, value in sorted(options.items())]
    return Source(model, name, "-".join([revision, *suffix]), is_lusifer)


def load_encoder(
    source: Source,
    *,
    devices: Sequence[str] = (),
    dtype: str = "auto",
    max_length: int | None = None,
    max_tokens_per_batch: int | None = None,
    trust_remote_code: bool = False,
):
    """
    Load a model for `mteb.evaluate`.

    Args:
        source (`Source`):
            What [`find_model`] returned.
        devices (sequence of `str`, *optional*):
            By default the accelerator, if there is one. With several, each holds the model and embeds its share of the
            texts (sentence-transformers' multi-process pool).
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of the weights; `"auto"`: as stored.
        max_length (`int`, *optional*):
            Longer texts are cut to so many tokens.
        max_tokens_per_batch (`int`, *optional*):
            Of a LUSIFER model on one device; see [`LusiferModel.encode`].
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code of the repositories of other models.
    """
    device = devices[0] if devices else None
    if source.is_lusifer and len(devices) < 2:
        encoder = LusiferEncoder(
            source.path,
            device=device,
            dtype=dtype,
            max_length=max_length,
            max_tokens_per_batch=max_tokens_per_batch,
        )
    else:
        model = SentenceTransformer(
            source.path,
            device=device,
            model_kwargs={"dtype": dtype},
            trust_remote_code=trust_remote_code,
        )
        if max_length is not None:
            model.max_seq_length = max_length
        encoder = _PooledEncoder(model, devices) if len(devices) > 1 else SentenceTransformerEncoderWrapper(model)
        if source.is_lusifer:  # as on one device, also where the prompts file is older than the table
            encoder.model_prompts = model_prompts(LusiferConfig.from_pretrained(source.path))
    names = {"name": source.name, "revision": source.revision}
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=names)
    return encoder


class _PooledEncoder(SentenceTransformerEncoderWrapper):
    """On several devices, each with a process that stays until `close`."""

    def __init__(self, model: SentenceTransformer, devices: Sequence[str]):
        super().__init__(model)
        self.pool = model.start_multi_process_pool(list(devices))

    def encode(self, inputs, **kwargs):
        return super().encode(inputs, pool=self.pool, **kwargs)

    def close(self):
        self.model.stop_multi_process_pool(self.pool)


def _is_wanted(task: AbsTask, subset: str, languages: Sequence[str] | None) -> bool:
    codes = [langscript.split("-")[0] for langscript in task.metadata.hf_subsets_to_langscripts[subset]]
    found = {LANGUAGES.get(code, code) for code in codes}
    return not languages or (found - {"en"} or found) <= set(languages)


def _kept(options: dict) -> dict:
    """The options that change scores."""
    return {
        name: options[name]
        for name, default in (("dtype", "auto"), ("max_length", None))
        if options.get(name, default) != default
    }


def _fingerprint(folder: Path) -> str:
    """Of the content of all files but the card, so that a moved or copied folder keeps its results."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and path.name != "README.md" and not any(part.startswith(".") for part in relative.parts):
            digest.update(str(relative).encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _load(source: Source, output: Path, stack: ExitStack, cache: bool, **options):
    encoder = load_encoder(source, **options)
    if isinstance(encoder, _PooledEncoder):
        stack.callback(encoder.close)  # or the next model would not find the devices empty
    return CachedEncoder(encoder, output / "embeddings" / source.folder) if cache else encoder


def _evaluate(
    encoder, task: AbsTask, results: mteb.ResultCache, predictions: Path, batch_size: int, only_missing: bool
) -> TaskResult:
    remove_damaged(predictions / f"{task.metadata.name}_predictions.json")  # to which mteb adds in place
    with warnings.catch_warnings():
        # mteb logs its own; sklearn's are of classifiers that mteb stops early by definition.
        warnings.simplefilter("ignore", UserWarning)
        [result] = mteb.evaluate(
            encoder,
            _own_copy(task),
            cache=results,
            # Left to itself, mteb returns a complete result of other data.
            overwrite_strategy="only-missing" if only_missing else "always",
            prediction_folder=predictions,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            show_progress_bar=False,
            co2_tracker=False,
        ).task_results
    return result


def _own_copy(task: AbsTask) -> AbsTask:
    """A copy for one model, whose predictions end where its main score does."""
    task = copy.deepcopy(task)  # its random state and data would go over to the next model
    cutoff = task.metadata.main_score.rpartition("_at_")[2]
    if isinstance(task, AbsTaskRetrieval) and cutoff.isdecimal():
        # mteb saves 1,000 documents for each query, and the whole file again after every language: most of the time
        # outside of the model. Twice the cutoff, as documents of equal scores may come in another order.
        save, count = task._save_task_predictions, 2 * int(cutoff)

        def save_best(rankings, *args, **kwargs):
            best = {
                query: dict(heapq.nlargest(count, ranking.items(), key=itemgetter(1)))
                for query, ranking in rankings.items()
            }
            save(best, *args, **kwargs)

        task._save_task_predictions = save_best
    return task


def _note_other_revisions(folder: Path):
    others = [path.name for path in sorted(folder.parent.glob("*")) if path.is_dir() and path != folder]
    if others:
        logger.warning(
            f"{folder.parent} also holds results of other revisions of the model, which are not used: "
            f"{', '.join(others)}. This one is {folder.name}."
        )
