"""The research code's golden values, which stand in ../shared/golden beside the repository (or in LUSIFER_SHARED)."""

import json
from pathlib import Path

import pytest
from conftest import ON_CI, SHARED
from safetensors.torch import load_file


GOLDEN = SHARED / "golden"

# On CI the values must be there: nothing is skipped, and `golden_case` fails.
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir() and not ON_CI, reason="needs ../shared/golden, or LUSIFER_SHARED"
)


def golden_case(name: str) -> Path:
    """The folder of a case."""
    folder = GOLDEN / name
    assert folder.is_dir(), f"{folder} is missing: the tests against the research code need ../shared/golden"
    return folder


def golden_names(pattern: str) -> list[str]:
    """The cases of a kind; where the values are missing, the pattern itself, by which a test is skipped or fails."""
    return sorted(path.name for path in GOLDEN.glob(pattern)) or [pattern]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def constructor_arguments(case: Path) -> dict:
    """What the research code publishes as config.json: its model_dtype is not written there."""
    return {
        name: value for name, value in read_json(case / "config.json")["lusifer_init"].items() if name != "model_dtype"
    }


def backbones(case: Path, root: Path | None = None) -> dict[str, str]:
    """`convert`'s options for a case: its own backbones have configs and tokenizers alone, those in GOLDEN weights."""
    arguments = constructor_arguments(case)
    root = case if root is None else root
    return {
        "encoder": str(root / arguments["universal_learner_name_or_path"]),
        "llm": str(root / arguments["encoder_name_or_path"]),
    }


def publish(case: Path, folder: Path) -> Path:
    """Write a case's weights in the form in which the research code publishes a model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(constructor_arguments(case)))
    (folder / "model.safetensors").symlink_to(case / "reference.safetensors")
    return folder


def expected_values(case: Path) -> dict:
    return load_file(case / "io.safetensors")
