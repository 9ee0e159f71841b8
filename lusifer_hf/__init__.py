"""LUSIFER: multilingual text embeddings from a multilingual encoder and an English-centric LLM (arXiv 2501.00874)."""

from transformers import AutoConfig, AutoModel

from .configuration_lusifer import LusiferConfig
from .modeling_alignment import LusiferForAlignment
from .modeling_lusifer import LusiferModel, LusiferModelOutput


__version__ = "0.1.0"

AutoConfig.register("lusifer", LusiferConfig)
AutoModel.register(LusiferConfig, LusiferModel)

__all__ = ["LusiferConfig", "LusiferForAlignment", "LusiferModel", "LusiferModelOutput"]
