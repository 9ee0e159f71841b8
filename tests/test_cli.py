"""
The contract of `lusifer-hf`: every sub-command does what the function behind it does; a user's mistake is one line on
stderr and exit status 1 (2 for arguments that do not exist), never a traceback unless `--debug` asks for it.
"""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import assert_distinct, assert_same

from lusifer_hf import LusiferConfig, LusiferModel, quickstart
from lusifer_hf.cli import main
from lusifer_hf.quickstart import SENTENCES


@pytest.fixture(scope="module")
def model(tiny_repository):
    return LusiferModel.from_pretrained(tiny_repository)


def test_console_script():
    script = Path(sys.executable).with_name("lusifer-hf")
    finished = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    for name in ("compose", "convert", "encode", "evaluate", "compare", "prepare", "quickstart"):
        assert name in finished.stdout


# compose and convert


def test_compose(tiny_backbones, tmp_path, capsys):
    encoder, llm = map(str, tiny_backbones)
    folder = tmp_path / "model"
    options = ["--seed", "3", "--dtype", "bfloat16", "--connector", "embedding_table", "--num-added-tokens", "2"]
    options += ["--pooling", "lasttoken", "--added-token-positions", "after_padding", "--no-projection"]
    assert main(["compose", "--encoder", encoder, "--llm", llm, str(folder), *options]) == 0
    assert "torch.bfloat16" in capsys.readouterr().out
    config = LusiferConfig.from_pretrained(folder)
    assert (config.connector, config.num_added_tokens, config.pooling) == ("embedding_table", 2, "lasttoken")
    assert (config.added_token_positions, config.projection) == ("after_padding", False)
    assert LusiferModel.from_pretrained(folder).encode("text").shape == (64,)


def test_compose_without_options_keeps_the_defaults(tiny_backbones, tmp_path):
    encoder, llm = map(str, tiny_backbones)
    assert main(["compose", "--encoder", encoder, "--llm", llm, str(tmp_path / "model")]) == 0
    config = LusiferConfig.from_pretrained(tmp_path / "model")
    for name in ("connector", "num_added_tokens", "pooling", "projection", "added_token_positions"):
        assert getattr(config, name) == getattr(LusiferConfig(), name)


def test_convert_passes_on_what_is_given(monkeypatch, capsys):
    calls = []
    module = ModuleType("lusifer_hf.converting")
    module.convert = lambda source, output, **options: calls.append((source, output, options)) or "the report"
    monkeypatch.setitem(sys.modules, "lusifer_hf.converting", module)
    assert main(["convert", "src", "out"]) == 0
    options = ["--encoder", "e", "--llm", "l", "--pooling", "cls", "--added-token-positions", "after_padding"]
    options += ["--keep-adapters", "--lora-alpha", "32", "--dtype", "float16"]
    assert main(["convert", "src", "out", *options]) == 0
    expected = {"encoder": "e", "llm": "l", "pooling": "cls", "added_token_positions": "after_padding"}
    expected |= {"keep_adapters": True, "lora_alpha": 32, "dtype": "float16"}
    assert calls == [("src", "out", {}), ("src", "out", expected)]
    assert capsys.readouterr().out == "the report\nthe report\n"


# encode


def encode(repository: Path, *arguments) -> int:
    return main(["encode", "--model", str(repository), "--device", "cpu", *map(str, arguments)])


def test_encode_texts(model, tiny_repository, tmp_path, capsys):
    texts = ["¿Cuánto tiempo?", "", "a {brace} and a file.txt.backup", *SENTENCES["bn"]]
    assert encode(tiny_repository, *texts, "--output", tmp_path / "out.npy") == 0
    assert_same(np.load(tmp_path / "out.npy"), model.encode(texts), 1e-6)
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out.npy'}\n"
    assert f"{len(texts)}/{len(texts)}" in captured.err

    assert encode(tiny_repository, *texts, "--output", tmp_path / "out.parquet") == 0
    assert pq.read_table(tmp_path / "out.parquet")["text"].to_pylist() == texts


def test_encode_file_with_every_option(model, tiny_repository, tmp_path, sentences):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in sentences))
    options = ["--prompt-name", "document", "--instruction", "Find it:", "--normalize", "--truncate-dim", "32"]
    options += ["--max-length", "30", "--batch-size", "5", "--max-tokens-per-batch", "90", "--text-field", "body"]
    options += ["--dtype", "float32", "--attn-implementation", "sdpa"]
    assert encode(tiny_repository, source, "--output", output, *options) == 0
    expected = model.encode(
        sentences, prompt_name="document", instruction="Find it:", normalize=True, truncate_dim=32, max_length=30
    )
    assert_same(np.load(output), expected, 1e-5)


def test_encode_compiles_layers_and_casts(tiny_repository, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(LusiferModel, "compile_layers", lambda model: compiled.append(model.dtype))
    options = ["--compile-layers", "--dtype", "bfloat16"]
    assert encode(tiny_repository, "text", "--output", tmp_path / "out.npy", *options) == 0
    assert [str(dtype) for dtype in compiled] == ["torch.bfloat16"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jsonl", "--output", "out.npy"], "error: missing.jsonl does not exist."),
        (["known.txt", "more", "--output", "out.npy"], "error: known.txt is the name of a file: give one file, or"),
        (["a text", "gone.parquet", "--output", "out.npy"], "error: gone.parquet is the name of a file"),
        (["known.csv", "--output", "out.npy"], "error: known.csv does not end in one of .txt, "),
        (["known.txt", "--output", "known.npy"], "error: known.npy exists already"),
        (["known.txt", "--output", "out.bin"], "error: out.bin does not end in one of .npy, .parquet"),
        (["bad.jsonl", "--output", "out.npy"], "error: bad.jsonl, line 2 is not valid JSON"),
        (["a", "\udce9", "--output", "out.npy"], 'line 2, field "text" holds a lone surrogate, U+DCE9'),
        (["a", "--output", "out.npy", "--batch-size", "-1"], "error: batch_size=-1 must be 1 or more."),
    ],
)
def test_encode_mistakes(tiny_repository, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "known.txt": "a",
        "known.csv": "a",
        "known.npy": "a",
        "bad.jsonl": '{"text": ""}\n{',
    }.items():
        Path(name).write_text(content)
    assert encode(tiny_repository, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(list(tmp_path.iterdir())) == 4


def test_debug_shows_the_traceback(tiny_repository, tmp_path):
    with pytest.raises(FileNotFoundError):
        encode(tiny_repository, "missing.txt", "--output", tmp_path / "out.npy", "--debug")


@pytest.mark.parametrize(
    "arguments", [[], ["embed"], ["encode", "text"], ["compose", "out", "--encoder", "a", "--llm", "b", "--pool", "x"]]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: lusifer-hf" in capsys.readouterr().err


# quickstart


@pytest.fixture
def trained(tmp_path, monkeypatch, tiny_repository, tiny_backbones) -> Path:
    """What a finished run leaves, made without one."""
    rows = [{"_id": str(i), "text": text} for i, text in enumerate(SENTENCES["en"])]
    held_out, prepared = tmp_path / "prepared" / "data" / "held_out", tmp_path / "prepared"
    held_out.mkdir(parents=True)
    for name in ("queries", "corpus"):
        (held_out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (held_out / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n0\t0\t1\n1\t1\t1\n")
    lines = (json.dumps({"positive": [text]}) + "\n" for text in SENTENCES["en"])
    (prepared / "data" / "train.jsonl").write_text("".join(lines))
    shutil.copytree(tiny_backbones[0].parent, prepared / "backbones")
    for step in quickstart.STEPS:
        shutil.copytree(tiny_repository, tmp_path / step / "final")
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(quickstart, "FOLDER", tmp_path)
    return tmp_path / quickstart.STEPS[-1] / "final"


def test_quickstart_of_a_finished_run(trained, tmp_path, capsys, monkeypatch):
    ways = quickstart.embed_in_every_way(trained, tmp_path)
    assert len(ways) == 4
    reference = ways["AutoModel"]
    assert reference.shape == (42, 64)
    assert_distinct(reference)
    for way, embeddings in ways.items():
        assert np.abs(embeddings - reference).max() <= 1e-5, way

    # And what is printed is of these figures; a difference is an error.
    monkeypatch.setattr(quickstart, "embed_in_every_way", lambda folder, scratch: ways)
    assert main(["quickstart"]) == 0
    printed = capsys.readouterr().out
    assert "nDCG@10 on the pairs that were held out: " in printed
    for text in (*quickstart.QUERIES, *(f"-> {text[:60]}" for text in SENTENCES["en"]), *ways, str(trained)):
        assert text in printed
    ways["SentenceTransformer"] = reference + 1e-3
    assert main(["quickstart"]) == 1
    captured = capsys.readouterr()
    assert "error: The ways to load the model differ by " in captured.err
    assert "The model is in" not in captured.out


def test_quickstart_trains_the_steps_that_are_not_finished(trained, capsys, monkeypatch):
    shutil.rmtree(trained)
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=1)
    )
    assert main(["quickstart"]) == 1
    assert [command[-2:] for command in commands] == [["train.py", "configs/quickstart/4_all.yaml"]]
    assert "error: 4_all stopped; start the same command again to continue it." in capsys.readouterr().err


def test_quickstart_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart"]) == 1
    assert "error: There is no configs/quickstart here: run this in a checkout" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "extra"), [("data.prepare", "prepare"), ("evaluation", "eval")])
def test_a_missing_package_names_its_extra(monkeypatch, package, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, f"lusifer_hf.{package}", raising=False)
    with pytest.raises(ImportError, match=rf'needs (datasets|mteb): pip install "lusifer-hf\[{extra}\]"'):
        importlib.import_module(f"lusifer_hf.{package}")
