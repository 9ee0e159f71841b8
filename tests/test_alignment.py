"""
Contract of the alignment model: P14, the loss at label positions is the loss of all logits, gradients included; P10,
the research code's golden batches give its loss, logits and gradients; every LLM family and attention implementation
gives what the family's own causal LM gives for the same sequence and mask; a row depends on no other row and on no
padding; hidden positions are hidden, and with "prefix_lm" nothing sees a later token.
"""

import math

import pytest
import torch
from alignment import (
    BOS,
    CONNECTOR,
    FAMILIES,
    LENGTHS,
    MASK_TOKEN,
    MODES,
    TEXT_LENGTHS,
    assert_as_stock,
    assert_same_gradients,
    attention_of,
    collate,
    gradients,
    logits_by_row,
    make_rows,
    tiny_alignment,
)
from conftest import VOCABULARY, assert_distinct, assert_same
from golden import backbones, expected_values, golden_case, needs_golden, publish
from peft import LoraConfig, get_peft_model

from lusifer_hf import LusiferForAlignment, LusiferModel, modeling_alignment
from lusifer_hf.converting import convert


@pytest.mark.parametrize("mode", MODES)
class TestTheFamilysOwnCausalLM:
    @pytest.mark.parametrize("llm", FAMILIES)
    def test_hidden_positions(self, llm, mode):
        """Rows with and without BOS; gemma's windows are shorter than the sequence."""
        assert_as_stock(make_rows(), llm=llm, alignment_attention=mode, num_added_tokens=2)

    def test_nothing_hidden(self, mode):
        assert_as_stock(make_rows(hidden=0.0), alignment_attention=mode)

    @pytest.mark.parametrize("llm", ["mistral", "phi3"])
    def test_sliding_window_shorter_than_the_sequence(self, llm, mode):
        fields = {"llm": llm, "alignment_attention": mode}
        assert_as_stock(make_rows(), llm_fields={"sliding_window": 5}, **fields)
        narrow, wide = (
            logits_by_row(tiny_alignment(llm_fields={"sliding_window": window}, **fields), make_rows())
            for window in (5, None)
        )
        assert all((left - right).abs().max() > 0.1 for left, right in zip(narrow, wide, strict=True))


class TestLoss:
    """P14."""

    def full_logits_loss(self, model, batch) -> torch.Tensor:
        logits = model(**{**batch, "labels": batch["labels"]}, return_logits=True).logits
        predicted = batch["labels"].clone()
        predicted[:, 0][predicted[:, 0] == BOS] = -100  # comes first: nothing predicts it
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), predicted.flatten())

    @pytest.mark.parametrize("llm", ["mistral", "gemma2", "phi", "cohere"])
    @pytest.mark.parametrize("rows_per_chunk", [1, 7, 17, 34, 10_000])
    def test_label_positions_give_the_loss_of_all_logits(self, monkeypatch, llm, rows_per_chunk):
        model = tiny_alignment(llm=llm)
        batch = collate(make_rows())
        assert int((batch["labels"] != -100).sum()) - 3 == 34
        expected = self.full_logits_loss(model, batch)
        expected_gradients = gradients(model, expected)
        assert "lm_head.weight" in expected_gradients
        monkeypatch.setattr(modeling_alignment, "LOGITS_PER_CHUNK", rows_per_chunk * VOCABULARY)
        loss = model(**batch).loss
        assert_same(loss, expected)
        assert_same_gradients(gradients(model, loss), expected_gradients)

    def test_labels_left_out(self):
        """A row without a label, and single positions without one, which stay part of the text."""
        model = tiny_alignment()
        batch = collate(make_rows(hidden=0.0))
        whole = model(**batch, return_logits=True)
        batch["labels"][1] = -100
        batch["labels"][0, 3:5] = -100
        output = model(**batch, return_logits=True)
        assert_same(output.logits, whole.logits)
        assert_same(output.loss, self.full_logits_loss(model, batch))
        assert (output.loss - whole.loss).abs() > 1e-3
        batch["labels"][:] = -100
        nothing = model(**batch).loss
        assert nothing.item() == 0
        nothing.backward()

    def test_what_the_sum_is_divided_by(self):
        """Two halves of a batch, each divided by the labels of the whole, add up to the whole batch."""
        model = tiny_alignment()
        rows = make_rows()
        expected = model(**collate(rows)).loss
        halves = [model(**collate(half), num_items_in_batch=torch.tensor(34)).loss for half in (rows[:2], rows[2:])]
        assert_same(sum(halves), expected)
        assert LusiferForAlignment.accepts_loss_kwargs

    def test_no_tensor_is_kept_that_holds_all_logits(self, monkeypatch):
        monkeypatch.setattr(modeling_alignment, "LOGITS_PER_CHUNK", 5 * VOCABULARY)
        model = tiny_alignment()
        model.lm_head.requires_grad_(False)
        states = torch.randn(200, 48, requires_grad=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x
        ):
            loss = model.lm_head(states, torch.randint(0, VOCABULARY, (200,)))
        assert sum(sizes) <= states.numel() + 200 < 200 * VOCABULARY  # the states and the labels
        loss.backward()
        assert model.lm_head.weight.grad is None and states.grad.abs().max() > 0

    def test_float32(self):
        """The loss of a model in half precision is computed in float32."""
        model = tiny_alignment().to(torch.bfloat16)
        batch = collate(make_rows())
        output = model(**batch, return_logits=True)
        assert output.loss.dtype == output.logits.dtype == torch.float32
        assert (output.loss - tiny_alignment()(**batch).loss).abs() < 0.1 * output.loss

    def test_logits_without_labels(self):
        model = tiny_alignment()
        batch = collate(make_rows(hidden=0.0))
        expected = model(**batch, return_logits=True).logits
        del batch["labels"]
        output = model(**batch)
        assert output.loss is None
        assert output.logits.shape == (*batch["llm_input_ids"].shape, VOCABULARY)
        assert_same(output.logits, expected)


class TestSequence:
    """What the LLM gets: [BOS of the text, states and added tokens, rest of the text], each row for itself."""

    @torch.no_grad()
    def llm_inputs(self, model, batch) -> dict:
        seen = {}
        model.model.llm.register_forward_pre_hook(lambda _, args, inputs: seen.update(inputs), with_kwargs=True)
        model(**batch)
        return seen

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("num_added_tokens", [0, 2])
    def test_padded(self, num_added_tokens, side):
        model = tiny_alignment(attn_implementation="sdpa", num_added_tokens=num_added_tokens)
        rows = make_rows()
        rows[0]["llm_input_ids"][0] = MASK_TOKEN  # the label tells that it is BOS
        rows[0]["llm_attention_mask"][0] = 0
        seen = self.llm_inputs(model, collate(rows, side=side, extra=3))
        embed_tokens = model.model.llm.get_input_embeddings()
        longest = 0
        for index, row in enumerate(rows):
            states = model.model._embed_in_llm(row["input_ids"][None], torch.ones(1, len(row["input_ids"])).bool())
            assert states[0].shape[1] == len(row["input_ids"]) + num_added_tokens
            text = embed_tokens(row["llm_input_ids"])
            first = int(row["labels"][0] == BOS)
            expected = torch.cat([text[:first], states[0][0], text[first:]])
            assert_same(seen["inputs_embeds"][index, : len(expected)], expected)
            attention = row["llm_attention_mask"]
            keys = torch.cat([attention[:first], torch.ones(states[0].shape[1]), attention[first:]]).long()
            assert seen["attention_mask"][index, : len(expected)].tolist() == keys.tolist()
            assert seen["attention_mask"][index, len(expected) :].sum() == 0
            longest = max(longest, len(expected))
        assert seen["inputs_embeds"].shape[1] == longest
        assert seen["position_ids"].tolist() == [list(range(longest))] * len(rows)

    def test_packed(self):
        model = tiny_alignment(num_added_tokens=2)
        rows = make_rows()
        seen = self.llm_inputs(model, collate(rows, side="left"))
        lengths = torch.tensor([len(row["input_ids"]) + 2 + len(row["labels"]) for row in rows])
        visible = torch.tensor([len(row["input_ids"]) + 2 + int(row["llm_attention_mask"].sum()) for row in rows])
        assert seen["inputs_embeds"].shape[1] == lengths.sum()  # no padding
        assert seen["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]
        assert seen["cu_seq_lens_q"].diff().tolist() == lengths.tolist()
        assert seen["cu_seq_lens_k"].diff().tolist() == visible.tolist()
        assert len(seen["visible_keys"]) == visible.sum()

    def test_nothing_is_selected_where_nothing_is_hidden(self):
        seen = self.llm_inputs(tiny_alignment(), collate(make_rows(hidden=0.0)))
        assert "visible_keys" not in seen and "prefix" not in seen

    @pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
    def test_mixed_precision(self, implementation):
        """Text joins the states in their dtype, as in embedding."""
        batch = collate(make_rows())
        model = tiny_alignment(attn_implementation=implementation)
        expected = model(**batch).loss
        with torch.autocast("cpu", torch.bfloat16):
            assert self.llm_inputs(model, batch)["inputs_embeds"].dtype == torch.bfloat16
            loss = model(**batch).loss
        assert loss.dtype == torch.float32
        assert (loss - expected).abs() < 0.1 * expected
        gradients(model, loss)

    def test_an_llm_without_bos(self):
        """Its text's first token follows the states, whatever it is, and is predicted."""
        rows = make_rows(hidden=0.0)
        model = tiny_alignment(llm="qwen2", llm_fields={"bos_token_id": None})
        total, count = model(**collate(rows), num_items_in_batch=1).loss, sum(len(row["labels"]) for row in rows)
        assert_same(model(**collate(rows)).loss, total / count)
        assert (logits_by_row(model, rows)[0][0]).abs().max() > 0.1

    def test_too_long(self):
        model = tiny_alignment(llm_fields={"max_position_embeddings": 20})
        with pytest.raises(ValueError, match=r"Row 2 takes 22 positions of the LLM's 20.*truncate"):
            model(**collate(make_rows()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
class TestIndependence:
    """A row's logits do not depend on its batch."""

    @pytest.fixture
    def model(self, implementation, mode):
        return tiny_alignment(attn_implementation=implementation, alignment_attention=mode)

    @pytest.fixture
    def alone(self, model):
        logits = [logits_by_row(model, [row])[0] for row in make_rows()]
        assert_distinct(torch.stack([row[1:3].flatten() for row in logits]))
        return logits

    @pytest.mark.parametrize(("side", "extra"), [("right", 0), ("left", 9)])
    def test_padding(self, model, alone, side, extra):
        for actual, expected in zip(logits_by_row(model, make_rows(), side=side, extra=extra), alone, strict=True):
            assert_same(actual, expected)

    def test_order(self, model, alone):
        order = [3, 1, 4, 0, 2]
        rows = make_rows()
        for actual, index in zip(logits_by_row(model, [rows[index] for index in order]), order, strict=True):
            assert_same(actual, alone[index])

    def test_what_stands_under_the_padding(self, model, alone):
        batch = collate(make_rows(), side="left")
        batch["input_ids"][batch["attention_mask"] == 0] = 7
        present = batch["labels"] != -100
        batch["llm_input_ids"][~present] = BOS
        logits = model(**batch, return_logits=True).logits
        for row, expected in enumerate(alone):
            assert_same(logits[row][present[row]], expected)


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
class TestAfterPadding:
    """The research code's places of the added tokens: padding keeps its place between the states and them."""

    def test_is_contiguous_without_padding(self, implementation):
        rows = make_rows()
        expected = tiny_alignment(attn_implementation=implementation, num_added_tokens=2)
        model = tiny_alignment(
            attn_implementation=implementation, num_added_tokens=2, added_token_positions="after_padding"
        )
        for row in rows:
            assert_same(logits_by_row(model, [row])[0], logits_by_row(expected, [row])[0])
        assert (logits_by_row(model, rows)[1] - logits_by_row(expected, rows)[1]).abs().max() > 1e-3

    def test_is_contiguous_without_added_tokens(self, implementation):
        fields = {"attn_implementation": implementation, "num_added_tokens": 0}
        expected = logits_by_row(tiny_alignment(**fields), make_rows())
        model = tiny_alignment(added_token_positions="after_padding", **fields)
        for actual, row in zip(logits_by_row(model, make_rows(), extra=3), expected, strict=True):
            assert_same(actual, row)

    @pytest.mark.parametrize("mode", MODES)
    def test_implementations_agree(self, implementation, mode):
        fields = {"added_token_positions": "after_padding", "alignment_attention": mode}
        batch = collate(make_rows(), extra=3)
        loss = tiny_alignment(attn_implementation=implementation, **fields)(**batch).loss
        assert_same(loss, tiny_alignment(attn_implementation="eager", **fields)(**batch).loss)


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
class TestWhoSeesWhom:
    """By changing one id and looking at which logits change."""

    ROW, COLUMN = 2, 2  # the third row: 17 states, then 4 columns of text, BOS among them

    def changes(self, model, rows, row: int, name: str, place: int) -> list[list[bool]]:
        before = logits_by_row(model, rows)
        rows[row][name][place] = 60
        after = logits_by_row(model, rows)
        return [((new - old).abs().amax(dim=-1) > 1e-6).tolist() for old, new in zip(before, after, strict=True)]

    def only(self, row: int, expected: list[bool]) -> list[list[bool]]:
        lengths = [len(row["labels"]) for row in make_rows()]
        return [expected if index == row else [False] * length for index, length in enumerate(lengths)]

    @pytest.mark.parametrize("llm", ["mistral", "qwen3", "phi"])
    def test_bidirectional(self, implementation, llm):
        model = tiny_alignment(llm, attention_of(llm, implementation))
        rows = make_rows(hidden=0.0)
        # BOS comes first and is predicted by nothing; all other columns see the change, also those before it.
        changed = self.only(2, [False, True, True, True])
        assert self.changes(model, rows, 2, "llm_input_ids", self.COLUMN) == changed
        assert self.changes(model, rows, 2, "input_ids", 5) == changed
        # Hidden, a column changes nothing but what it predicts itself.
        rows[2]["llm_attention_mask"][self.COLUMN] = 0
        rows[2]["llm_input_ids"][self.COLUMN] = MASK_TOKEN
        assert self.changes(model, rows, 2, "llm_input_ids", self.COLUMN) == self.only(2, [False] * 3 + [True])

    @pytest.mark.parametrize("llm", ["mistral", "qwen3", "gemma2", "gemma3_text"])
    def test_prefix_lm(self, implementation, llm):
        model = tiny_alignment(
            llm, attention_of(llm, implementation), alignment_attention="prefix_lm", num_added_tokens=2
        )
        states = []
        model.model.llm.register_forward_hook(lambda *arguments: states.append(arguments[-1].last_hidden_state))
        rows = make_rows(hidden=0.0)
        # Without BOS: column c is predicted from the position before it, so it is the next one that sees a change.
        for column in (0, 10):
            expected = self.only(1, [place > column for place in range(12)])
            assert self.changes(model, rows, 1, "llm_input_ids", column) == expected
        is_packed = states[0].shape[0] == 1
        start = 1 + LENGTHS[0] + 2 + TEXT_LENGTHS[0] if is_packed else 0
        prefix = slice(start, start + LENGTHS[1] + 2)
        for state in states:
            assert_same(state[0 if is_packed else 1, prefix], states[0][0 if is_packed else 1, prefix], tolerance=0)
        assert self.changes(model, rows, 1, "input_ids", 0) == self.only(1, [True] * 12)
        # BOS belongs to the prefix: states see it, and it sees them.
        assert self.changes(model, rows, 2, "llm_input_ids", 0) == self.only(2, [False, True, True, True])
        assert self.changes(model, rows, 2, "input_ids", 16) == self.only(2, [False, True, True, True])


def test_flash_attention_is_refused():
    model = tiny_alignment()
    model.model.llm.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention cannot hide positions: load the model without"):
        model(**collate(make_rows()))


GOLDEN_GRADIENTS = {
    "universal_learner.": "model.encoder.",
    "connection_module.added_tokens": "model.connector.added_tokens",
    "connection_module.ff.0.": "model.connector.mlp.linear_1.",
    "connection_module.ff.2.": "model.connector.mlp.linear_2.",
}


@needs_golden
@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
@pytest.mark.parametrize("name", ["alignment_mistral", "alignment_qwen2"])
def test_research_code(tmp_path, name, implementation):
    """Rows 0, 2 and 3 hide their BOS and mask it; more than 40 % of all scored positions are hidden."""
    case = golden_case(name)
    golden = expected_values(case)
    convert(publish(case, tmp_path / "published"), tmp_path / "model", **backbones(case))
    model = LusiferForAlignment.from_pretrained(
        tmp_path / "model", added_token_positions="after_padding", attn_implementation=implementation
    )
    batch = {
        ours: golden[f"batch::{theirs}"]
        for ours, theirs in (
            ("input_ids", "universal_learner_input_ids"),
            ("attention_mask", "universal_learner_attention_mask"),
            ("llm_input_ids", "lm_input_ids"),
            ("llm_attention_mask", "lm_attention_mask"),
            ("labels", "lm_labels"),
        )
    }
    seen = {}
    model.model.llm.register_forward_pre_hook(lambda _, args, inputs: seen.update(inputs), with_kwargs=True)
    output = model(**batch, return_logits=True)

    labels = golden["llm_labels"]
    computed = golden["llm_attention_mask"].bool() | (labels != -100)
    if implementation is None:
        inputs_embeds, position_ids = seen["inputs_embeds"][0], seen["position_ids"][0]
    else:
        inputs_embeds, position_ids = seen["inputs_embeds"][computed], seen["position_ids"][computed]
        assert torch.equal(seen["attention_mask"], golden["llm_attention_mask"])
    torch.testing.assert_close(inputs_embeds, golden["llm_inputs_embeds"][computed], atol=1e-5, rtol=1e-4)
    assert position_ids.tolist() == computed.nonzero()[:, 1].tolist()

    # Their logits at a position predict the next label; ours stand at the column that they predict.
    expected = golden["llm_logits"][:, :-1][labels[:, 1:] != -100]
    predicted = batch["labels"] != -100
    if name == "alignment_mistral":
        predicted[:, 0] = False  # BOS comes first
    torch.testing.assert_close(output.logits[predicted], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss[None], golden["loss"], atol=1e-5, rtol=1e-5)

    output.loss.backward()
    parameters = dict(model.named_parameters())
    theirs = [key for key in golden if key.startswith("grad::")]
    assert len(theirs) == 42
    for key in theirs:
        name = key.removeprefix("grad::")
        prefix = next(prefix for prefix in GOLDEN_GRADIENTS if name.startswith(prefix))
        gradient = parameters[GOLDEN_GRADIENTS[prefix] + name.removeprefix(prefix)].grad
        scale = golden[key].abs().max().item()
        torch.testing.assert_close(gradient, golden[key], rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=key)


class TestTraining:
    def with_lora(self, model, dropout: float = 0.0):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4,
            target_modules=r"model\.encoder\..*\.(query|key|value|dense)",
            modules_to_save=["connector"],
            init_lora_weights=False,
            lora_dropout=dropout,
        )
        return get_peft_model(model, config)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("connector", ["ff", "embedding_table"])
    def test_one_step_trains_exactly_what_is_adapted(self, connector, mode):
        model = self.with_lora(tiny_alignment(connector=connector, alignment_attention=mode))
        expected = {name for name, _ in model.named_parameters() if "lora_" in name or "modules_to_save" in name}
        assert not any(".llm." in name or "lm_head" in name for name in expected)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss = model(**collate(make_rows())).loss
        loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed == expected
        assert model(**collate(make_rows())).loss < loss
        merged = model.merge_and_unload().to_embedding_model()
        assert type(merged) is LusiferModel
        assert not [name for name in merged.state_dict() if "lora_" in name or "modules_to_save" in name]
        assert merged.lm_head_to_save.keys() == {"lm_head.weight"}

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("implementation", [None, "sdpa"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, implementation, mode, use_reentrant):
        model = tiny_alignment(attn_implementation=implementation, alignment_attention=mode)
        model = self.with_lora(model, dropout=0.2).train()
        for module in model.modules():
            if type(module) is torch.nn.Dropout:
                module.p = 0.2
        batch = collate(make_rows())

        def step():
            torch.manual_seed(3)
            return gradients(model, model(**batch).loss)

        expected = {name: gradient.clone() for name, gradient in step().items()}
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        calls = []
        attention = model.model.model.llm.layers[0].self_attn
        attention.register_forward_hook(lambda *_: calls.append(1))
        assert_same_gradients(step(), expected)
        assert len(calls) == 2  # once forward and once again for the backward pass

    @pytest.mark.parametrize("mode", MODES)
    def test_it_learns(self, mode):
        """A frozen LLM, a trained connector: the loss of one batch falls well below guessing."""
        model = self.with_lora(tiny_alignment(alignment_attention=mode, num_added_tokens=4))
        batch = collate(make_rows(hidden=0.0 if mode == "prefix_lm" else 0.3))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(20):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0] and losses[-1] < math.log(VOCABULARY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestCuda:
    """Half precision on CUDA, with its own kernels, against float32 on the CPU with the same weights."""

    def outcome(self, device, dtype, implementation, batch, **fields):
        model = tiny_alignment(attn_implementation=implementation, **fields)
        with torch.no_grad():
            for parameter in model.parameters():  # narrower than elsewhere, since bfloat16 keeps three digits
                parameter.mul_(0.4)
        model = model.to(device, dtype)
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        return loss.item(), gradients(model, loss)[CONNECTOR].float().cpu()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("hidden", [0.0, 0.4])
    @pytest.mark.parametrize("window", [None, 5])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_packed(self, mode, hidden, window, dtype):
        # The kernel takes heads whose size is a multiple of 8.
        llm_fields = {"sliding_window": window, "head_dim": 16}
        fields = {"alignment_attention": mode, "llm_fields": llm_fields, "num_added_tokens": 2}
        batch = collate(make_rows(hidden), side="left")
        loss, gradient = self.outcome("cuda", dtype, None, batch, **fields)
        expected, expected_gradient = self.outcome("cpu", torch.float32, "sdpa", batch, **fields)
        assert abs(loss - expected) < 0.01 * expected
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0)
        assert cosine > (0.99 if dtype == torch.bfloat16 else 0.9999)

    @pytest.mark.parametrize("llm", ["mistral", "gemma2", "phi", "cohere"])
    @pytest.mark.parametrize("frozen", [True, False])
    def test_liger(self, monkeypatch, llm, frozen):
        if not modeling_alignment.is_liger_kernel_available():
            pytest.skip("needs liger-kernel")
        head = tiny_alignment(llm=llm).lm_head.cuda().requires_grad_(not frozen)
        states = torch.randn(100, 48, device="cuda", requires_grad=True)
        labels = torch.randint(0, VOCABULARY, (100,), device="cuda")
        outcomes = []
        for available in (True, False):
            monkeypatch.setattr(modeling_alignment, "is_liger_kernel_available", lambda available=available: available)
            loss = head(states, labels)
            inputs = [states] if frozen else [states, *head.parameters()]
            outcomes.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
        for actual, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
