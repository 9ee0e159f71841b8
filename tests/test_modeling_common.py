"""
Contract: LusiferModel is a transformers model like any other. transformers' own `ModelTesterMixin` and `ConfigTester`,
of the very version that is installed, pass on it.

Those test files are in transformers' source distribution only. They are fetched once with pip and kept in
~/.cache/lusifer_hf.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import torch
import transformers
from conftest import VOCABULARY, backbone_config, unavailable
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from lusifer_hf import LusiferConfig, LusiferModel


CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lusifer_hf"
FILES = ("test_modeling_common.py", "test_configuration_common.py")


def fetch_tests() -> Path:
    """The folder with transformers' test files, downloaded if it is not there yet."""
    version = transformers.__version__
    folder = CACHE / f"transformers-tests-{version}"
    if not all((folder / name).exists() for name in FILES):
        folder.mkdir(parents=True, exist_ok=True)
        options = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet", "--dest", str(folder))
        command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
            for name in FILES:
                content = archive.extractfile(f"transformers-{version}/tests/{name}").read()
                partial = folder / f"{name}.{os.getpid()}"
                partial.write_bytes(content)
                partial.replace(folder / name)  # whole or not at all, also when several workers fetch
    return folder


def import_tests(folder: Path) -> tuple[type, type]:
    """`ModelTesterMixin` and `ConfigTester`, imported under a package name that is not our own `tests`."""
    package = "transformers_tests"

    def stub(name: str, **names):
        module = types.ModuleType(f"{package}.{name}".rstrip("."))
        module.__path__ = [str(folder)] if name == "" else []
        vars(module).update(names)
        sys.modules[module.__name__] = module

    # The source distribution holds tests/test*.py but none of the sub-folders they import from.
    stub("")
    stub("exporters")
    stub("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    stub("generation")
    stub("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    stub("utils")
    stub("utils.test_configuration_utils", config_common_kwargs={})
    (folder / "__init__.py").touch()  # ConfigTester runs it
    modeling, configuration = (importlib.import_module(f"{package}.{name.removesuffix('.py')}") for name in FILES)
    return modeling.ModelTesterMixin, configuration.ConfigTester


try:
    ModelTesterMixin, ConfigTester = import_tests(fetch_tests())
    MISSING = None
except (OSError, KeyError, ImportError, subprocess.SubprocessError) as error:
    MISSING = f"transformers' own tests could not be fetched: {getattr(error, 'stderr', None) or error!r}"
    ModelTesterMixin = ConfigTester = type("Missing", (), {})


def test_own_tests_of_transformers_are_there():
    if MISSING is not None:
        unavailable(MISSING)


class LusiferModelWithLoss(LusiferModel):
    """For the tests of training, which pass over models that return no loss."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = output.pooler_output.square().mean()
        return output


class LusiferModelUnchecked(LusiferModel):
    """For the tests that load a file without weights, which LusiferModel refuses (see `test_incomplete_weights`)."""

    from_pretrained = classmethod(PreTrainedModel.from_pretrained.__func__)


MODEL_CLASS_OF_TEST = {
    "test_training": LusiferModelWithLoss,
    "test_training_gradient_checkpointing": LusiferModelWithLoss,
    "test_training_gradient_checkpointing_use_reentrant_false": LusiferModelWithLoss,
    "test_training_gradient_checkpointing_use_reentrant_true": LusiferModelWithLoss,
    "test_can_init_all_missing_weights": LusiferModelUnchecked,
    "test_model_weights_reload_no_missing_tied_weights": LusiferModelUnchecked,
}

# Tests that make no sense here, by the beginning of their names.
SKIPPED = {
    "test_model_rope_scaling_from_config": "it feeds texts longer than the model has positions for, which we refuse",
}


class LusiferModelTester:
    batch_size = 5
    seq_length = 7
    encoder_seq_length = seq_length + 1  # the states are the LLM's, which sees the added token too
    is_training = True
    num_hidden_layers = 2
    hidden_size = 48
    num_attention_heads = 4

    def __init__(self, parent, connector: str):
        self.parent = parent
        self.connector = connector

    def get_config(self) -> LusiferConfig:
        return LusiferConfig(
            encoder_config=backbone_config("xlm-roberta"),
            llm_config=backbone_config("mistral"),
            connector=self.connector,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LusiferConfig, dict]:
        input_ids = torch.randint(5, VOCABULARY, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@unittest.skipIf(MISSING is not None, MISSING or "")
class LusiferModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LusiferModel,)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # the mixin skips files without a recent copyright line

    def setUp(self):
        for name, reason in SKIPPED.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        # The tests of training want a gradient for every parameter, and "ff" does not use the LLM's embeddings.
        connector = "embedding_table" if "training" in self._testMethodName else "ff"
        self.model_tester = LusiferModelTester(self, connector)
        # The vocabularies are those of the towers, as in transformers' own composite configs.
        self.config_tester = ConfigTester(self, config_class=LusiferConfig, has_text_modality=False, pooling="cls")
        self.all_model_classes = (MODEL_CLASS_OF_TEST.get(self._testMethodName, LusiferModel),)
        # As for a base model of transformers: tests of what a default config gives and of rotary embeddings run too.
        known = mock.patch.dict(MODEL_MAPPING_NAMES, {"lusifer": LusiferModel.__name__})
        known.start()
        self.addCleanup(known.stop)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_incomplete_weights(self):
        model = LusiferModel(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            weights = {name: tensor for name, tensor in model.state_dict().items() if "projection" not in name}
            model.save_pretrained(folder, state_dict=weights)
            with self.assertRaisesRegex(ValueError, "missing_keys: projection"):
                LusiferModel.from_pretrained(folder)
