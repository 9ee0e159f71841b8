"""
Contract: every step of a recipe starts from what the one before wrote. `load_for_stage` switches gradients on for what
the stage trains and nothing else (P9), and `save_final` writes a complete repository that embeds as the trained model
does, LoRA merged or kept, with the LM head for as long as alignment needs it.
"""

import json
import logging
import shutil

import pytest
import torch
from conftest import assert_distinct, assert_same, save_backbone
from peft import PeftModel
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from lusifer_hf import LusiferForAlignment, LusiferModel
from lusifer_hf.training.arguments import AlignmentConfig, ModelArguments, RepresentationConfig
from lusifer_hf.training.loading import check_fits, embedding_model, load_for_stage, module_pattern, save_final


STAGES = ("alignment", "representation")
TEXTS = {
    "input_ids": torch.tensor([[0, 9, 12, 7, 2], [0, 33, 5, 2, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
}
LLM_TEXTS = {"llm_input_ids": torch.tensor([[1, 8, 30, 2], [1, 50, 2, 2]]), "llm_attention_mask": torch.ones(2, 4)}


@pytest.fixture(scope="session")
def without_added_tokens(tmp_path_factory, tiny_backbones):
    """A composed repository with `num_added_tokens=0`, as step 1 of the paper has it; never written to."""
    folder = tmp_path_factory.mktemp("models") / "composed"
    LusiferModel.from_backbones(*map(str, tiny_backbones), seed=0, num_added_tokens=0).save_pretrained(folder)
    return folder


def load(stage: str, folder, **fields):
    return load_for_stage(stage, ModelArguments(model_name_or_path=str(folder), **fields))


def loss_of(model, stage: str) -> torch.Tensor:
    if stage == "alignment":
        labels = LLM_TEXTS["llm_input_ids"].masked_fill(LLM_TEXTS["llm_attention_mask"] == 0, -100)
        return model(**TEXTS, **LLM_TEXTS, labels=labels).loss
    embeddings = model(**TEXTS).pooler_output
    return (embeddings * torch.linspace(-1, 2, embeddings.shape[1])).square().mean()


def train(model, stage: str, steps: int = 2):
    """Large steps, so that LoRA and the connector have an effect that shows."""
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    for _ in range(steps):
        loss_of(model, stage).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def is_trained(name: str, stage: str, fields: dict) -> bool:
    """By its name in the plain embedding model, whether a parameter is to be trained."""
    if name.startswith("connector."):
        return True
    if stage == "alignment":
        return name.startswith("encoder.") and fields.get("train_encoder", True)
    return name != "llm.embed_tokens.weight"


@pytest.mark.parametrize(
    "stage, fields",
    [
        ("alignment", {"lora_r": 4}),
        ("alignment", {}),
        ("alignment", {"train_encoder": False}),
        ("representation", {"lora_r": 4}),
        ("representation", {}),
    ],
)
def test_exactly_what_the_stage_trains_changes(stage, fields, tiny_repository):
    model = load(stage, tiny_repository, **fields)
    expected = set()
    for name, _ in model.named_parameters():
        plain = name.removeprefix("base_model.model.").removeprefix("model.")
        if "lora_r" not in fields:
            expected |= {name} if is_trained(plain, stage, fields) else set()
        elif ".modules_to_save." in name:
            assert plain.startswith(("connector.", "projection.")[: 1 if stage == "alignment" else 2]), name
            expected.add(name)
        elif ".lora_" in name:
            assert plain.startswith(("encoder.", "llm.")[: 1 if stage == "alignment" else 2]), name
            expected.add(name)
    assert expected == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, stage)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == expected


@pytest.mark.parametrize("stage", STAGES)
def test_lora_covers_all_linear_layers_of_the_towers_and_nothing_else(stage, tiny_repository):
    model = load(stage, tiny_repository, lora_r=4, lora_dropout=0.25)
    adapted = [name for name, module in embedding_model(model).named_modules() if hasattr(module, "lora_A")]
    layers = {"encoder": 2 * 6, "llm": 2 * 7 if stage == "representation" else 0}
    assert {tower: sum(name.startswith(tower) for name in adapted) for tower in layers} == layers
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.25)
    assert load(stage, tiny_repository, lora_r=4, lora_alpha=2).peft_config["default"].lora_alpha == 2
    assert not [name for name, _ in model.named_parameters() if "lora_" in name and "lm_head" in name]


def test_chosen_lora_targets(tiny_repository):
    pattern = r"(encoder|llm)\..*\.(query|q_proj)"
    model = load("representation", tiny_repository, lora_r=2, lora_target_modules=pattern)
    adapted = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 4 and all(name.endswith(("query", "q_proj")) for name in adapted)
    aligned = load("alignment", tiny_repository, lora_r=2, lora_target_modules=pattern)
    assert sum(hasattr(module, "lora_A") for module in aligned.modules()) == 2
    with pytest.raises(ValueError, match=r"'q_proj' matches none of the 26 linear layers.*encoder\.encoder\.layer\.0"):
        load("representation", tiny_repository, lora_r=2, lora_target_modules="q_proj")
    one = ["encoder.encoder.layer.1.attention.self.query"]
    assert "\\d" not in module_pattern(one, aligned.get_base_model().base_model)


def test_fresh_weights_are_reproducible(tiny_repository):
    first, second, other = (
        load("representation", tiny_repository, lora_r=4, composition_seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert {name for name, tensor in first.items() if not torch.equal(tensor, other[name])} == {
        name for name in first if "lora_A" in name
    }


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_added_tokens_grow(stage, lora, without_added_tokens, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lusifer_hf")
    model = load(stage, without_added_tokens, num_added_tokens=2, lora_r=lora)
    assert "num_added_tokens: 0 -> 2. The 2 new ones have random values." in caplog.text
    embedder = embedding_model(model)
    assert model.config.num_added_tokens == embedder.config.num_added_tokens == 2
    fresh = embedder.connector.added_tokens.detach().clone()
    assert fresh.shape == (2, 64) and 0.5 < fresh.std() / embedder.config.initializer_range < 1.5
    train(model, stage)
    trained = embedder.connector.added_tokens.detach().clone()
    assert (trained - fresh).abs().max() > 1e-4
    save_final(model, tmp_path / "final")

    caplog.clear()
    grown = load(stage, tmp_path / "final", num_added_tokens=3, composition_seed=1).base_model
    assert "num_added_tokens: 2 -> 3. The 1 new ones have random values, the first 2 keep theirs." in caplog.text
    assert_same(grown.connector.added_tokens[:2], trained, 0)
    assert not torch.equal(grown.connector.added_tokens[2], fresh[0])
    caplog.clear()
    load(stage, tmp_path / "final", num_added_tokens=2)
    assert "num_added_tokens" not in caplog.text
    with pytest.raises(ValueError, match=r"num_added_tokens=1.*has 2, which can only grow"):
        load(stage, tmp_path / "final", num_added_tokens=1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lora", [None, 4])
def test_final_embeds_as_the_trained_model(stage, lora, tiny_repository, tmp_path, sentences):
    untrained = LusiferModel.from_pretrained(tiny_repository).encode(sentences)
    model = load(stage, tiny_repository, lora_r=lora)
    if lora:
        train(model, stage)
    else:
        with torch.no_grad():  # a step that is large enough to show would not be finite here
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter) if parameter.requires_grad else 0
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = embedding_model(model).encode(sentences)
    assert_distinct(expected)
    assert abs(expected - untrained).max() > 0.05
    save_final(model, tmp_path / "final", state_dict=state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert_same(embedding_model(model).encode(sentences), expected, 0)

    final = LusiferModel.from_pretrained(tmp_path / "final")
    assert_same(final.encode(sentences), expected)
    by_sentence_transformers = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert_same(by_sentence_transformers.encode(sentences), expected)
    assert not (tmp_path / "final" / "adapter").exists()
    for next_stage in STAGES[STAGES.index(stage) :]:
        assert_same(load(next_stage, tmp_path / "final").base_model.encode(sentences), expected)


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_kept_equal_adapters_merged(stage, tiny_repository, tmp_path, sentences):
    model = load(stage, tiny_repository, lora_r=4, lora_alpha=6)
    train(model, stage)
    expected = embedding_model(model).encode(sentences)
    for name, merge in {"merged": True, "kept": False}.items():
        save_final(model, tmp_path / name, merge_adapters=merge)
    base = LusiferModel.from_pretrained(tmp_path / "kept")
    assert abs(base.encode(sentences) - expected).max() > 0.02, "without an effect of LoRA this proves nothing"
    before = LusiferModel.from_pretrained(tiny_repository).encoder.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.encoder.state_dict().items())
    assert_same(LusiferModel.from_pretrained(tmp_path / "merged").encode(sentences), expected)
    kept = PeftModel.from_pretrained(base, tmp_path / "kept" / "adapter")
    assert_same(kept.base_model.model.encode(sentences), expected)
    names = load_file(tmp_path / "kept" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in names)

    # The next step begins from what was trained, not from the bare backbones.
    following = load("representation", tmp_path / "kept", lora_r=4)
    assert_same(embedding_model(following).encode(sentences), expected)
    save_final(following, tmp_path / "next")
    assert_same(LusiferModel.from_pretrained(tmp_path / "next").encode(sentences), expected)


def test_lm_head_is_there_while_alignment_goes_on(tiny_repository, tmp_path):
    head = load_file(tiny_repository / "model.safetensors")["lm_head.weight"]
    for step in (1, 2):
        model = load("alignment", tmp_path / "1" if step == 2 else tiny_repository, lora_r=2)
        train(model, "alignment")
        save_final(model, tmp_path / str(step))
        assert_same(load_file(tmp_path / str(step) / "model.safetensors")["lm_head.weight"], head, 0)
    save_final(load("representation", tmp_path / "2"), tmp_path / "3")
    assert "lm_head.weight" not in load_file(tmp_path / "3" / "model.safetensors")
    with pytest.raises(ValueError, match="holds no LM head"):
        load("alignment", tmp_path / "3")


@pytest.mark.parametrize("stage", STAGES)
def test_two_backbones(stage, tiny_backbones, tmp_path, monkeypatch, sentences):
    monkeypatch.chdir(tmp_path)
    encoder, llm = map(str, tiny_backbones)
    arguments = ModelArguments(encoder=encoder, llm=llm, pooling="cls", num_added_tokens=3, lora_r=2)
    model = load_for_stage(stage, arguments)
    assert list(tmp_path.iterdir()) == []
    assert model.config.pooling == "cls" and model.config.num_added_tokens == 3
    train(model, stage)
    expected = embedding_model(model).encode(sentences)
    save_final(model, tmp_path / "final")
    assert_same(LusiferModel.from_pretrained(tmp_path / "final").encode(sentences), expected)
    assert ("lm_head.weight" in load_file(tmp_path / "final" / "model.safetensors")) == (stage == "alignment")
    # As `compose` does with the same seed.
    composed = LusiferModel.from_backbones(encoder, llm, seed=0, pooling="cls", num_added_tokens=3)
    fresh = load_for_stage("alignment", ModelArguments(encoder=encoder, llm=llm, pooling="cls", num_added_tokens=3))
    assert_same(fresh.model.encode(sentences), composed.encode(sentences), 0)


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision(stage, lora, tiny_repository, tmp_path, sentences):
    LusiferForAlignment.from_pretrained(tiny_repository, dtype=torch.bfloat16).to_embedding_model().save_pretrained(
        tmp_path / "bfloat16"
    )
    model = load(stage, tmp_path / "bfloat16", lora_r=lora)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, stage)
    training = AlignmentConfig if stage == "alignment" else RepresentationConfig
    with pytest.raises(ValueError, match="half precision"):
        check_fits(training(output_dir=str(tmp_path / "run"), use_cpu=True), model)
    check_fits(training(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=True), model)
    save_final(model, tmp_path / "final")
    assert {tensor.dtype for tensor in load_file(tmp_path / "final" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    embeddings = LusiferModel.from_pretrained(tmp_path / "final").encode(sentences)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = embedding_model(model).encode(sentences)
    assert_same(
        torch.nn.functional.cosine_similarity(torch.tensor(embeddings), torch.tensor(expected)), torch.ones(42), 0.01
    )
    assert load(stage, tmp_path / "bfloat16", dtype="float32").base_model.dtype == torch.float32


def test_fields_that_change_the_model(tiny_repository, tmp_path):
    overrides = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.3}
    model = load("alignment", tiny_repository, alignment_attention="prefix_lm", encoder_overrides=overrides)
    assert model.config.alignment_attention == model.model.config.alignment_attention == "prefix_lm"
    layer = model.model.encoder.encoder.layer[0]
    assert (layer.attention.self.dropout.p, layer.output.dropout.p) == (0.0, 0.3)
    with pytest.raises(ValueError, match=r"no 'attention_dropout_prob'.*'attention_probs_dropout_prob'"):
        load("alignment", tiny_repository, encoder_overrides={"attention_dropout_prob": 0})
    eager = load("representation", tiny_repository, attn_implementation="eager", compile_layers=True)
    assert eager.llm.config._attn_implementation == "eager"
    assert eager.llm.layers[0]._compiled_call_impl is not None
    # What the training ran with, perhaps on a GPU, neither stays nor is needed to save.
    eager.config._attn_implementation = "flash_attention_2"
    save_final(eager, tmp_path / "final")
    assert LusiferModel.from_pretrained(tmp_path / "final").llm.config._attn_implementation == "packed"


def test_check_fits(tiny_repository, tmp_path):
    model, output = load("representation", tiny_repository), str(tmp_path / "run")
    check_fits(RepresentationConfig(output_dir=output, max_length=512, matryoshka_dims=[64, 8]), model)
    with pytest.raises(ValueError, match="max_length=513 is more than the 512 positions"):
        check_fits(RepresentationConfig(output_dir=output, max_length=513), model)
    with pytest.raises(ValueError, match=r"matryoshka_dims=\[8, 65\]: an embedding has 64 numbers"):
        check_fits(RepresentationConfig(output_dir=output, matryoshka_dims=[8, 65]), model)


def test_folders_that_hold_no_model_to_start_from(tiny_repository, tiny_backbones, tmp_path):
    with pytest.raises(ValueError, match="model of type 'xlm-roberta', not LUSIFER"):
        load("alignment", tiny_backbones[0])
    with pytest.raises(OSError, match=r"No model can be loaded from .*gone"):
        load("alignment", tmp_path / "gone")
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is a run's output folder.*run/final"):
        load("alignment", tmp_path / "run")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").touch()
    with pytest.raises(ValueError, match="checkpoint for resuming its own run"):
        load("alignment", tmp_path / "checkpoint-3")

    other = shutil.copytree(tiny_repository, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = 3
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit its config.json"):
        load("representation", other)


def test_failed_save_leaves_nothing(tiny_repository, tmp_path, monkeypatch):
    model = load("representation", tiny_repository)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="taken exists already"):
        save_final(model, tmp_path / "taken")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(LusiferModel, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_final(model, tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("llm", ["qwen2", "gemma3_text"])
@pytest.mark.parametrize("connector", ["ff", "embedding_table"])
def test_other_towers(llm, connector, tmp_path, tiny_backbones):
    """Tied LM heads, other layer names, a connector that reads the LLM's table."""
    encoder = save_backbone(tmp_path / "mt5", "mt5")
    decoder = save_backbone(tmp_path / llm, llm, tie_word_embeddings=True)
    for folder in (encoder, decoder):
        for file in tiny_backbones[0].glob("*token*"):
            shutil.copy(file, folder)
    for stage in STAGES:
        arguments = ModelArguments(encoder=str(encoder), llm=str(decoder), connector=connector, lora_r=2)
        model = load_for_stage(stage, arguments)
        train(model, stage)
        expected = embedding_model(model)(**TEXTS).pooler_output
        save_final(model, tmp_path / stage)
        assert_same(LusiferModel.from_pretrained(tmp_path / stage)(**TEXTS).pooler_output.detach(), expected.detach())
    # Every trainable parameter has a gradient: distributed training would wait for the others.
    for stage in STAGES:
        full = load(stage, tmp_path / "alignment")
        loss_of(full, stage).backward()
        trained = {name for name, parameter in full.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, parameter in full.named_parameters() if parameter.grad is not None}
