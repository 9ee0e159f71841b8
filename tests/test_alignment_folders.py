"""A folder keeps its LM head from one alignment to the next; no head is ever trained against that was not loaded."""

from pathlib import Path

import pytest
import torch
from alignment import BOS, collate, make_rows, stock_loss, tiny_alignment
from conftest import VOCABULARY, assert_same, backbone_config, save_backbone, widen
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lusifer_hf import LusiferConfig, LusiferForAlignment, LusiferModel, modeling_alignment


class TestFolders:
    def test_from_composed_to_embedding_and_on(self, tiny_repository, tmp_path, sentences):
        model = LusiferForAlignment.from_pretrained(tiny_repository)
        composed = load_file(tiny_repository / "model.safetensors")
        assert_same(model.lm_head.weight, composed["lm_head.weight"], tolerance=0)
        expected = LusiferModel.from_pretrained(tiny_repository).encode(sentences[:5])
        assert_same(model.model.encode(sentences[:5]), expected)
        with torch.no_grad():
            model.model.connector.mlp.linear_2.bias.add_(1)
        model.to_embedding_model().save_pretrained(tmp_path / "aligned")
        assert {path.name for path in (tmp_path / "aligned").iterdir()} == {
            path.name for path in tiny_repository.iterdir()
        }
        aligned = load_file(tmp_path / "aligned" / "model.safetensors")
        assert aligned.keys() == composed.keys()
        changed = {name for name in composed if not torch.equal(aligned[name], composed[name])}
        assert changed == {"connector.mlp.linear_2.bias"}
        embedder = LusiferModel.from_pretrained(tmp_path / "aligned")
        assert_same(embedder.encode(sentences[:5]), model.model.encode(sentences[:5]))
        assert abs(embedder.encode(sentences[:5]) - expected).max() > 1e-3
        again = LusiferForAlignment.from_pretrained(tmp_path / "aligned")
        assert_same(again.lm_head.weight, composed["lm_head.weight"], tolerance=0)
        embedder.save_pretrained(tmp_path / "finished")
        with pytest.raises(ValueError, match=r"holds no LM head that fits the LLM.*lusifer-hf compose"):
            LusiferForAlignment.from_pretrained(tmp_path / "finished")

    def test_a_checkpoint_loads_as_both(self, tiny_repository, tmp_path):
        model = LusiferForAlignment.from_pretrained(tiny_repository, alignment_attention="prefix_lm")
        model.save_pretrained(tmp_path)
        for name, tensor in LusiferForAlignment.from_pretrained(tmp_path).state_dict().items():
            assert_same(tensor, model.state_dict()[name], tolerance=0)
        embedder = LusiferModel.from_pretrained(tmp_path)
        assert embedder.config.alignment_attention == "prefix_lm"
        for name, tensor in embedder.state_dict().items():
            assert_same(tensor, model.model.state_dict()[name], tolerance=0)

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("llm", ["qwen2", "gemma2", "phi"])
    def test_from_backbones(self, tmp_path, llm, tied):
        """Tied in the LLM or not, the head is a copy of its own, with the bias it has; in memory and from a folder."""
        folders = save_backbone(tmp_path / "encoder", "xlm-roberta"), tmp_path / "llm"
        save_backbone(folders[1], llm, tie_word_embeddings=tied, bos_token_id=BOS)
        composed = LusiferModel.from_backbones(*map(str, folders))
        widen(composed.connector)
        composed.save_pretrained(tmp_path / "composed")
        model = LusiferForAlignment.from_embedding_model(composed)
        assert model.model is composed and not model.training
        loaded = LusiferForAlignment.from_pretrained(tmp_path / "composed")
        head = AutoModelForCausalLM.from_pretrained(folders[1]).get_output_embeddings()
        for alignment in (model, loaded):
            assert_same(alignment.lm_head.weight, head.weight, tolerance=0)
            assert (alignment.lm_head.bias is None) == (head.bias is None)
            if head.bias is not None:
                assert_same(alignment.lm_head.bias, head.bias, tolerance=0)
            assert alignment.lm_head.weight is not alignment.model.llm.get_input_embeddings().weight
        rows = make_rows()
        assert_same(model(**collate(rows)).loss, loaded(**collate(rows)).loss)
        reference = LusiferForAlignment.from_pretrained(tmp_path / "composed", attn_implementation="eager")
        total, count = stock_loss(reference, rows)
        assert_same(model(**collate(rows)).loss, total / count)

    def test_no_head_in_memory(self, tiny_repository):
        with pytest.raises(ValueError, match=r"holds no LM head: compose it with LusiferModel\.from_backbones"):
            LusiferForAlignment.from_embedding_model(LusiferModel.from_pretrained(tiny_repository))

    @pytest.fixture
    def saved_with(self, tiny_repository, tmp_path):
        """The composed folder with other weights."""

        def save(**changes) -> Path:
            model = LusiferForAlignment.from_pretrained(tiny_repository)
            model.to_embedding_model().save_pretrained(tmp_path)
            weights = {**load_file(tmp_path / "model.safetensors"), **changes}
            weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
            save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
            return tmp_path

        return save

    @pytest.mark.parametrize("head", [None, torch.ones(3, 4)], ids=["missing", "mismatched"])
    def test_a_head_that_would_be_random(self, saved_with, head):
        """Whatever is allowed."""
        folder = saved_with(**{"lm_head.weight": head})
        with pytest.raises(ValueError, match="holds no LM head that fits the LLM"):
            LusiferForAlignment.from_pretrained(folder, ignore_mismatched_sizes=True)

    def test_other_weights_that_may_be_random(self, saved_with):
        folder = saved_with(**{"projection.linear_2.bias": torch.ones(4)})
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            LusiferForAlignment.from_pretrained(folder)
        LusiferForAlignment.from_pretrained(folder, ignore_mismatched_sizes=True)

    def test_weights_that_do_not_fit(self, tiny_repository, tmp_path):
        model = LusiferForAlignment.from_pretrained(tiny_repository)
        weights = {name: tensor for name, tensor in model.state_dict().items() if "connector" not in name}
        model.save_pretrained(tmp_path, state_dict=weights)
        with pytest.raises(ValueError, match=r"do not fit its config\.json.*missing_keys: model\.connector"):
            LusiferForAlignment.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("model_class", "check"), [(LusiferModel, "check_bidirectional"), (LusiferForAlignment, "check_lm_head")]
    )
    def test_checks_on_loading(self, tiny_repository, monkeypatch, model_class, check):
        def refuse(self):
            raise ValueError("not this LLM")

        composed = LusiferForAlignment.from_pretrained(tiny_repository).to_embedding_model()
        monkeypatch.setattr(model_class, check, refuse)
        with pytest.raises(ValueError, match="not this LLM"):
            LusiferForAlignment.from_pretrained(tiny_repository)
        if check == "check_lm_head":  # the other one is of whoever made the embedding model
            with pytest.raises(ValueError, match="not this LLM"):
                LusiferForAlignment.from_embedding_model(composed)

    def test_tokenizers_come_along(self, tiny_repository):
        model = LusiferForAlignment.from_pretrained(tiny_repository).model
        assert model.tokenizer("a text")["input_ids"]
        assert model.llm_tokenizer_source["subfolder"] == "llm_tokenizer"

    @pytest.mark.parametrize(("name", "value"), [("scale", 2.0), ("softcap", 3.0)])
    @pytest.mark.parametrize("llm", ["mistral", "gemma2", "granite"])
    def test_logits_made_otherwise_are_refused(self, llm, name, value):
        model = tiny_alignment(llm)
        model.check_lm_head()
        setattr(model.lm_head, name, value)
        with pytest.raises(
            ValueError, match="ForCausalLM makes its logits in a way that the alignment stage does not"
        ):
            model.check_lm_head()

    def test_a_head_of_several_layers_is_refused(self):
        with pytest.raises(ValueError, match=r"needs an LM head of one linear layer.*bert"):
            modeling_alignment.LMHead(LusiferConfig(llm_config=backbone_config("bert", is_decoder=True)))

    def test_resizing_leaves_the_head(self):
        model = tiny_alignment()
        shape = model.lm_head.weight.shape
        model.resize_token_embeddings(VOCABULARY + 8)
        assert model.get_input_embeddings().num_embeddings == VOCABULARY + 8
        assert model.lm_head.weight.shape == shape == (VOCABULARY, 48)


@pytest.mark.parametrize("value", ["causal", "", None])
def test_config_field(value):
    assert LusiferConfig().alignment_attention == "bidirectional"
    with pytest.raises(ValueError, match=r"alignment_attention=.* is not one of 'bidirectional', 'prefix_lm'"):
        LusiferConfig(alignment_attention=value)
