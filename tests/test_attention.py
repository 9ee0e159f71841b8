"""
Contract P3: the attention implementation never changes an embedding. eager = sdpa = packed for every backbone family,
sliding windows, pooling and output; whatever cannot be computed right is refused with the way out.
"""

import shutil
from functools import partial

import pytest
import torch
from conftest import (
    EAGER_ONLY,
    ENCODERS,
    LLMS,
    assert_distinct,
    assert_same,
    pad,
    random_texts,
    tiny_model,
    unavailable,
)
from transformers import AttentionInterface

from lusifer_hf import LusiferModel
from lusifer_hf.modeling_lusifer import packed_attention_forward


# Runs of equal length (one SDPA call each in "packed"), a single token, and one text longer than every window.
LENGTHS = [9, 9, 4, 17, 1, 4]
# Encoders with an attention of their own: eager only.
OWN_ATTENTION = ("deberta-v2",)


def with_attention(attn_implementation, **fields):
    return tiny_model(attn_implementation=attn_implementation, **fields)


@torch.no_grad()
def embed(model, **inputs):
    return model(**(inputs or pad(random_texts(LENGTHS)))).pooler_output


def assert_all_agree(packed_by_default: bool = True, **fields):
    eager = with_attention("eager", **fields)
    default = tiny_model(**fields)
    expected = embed(eager)
    assert_distinct(expected)
    if packed_by_default:
        assert default.llm.config._attn_implementation == "packed"
    assert_same(embed(default), expected)
    return expected


@pytest.mark.parametrize("llm", [name for name in LLMS if name not in EAGER_ONLY])
def test_llms(llm):
    expected = assert_all_agree(llm=llm)
    assert_same(embed(with_attention("sdpa", llm=llm)), expected)


@pytest.mark.parametrize("llm", EAGER_ONLY)
def test_llm_with_soft_cap(llm):
    default = tiny_model(llm=llm)
    assert default.llm.config._attn_implementation == "eager"
    assert_same(embed(default), embed(with_attention({"encoder_config": "sdpa", "llm_config": "eager"}, llm=llm)))
    with pytest.raises(ValueError, match=r"softcap.*eager"):
        embed(with_attention({"llm_config": "packed"}, llm=llm))
    with pytest.raises(ValueError, match="eager"):
        embed(with_attention("sdpa", llm=llm))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders(encoder):
    expected = assert_all_agree(encoder=encoder)
    if encoder not in OWN_ATTENTION:
        assert_same(embed(with_attention("sdpa", encoder=encoder)), expected)


@pytest.mark.parametrize(
    ("tower", "model_type", "narrow", "wide"),
    [
        ("llm", "mistral", {"sliding_window": 4}, {"sliding_window": None}),
        ("llm", "gemma3_text", {"sliding_window": 4}, {"sliding_window": 64}),
        ("llm", "phi3", {"sliding_window": 4}, {"sliding_window": None}),
        ("encoder", "modernbert", {"local_attention": 4}, {"local_attention": 64}),
    ],
)
def test_sliding_window_shorter_than_the_text(tower, model_type, narrow, wide):
    fields = {tower: model_type, f"{tower}_fields": narrow}
    expected = assert_all_agree(**fields)
    assert_same(embed(with_attention("sdpa", **fields)), expected)
    # The window does something: only the texts that fit into it keep their embedding.
    full = embed(tiny_model(**{tower: model_type, f"{tower}_fields": wide}))
    changed = (full - expected).abs().amax(dim=1) > 1e-3
    assert changed[LENGTHS.index(17)] and not changed[LENGTHS.index(1)]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_key_value_heads(heads):
    expected = assert_all_agree(llm_fields={"num_key_value_heads": heads})
    assert_same(embed(with_attention("sdpa", llm_fields={"num_key_value_heads": heads})), expected)


@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "cls", "lasttoken"])
@pytest.mark.parametrize("num_added_tokens", [0, 2])
def test_poolings(pooling, num_added_tokens):
    """Every pooling is what its name says, computed here by hand from the states of one text alone."""
    fields = {"pooling": pooling, "num_added_tokens": num_added_tokens, "projection": False}
    expected = assert_all_agree(**fields)
    assert_same(embed(with_attention("sdpa", **fields)), expected)
    model = tiny_model(**fields)
    for row, text in zip(expected, random_texts(LENGTHS), strict=True):
        with torch.no_grad():
            states = model(input_ids=text[None]).last_hidden_state[0]
        assert len(states) == len(text) + num_added_tokens
        weights = torch.arange(1.0, len(states) + 1)
        by_hand = {
            "mean": states.mean(dim=0),
            "weightedmean": weights @ states / weights.sum(),
            "cls": states[0],
            "lasttoken": states[-1],
        }
        assert_same(row, by_hand[pooling])


@pytest.mark.parametrize("attn_implementation", [None, "sdpa", "eager"])
class TestOutputs:
    """What else `forward` returns."""

    @torch.no_grad()
    def run(self, attn_implementation, **arguments):
        model = with_attention(attn_implementation)
        inputs = pad(random_texts(LENGTHS), side="left", extra=2)
        return model, inputs, model(**inputs, **arguments)

    def test_states_and_mask(self, attn_implementation):
        _, inputs, output = self.run(attn_implementation)
        assert output.last_hidden_state.shape[:2] == output.attention_mask.shape
        assert output.attention_mask.sum(dim=1).tolist() == [length + 1 for length in LENGTHS]
        assert (output.attention_mask.diff(dim=1) <= 0).all()  # kept tokens first
        reference = with_attention("eager")(**inputs).last_hidden_state
        kept = output.attention_mask.bool()
        assert_same(output.last_hidden_state[kept], reference[kept])

    def test_hidden_states(self, attn_implementation):
        model, inputs, output = self.run(attn_implementation, output_hidden_states=True)
        assert len(output.hidden_states) == model.config.llm_config.num_hidden_layers + 1
        reference = with_attention("eager")(**inputs, output_hidden_states=True).hidden_states
        kept = output.attention_mask.bool()
        for states, expected in zip(output.hidden_states, reference, strict=True):
            assert states.shape == output.last_hidden_state.shape
            assert_same(states[kept], expected[kept])
        assert_same(output.hidden_states[-1][kept], output.last_hidden_state[kept])

    def test_outputs_asked_for_in_the_config(self, attn_implementation):
        # Attention weights exist with eager attention only.
        for name in ("output_hidden_states", "output_attentions")[: 2 if attn_implementation == "eager" else 1]:
            model = with_attention(attn_implementation)
            setattr(model.config, name, True)
            asked = model(**pad(random_texts(LENGTHS)))
            assert getattr(asked, name.removeprefix("output_")) is not None
            declined = model(**pad(random_texts(LENGTHS)), **{name: False})
            assert getattr(declined, name.removeprefix("output_")) is None

    def test_inputs_embeds(self, attn_implementation):
        model, inputs, output = self.run(attn_implementation)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
        assert_same(embedded.pooler_output, output.pooler_output)

    def test_tuple(self, attn_implementation):
        _, _, output = self.run(attn_implementation)
        _, _, as_tuple = self.run(attn_implementation, return_dict=False)
        assert isinstance(as_tuple, tuple)
        for value, expected in zip(as_tuple, output.to_tuple(), strict=True):
            assert_same(value, expected)


def test_attention_weights():
    """With eager attention: rows sum to 1, and no weight falls on padding."""
    model = with_attention("eager")
    output = model(**pad(random_texts(LENGTHS), side="left"), output_attentions=True)
    kept = output.attention_mask.bool()
    size = kept.shape[1]
    assert len(output.attentions) == 2
    for weights in output.attentions:
        assert weights.shape == (len(LENGTHS), 4, size, size)
        weights = weights.transpose(1, 2)[kept]  # queries that hold a token
        assert_same(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        on_padding = weights * ~kept.repeat_interleave(kept.sum(dim=1), dim=0)[:, None]
        assert on_padding.abs().max() == 0


@pytest.mark.parametrize(
    "implementations", [("sdpa", "eager"), ("eager", "sdpa"), ("packed", "sdpa"), ("eager", "packed")]
)
def test_one_implementation_per_tower(implementations):
    encoder, llm = implementations
    model = with_attention({"encoder_config": encoder, "llm_config": llm})
    assert (model.encoder.config._attn_implementation, model.llm.config._attn_implementation) == implementations
    assert_same(embed(model), embed(with_attention("eager")))


@pytest.mark.parametrize(
    "implementation", ["eager", "sdpa", "packed", {"encoder_config": "eager", "llm_config": "sdpa"}]
)
def test_changed_at_run_time(implementation):
    model = tiny_model()
    expected = embed(model)
    model.set_attn_implementation(implementation)
    if isinstance(implementation, str):
        implementation = {"encoder_config": implementation, "llm_config": implementation}
    assert model.encoder.config._attn_implementation == implementation["encoder_config"]
    assert model.llm.config._attn_implementation == implementation["llm_config"]
    assert_same(embed(model), expected)


@pytest.fixture
def flash_calls():
    """A stand-in for flash attention that records what it is given, registered under a name with "flash" in it."""
    calls = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        calls.append({"module": module, "tokens": query.shape[2], "mask": attention_mask, **kwargs})
        return packed_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("test_flash", flash)
    yield calls
    AttentionInterface._global_mapping.pop("test_flash")


def test_flash_attention_gets_segments(flash_calls):
    model = tiny_model()
    expected = embed(model)
    for tower in (model.encoder, model.llm):
        tower.config._attn_implementation = "test_flash"  # `set_attn_implementation` would look for a real kernel
    assert_same(embed(model), expected)
    lengths = torch.tensor(LENGTHS)
    towers = {model.config.encoder_config.model_type: lengths, model.config.llm_config.model_type: lengths + 1}
    assert len(flash_calls) == 4
    for call in flash_calls:
        expected_lengths = towers[call["module"].config.model_type]
        assert call["mask"] is None
        assert call["tokens"] == expected_lengths.sum()
        for side in "qk":
            assert call[f"cu_seq_lens_{side}"].dtype == torch.int32
            assert call[f"cu_seq_lens_{side}"].tolist() == [0, *expected_lengths.cumsum(0).tolist()]
            assert call[f"max_length_{side}"] == expected_lengths.max()


def test_packed_attention_without_segments_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="not told where texts begin: call the LUSIFER model"):
        model.llm(inputs_embeds=torch.randn(1, 5, 48))


ONE_LAYER = {"encoder_fields": {"num_hidden_layers": 1}, "llm_fields": {"num_hidden_layers": 1}}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    """The backends "eager" and "aot_eager" trace as the real compiler does, without minutes of code generation."""

    @pytest.mark.parametrize(("attn_implementation", "backend"), [(None, "eager"), ("sdpa", "inductor")])
    def test_whole_model(self, attn_implementation, backend):
        if backend == "inductor" and shutil.which("g++") is None:
            unavailable("torch.compile needs a C++ compiler")
        model = with_attention(attn_implementation, **ONE_LAYER)
        compiled = torch.compile(model, backend=backend, fullgraph=attn_implementation == "sdpa")
        for lengths, side in (([4, 4, 7], "right"), ([3, 9], "left")):
            inputs = pad(random_texts(lengths), side)
            assert_same(embed(compiled, **inputs), embed(model, **inputs))

    def test_layers_in_encode(self, tiny_repository, sentences):
        model = LusiferModel.from_pretrained(tiny_repository)
        expected = model.encode(sentences[:2])
        assert_distinct(expected)
        layers = [*model.encoder.encoder.layer, *model.llm.layers]
        for layer in layers:
            layer.compile = partial(layer.compile, backend="aot_eager")
        assert_same(model.encode(sentences[:2], compile_layers=True), expected)
        assert all(layer._compiled_call_impl is not None for layer in layers)

    @pytest.mark.parametrize("connector", ["ff", "embedding_table"])
    def test_export(self, connector):
        """With static and with free batch size and length."""
        model = with_attention("sdpa", connector=connector)
        inputs = pad(random_texts([3, 8, 5]), side="left")
        static = torch.export.export(model, (), kwargs=inputs)
        assert_same(static.module()(**inputs).pooler_output, embed(model, **inputs))
        shapes = {name: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for name in inputs}  # an error if specialised
        dynamic = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=shapes)
        other = pad(random_texts([6, 12, 7, 2]))
        assert_same(dynamic.module()(**other).pooler_output, embed(model, **other))


def test_packed_is_refused_where_attention_would_ignore_it():
    model = with_attention({"encoder_config": "packed"}, encoder="deberta-v2")
    with pytest.raises(ValueError, match=r'DebertaV2Model cannot run .packed.: load it with "sdpa" or "eager"'):
        embed(model)
