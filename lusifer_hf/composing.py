"""From two pretrained backbones to an initialised LUSIFER repository."""

from pathlib import Path

from .modeling_lusifer import LusiferModel
from .prompts import INSTRUCTIONS
from .publishing import new_folder, save_repository


def compose(encoder: str, llm: str, output: str | Path, **options) -> LusiferModel:
    """
    Compose a model and write it, with both tokenizers, the LLM's LM head, the prompts and the card.

    Args:
        encoder (`str`):
            Hub id or folder of the multilingual encoder.
        llm (`str`):
            Hub id or folder of the decoder LLM.
        output (`str` or `Path`):
            The folder to write; it must not hold anything yet.
        options:
            As in [`LusiferModel.from_backbones`]: `seed`, `dtype` and any field of the config.
    """
    options.setdefault("instructions", INSTRUCTIONS)
    with new_folder(output) as folder:
        model = LusiferModel.from_backbones(encoder, llm, **options)
        save_repository(model, folder)
    return model
