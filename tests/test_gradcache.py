"""
Contract P5: a GradCache step leaves the gradients of the plain graph over the whole batch, with dropout on (the same
masks), whatever the size of a chunk and in whatever way the batch is cut, on one process and on two.

Golden: loss, gradient of every embedding and of every parameter of `gradcache_crossbatch_ws1` and, on one process with
both ranks' batches, of `gradcache_ddp_ws2` (its parameters' gradients are twice the true ones).
"""

import multiprocessing
import os
import socket
from contextlib import contextmanager, nullcontext

import pytest
import torch
from accelerate import PartialState
from conftest import assert_distinct, pad, random_texts, tiny_model
from golden import backbones, expected_values, golden_case, needs_golden, publish
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from lusifer_hf import LusiferModel
from lusifer_hf.converting import _rename, convert
from lusifer_hf.training.distributed import gather_rows, same_number_of_chunks
from lusifer_hf.training.gradcache import gradcache_step, split_by_rows, split_by_tokens
from lusifer_hf.training.losses import LossOutput, contrastive_loss


ROWS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 4])
KINDS = torch.tensor([0] * 5 + [1] * 6 + [2] * 7)
LENGTHS = torch.tensor([5, 9, 4, 12, 7, 17, 3, 30, 8, 6, 11, 21, 14, 2, 10, 25, 13, 4])
INPUTS = pad(random_texts(LENGTHS.tolist()))
WHOLE = [torch.arange(len(ROWS))]


def take(chunk: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor[chunk, : LENGTHS[chunk].max()] for name, tensor in INPUTS.items()}


def tiny_lora_model(dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(0)
    model = tiny_model(
        encoder_fields={"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout},
        llm_fields={"attention_dropout": dropout},
    )
    config = LoraConfig(
        r=4,
        lora_dropout=dropout,
        target_modules=r"encoder\..*\.(query|value)|llm\..*\.(q_proj|down_proj)",
        modules_to_save=["connector", "projection"],
        init_lora_weights=False,
    )
    return get_peft_model(model, config).train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name.removeprefix("module."): gradient.clone() for name, gradient in gradients.items()}


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 1e-4):
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(gradient.abs().max() for gradient in expected.values())  # a key's bias changes nothing
    for name in expected:
        difference = (actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=floor)
        assert difference < tolerance, f"{name}: {difference}"


def loss_of(splits: list[torch.Tensor], **options):
    """The loss of embeddings in the chunks' order."""
    order = torch.cat(splits)
    options = {"temperature": 0.2, "miner_epsilon": 0.25, **options}
    return lambda embeddings: contrastive_loss(embeddings, ROWS[order], KINDS[order], **options)


def step(model, splits: list[torch.Tensor], **options) -> tuple[LossOutput, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = gradcache_step(
        [take(chunk) for chunk in splits], lambda chunk: model(**chunk).pooler_output, loss_of(splits), **options
    )
    return output, gradients(model)


def plain(model, splits: list[torch.Tensor]) -> tuple[LossOutput, dict[str, torch.Tensor]]:
    """Every chunk's graph alive until one backward pass."""
    model.zero_grad()
    output = loss_of(splits)(torch.cat([model(**take(chunk)).pooler_output for chunk in splits]))
    output.loss.backward()
    return output, gradients(model)


# The step.


def test_dropout_draws_the_same_masks():
    model, splits = tiny_lora_model(dropout=0.2), split_by_rows(ROWS, 2)
    torch.manual_seed(7)
    expected, expected_gradients = plain(model, splits)
    state = torch.get_rng_state()
    other, _ = plain(model, splits)
    assert (other.loss - expected.loss).abs() > 0.01  # so dropout matters

    torch.manual_seed(7)
    output, actual_gradients = step(model, splits)
    torch.testing.assert_close(output.loss, expected.loss.detach())
    assert_same_gradients(actual_gradients, expected_gradients)
    assert all(gradient.abs().max() > 1e-5 for gradient in actual_gradients.values())
    assert torch.equal(torch.get_rng_state(), state)  # and what comes next is random as after the plain step


@pytest.mark.parametrize("lora", [True, False])
def test_the_cut_does_not_matter(lora):
    model = tiny_lora_model() if lora else tiny_model().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert_distinct(model(**take(WHOLE[0])).pooler_output.detach())
    expected, expected_gradients = plain(model, WHOLE)
    one_each = list(torch.arange(len(ROWS)).split(1))
    by_tokens = [split_by_tokens(LENGTHS, budget) for budget in (30, 64, 100)]
    splits = [*(split_by_rows(ROWS, size) for size in (1, 2, 4, 5)), *by_tokens, one_each]
    assert [len(chunks) for chunks in splits] == [5, 3, 2, 1, 9, 5, 3, 18]
    for chunks in splits:
        output, actual_gradients = step(model, chunks)
        torch.testing.assert_close(output.loss, expected.loss.detach(), rtol=1e-5, atol=1e-6)
        assert output.metrics.keys() == expected.metrics.keys() and not output.loss.requires_grad
        assert_same_gradients(actual_gradients, expected_gradients)


@pytest.mark.parametrize("number,forwards", [(1, 1), (2, 4), (3, 6)])
def test_forward_and_backward_passes(number, forwards):
    """One chunk is embedded once. All chunks but the last run inside `no_sync`, forward and backward."""
    model, splits, events = tiny_lora_model(), [*torch.arange(len(ROWS)).tensor_split(number)], []

    @contextmanager
    def no_sync():
        events.append("(")
        yield
        events.append(")")

    def backward(loss):
        events.append("backward")
        loss.backward()

    model.register_forward_hook(lambda *_: events.append("graph" if torch.is_grad_enabled() else "no graph"))
    step(model, splits, backward=backward, no_sync=no_sync)
    again = ["graph", "backward"]
    assert events == ["no graph"] * (forwards - number) + ["(", *again, ")"] * (number - 1) + again


@pytest.mark.parametrize("splits", [WHOLE, split_by_rows(ROWS, 2)])
def test_a_loss_scale_enters_once(splits):
    model = tiny_lora_model()
    expected, expected_gradients = step(model, splits)
    scaled, actual_gradients = step(model, splits, backward=lambda loss: (1024 * loss).backward())
    assert_same_gradients({name: gradient / 1024 for name, gradient in actual_gradients.items()}, expected_gradients)
    torch.testing.assert_close(scaled.loss, expected.loss)


def test_autocast_around_the_whole_step():
    """Autocast remembers the weights that it cast in the pass without a graph: they must not be used with one."""
    model, splits = tiny_model().eval(), split_by_rows(ROWS, 2)
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = plain(model, splits)
        _, actual = step(model, splits)
    for name in expected:
        similarity = torch.cosine_similarity(actual[name].flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.99, f"{name}: {similarity}"


def test_bfloat16_embeddings_keep_their_gradient_in_float32():
    splits, seen = split_by_rows(ROWS, 2), []

    def loss(embeddings):
        seen.append(embeddings.dtype)
        return loss_of(splits)(embeddings)

    model = tiny_model().to(torch.bfloat16)
    gradcache_step([take(chunk) for chunk in splits], lambda chunk: model(**chunk).pooler_output, loss)
    assert seen == [torch.float32]


# The cuts.


def test_split_by_rows():
    rows = torch.tensor([7, 9, 30, 7, 9, 30, 9])
    assert [chunk.tolist() for chunk in split_by_rows(rows, 2)] == [[0, 1, 3, 4, 6], [2, 5]]
    assert [chunk.tolist() for chunk in split_by_rows(rows, 3)] == [list(range(7))]
    with pytest.raises(ValueError, match="gradcache_rows=0 must be at least 1"):
        split_by_rows(rows, 0)


@pytest.mark.parametrize("budget", [1, 12, 40, 64, 1000])
def test_split_by_tokens(budget):
    chunks = split_by_tokens(LENGTHS, budget)
    assert sorted(torch.cat(chunks).tolist()) == WHOLE[0].tolist()
    lengths = [LENGTHS[chunk] for chunk in chunks]
    assert torch.equal(torch.cat(lengths), LENGTHS.sort(descending=True).values)
    for chunk, following in zip(lengths, [*lengths[1:], None], strict=True):
        assert len(chunk) == 1 or chunk.max() * len(chunk) <= budget
        assert following is None or chunk.max() * (len(chunk) + 1) > budget  # and it is full
    with pytest.raises(ValueError, match="gradcache_tokens=0 must be at least 1"):
        split_by_tokens(LENGTHS, 0)


# Golden.


def golden_batch(values: dict, prefixes: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The model's inputs, rows and kinds of all ranks: row by row, each row's texts in the order of the cache."""
    inputs = {}
    for name in ("input_ids", "attention_mask"):
        parts = []
        for prefix in prefixes:
            query, positive, negative = (values[f"{prefix}batch::{kind}_{name}"] for kind in ("query", "pos", "neg"))
            parts.append(torch.cat([query.unsqueeze(1), positive, negative], dim=1))
        inputs[name] = torch.cat(parts)  # (rows, 1 + P + N, length)
    number, texts, _ = inputs["input_ids"].shape
    rows = torch.cat([values[f"{prefix}batch::query_labels"] for prefix in prefixes]).repeat_interleave(texts)
    kinds = torch.tensor([0, 1, *[2] * (texts - 2)]).repeat(number)
    return {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}, rows, kinds


@needs_golden
@pytest.mark.parametrize(
    "name,prefixes", [("gradcache_crossbatch_ws1", [""]), ("gradcache_ddp_ws2", ["rank0::", "rank1::"])]
)
def test_golden(tmp_path, name, prefixes):
    case, world_size = golden_case(name), len(prefixes)
    options = {**backbones(case), "added_token_positions": "after_padding", "keep_adapters": True}
    convert(publish(case, tmp_path / "published"), tmp_path / "model", **options)
    model = LusiferModel.from_pretrained(tmp_path / "model", attn_implementation="eager")
    model = PeftModel.from_pretrained(model, tmp_path / "model" / "adapter", is_trainable=True).train()
    for module in (model.base_model.model.connector, model.base_model.model.projection):
        module.requires_grad_(True)

    values = expected_values(case)
    inputs, rows, kinds = golden_batch(values, prefixes)
    chunks, seen = torch.arange(len(rows)).split(8), []  # two rows each, as there

    def loss(embeddings):
        embeddings.register_hook(seen.append)
        seen.append(embeddings.detach())
        return contrastive_loss(embeddings, rows, kinds, miner_epsilon=0.25)

    output = gradcache_step(
        [{name: tensor[chunk] for name, tensor in inputs.items()} for chunk in chunks],
        lambda chunk: model(**chunk).pooler_output,
        loss,
    )
    embeddings, cache = seen
    for prefix in prefixes:  # the loss as it is logged
        torch.testing.assert_close(output.loss, values[f"{prefix}con_loss"][0], rtol=1e-4, atol=1e-5)
    parts = []
    for prefix in prefixes:
        query, positive, negative = (values[f"{prefix}{kind}_projections"] for kind in ("query", "pos", "neg"))
        parts.append(torch.cat([query.unsqueeze(1), positive, negative], dim=1).flatten(0, 1))
    torch.testing.assert_close(embeddings, torch.cat(parts), rtol=1e-4, atol=1e-5)
    expected = torch.cat([values[f"{prefix}cache"].flatten(0, 1) for prefix in prefixes]) / world_size**2
    assert_same_gradients({"cache": cache}, {"cache": expected}, tolerance=1e-3)

    stored = {key.removeprefix("grad::"): value for key, value in values.items() if key.startswith("grad::")}
    expected = {key: value / world_size for key, value in _rename(stored, "ff")[0].items()}
    actual = {
        key.removeprefix("base_model.model.").removesuffix(".default.weight"): gradient
        for key, gradient in gradients(model).items()
    }
    assert_same_gradients(actual, expected, tolerance=1e-3)


# Two processes.


OWNERS = torch.tensor([0, 0, 0, 1, 1])  # the process of each row: 11 texts there, 7 here


def batch_of_process(rank: int) -> torch.Tensor:
    return torch.isin(ROWS, (OWNERS == rank).nonzero()).nonzero().squeeze(1)


def distributed_step(model, texts: torch.Tensor, splits: list[torch.Tensor]) -> LossOutput:
    order = torch.cat(splits)
    rows, kinds = gather_rows(ROWS[texts][order]), gather_rows(KINDS[texts][order])

    def loss(embeddings):
        return contrastive_loss(
            gather_rows(embeddings[: len(order)]), rows, kinds, temperature=0.2, miner_epsilon=0.25
        )

    return gradcache_step(
        [take(texts[chunk]) for chunk in same_number_of_chunks(splits)],
        lambda chunk: model(**chunk).pooler_output,
        loss,
        no_sync=model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext,
    )


def process(rank: int, port: int, folder: str):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    assert (state.num_processes, state.process_index, state.backend) == (2, rank, "gloo")

    # What each one has, in the processes' order, in every dtype that is exchanged.
    for dtype in (torch.float32, torch.bfloat16, torch.long):
        own = (torch.arange(3 + 2 * rank)[:, None] * torch.tensor([1, 10]) + 100 * rank).to(dtype)
        everything = torch.cat([torch.arange(3)[:, None], 100 + torch.arange(5)[:, None]])
        gathered = gather_rows(own)
        assert gathered.dtype == dtype and torch.equal(gathered[:, 0], everything[:, 0].to(dtype))
    own = torch.ones(3 + 2 * rank, 2, requires_grad=True)
    gathered = gather_rows(own)
    weights = torch.arange(8.0)[:, None].expand(-1, 2)
    (gathered * weights).sum().backward()
    assert torch.equal(own.grad, 2 * weights[:3] if rank == 0 else 2 * weights[3:])  # times the number of processes
    assert same_number_of_chunks([1] if rank else [1, 2, 3]) == ([1, 1, 1] if rank else [1, 2, 3])

    texts = batch_of_process(rank)
    model = DistributedDataParallel(tiny_lora_model())
    splits = {
        "plain": [torch.arange(len(texts))],
        "rows": split_by_rows(ROWS[texts], 1),
        "tokens": split_by_tokens(LENGTHS[texts], 40),
        # One process alone would have a single chunk.
        "uneven": list(torch.arange(len(texts)).split(4 if rank == 0 else 100)),
    }
    results = {}
    for name, chunks in splits.items():
        model.zero_grad()
        output = distributed_step(model, texts, chunks)
        results[name] = (output.loss, gradients(model), output.metrics)
    torch.save(results, f"{folder}/{rank}.pt")
    state.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    assert [len(batch_of_process(rank)) for rank in (0, 1)] == [11, 7]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # The imports take longer than everything else: once, not twice.
    multiprocessing.set_forkserver_preload(["lusifer_hf.converting", "lusifer_hf.quickstart", "torch.distributed"])
    torch.multiprocessing.start_processes(process, (port, str(tmp_path)), nprocs=2, start_method="forkserver")
    model = tiny_lora_model()
    expected, expected_gradients = step(model, WHOLE)
    for rank in (0, 1):
        for name, (loss, actual, metrics) in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6, msg=name)
            assert_same_gradients(actual, expected_gradients)
            assert {key: float(value) for key, value in metrics.items()} == pytest.approx(
                {key: float(value) for key, value in expected.metrics.items()}, rel=1e-5
            )


def test_one_process_exchanges_nothing():
    tensor = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(tensor) is tensor
    assert same_number_of_chunks([1, 2]) == [1, 2]
