"""Tiny alignment models, batches for them, and the loss that the family's own causal LM has of the same rows."""

import copy

import pytest
import torch
from conftest import EAGER_ONLY, assert_same, backbone_config, pad, random_texts, widen
from transformers import AutoModelForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from lusifer_hf import LusiferConfig, LusiferForAlignment


BOS, MASK_TOKEN = 2, 3  # `random_texts` has neither
MODES = ["bidirectional", "prefix_lm"]
# With logits scaled (cohere, granite) or capped (gemma2), an LM head with a bias (phi), windows (gemma).
FAMILIES = ["mistral", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "cohere", "granite"]
FIELDS = {"granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.3}}
LENGTHS, TEXT_LENGTHS = [9, 4, 17, 4, 1], [7, 12, 3, 7, 5]
STARTS_WITH_BOS = [True, False, True, False, True]
CONNECTOR = "model.connector.mlp.linear_1.weight"


def tiny_alignment(llm: str = "mistral", attn_implementation=None, llm_fields: dict | None = None, seed=0, **fields):
    """As `tiny_model`."""
    llm_fields = {"bos_token_id": BOS, **FIELDS.get(llm, {}), **(llm_fields or {})}
    config = LusiferConfig(
        encoder_config=backbone_config("xlm-roberta"), llm_config=backbone_config(llm, **llm_fields), **fields
    )
    config._attn_implementation = attn_implementation
    return widen(LusiferForAlignment._from_config(config), seed).eval()


def attention_of(llm: str, implementation: str | None):
    if llm in EAGER_ONLY and implementation == "sdpa":
        pytest.skip("its capped attention scores need eager")
    return implementation


def make_rows(hidden: float = 0.4) -> list[dict[str, torch.Tensor]]:
    """Rows whose text is masked as the collator does it: attention and, independently, the input token."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    texts = random_texts(TEXT_LENGTHS, seed=1)
    texts[1][5] = BOS  # inside a text it is a token like any other
    for encoder_ids, text, has_bos in zip(random_texts(LENGTHS), texts, STARTS_WITH_BOS, strict=True):
        ids = torch.cat([torch.tensor([BOS]), text]) if has_bos else text
        may_change = torch.arange(len(ids)) >= int(has_bos)
        attention = ~((torch.rand(len(ids), generator=generator) < hidden) & may_change)
        masked = (torch.rand(len(ids), generator=generator) < hidden) & may_change
        rows.append(
            {
                "input_ids": encoder_ids,
                "llm_input_ids": ids.masked_fill(masked, MASK_TOKEN),
                "llm_attention_mask": attention.long(),
                "labels": ids,
            }
        )
    return rows


def collate(rows: list[dict], side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    padding = {"llm_input_ids": 0, "llm_attention_mask": 0, "labels": -100}
    texts = {
        name: pad([row[name] for row in rows], side, extra, padding=value)["input_ids"]
        for name, value in padding.items()
    }
    return {**pad([row["input_ids"] for row in rows], side, extra), **texts}


def logits_by_row(model, rows: list[dict], **padding) -> list[torch.Tensor]:
    """Of each row the logits of every column of its text."""
    with torch.no_grad():
        batch = collate(rows, **padding)
        logits = model(**batch, return_logits=True).logits
    present = batch["labels"] != -100
    return [row[mask] for row, mask in zip(logits, present, strict=True)]


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual, expected, tolerance: float = 1e-4):
    assert actual.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-3 * largest)
        assert difference < tolerance, f"{name}: {difference}"


def allowed(config: LusiferConfig, keys: torch.Tensor, num_prefix: int, window: int | None) -> torch.Tensor:
    """Which position sees which, of one row: queries, keys."""
    positions = torch.arange(len(keys))
    mask = keys.expand(len(keys), -1)
    if window is not None:
        mask = mask & ((positions[:, None] - positions).abs() <= window)
    if config.alignment_attention == "prefix_lm":
        mask = mask & ((positions < num_prefix) | (positions <= positions[:, None]))
    return mask


def stock_loss(model: LusiferForAlignment, rows: list[dict]) -> tuple[torch.Tensor, int]:
    """The summed loss of the family's own causal LM, each row alone, and the number of predicted labels."""
    config = model.config
    llm_config = copy.deepcopy(config.llm_config)
    llm_config._attn_implementation = "eager"
    causal_lm = AutoModelForCausalLM.from_config(llm_config).eval()
    causal_lm.get_output_embeddings().weight = model.lm_head.weight
    if model.lm_head.bias is not None:
        causal_lm.get_output_embeddings().bias = model.lm_head.bias
    causal_lm.model = model.model.llm  # in eager mode the reference's own masks decide
    losses, count = [], 0
    for row in rows:
        text, is_kept = row["llm_input_ids"], row["llm_attention_mask"].bool()
        states = model.model._embed_in_llm(row["input_ids"][None], torch.ones(1, len(row["input_ids"])).bool())[0][0]
        embedded = causal_lm.get_input_embeddings()(text)
        first = int(row["labels"][0] == BOS)
        sequence = torch.cat([embedded[:first], states, embedded[first:]])
        keys = torch.cat([is_kept[:first], torch.ones(len(states)).bool(), is_kept[first:]])
        labels = torch.cat([row["labels"][:first], torch.full((len(states),), -100), row["labels"][first:]])
        masks = {
            name: torch.zeros(1, 1, len(keys), len(keys)).masked_fill(
                ~allowed(config, keys, first + len(states), window), torch.finfo(torch.float32).min
            )
            for name, window in (
                ("full_attention", None),
                ("sliding_attention", getattr(llm_config, "sliding_window", None)),
            )
        }
        has_types = hasattr(llm_config, "layer_types")
        one_mask = masks["sliding_attention" if getattr(llm_config, "sliding_window", None) else "full_attention"]
        logits = causal_lm(
            inputs_embeds=sequence[None],
            attention_mask=masks if has_types else one_mask,
            position_ids=torch.arange(len(keys))[None],
            use_cache=False,
        ).logits
        losses.append(ForCausalLMLoss(logits, labels[None], llm_config.vocab_size, num_items_in_batch=1))
        count += int((labels[1:] != -100).sum())
    return torch.stack(losses).sum(), count


def assert_as_stock(rows: list[dict], **fields):
    """Loss and gradients, with every attention implementation that the family has."""
    reference = tiny_alignment(attn_implementation="eager", **fields)
    total, count = stock_loss(reference, rows)
    expected = gradients(reference, total / count)
    llm = fields.get("llm", "mistral")
    for implementation in [None] if llm in EAGER_ONLY else [None, "sdpa", "eager"]:
        model = tiny_alignment(attn_implementation=implementation, **fields)
        chosen = model.model.llm.config._attn_implementation
        assert chosen == (implementation or ("eager" if llm in EAGER_ONLY else "packed"))
        output = model(**collate(rows))
        assert output.logits is None
        assert_same(output.loss, total / count)
        assert_same_gradients(gradients(model, output.loss), expected)
