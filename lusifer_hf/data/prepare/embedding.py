"""Embed the texts of a step shard by shard, on all processes of `accelerate launch`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from ...modeling_lusifer import LusiferModel
from .steps import Step


SHARD_TEXTS = 8192

Encode = Callable[[list[str]], np.ndarray]


def load_encoders(
    model: str, instruction: str | None = None, document_prompt: str | None = None, trust_remote_code: bool = False
) -> tuple[Encode, Encode]:
    """
    How a model embeds queries and documents, on this process's device.

    Args:
        model (`str`): Hub id or folder of a LUSIFER model, or of any model for sentence-transformers.
        instruction (`str`, *optional*):
            What the embeddings are for. For other models the prompt of queries, instead of their own: "query: " of E5.
        document_prompt (`str`, *optional*): For other models that of documents: "passage: " of E5.
        trust_remote_code (`bool`, *optional*, defaults to `False`): For other models.

    Returns:
        `tuple`: Two functions from texts to float32 arrays (N, D) of length 1.
    """
    device = PartialState().device
    if PretrainedConfig.get_config_dict(model)[0].get("model_type") == "lusifer":
        if document_prompt is not None:
            raise ValueError(f"document_prompt={document_prompt!r}: {model} has its own template for documents.")
        loaded = LusiferModel.from_pretrained(model).to(device)
        options = {"instruction": instruction, "normalize": True, "show_progress_bar": False}
        document_options = options
    else:
        loaded = SentenceTransformer(model, device=str(device), trust_remote_code=trust_remote_code)
        shared = {"normalize_embeddings": True, "show_progress_bar": False}
        options = shared | ({} if instruction is None else {"prompt": instruction})
        document_options = shared | ({} if document_prompt is None else {"prompt": document_prompt})
    return (
        lambda texts: np.asarray(loaded.encode_query(texts, **options), dtype=np.float32),
        lambda texts: np.asarray(loaded.encode_document(texts, **document_options), dtype=np.float32),
    )


def embed_shards(running: Step, texts: Dataset, encode: Encode, name: str) -> list[Path]:
    """
    Embed a data set's column `text`; every process does its share of the shards that are not on the disk.

    Returns:
        `list[Path]`: `.npy` files of float32 (n, D), whose rows one after the other are those of the texts.

    Raises:
        `ValueError`: if a shard of an earlier run has another number of dimensions.
    """
    folder = running.folder / "shards" / name
    folder.mkdir(parents=True, exist_ok=True)
    paths = {start: folder / f"{start:012d}.npy" for start in range(0, len(texts), SHARD_TEXTS)}
    running.wait()  # all see the same shards
    todo = [start for start, path in paths.items() if not path.exists()]
    running.wait()  # and nobody adds one before
    state = running.state
    with tqdm(total=len(todo), desc=f"Embedding {name}", unit="shard", disable=not running.is_main) as progress:
        for start in todo[state.process_index :: state.num_processes]:
            embeddings = encode(texts[start : start + SHARD_TEXTS]["text"])
            partial = paths[start].with_suffix(".tmp")
            with open(partial, "wb") as file:
                np.save(file, embeddings)
            os.replace(partial, paths[start])
            progress.update(min(state.num_processes, len(todo) - progress.n))  # the last round may lack some
    running.wait()
    sizes = {np.load(path, mmap_mode="r").shape[1]: path for path in paths.values()}
    if len(sizes) > 1:
        listed = ", ".join(f"{path.name} has {size}" for size, path in sizes.items())
        raise ValueError(
            f"The embeddings of {name} differ in their number of dimensions ({listed}): the model has changed since "
            f"the run that is continued. Remove {running.folder} and start again."
        )
    return list(paths.values())


def take_rows(paths: Sequence[Path], rows: np.ndarray) -> np.ndarray:
    """Rows (n, D) of the embeddings in shards, in the given order."""
    shards = rows // SHARD_TEXTS
    taken = None
    for shard in np.unique(shards):
        here = shards == shard
        part = np.load(paths[shard], mmap_mode="r")[rows[here] - shard * SHARD_TEXTS]
        taken = np.empty((len(rows), part.shape[1]), dtype=np.float32) if taken is None else taken
        taken[here] = part
    return taken
