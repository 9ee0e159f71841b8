"""
Contract P4: at batch size 1 and without padding, where no mask says so, every LLM family lets every token reach every
position under every attention implementation; an LLM that stays causal, or that mixes texts, is refused.
"""

import pytest
import torch
from conftest import EAGER_ONLY, LLMS, assert_distinct, backbone_config, random_texts, tiny_model, widen
from transformers import AutoConfig, AutoModelForCausalLM

from lusifer_hf import LusiferConfig, LusiferModel


CASES = [
    (llm, attention)
    for llm in LLMS
    for attention in ("packed", "sdpa", "eager")
    if attention == "eager" or llm not in EAGER_ONLY
]
# An encoder without layers mixes no positions: what reaches another position did so inside the LLM.
NO_MIXING = {"encoder_fields": {"num_hidden_layers": 0}}
STAY_CAUSAL = {
    "mamba": {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2},
}
MIX_TEXTS_WHEN_PACKED = {
    "recurrent_gemma": {
        "head_dim": 12,
        "lru_width": 48,
        "block_types": ["recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}
COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(("llm", "attention"), CASES)
class TestEveryFamily:
    def model(self, llm, attention, **fields):
        implementation = {"encoder_config": "sdpa", "llm_config": attention}
        return tiny_model(llm=llm, attn_implementation=implementation, **NO_MIXING, **fields)

    @torch.no_grad()
    @pytest.mark.parametrize("num_added_tokens", [0, 1])
    def test_last_token_changes_the_first_state(self, llm, attention, num_added_tokens):
        model = self.model(llm, attention, num_added_tokens=num_added_tokens, pooling="cls")
        text = random_texts([7])[0]
        changed = torch.cat([text[:-1], (text[-1:] + 1) % 90])
        encoder = [model.encoder(ids[None]).last_hidden_state[0, :-1] for ids in (text, changed)]
        assert torch.equal(*encoder)  # or the encoder would bring the change about
        outputs = [model(input_ids=ids[None]) for ids in (text, changed)]
        first_states = torch.stack([output.last_hidden_state[0, 0] for output in outputs])
        assert (first_states[0] - first_states[1]).abs().max() > 1e-3
        assert_distinct(torch.cat([output.pooler_output for output in outputs]))

    def test_every_token_reaches_every_position(self, llm, attention):
        model = self.model(llm, attention)
        length = 6
        embeds = model.get_input_embeddings()(random_texts([length])[0][None]).detach().requires_grad_()
        states = model(inputs_embeds=embeds).last_hidden_state[0]
        assert len(states) == length + 1
        for position, state in enumerate(states):
            (gradient,) = torch.autograd.grad(state.square().sum(), embeds, retain_graph=True)
            reached = gradient[0].norm(dim=1)
            assert (reached > 1e-5).all(), f"position {position} sees {reached.tolist()}"


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_untrained_llm_is_not_taken_for_a_causal_one(llm, dtype):
    """With transformers' usual narrow initialisation, where a later token changes little."""
    config = LusiferConfig(encoder_config=backbone_config("xlm-roberta"), llm_config=backbone_config(llm))
    torch.manual_seed(0)
    LusiferModel._from_config(config, dtype=dtype).eval().check_bidirectional()


@pytest.fixture(params=STAY_CAUSAL)
def causal_config(request):
    return AutoConfig.for_model(request.param, **STAY_CAUSAL[request.param])


class TestCausalLLM:
    message = "stays causal with is_causal=False, so it cannot embed text"

    def test_from_backbones(self, causal_config, tiny_backbones, tmp_path):
        widen(AutoModelForCausalLM.from_config(causal_config)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=self.message):
            LusiferModel.from_backbones(str(tiny_backbones[0]), str(tmp_path))

    def test_from_pretrained(self, causal_config, tmp_path):
        config = LusiferConfig(encoder_config=backbone_config("xlm-roberta"), llm_config=causal_config)
        widen(LusiferModel(config)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=self.message):
            LusiferModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("llm", MIX_TEXTS_WHEN_PACKED)
def test_llm_that_mixes_the_texts_of_a_batch(llm, tmp_path):
    """Recurrent layers run on from one text into the next where all are one packed sequence."""
    llm_config = AutoConfig.for_model(llm, **COMMON, **MIX_TEXTS_WHEN_PACKED[llm])
    config = LusiferConfig(encoder_config=backbone_config("xlm-roberta"), llm_config=llm_config)
    widen(LusiferModel(config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'mixes the texts of a packed batch.*attn_implementation="sdpa"'):
        LusiferModel.from_pretrained(tmp_path)
    LusiferModel.from_pretrained(tmp_path, attn_implementation="sdpa")
