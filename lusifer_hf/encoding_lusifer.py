"""
The text side of a LUSIFER model: its tokenizers, `encode`, and the files that make its folder a complete repository.

`encode` in three steps: (1) tokenise a window of texts, (2) sort the window by length and cut it into batches by a
token budget, (3) embed each batch and write its rows where the caller's order wants them.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from tokenizers import normalizers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging


logger = logging.get_logger(__name__)

# Long enough to sort well, short enough that ids never pile up.
WINDOW_TEXTS = 8192
WINDOW_CHARACTERS = 8_000_000

_SET_TOKENIZER = 'Set one: model.tokenizer = AutoTokenizer.from_pretrained("the encoder\'s id").'
_UPLOAD_ARGUMENTS = ("repo_id", "private", "commit_message", "commit_description", "revision", "create_pr")
REQUIREMENTS = {"sentence-transformers": ">=6.0", "transformers": ">=5.15"}
# In an installed package and in a checkout; a model that was loaded as remote code has neither.
CARD_TEMPLATES = (Path(__file__).with_name("model_card.md"), Path(__file__).parents[1] / "model_card" / "template.md")


class RepositoryMixin:
    """Tokenizers, and saving a folder that AutoModel, AutoTokenizer and SentenceTransformer load."""

    # Arguments of `AutoTokenizer.from_pretrained`; None for a model that was not loaded from anywhere.
    tokenizer_source: dict | None = None
    llm_tokenizer_source: dict | None = None
    # Of a freshly composed or converted model: tensors that `save_pretrained` adds, for the alignment stage.
    lm_head_to_save: dict[str, torch.Tensor] | None = None
    _tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The encoder's tokenizer, loaded on first use from where the weights came from."""
        if self._tokenizer is None:
            if self.tokenizer_source is None:
                raise ValueError(
                    f"This model was not loaded from a repository, so it has no tokenizer. {_SET_TOKENIZER}"
                )
            try:
                self._tokenizer = _load_tokenizer(
                    self.tokenizer_source,
                    config=self.config.encoder_config,
                    model_input_names=["input_ids", "attention_mask"],
                    split_special_tokens=True,
                )
            except (OSError, ValueError) as error:
                name = self.tokenizer_source["pretrained_model_name_or_path"]
                raise ValueError(f"No tokenizer could be loaded from {name}. {_SET_TOKENIZER}") from error
            keep_special_strings_as_text(self._tokenizer)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    def use_backbones_tokenizers(self, encoder: str, llm: str):
        """Take the tokenizers of two backbones, ids or folders; texts will be cut to 512 tokens, or what fits."""
        length = min(512, self.max_positions or 512)
        self.tokenizer_source = {"pretrained_model_name_or_path": encoder, "model_max_length": length}
        self.llm_tokenizer_source = {"pretrained_model_name_or_path": llm}

    def save_pretrained(self, save_directory, is_main_process=True, push_to_hub=False, **kwargs):
        """As [`~PreTrainedModel.save_pretrained`], and the tokenizers, sentence-transformers' files and the card."""
        hub = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS if name in kwargs}
        if self.lm_head_to_save is not None and kwargs.get("state_dict") is None:
            kwargs["state_dict"] = {**self.state_dict(), **self.lm_head_to_save}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        self._save_tokenizers(folder)
        write_sentence_transformers_files(self.config, folder)
        self._save_card(folder)
        if push_to_hub:
            _upload(folder, **{"repo_id": folder.resolve().name, "token": kwargs.get("token"), **hub})

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs) -> str:
        """
        Upload the folder that `save_pretrained` writes, the card included; returns the commit's address.

        Args:
            kwargs: `token`, `private`, `commit_message`, `commit_description`, `revision`, `create_pr`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return _upload(Path(folder), repo_id=repo_id, **kwargs)

    def _save_tokenizers(self, folder: Path):
        try:
            self.tokenizer.save_pretrained(folder)
        except ValueError as error:
            logger.warning(f"Saved {folder} without a tokenizer. {error}")
        if self.llm_tokenizer_source is not None:
            try:
                tokenizer = _load_tokenizer(self.llm_tokenizer_source, config=self.config.llm_config)
                tokenizer.save_pretrained(folder / "llm_tokenizer")
            except (OSError, ValueError):
                logger.info(f"Saved {folder} without the LLM's tokenizer, which only the alignment stage needs.")

    def _save_card(self, folder: Path):
        card = folder / "README.md"
        if card.exists():  # perhaps edited by hand
            return
        template = next((path for path in CARD_TEMPLATES if path.exists()), None)
        if template is not None:
            card.write_text(render_card(self.config, template), encoding="utf-8")
        elif self.tokenizer_source is not None:
            source = {name: value for name, value in self.tokenizer_source.items() if name != "model_max_length"}
            name = source.pop("pretrained_model_name_or_path")
            loaded = cached_file(name, "README.md", _raise_exceptions_for_missing_entries=False, **source)
            if loaded is not None:
                card.write_bytes(Path(loaded).read_bytes())


class EncodingMixin:
    """`encode`, `encode_query` and `encode_document`."""

    def encode_query(self, sentences: str | Sequence[str], instruction: str | None = None, **kwargs):
        """[`~EncodingMixin.encode`] with the query prompt and `instruction`, or the config's default instruction."""
        return self.encode(sentences, prompt_name="query", instruction=instruction, **kwargs)

    def encode_document(self, sentences: str | Sequence[str], instruction: str | None = None, **kwargs):
        """[`~EncodingMixin.encode`] with the document prompt."""
        return self.encode(sentences, prompt_name="document", instruction=instruction, **kwargs)

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        instruction: str | None = None,
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        max_length: int | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        convert_to: str = "numpy",
        show_progress_bar: bool | None = None,
        compile_layers: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """
        Embed texts; a text's vector does not depend on the other texts.

        Args:
            sentences (`str` or sequence of `str`):
                One text or many; `""` is a text.
            prompt_name (`str`, *optional*):
                `"query"` or `"document"`; without it and without an instruction the text is embedded as it is.
            instruction (`str`, *optional*):
                What the embedding is for; alone it formats the text as a query.
            batch_size (`int`, *optional*):
                At most so many texts in a batch.
            max_tokens_per_batch (`int`, *optional*):
                At most so many tokens in a batch, unless a single text has more. 4,096 on CPUs, 16,384 elsewhere.
            max_length (`int`, *optional*, defaults to `tokenizer.model_max_length`):
                Longer texts are cut to so many tokens, prompt and special tokens included. 512 as composed.
            normalize (`bool`, *optional*, defaults to `False`):
                Whether to give the vectors length 1.
            truncate_dim (`int`, *optional*):
                Keep so many leading dimensions, before normalising.
            convert_to (`str`, *optional*, defaults to `"numpy"`):
                `"numpy"` or `"torch"` (on the CPU).
            show_progress_bar (`bool`, *optional*):
                By default as sentence-transformers does: when the log level is INFO or lower.
            compile_layers (`bool`, *optional*, defaults to `False`):
                Compile the layers first ([`~LusiferModel.compile_layers`]): worth its minute for long runs on a GPU.

        Returns:
            float32 of shape `(len(sentences), H)`, or `(H,)` for a single `str`, in the order of `sentences`.

        Raises:
            `TypeError`, `ValueError`: naming the text or the argument, before anything is embedded.
        """
        if isinstance(sentences, str):
            single, sentences = True, [sentences]
        else:
            single, sentences = False, list(sentences)
        check_texts(sentences)
        prefix, max_length = self._check_arguments(prompt_name, instruction, max_length)
        _check_positive(batch_size=batch_size, max_tokens_per_batch=max_tokens_per_batch, truncate_dim=truncate_dim)
        if truncate_dim is not None and truncate_dim > self.config.hidden_size:
            raise ValueError(f"truncate_dim={truncate_dim} is larger than the embedding ({self.config.hidden_size}).")
        if convert_to not in ("numpy", "torch"):
            raise ValueError(f"convert_to={convert_to!r} is not one of 'numpy', 'torch'.")
        if max_tokens_per_batch is None:
            max_tokens_per_batch = 4096 if self.device.type == "cpu" else 16384
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() <= logging.INFO
        if compile_layers:
            self.compile_layers()

        # Made outside of inference mode, so that training code can use it.
        embeddings = torch.empty(len(sentences), truncate_dim or self.config.hidden_size, dtype=torch.float32)
        in_training = [module for module in self.modules() if module.training]
        self.eval()
        bar = {"total": len(sentences), "desc": "Encoding", "unit": "text", "disable": not show_progress_bar}
        try:
            with torch.inference_mode(), tqdm(**bar) as progress:
                for start, window in _windows(sentences):
                    texts = [prefix + text for text in window]
                    ids = self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
                    for rows in _batches([len(row) for row in ids], batch_size, max_tokens_per_batch):
                        vectors = self._embed([ids[row] for row in rows])[:, :truncate_dim].float()
                        if normalize:
                            vectors = torch.nn.functional.normalize(vectors, dim=1)
                        embeddings[torch.tensor(rows) + start] = vectors.cpu()
                        progress.update(len(rows))
        finally:
            for module in in_training:
                module.training = True
        if single:
            embeddings = embeddings[0]
        return embeddings.numpy() if convert_to == "numpy" else embeddings

    def _embed(self, ids: list[list[int]]) -> torch.Tensor:
        rows = [torch.tensor(row) for row in ids]
        padding = self.tokenizer.pad_token_id
        input_ids = pad_sequence(rows, batch_first=True, padding_value=0 if padding is None else padding)
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return self(input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device)).pooler_output

    def _check_arguments(self, prompt_name, instruction, max_length: int | None) -> tuple[str, int]:
        """The prompt's prefix and the length in tokens to cut at."""
        if instruction is not None:
            check_texts([instruction], what="The instruction")
        prefix = self.config.prompt(prompt_name, instruction)
        _check_positive(max_length=max_length)
        max_length = self.tokenizer.model_max_length if max_length is None else max_length
        limit = self.max_positions
        if limit is not None and max_length > limit:
            logger.warning_once(
                f"max_length={max_length} is cut to the {limit} tokens that the model has positions for."
            )
            max_length = limit
        used = len(self.tokenizer(prefix)["input_ids"])
        if used >= max_length:
            raise ValueError(
                f"max_length={max_length} leaves no room for text beside {used} tokens of prompt: raise it."
            )
        return prefix, max_length


def _load_tokenizer(source: dict, config, **options) -> PreTrainedTokenizerBase:
    hub = {name: value for name, value in source.items() if name != "model_max_length"}
    # Where there is no file, AutoTokenizer makes an empty tokenizer of the config's class.
    cached_file(hub.pop("pretrained_model_name_or_path"), "tokenizer_config.json", **hub)
    # The tower's config: for that of a remote model transformers would ask whether to run its code.
    return AutoTokenizer.from_pretrained(**source, config=config, **options)


def keep_special_strings_as_text(tokenizer: PreTrainedTokenizerBase):
    """
    Have a text that spells a special token, such as "</s>", read as that text and not as the token.

    `split_special_tokens` does it for most tokenizers, but a Unigram model (XLM-R, mT5) holds the string as a piece of
    its vocabulary, and would still match it.
    """
    matched = [
        token
        for token in set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
        if tokenizer.convert_tokens_to_ids(token) in tokenizer(token, add_special_tokens=False)["input_ids"]
    ]
    if matched:
        backend = tokenizer.backend_tokenizer
        breaks = [normalizers.Replace(token, f"{token[0]} {token[1:]}") for token in sorted(matched)]
        backend.normalizer = normalizers.Sequence([*breaks, *([backend.normalizer] if backend.normalizer else [])])


def check_texts(texts: Sequence[str], what: str = "Text", first: int = 0):
    """Raise an error that names the first item that cannot be embedded, counting from `first`."""
    for index, text in enumerate(texts, first):
        name = f"{what} {index}" if what == "Text" else what
        if not isinstance(text, str):
            raise TypeError(f"{name} is {text!r} of type {type(text).__name__}, not a string.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise ValueError(
                f"{name} holds a lone surrogate, U+{code:04X} at character {error.start}, which is no valid Unicode: "
                'remove it, for instance with text.encode("utf-8", "ignore").decode().'
            ) from None


def _check_positive(**values: int | None):
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")


def _windows(texts: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Consecutive windows of the texts, each with the index of its first text."""
    start = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if index + 1 - start == WINDOW_TEXTS or characters >= WINDOW_CHARACTERS:
            yield start, texts[start : index + 1]
            start, characters = index + 1, 0
    if start < len(texts):
        yield start, texts[start:]


def _batches(lengths: list[int], batch_size: int | None, max_tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest texts first, so that running out of memory happens at once."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and ((len(batch) + 1) * lengths[batch[0]] > max_tokens or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def write_sentence_transformers_files(config, folder: Path):
    """The three files with which stock sentence-transformers modules load the folder and take its `pooler_output`."""
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}},
            "module_output_name": "sentence_embedding",
            "unpad_inputs": False,  # the model does it itself
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": config.prompts(),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "requirements": REQUIREMENTS,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def render_card(config, template: Path) -> str:
    """The model card of a repository, from a Jinja template."""
    names = [getattr(config, tower).name_or_path for tower in ("encoder_config", "llm_config")]
    data = ModelCardData(
        base_model=[name for name in names if "/" in name] or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["lusifer", "sentence-transformers", "feature-extraction", "multilingual"],
    )
    return str(ModelCard.from_template(data, template_path=str(template), config=config))


def _upload(folder: Path, repo_id: str, token=None, private=None, **commit) -> str:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit.setdefault("commit_message", "Upload LUSIFER model")
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)
