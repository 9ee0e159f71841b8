"""LUSIFER configuration: two towers, the connector between them, pooling, and the prompt templates."""

from typing import Literal, get_args

from transformers import AutoConfig, PreTrainedConfig


Connector = Literal["ff", "embedding_table"]
Pooling = Literal["mean", "weightedmean", "cls", "lasttoken"]
AddedTokenPositions = Literal["contiguous", "after_padding"]
AlignmentAttention = Literal["bidirectional", "prefix_lm"]

# Prefixes: every text is embedded as `prefix + text`, so the same strings serve sentence-transformers and mteb.
# "research" is the exact formatting of the published code, which keeps its "." after an empty instruction.
PROMPT_TEMPLATES = {
    "default": {"query": "{instruction}\n", "document": "{instruction} Candidate:\n"},
    "research": {"query": "{instruction}.\n", "document": "{instruction}. Candidate:\n"},
}


class LusiferConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LusiferModel`] (arXiv 2501.00874): `encoder -> connector -> llm -> pooling -> projection`.

    Args:
        encoder_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `XLMRobertaConfig()`):
            The multilingual encoder: any encoder that `AutoModelForTextEncoding` or `AutoModel` knows.
        llm_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `MistralConfig()`):
            The English-centric decoder, run bidirectionally: any decoder that honours `is_causal=False`.
        connector (`str`, *optional*, defaults to `"ff"`):
            `"ff"` maps the encoder's states by Linear-ReLU-Linear; `"embedding_table"` maps them to a softmax over the
            LLM's vocabulary that weighs the LLM's input embeddings.
        num_added_tokens (`int`, *optional*, defaults to 1):
            Number of trainable tokens appended to every sequence.
        pooling (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"weightedmean"` (weights 1..k), `"cls"` (first token) or `"lasttoken"`, over the LLM's last
            hidden states, added tokens included.
        projection (`bool`, *optional*, defaults to `True`):
            Whether the pooled states pass Linear-ReLU-Linear.
        added_token_positions (`str`, *optional*, defaults to `"contiguous"`):
            `"contiguous"`: the added tokens follow the last real token, so an embedding does not depend on its batch.
            `"after_padding"`: they take the positions after the padded length, as the research code places them.
        alignment_attention (`str`, *optional*, defaults to `"bidirectional"`):
            How the LLM attends in the alignment stage; embedding is always bidirectional. `"bidirectional"`: every
            position of the LLM's text sees every other, as in the research code, so tokens must be masked.
            `"prefix_lm"`: a position of the LLM's text sees the encoder's states and the text before it.
        prompt_template (`str`, *optional*, defaults to `"default"`):
            Name of the formatting of instructions, a key of `PROMPT_TEMPLATES`.
        default_instruction (`str`, *optional*):
            The instruction of `encode_query` and `encode_document` when none is given.
        instructions (`dict[str, str]`, *optional*):
            Further instructions, each with the name of a prompt of sentence-transformers, such as mteb's names of
            tasks and of task types. A name that ends in "-document" takes the document template, others the query's.
    """

    model_type = "lusifer"
    sub_configs = {"encoder_config": AutoConfig, "llm_config": AutoConfig}

    encoder_config: dict | PreTrainedConfig | None = None
    llm_config: dict | PreTrainedConfig | None = None
    connector: Connector = "ff"
    num_added_tokens: int = 1
    pooling: Pooling = "mean"
    projection: bool = True
    added_token_positions: AddedTokenPositions = "contiguous"
    alignment_attention: AlignmentAttention = "bidirectional"
    prompt_template: str = "default"
    default_instruction: str = "Given a web search query, retrieve relevant passages that answer the query:"
    instructions: dict[str, str] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.encoder_config = _as_config(self.encoder_config, "xlm-roberta")
        self.llm_config = _as_config(self.llm_config, "mistral").get_text_config(decoder=True)
        self.llm_config.is_causal = False
        super().__post_init__(**kwargs)
        # Never the "repo--module" form of a model that was loaded from the Hub: a saved folder must load on its own.
        self.auto_map = {
            "AutoConfig": "configuration_lusifer.LusiferConfig",
            "AutoModel": "modeling_lusifer.LusiferModel",
        }
        self.validate_fields()

    def validate_fields(self):
        """Raise a `ValueError` that names the field, its value and the choices."""
        choices = {
            "connector": get_args(Connector),
            "pooling": get_args(Pooling),
            "added_token_positions": get_args(AddedTokenPositions),
            "alignment_attention": get_args(AlignmentAttention),
            "prompt_template": tuple(PROMPT_TEMPLATES),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
        if self.num_added_tokens < 0:
            raise ValueError(f"num_added_tokens={self.num_added_tokens} must be 0 or more.")

    @property
    def hidden_size(self) -> int:
        """Size of the embedding, which sentence-transformers reads from here."""
        return self.llm_config.hidden_size

    def get_text_config(self, decoder=None, encoder=None):
        return self.llm_config

    def prompt(self, prompt_name: str | None = None, instruction: str | None = None) -> str:
        """
        The prefix that `model.encode`, sentence-transformers and mteb put before a text.

        Args:
            prompt_name (`str`, *optional*):
                `"query"` or `"document"`; with an instruction alone, `"query"`; with neither there is no prefix.
            instruction (`str`, *optional*, defaults to `default_instruction`):
                What the embedding is for, in English. `""`: nothing in particular, and so no prefix by default.
        """
        if prompt_name is None and instruction is None:
            return ""
        templates = PROMPT_TEMPLATES[self.prompt_template]
        name = "query" if prompt_name is None else prompt_name
        if name not in templates:
            raise ValueError(f"prompt_name={prompt_name!r} is not one of {', '.join(map(repr, templates))}.")
        instruction = self.default_instruction if instruction is None else instruction
        if not instruction and self.prompt_template == "default":
            return ""
        return templates[name].format(instruction=instruction)

    def prompts(self) -> dict[str, str]:
        """The prefixes by name that sentence-transformers reads: "query", "document" and those of `instructions`."""
        prompts = {name: self.prompt(name) for name in ("query", "document")}
        for name, instruction in sorted((self.instructions or {}).items()):  # as config.json sorts them
            prompts[name] = self.prompt("document" if name.endswith("-document") else "query", instruction)
        return prompts


def _as_config(config: dict | PreTrainedConfig | None, default_model_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config or {})
    return AutoConfig.for_model(fields.pop("model_type", default_model_type), **fields)


LusiferConfig.register_for_auto_class()
