"""
LUSIFER as an mteb encoder, and what mteb's registry wants to know about it.

A text is embedded with the prompt that mteb's own rule, `get_prompt_name`, picks from the model's `instructions`. So
the scores are those of `mteb.evaluate(SentenceTransformer(folder))`, which picks by the same rule from the prompts
file that was written from them.
"""

import copy
from typing import Any

import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder

from ..configuration_lusifer import LusiferConfig
from ..modeling_lusifer import LusiferModel
from ..prompts import INSTRUCTIONS


# mteb's names of the data that the paper's models are trained on, as far as mteb has them. Without one: PAQ, PubMedQA,
# SNLI, SQuAD, and WikiText, which only the alignment sees.
TRAINING_DATASETS = set(
    """
    ArguAna CQADupstackRetrieval DBPedia FEVER FiQA2018 HotpotQA MSMARCO NFCorpus NQ QuoraRetrieval SCIDOCS SciFact
    TRECCOVID Touche2020 MIRACLRetrieval MrTidyRetrieval STS12 STS22 STSBenchmark
    AmazonCounterfactualClassification AmazonReviewsClassification Banking77Classification EmotionClassification
    ImdbClassification MTOPIntentClassification ToxicConversationsClassification
    TweetSentimentExtractionClassification
    ArxivClusteringP2P ArxivClusteringS2S BiorxivClusteringP2P BiorxivClusteringS2S MedrxivClusteringP2P
    MedrxivClusteringS2S RedditClustering RedditClusteringP2P StackExchangeClustering StackExchangeClusteringP2P
    TwentyNewsgroupsClustering
    """.split()
)
LANGUAGES = """
    eng-Latn spa-Latn rus-Cyrl fra-Latn vie-Latn fas-Arab ind-Latn ara-Arab fin-Latn kor-Hang hin-Deva ben-Beng
    tel-Telu swa-Latn
""".split()


class LusiferEncoder(AbsEncoder):
    """
    An mteb encoder around a [`LusiferModel`].

    ```python
    >>> import mteb
    >>> from lusifer_hf.evaluation.model import LusiferEncoder

    >>> encoder = LusiferEncoder("path/to/model")  # doctest: +SKIP
    >>> mteb.evaluate(encoder, mteb.get_task("STS17"))  # doctest: +SKIP
    ```

    Args:
        model (`str` or `LusiferModel`):
            The model, or a Hub id or folder.
        revision (`str`, *optional*):
            Of the Hub repository; also the revision that mteb files the results under.
        device (`str`, *optional*):
            By default the accelerator, if there is one; a given `LusiferModel` stays where it is.
        max_length, max_tokens_per_batch (`int`, *optional*):
            As in [`LusiferModel.encode`]. mteb's `batch_size` is not used: batches are cut by tokens.
        loading:
            For `from_pretrained`, such as `dtype` and `attn_implementation`.
    """

    def __init__(
        self,
        model: str | LusiferModel,
        revision: str | None = None,
        device: str | None = None,
        *,
        max_length: int | None = None,
        max_tokens_per_batch: int | None = None,
        **loading: Any,
    ):
        if isinstance(model, str):
            if device is None:
                device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
            model = LusiferModel.from_pretrained(model, revision=revision or "main", **loading).to(device)
        self.model = model
        self.options = {"max_length": max_length, "max_tokens_per_batch": max_tokens_per_batch}
        self.instructions = {"query": None, "document": None, **_instructions(model.config)}
        self.model_prompts = model_prompts(model.config)
        self.mteb_model_meta = model_meta(model, revision=revision)

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        """Embed mteb's batches of texts: float32 of shape `(texts, H)`, in their order."""
        texts = [text for batch in inputs for text in batch["text"]]
        name = self.get_prompt_name(task_metadata, prompt_type)
        prompt = {} if name is None else {"prompt_name": _prompt_name(name), "instruction": self.instructions[name]}
        return self.model.encode(
            texts, **prompt, **self.options, show_progress_bar=kwargs.get("show_progress_bar", False)
        )


def model_prompts(config: LusiferConfig) -> dict[str, str]:
    """What a model puts before texts, by the names of mteb's prompts."""
    config = copy.copy(config)
    config.instructions = _instructions(config)
    return config.prompts()


def _instructions(config: LusiferConfig) -> dict[str, str]:
    # A model that was saved before the table was part of its config has the same one.
    return config.instructions or INSTRUCTIONS


def _prompt_name(name: str) -> str:
    return "document" if name.endswith("document") else "query"


def model_meta(model: LusiferModel, name: str | None = None, revision: str | None = None, **fields: Any) -> ModelMeta:
    """
    What mteb keeps beside results, complete enough for its registry once the fields below are given.

    Args:
        model (`LusiferModel`):
            Its sizes are measured.
        name (`str`, *optional*):
            `"organisation/name"`; by default the last two parts of the id or folder that it was loaded from.
        revision (`str`, *optional*):
            The commit on the Hub.
        fields:
            What the weights do not tell: `license`, `release_date`, `training_datasets` (`TRAINING_DATASETS` for the
            paper's data), `public_training_data`, `adapted_from`, ...
    """
    parameters = list(model.parameters())
    meta = {
        "loader": LusiferEncoder,
        "name": name or "/".join(["local", *model.name_or_path.strip("/").split("/")][-2:]),
        "revision": revision or "no_revision_available",
        "languages": LANGUAGES,
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "n_embedding_parameters": model.encoder.get_input_embeddings().weight.numel(),
        "memory_usage_mb": round(sum(parameter.nbytes for parameter in parameters) / 2**20, 1),
        "max_tokens": model.max_positions,
        "embed_dim": model.config.hidden_size,
        "open_weights": True,
        "public_training_code": "https://github.com/hieum98/lusifer",
        "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        "reference": "https://arxiv.org/abs/2501.00874",
        "similarity_fn_name": "cosine",
        "use_instructions": True,
    }
    unknown = dict.fromkeys(("release_date", "license", "public_training_data", "training_datasets"))
    return ModelMeta(**{**unknown, **meta, **fields})
