"""Write a model as a complete repository: the folder is there whole, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .modeling_lusifer import LusiferModel


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """
    A folder to write into, which takes its final name only when everything in it was written.

    Raises:
        `FileExistsError`: before any work, if `folder` holds something already.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: choose another output folder, or remove it first.")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save_repository(model: LusiferModel, folder: Path):
    """Save a model with both tokenizers: without one, which `save_pretrained` warns about, it is no repository."""
    model.save_pretrained(folder)
    for path, source in ((folder, model.tokenizer_source), (folder / "llm_tokenizer", model.llm_tokenizer_source)):
        if not (path / "tokenizer_config.json").exists():
            name = source["pretrained_model_name_or_path"]
            raise ValueError(f"{name} has no tokenizer: a repository needs both backbones' tokenizers.")
