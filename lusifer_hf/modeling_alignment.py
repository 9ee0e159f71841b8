"""
The model of the alignment stage: the embedding model, with the LLM's own LM head to predict a text of the LLM.

Not a Hub file: what travels to the Hub is the embedding model, which `LusiferForAlignment.to_embedding_model` gives.

The LLM's sequence of a row is [BOS of its text, the encoder's states and the added tokens, the rest of its text]; BOS
comes first only in the rows whose text begins with it. Only text is predicted, each token from the position before it
in the row's own sequence.

Shapes: B rows, L padded length of the encoder's text, S padded length of the LLM's text, T padded length of the LLM's
sequence, V size of its vocabulary, H its hidden size.
"""

import copy
from functools import cached_property

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutput
from transformers.utils import is_liger_kernel_available

from .configuration_lusifer import LusiferConfig
from .modeling_lusifer import LusiferModel, LusiferPreTrainedModel, _Layout, _take_positions


IGNORED = -100
# What the loss holds at a time: 0.5 GB in float32, 4,096 positions at 32k vocabulary entries.
LOGITS_PER_CHUNK = 2**27

_BOS, _PREFIX, _TEXT, _NOTHING = range(4)  # the parts of a row's sequence, in order


class _AlignmentLayout(_Layout):
    """Positions that are computed but hidden as keys; with `prefix`, text that sees what stands before it only."""

    def __init__(self, mask: torch.Tensor, keys: torch.Tensor, prefix: torch.Tensor | None):
        super().__init__(mask, torch.arange(mask.shape[1], device=mask.device).expand_as(mask))
        self.keys = keys  # (B, T), bool
        self.prefix = prefix  # (B, T), bool: true, then false

    @cached_property
    def segments(self) -> dict[str, torch.Tensor | int]:
        segments = super().segments
        if not torch.equal(self.keys, self.mask):
            keys = _Layout(self.keys, self.position_ids).segments
            segments |= {name: keys[name] for name in ("cu_seq_lens_k", "max_length_k")}
            segments["visible_keys"] = self.keys.flatten()[self.kept].nonzero().squeeze(1)
        if self.prefix is not None:
            prefix = _Layout(self.prefix & self.mask, self.position_ids)
            segments["prefix"] = prefix.mask.flatten()[self.kept].nonzero().squeeze(1)
            segments["cu_seq_lens_prefix"] = prefix.segments["cu_seq_lens_q"]
        return segments

    def padded_mask(self, config, arguments: dict) -> torch.Tensor | dict[str, torch.Tensor]:
        if self.prefix is None:
            return self.keys.long()
        lengths = self.prefix.sum(dim=1)
        # As the LLM makes its masks itself: windows and every implementation's own format included.
        return create_masks_for_generate(
            config,
            arguments["inputs_embeds"],
            attention_mask=self.keys.long(),
            past_key_values=None,
            and_mask_function=lambda row, head, query, key: (key < lengths[row]) | (key <= query),
        )


class LMHead(nn.Linear):
    """
    The LLM's LM head: logits as the LLM makes them, or their summed cross entropy without all logits in memory.

    The loss is here and not in the model, since wrappers (FSDP) have the weight ready in this forward only.
    """

    def __init__(self, config: LusiferConfig):
        llm = config.llm_config
        causal_lm = _stock_causal_lm(llm)
        head = causal_lm.get_output_embeddings()
        if type(head) is not nn.Linear or set(causal_lm.children()) != {causal_lm.base_model, head}:
            raise ValueError(f"The alignment stage needs an LM head of one linear layer, unlike {llm.model_type}'s.")
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None)
        self.scale = getattr(llm, "logit_scale", 1.0) / getattr(llm, "logits_scaling", 1.0)  # Cohere's, Granite's
        self.softcap = getattr(llm, "final_logit_softcapping", None)  # Gemma's

    def forward(self, states: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """States `(N, H)` to logits `(N, V)`, or with `labels` `(N,)` to the sum of their losses, in float32."""
        if labels is None:
            return self._logits(states)
        if states.is_cuda and len(states) and is_liger_kernel_available():
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=self.softcap)
            return loss(self.weight, states * self.scale, labels, self.bias)
        rows = max(1, LOGITS_PER_CHUNK // self.out_features)
        losses = [
            # The logits are computed again in the backward pass: kept, they are the largest tensor of the step.
            checkpoint(self._loss, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(states.split(rows), labels.split(rows), strict=True)
        ]
        return torch.stack(losses).sum()

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = super().forward(states * self.scale).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _loss(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self._logits(states), labels, reduction="sum")


class LusiferForAlignment(LusiferPreTrainedModel):
    """
    The embedding model and the LLM's LM head, for training the connector (and the encoder) against a frozen LLM.

    Example:

    ```python
    >>> from lusifer_hf import LusiferForAlignment

    >>> model = LusiferForAlignment.from_pretrained("path/to/composed")  # doctest: +SKIP
    >>> model(**batch).loss.backward()  # doctest: +SKIP
    >>> model.to_embedding_model().save_pretrained("path/to/aligned")  # doctest: +SKIP
    ```
    """

    accepts_loss_kwargs = True  # `Trainer` passes `num_items_in_batch` and leaves dividing by accumulation to us

    def __init__(self, config: LusiferConfig):
        super().__init__(config)
        self.model = LusiferModel(config)
        self.lm_head = LMHead(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As [`LusiferModel.from_pretrained`], from a folder that `compose`, `convert` or this stage wrote.

        Raises:
            `ValueError`: also if the folder holds no LM head, or if the LLM makes its logits in a way of its own.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).check_lm_head()
        return loaded

    @classmethod
    def from_embedding_model(cls, model: LusiferModel) -> "LusiferForAlignment":
        """Around a freshly composed model, such as `LusiferModel.from_backbones` gives, with the LM head it holds."""
        if model.lm_head_to_save is None:
            raise ValueError(
                "This model holds no LM head: compose it with LusiferModel.from_backbones, or load its folder with "
                "LusiferForAlignment.from_pretrained."
            )
        with torch.device("meta"):
            alignment = cls._from_config(model.config, dtype=model.dtype)
        alignment.model = model
        head = {name.removeprefix("lm_head."): tensor for name, tensor in model.lm_head_to_save.items()}
        alignment.lm_head.load_state_dict(head, assign=True)
        alignment.check_lm_head()
        return alignment.train(model.training)

    def to_embedding_model(self) -> LusiferModel:
        """The embedding model; its `save_pretrained` writes the LM head too, for another run of this stage."""
        self.model.lm_head_to_save = {f"lm_head.{name}": tensor for name, tensor in self.lm_head.state_dict().items()}
        return self.model

    @torch.no_grad()
    def check_lm_head(self):
        """Raise a `ValueError` if the LLM's own class makes other logits of a state than `lm_head`."""
        head = self.lm_head
        if not self.model.is_loaded:
            return
        causal_lm = _stock_causal_lm(self.config.llm_config)
        linear = causal_lm.get_output_embeddings()
        linear.weight, linear.bias = head.weight, head.bias
        states = head.weight[None, :3] * head.in_features**0.5  # any three vectors whose logits differ clearly
        causal_lm.base_model.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=states)
        expected = causal_lm(inputs_embeds=states).logits.float()
        if not torch.allclose(head(states), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item()):
            raise ValueError(
                f"{type(causal_lm).__name__} makes its logits in a way that the alignment stage does not know. Choose "
                "another LLM, such as mistral, llama, qwen2, qwen3, gemma2, gemma3, phi or phi3."
            )

    def resize_token_embeddings(self, *args, **kwargs):
        """Of the encoder: the LM head belongs to the LLM's vocabulary."""
        return self.model.resize_token_embeddings(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        llm_input_ids: torch.LongTensor,
        llm_attention_mask: torch.Tensor,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
    ) -> CausalLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Ids of the encoder's tokenizer, padded on either side.
            attention_mask (`torch.Tensor` of shape `(B, L)`):
                0 drops a position altogether.
            llm_input_ids (`torch.LongTensor` of shape `(B, S)`):
                Ids of the LLM's tokenizer, padded on either side.
            llm_attention_mask (`torch.Tensor` of shape `(B, S)`):
                A row's text runs from its first to its last position with attention or a label. Inside it, 0 hides a
                position from all others; it keeps its place and predicts the next one all the same.
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*):
                The ids before any was masked; -100 is not predicted.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*, defaults to the number of predicted labels):
                What the summed loss is divided by.
            return_logits (`bool`, *optional*, defaults to whether `labels` is None):
                Whether to return `logits` `(B, S, V)`, float32: those at a column predict the id *at* that column,
                and are 0 where nothing predicts it (a BOS that comes first, padding).

        Raises:
            `ValueError`: as [`LusiferModel`], or if a row's sequence is longer than the LLM has positions for.
        """
        if "flash" in self.model.llm.config._attn_implementation:
            raise ValueError(
                "flash attention cannot hide positions: load the model without attn_implementation, which runs the "
                "same kernels on CUDA."
            )
        prefix_states, prefix = self.model._embed_in_llm(input_ids, attention_mask.bool())
        text_states = self.model.llm.get_input_embeddings()(llm_input_ids).to(prefix_states)
        text_mask = llm_attention_mask.bool()
        labelled = torch.zeros_like(text_mask) if labels is None else labels != IGNORED
        ids = llm_input_ids if labels is None else torch.where(labelled, labels, llm_input_ids)

        part, order = self._arrange(prefix.mask, text_mask | labelled, ids)
        keys = torch.cat([prefix.mask, text_mask], dim=1).gather(1, order)
        layout = _AlignmentLayout(
            mask=keys | (part == _BOS) | (part == _TEXT),
            keys=keys,
            prefix=part <= _PREFIX if self.config.alignment_attention == "prefix_lm" else None,
        )
        states = _take_positions(torch.cat([prefix_states, text_states], dim=1), order)
        hidden_states = self.model._run_llm(states, layout).last_hidden_state.flatten(0, 1)  # (B * T, H)

        # Flat indices: the positions before a position of text, and the columns of `ids` which they predict. No row
        # begins with `_TEXT`, so the last position of a row predicts nothing.
        sources = (part.roll(-1, dims=1) == _TEXT).flatten().nonzero().squeeze(1)
        columns = order.flatten()[sources + 1] - prefix_states.shape[1]
        targets = sources // part.shape[1] * ids.shape[1] + columns
        loss = logits = None
        if labels is not None:
            chosen = labelled.flatten()[targets]
            total = self.lm_head(hidden_states.index_select(0, sources[chosen]), labels.flatten()[targets[chosen]])
            loss = total / (chosen.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if return_logits or (return_logits is None and labels is None):
            predicted = self.lm_head(hidden_states.index_select(0, sources))
            logits = predicted.new_zeros(ids.numel(), predicted.shape[1]).index_copy(0, targets, predicted)
            logits = logits.unflatten(0, ids.shape)
        return CausalLMOutput(loss=loss, logits=logits)

    def _arrange(self, prefix_mask: torch.Tensor, present: torch.Tensor, ids: torch.Tensor):
        """
        The order in which a row's sequence takes the columns of `[prefix, text]`, and the part of the sequence that
        each of its positions is, both `(B, T)`.
        """
        if self.config.added_token_positions == "after_padding" and self.config.num_added_tokens:
            prefix_mask = torch.ones_like(prefix_mask)  # padding keeps its place
        is_text = (present.cumsum(dim=1) > 0) & (present.flip(1).cumsum(dim=1).flip(1) > 0)
        text = torch.where(is_text, _TEXT, _NOTHING)
        if (bos_token_id := self.config.llm_config.bos_token_id) is not None:
            text[is_text & (is_text.cumsum(dim=1) == 1) & (ids == bos_token_id)] = _BOS
        part, order = torch.cat([torch.where(prefix_mask, _PREFIX, _NOTHING), text], dim=1).sort(dim=1, stable=True)
        longest = self._check_lengths((part != _NOTHING).sum(dim=1))
        return part[:, :longest], order[:, :longest]

    def _check_lengths(self, lengths: torch.Tensor) -> int:
        """The longest row's."""
        longest = int(lengths.max())
        limit = getattr(self.config.llm_config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"Row {int(lengths.argmax())} takes {longest} positions of the LLM's {limit}, for the encoder's text, "
                "the added tokens and the LLM's text: truncate both texts."
            )
        return longest


def _stock_causal_lm(config) -> PreTrainedModel:
    """The LLM as transformers has it, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))
