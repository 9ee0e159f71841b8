"""
PyTorch LUSIFER model (arXiv 2501.00874): multilingual encoder -> connector -> bidirectional LLM -> pooling.

Shapes: B texts, L padded input length, T = L + num_added_tokens, N kept tokens of the whole batch, H hidden size of
the LLM and size of the embedding.

Between the towers a batch is padded with each row's kept tokens first, whatever side the caller padded on. Inside a
tower that runs "packed" (the default where the backbone allows it) the N kept tokens are one sequence of B segments.
"""

import inspect
from dataclasses import dataclass, fields
from functools import cached_property, partial, reduce
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_lusifer import LusiferConfig
from .encoding_lusifer import EncodingMixin, RepositoryMixin


_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
_MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")

if torch.backends.cuda.is_built():  # it takes two seconds to import
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped key/value heads as they are, later versions want to be told.
    _VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (1, heads, N, head_dim)
    key: torch.Tensor,  # (1, key_value_heads, N, head_dim)
    value: torch.Tensor,  # (1, key_value_heads, N, head_dim)
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,  # (B + 1,)
    max_length_q: int | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,  # (B + 1,)
    max_length_k: int | None = None,
    visible_keys: torch.Tensor | None = None,  # (K,)
    prefix: torch.Tensor | None = None,  # (P,)
    cu_seq_lens_prefix: torch.Tensor | None = None,  # (B + 1,)
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Full attention inside each of the B segments of one packed sequence; returns states `(1, N, heads, head_dim)`.

    The alignment stage may hide all positions but `visible_keys` as keys, or let only the positions `prefix`, with
    which segments begin, see each other, and every other position see what stands before it.

    Half precision on CUDA runs `varlen_attn`, everything else one SDPA call per run of segments of equal length.
    """
    name = module.__class__.__name__
    if cu_seq_lens_q is None:
        raise ValueError(
            f"{name} was not told where texts begin: call the LUSIFER model, not one of its towers, or load it with "
            'attn_implementation="sdpa".'
        )
    if unsupported := [
        feature for feature in ("softcap", "s_aux", "position_bias") if kwargs.get(feature) is not None
    ]:
        raise ValueError(
            f"{name} uses {', '.join(unsupported)}, which packed attention leaves out: load the model with "
            'attn_implementation="eager".'
        )
    # The masks of "sdpa" and "eager" read the window from the config; the argument has flash attention's convention.
    window = module.config.sliding_window if sliding_window is not None else None
    if window is not None and max_length_q <= window:
        window = None
    grouped = query.shape[1] != key.shape[1]

    fits_kernel = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and dropout == 0.0
    if visible_keys is not None and (prefix is not None or window is not None):
        fits_kernel = False  # it counts distances in keys, so none may be left out
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and fits_kernel:
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        attend = partial(varlen_attn, scale=scaling, **(_VARLEN_GQA if grouped else {}))
        left, right = (-1, -1) if window is None else (window, window)
        if visible_keys is not None:
            key, value = key.index_select(0, visible_keys), value.index_select(0, visible_keys)
        states = attend(
            *(query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k),
            window_size=(left, right if prefix is None else 0),
        )
        if prefix is not None:
            inside = attend(
                *(states.index_select(0, prefix) for states in (query, key, value)),
                *(cu_seq_lens_prefix, cu_seq_lens_prefix, max_length_q, max_length_q),
                window_size=(left, right),
            )
            states = states.index_copy(0, prefix, inside)
        return states.unsqueeze(0), None

    if visible_keys is not None:
        visible = torch.zeros_like(query[0, 0, :, 0], dtype=torch.bool).index_fill(0, visible_keys, True)  # (N,)
    lengths, counts = cu_seq_lens_q.diff().unique_consecutive(return_counts=True)
    # Not slices: the gradient of each would be as large as the whole sequence.
    runs = (states[0].split((lengths * counts).tolist(), dim=1) for states in (query, key, value))
    outputs, start, row = [], 0, 0
    for length, count, *parts in zip(lengths.tolist(), counts.tolist(), *runs, strict=True):
        end = start + length * count
        masks = []
        positions = torch.arange(length, device=query.device)
        if window is not None and length > window:
            masks.append((positions[:, None] - positions).abs() <= window)
        if visible_keys is not None:
            masks.append(visible[start:end].view(count, 1, 1, length))
        if prefix is not None:
            prefix_lengths = cu_seq_lens_prefix.diff()[row : row + count]
            masks.append((positions < prefix_lengths.view(-1, 1, 1, 1)) | (positions <= positions[:, None]))
        states = nn.functional.scaled_dot_product_attention(
            *(part.unflatten(1, (count, length)).transpose(0, 1) for part in parts),
            attn_mask=reduce(torch.logical_and, masks) if masks else None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(states.transpose(1, 2).flatten(0, 1))  # (count * length, heads, head_dim)
        start, row = end, row + count
    return torch.cat(outputs).unsqueeze(0), None


AttentionInterface.register("packed", packed_attention_forward)


class _Layout:
    """Which positions of a padded batch hold a token, and how to take the padding out and put it back."""

    def __init__(self, mask: torch.Tensor, position_ids: torch.Tensor):
        self.mask = mask  # (B, T), bool
        self.position_ids = position_ids  # (B, T)

    @cached_property
    def kept(self) -> torch.Tensor:
        return self.mask.flatten().nonzero().squeeze(1)  # (N,)

    @cached_property
    def segments(self) -> dict[str, torch.Tensor | int]:
        """The arguments with which transformers tells an attention function where sequences begin."""
        lengths = self.mask.sum(dim=1, dtype=torch.int32)
        cu_seq_lens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = int(lengths.max())
        return {
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def padded_mask(self, config, arguments: dict) -> torch.Tensor:
        """The `attention_mask` of a tower that runs padded, on these other arguments."""
        return self.mask.long()

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        return states.flatten(0, 1)[self.kept].unsqueeze(0)  # (1, N, ...)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        padded = states.new_zeros(self.mask.numel(), states.shape[-1])
        return padded.index_copy(0, self.kept, states[0]).unflatten(0, self.mask.shape)  # (B, T, ...)


@dataclass
class LusiferModelOutput(ModelOutput):
    """
    Output of [`LusiferModel`]. Every row holds its text's kept tokens first, then the added tokens, then padding.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, H)`):
            The LLM's last hidden states, after its final norm.
        pooler_output (`torch.FloatTensor` of shape `(B, H)`):
            The embeddings, not normalised.
        attention_mask (`torch.LongTensor` of shape `(B, T)`):
            1 where `last_hidden_state` holds a token or an added token.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*):
            The LLM's input embeddings and the output of each of its layers, `(B, T, H)` each.
        attentions (`tuple[torch.FloatTensor]`, *optional*):
            The LLM's attention weights `(B, heads, T, T)` of each layer; with `attn_implementation="eager"` only.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class LusiferMLP(nn.Module):
    """Linear-ReLU-Linear, the shape of both the connector and the projection."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, in_features)
        self.linear_2 = nn.Linear(in_features, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.relu(self.linear_1(hidden_states)))


class LusiferConnector(nn.Module):
    """Maps the encoder's states to the LLM's input space and appends the added tokens."""

    def __init__(self, config: LusiferConfig):
        super().__init__()
        encoder_size, llm = config.encoder_config.hidden_size, config.llm_config
        if config.connector == "ff":
            self.mlp = LusiferMLP(encoder_size, llm.hidden_size)
        else:
            self.vocabulary = nn.Linear(encoder_size, llm.vocab_size)
        if config.num_added_tokens:
            self.added_tokens = nn.Parameter(torch.empty(config.num_added_tokens, llm.hidden_size))
        self.config = config

    def forward(
        self,
        hidden_states: torch.Tensor,
        embedding_table: torch.Tensor | None = None,
        embedding_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States `(B, L, encoder hidden size)` to `(B, T, H)`; the LLM's table `(vocabulary, H)` for that variant."""
        if self.config.connector == "ff":
            states = self.mlp(hidden_states)
        else:
            states = self.vocabulary(hidden_states).softmax(dim=-1) @ embedding_table
            if embedding_scale is not None:
                states = states * embedding_scale.to(states.dtype)
        if self.config.num_added_tokens == 0:
            return states
        # Here, not in the model: wrappers (PEFT, FSDP, offloading) have the parameter ready in this forward only.
        return torch.cat([states, self.added_tokens.to(states.dtype).expand(states.shape[0], -1, -1)], dim=1)


class LusiferPreTrainedModel(PreTrainedModel):
    config_class = LusiferConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LusiferConnector) and self.config.num_added_tokens:
            init.normal_(module.added_tokens, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As [`~PreTrainedModel.from_pretrained`], but weights that do not fit the config, and an LLM that stays causal,
        are errors instead of a model that embeds wrongly.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        source = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"A weights file of {pretrained_model_name_or_path} is damaged ({error}): download or copy it again."
            ) from error
        embedder = model.base_model
        embedder.tokenizer_source = {"pretrained_model_name_or_path": pretrained_model_name_or_path, **source}
        llm_folder = "/".join(filter(None, [source.get("subfolder"), "llm_tokenizer"]))
        embedder.llm_tokenizer_source = {**embedder.tokenizer_source, "subfolder": llm_folder}
        fresh = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
        if any(name.startswith("lm_head.") for name in fresh):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no LM head that fits the LLM, and the alignment stage would "
                "train against a random one. Start from a folder that `lusifer-hf compose`, `lusifer-hf convert` or "
                "the alignment stage wrote: a model that was saved after any other training has none."
            )
        misfits = [f"{kind}: {', '.join(sorted(map(str, info[kind]))[:5])}" for kind in _MISFITS if info[kind]]
        if misfits and not kwargs.get("ignore_mismatched_sizes"):
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} do not fit its config.json ({'; '.join(misfits)}). "
                "Take config.json and the weights from one save."
            )
        embedder.check_bidirectional()
        return (model, info) if wants_info else model


class LusiferModel(EncodingMixin, RepositoryMixin, LusiferPreTrainedModel):
    """
    Multilingual text embeddings from an encoder, a connector and an LLM run bidirectionally.

    Example:

    ```python
    >>> from lusifer_hf import LusiferModel

    >>> model = LusiferModel.from_pretrained("path/to/model")  # doctest: +SKIP
    >>> model.encode_query(["how do plants breathe?"]).shape  # doctest: +SKIP
    (1, 4096)
    ```
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # kept for the alignment stage

    def __init__(self, config: LusiferConfig):
        config.validate_fields()  # `from_pretrained(folder, pooling=...)` sets fields after the config's own check
        super().__init__(config)
        self.encoder = _build_tower(_encoder_class(config.encoder_config), config.encoder_config)
        if hasattr(self.encoder, "pooler"):
            self.encoder.pooler = None
        self.connector = LusiferConnector(config)
        self.llm = _build_tower(AutoModel, config.llm_config)
        if config.projection:
            self.projection = LusiferMLP(config.hidden_size, config.hidden_size)
        self._encoder_takes_positions = "position_ids" in inspect.signature(self.encoder.forward).parameters
        self._first_position = _first_position(self.encoder)
        self.post_init()

    @classmethod
    def from_backbones(
        cls,
        encoder: str,
        llm: str,
        *,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | dict | None = None,
        seed: int | None = None,
        **config_fields,
    ) -> "LusiferModel":
        """
        Compose two pretrained backbones with a fresh connector and projection.

        The LLM's LM head, which the alignment stage needs, is written by `save_pretrained` of the composed model.

        Args:
            encoder (`str`):
                Hub id or folder of the multilingual encoder.
            llm (`str`):
                Hub id or folder of the decoder LLM.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Of the whole model; `"auto"` is the dtype that the LLM's weights are stored in.
            attn_implementation (`str` or `dict`, *optional*):
                As in `from_pretrained`.
            seed (`int`, *optional*):
                Makes the connector, the added tokens and the projection reproducible.
            config_fields:
                Fields of [`LusiferConfig`], such as `num_added_tokens=0`.
        """
        # Before gigabytes are read; a config by itself keeps any extra field, as those of transformers do.
        if unknown := set(config_fields) - {field.name for field in fields(LusiferConfig)}:
            raise ValueError(f"LusiferConfig has no field {', '.join(sorted(unknown))}.")
        LusiferConfig(**config_fields)
        causal_lm = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype)
        encoder_config = AutoConfig.from_pretrained(encoder)
        encoder_model = _encoder_class(encoder_config).from_pretrained(encoder, dtype=causal_lm.dtype)
        decoder = causal_lm.get_decoder()
        for tower, name in ((encoder_model, encoder), (decoder, llm)):
            tower.config.name_or_path = Path(name).name if Path(name).exists() else name
        config = LusiferConfig(encoder_config=encoder_model.config, llm_config=decoder.config, **config_fields)
        config._attn_implementation = attn_implementation
        with torch.device("meta"):
            model = cls._from_config(config, dtype=causal_lm.dtype)

        model.encoder, model.llm = encoder_model, decoder
        if hasattr(encoder_model, "pooler"):
            encoder_model.pooler = None
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            for fresh in [model.connector, *([model.projection] if config.projection else [])]:
                fresh.to_empty(device="cpu").apply(model._init_weights)
        # Not a submodule: embedding never needs it. A copy, since some LLMs tie it to their input embeddings.
        lm_head = causal_lm.get_output_embeddings()
        model.lm_head_to_save = {f"lm_head.{name}": tensor.clone() for name, tensor in lm_head.state_dict().items()}
        model.use_backbones_tokenizers(encoder, llm)
        model.check_bidirectional()
        return model.eval()

    @property
    def is_loaded(self) -> bool:
        """Whether this process has the weights: with FSDP's CPU-efficient loading one process of a machine has."""
        weight = self.llm.get_input_embeddings().weight
        # Before transformers 5.23 the others hold zeros.
        return not weight.is_meta and bool(weight[:8].any())

    @torch.no_grad()
    def check_bidirectional(self):
        """
        Raise a `ValueError` if a later token does not change the LLM's state of an earlier one, or if one text of a
        batch changes another's, as recurrent layers do in a packed batch.
        """
        embed_tokens = self.llm.get_input_embeddings()
        if not self.is_loaded:
            return
        ids = torch.tensor([[3, 4, 5], [3, 4, 6]], device=embed_tokens.weight.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        layout = _Layout(mask, torch.arange(3, device=ids.device).expand_as(ids))
        states = self._run_llm(embed_tokens(ids), layout).last_hidden_state.float()
        swapped = self._run_llm(embed_tokens(ids.flip(0)), layout).last_hidden_state.float().flip(0)
        first, second = states[:, :2]
        if torch.allclose(first, second, rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"{self.llm.__class__.__name__} stays causal with is_causal=False, so it cannot embed text. "
                "Choose an LLM that honours it, such as mistral, llama, qwen2, qwen3, gemma2, gemma3, phi or phi3."
            )
        if (states - swapped).abs().max() > 0.01 * states.abs().max():
            raise ValueError(
                f"{self.llm.__class__.__name__} mixes the texts of a packed batch. "
                'Load the model with attn_implementation="sdpa".'
            )

    def get_input_embeddings(self):
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> LusiferModelOutput | tuple:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Ids of the encoder's tokenizer, padded on either side.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*, defaults to all ones):
                0 drops a position altogether, wherever it stands in its row.
            inputs_embeds (`torch.FloatTensor` of shape `(B, L, encoder hidden size)`, *optional*):
                The encoder's input embeddings, instead of `input_ids`.

        Raises:
            `ValueError`: if a row keeps no token, or more than the encoder has positions for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = inputs.new_ones(inputs.shape[:2], dtype=torch.long)

        states, layout = self._embed_in_llm(inputs, attention_mask.bool())
        outputs = self._run_llm(
            states,
            layout,
            output_hidden_states=(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
        )
        embeddings = self._pool(outputs.last_hidden_state, layout.mask)
        output = LusiferModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=embeddings,
            attention_mask=layout.mask.long(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        # PEFT passes None, which means the default.
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    def _embed_in_llm(self, inputs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, _Layout]:
        """Ids `(B, L)` or embeddings `(B, L, ...)` to the LLM's input states `(B, T, H)`, added tokens included."""
        encoder_states, layout = self._run_encoder(inputs, mask)
        table = ()
        if self.config.connector == "embedding_table":
            embed_tokens = self.llm.get_input_embeddings()
            table = embed_tokens.weight, getattr(embed_tokens, "embed_scale", None)  # Gemma scales what leaves it
        states = self.connector(encoder_states, *table).to(layout.mask.device)
        return self._place_added_tokens(states, layout)

    def _run_encoder(self, inputs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, _Layout]:
        """Ids `(B, L)` or embeddings `(B, L, ...)` to the encoder's last states `(B, L, ...)`, kept tokens first."""
        lengths = mask.sum(dim=1, keepdim=True)
        _check_lengths(lengths, mask.shape[1], self.max_positions)
        # A stable sort, so that every shape is static where the towers run padded (torch.compile, export).
        order = mask.logical_not().byte().argsort(dim=1, stable=True)
        inputs = _take_positions(inputs, order)
        positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        layout = _Layout(positions < lengths, positions)

        name = "input_ids" if inputs.dim() == 2 else "inputs_embeds"
        arguments = {name: inputs}
        if self._encoder_takes_positions:
            # Padding repeats the last position: a row padded beyond the encoder's limit must not index past its table.
            arguments["position_ids"] = torch.minimum(positions, lengths - 1) + self._first_position
        return _run_tower(self.encoder, layout, arguments).last_hidden_state, layout

    def _place_added_tokens(self, states: torch.Tensor, layout: _Layout) -> tuple[torch.Tensor, _Layout]:
        """Move the added tokens of states `(B, T, H)` from after the padding to after each row's tokens."""
        num_added = self.config.num_added_tokens
        if num_added == 0:
            return states, layout
        batch, length = layout.mask.shape
        positions = torch.arange(length + num_added, device=states.device).expand(batch, -1)
        if self.config.added_token_positions == "after_padding":
            mask = torch.cat([layout.mask, layout.mask.new_ones(batch, num_added)], dim=1)
            return states, _Layout(mask, positions)
        lengths = layout.mask.sum(dim=1, keepdim=True)
        mask = positions < lengths + num_added
        source = torch.where(mask & (positions >= lengths), positions - lengths + length, positions)
        return _take_positions(states, source), _Layout(mask, positions)

    def _run_llm(self, states: torch.Tensor, layout: _Layout, **outputs) -> ModelOutput:
        """States `(B, T, H)` through the bidirectional LLM."""
        # `config.is_causal=False` makes masks bidirectional, but SDPA and flash attention without a mask (no padding)
        # ask the layer, which says causal unless told here.
        arguments = {
            "inputs_embeds": states,
            "position_ids": layout.position_ids,
            "is_causal": False,
            "use_cache": False,
            **outputs,
        }
        return _run_tower(self.llm, layout, arguments)

    def _pool(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states `(B, T, H)` to embeddings `(B, H)`."""
        rank = mask.cumsum(dim=1) * mask  # 1..k over the kept positions
        weights = {
            "mean": mask,
            "weightedmean": rank,
            "cls": rank == 1,
            "lasttoken": rank == rank.amax(dim=1, keepdim=True),
        }[self.config.pooling].float()
        weights = weights / weights.sum(dim=1, keepdim=True)
        # In float32: a mean over hundreds of bfloat16 states loses digits.
        pooled = torch.einsum("bt,bth->bh", weights, hidden_states.float()).to(hidden_states.dtype)
        return self.projection(pooled) if self.config.projection else pooled

    @property
    def max_positions(self) -> int | None:
        """Longest text in tokens, special tokens included: what both towers have positions for."""
        limits = []
        if (encoder_limit := getattr(self.config.encoder_config, "max_position_embeddings", None)) is not None:
            limits.append(encoder_limit - self._first_position)
        if (llm_limit := getattr(self.config.llm_config, "max_position_embeddings", None)) is not None:
            limits.append(llm_limit - self.config.num_added_tokens)
        return min(limits, default=None)

    def compile_layers(self):
        """Compile every layer of both towers once, for any length (regional `torch.compile`)."""
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer._compiled_call_impl is None:
                layer.compile(dynamic=True)


def _encoder_class(config):
    """Of an encoder-decoder, such as mT5, the encoder alone."""
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _build_tower(auto_class, config) -> PreTrainedModel:
    """A backbone without weights; packed if nothing else was asked for and its attention can be."""
    requested = config._attn_implementation
    if requested is None and getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"  # Gemma2: neither SDPA nor packed attention caps the logits
    tower = auto_class.from_config(config)
    takes_segments = "position_ids" in inspect.signature(tower.forward).parameters
    if requested is None and tower.config._attn_implementation == "sdpa":
        if tower._supports_attention_backend and takes_segments:
            tower.set_attn_implementation("packed")
    return tower


def _first_position(encoder: nn.Module) -> int:
    """RoBERTa's family numbers positions from padding_idx + 1, everything else from 0."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    return 0


def _take_positions(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Ids `(B, L)` or states `(B, L, ...)` in another order `(B, L)` of their positions."""
    # `take_along_dim` does the same, but torch.export then fixes the batch size and the length.
    return states.gather(1, order if states.dim() == 2 else order.unsqueeze(2).expand(-1, -1, states.shape[2]))


def _check_lengths(lengths: torch.Tensor, padded_length: int, limit: int | None):
    if torch.compiler.is_compiling() or lengths.is_meta:
        return
    if (empty := (lengths == 0).nonzero()).numel():
        raise ValueError(f"Row {int(empty[0, 0])} has no token: its attention_mask is 0 everywhere.")
    if limit is not None and padded_length > limit and (longest := int(lengths.max())) > limit:
        raise ValueError(f"A row of {longest} tokens is longer than the {limit} positions of the model: truncate it.")


def _run_tower(tower: PreTrainedModel, layout: _Layout, arguments: dict) -> ModelOutput:
    """Run a tower on padded inputs, packed inside if its attention takes segments; the states come back padded."""
    implementation = tower.config._attn_implementation
    device = layout.mask.device  # where the parts of a model that is spread over devices meet
    if implementation == "sdpa" and getattr(tower.config, "attn_logit_softcapping", None) is not None:
        # transformers refuses this from 5.23 on, and left the cap out before.
        raise ValueError(
            f'{tower.__class__.__name__} caps its attention logits: load it with attn_implementation="eager".'
        )
    if implementation != "packed" and "flash" not in implementation:
        outputs = tower(**arguments, attention_mask=layout.padded_mask(tower.config, arguments))
        outputs.last_hidden_state = outputs.last_hidden_state.to(device)
        return outputs
    if not tower._supports_attention_backend:
        raise ValueError(f'{tower.__class__.__name__} cannot run {implementation!r}: load it with "sdpa" or "eager".')
    packed = {name: layout.pack(value) if torch.is_tensor(value) else value for name, value in arguments.items()}
    outputs = tower(**packed, **layout.segments)
    outputs.last_hidden_state = layout.unpack(outputs.last_hidden_state.to(device))
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(
            None if states is None else layout.unpack(states.to(device)) for states in outputs.hidden_states
        )
    return outputs


LusiferModel.register_for_auto_class("AutoModel")
