"""
Embed a text once for each prompt, whatever tasks it is in.

mteb's own `CachedEmbeddingWrapper` has a cache for each task, and prepares what it has not found a second time: a
document gets its title twice. Only its store is used here.
"""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
from datasets import Dataset
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.cache_wrappers.cache_backends import NumpyCache
from torch.utils.data import DataLoader


logger = logging.getLogger(__name__)


class CachedEncoder:
    """
    An mteb encoder that keeps the embeddings of another one on the disk.

    Args:
        encoder (`AbsEncoder`):
            Whose `model_prompts` are what it puts before texts.
        folder (`Path`):
            For embeddings of this encoder alone.
    """

    def __init__(self, encoder: AbsEncoder, folder: Path):
        self.encoder, self.folder = encoder, folder
        self.mteb_model_meta = encoder.mteb_model_meta
        self.similarity, self.similarity_pairwise = encoder.similarity, encoder.similarity_pairwise
        self._stores: dict[str, NumpyCache] = {}

    def encode(self, inputs, *, task_metadata, prompt_type=None, **kwargs):
        """Embed mteb's batches of texts: float32 of shape `(texts, H)`, in their order."""
        name = self.encoder.get_prompt_name(task_metadata, prompt_type)
        prompt = (self.encoder.model_prompts or {}).get(name, "")
        store = self._store(prompt, prompt_type)  # sentence-transformers may embed queries and documents differently
        items = [{"text": text} for batch in inputs for text in batch["text"]]
        new = list({item["text"]: item for item in items if item not in store}.values())
        if new:
            batches = DataLoader(Dataset.from_list(new), batch_size=kwargs.get("batch_size", 32))
            vectors = self.encoder.encode(batches, task_metadata=task_metadata, prompt_type=prompt_type, **kwargs)
            store.add(new, np.asarray(vectors))
            store.save()
        return np.array([store.get_vector(item) for item in items])

    def _store(self, prompt: str, prompt_type) -> NumpyCache:
        name = f"{prompt_type.value if prompt_type else 'text'}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"
        if name not in self._stores:
            self._stores[name] = _open(self.folder / name)
        return self._stores[name]


def _open(folder: Path) -> NumpyCache:
    index = folder / "index.json"
    remove_damaged(index)  # its vectors are written over
    store = NumpyCache(folder)
    if index.exists():
        store.load()
    return store


def remove_damaged(path: Path):
    """Remove a JSON file that a run left unfinished that was killed: mteb writes in place, and would stop at it."""
    if path.exists():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            logger.warning(f"Removing {path}, which a run that was killed left unfinished.")
            path.unlink()
