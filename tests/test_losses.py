"""
Contract: `contrastive_loss` is the research code's loss, and its dense blocks are the plain definition.

Golden: loss and gradient of every sub-case and configuration of `contrastive_inbatch` and `contrastive_crossbatch_ws2`
(whose factors of world_size are divided out), and the very pairs that the miner kept. The one difference is SupCon's
mean over anchors with a loss above 0, where the research code's float32 rounds three cases' tiny losses to 0.

Definition: a loop over anchors and pairs in float64, for rows with unequal numbers of positives and negatives, with
every option; the same numbers whatever the size of a block, in whatever order the texts come.
"""

import itertools
import math

import pytest
import torch
from conftest import assert_same
from golden import expected_values, golden_case, needs_golden, read_json
from torch.utils._python_dispatch import TorchDispatchMode

from lusifer_hf.training import losses
from lusifer_hf.training.losses import NEGATIVE, POSITIVE, QUERY, contrastive_loss


# Golden.

LOSS_NAMES = {"NTXentLoss": "ntxent", "SupConLoss": "supcon"}
CONFIGS = ["__".join(parts) for parts in itertools.product(LOSS_NAMES, ("lp", "cos"), ("miner", "nominer"))]
SUBCASES = {
    "contrastive_inbatch": ("basic", "duplabels", "p1n1", "ident", "large", "b1"),
    "contrastive_crossbatch_ws2": ("equal", "mismatched", "duplabels", "ident", "large", "easy"),
}
# Anchors that the research code's SupCon took the mean over, and anchors that have a loss above 0: the others' are
# below 1.2e-7 (5e-8 in the sub-case `easy`, all of whose losses are).
ROUNDED_AWAY = {
    ("contrastive_inbatch", "p1n1", "SupConLoss__lp__miner"): (9, 10),
    ("contrastive_inbatch", "p1n1", "SupConLoss__lp__nominer"): (9, 10),
    ("contrastive_inbatch", "ident", "SupConLoss__lp__miner"): (6, 8),
    ("contrastive_inbatch", "ident", "SupConLoss__lp__nominer"): (6, 8),
    ("contrastive_crossbatch_ws2", "ident", "SupConLoss__lp__nominer"): (6, 12),
}


def batch_of(values: dict, subcase: str, prefixes: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, rows and kinds: all queries, then all positives, then all negatives, rank after rank."""
    parts = []
    for kind, name in enumerate(("q", "pos", "neg")):
        for prefix in prefixes:
            embeddings = values[f"{subcase}::{prefix}{name}"]
            labels = values[f"{subcase}::{prefix}labels"]
            per_row = 1 if kind == QUERY else embeddings.shape[1]
            rows = labels.repeat_interleave(per_row)
            parts.append((embeddings.reshape(-1, embeddings.shape[-1]), rows, torch.full_like(rows, kind)))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def gradient_of(values: dict, key: str, prefixes: list[str]) -> torch.Tensor:
    parts = [values[f"{key}::{prefix}grad_{name}"] for name in ("q", "pos", "neg") for prefix in prefixes]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@needs_golden
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case,subcase", [(case, name) for case, names in SUBCASES.items() for name in names])
def test_golden(case, subcase, config):
    values = expected_values(golden_case(case))
    loss, distance, miner = config.split("__")
    in_batch_negatives = case == "contrastive_crossbatch_ws2"
    prefixes = ["rank0::", "rank1::"] if in_batch_negatives else [""]
    embeddings, rows, kinds = batch_of(values, subcase, prefixes)
    if not in_batch_negatives:  # there the research code looks at one row at a time, whatever the labels
        number = len(values[f"{subcase}::labels"])
        rows = torch.cat([torch.arange(number).repeat_interleave(count // number) for count in kinds.bincount()])
    output = contrastive_loss(
        embeddings.requires_grad_(),
        rows,
        kinds,
        loss=LOSS_NAMES[loss],
        similarity={"lp": "l2", "cos": "cosine"}[distance],
        miner_epsilon=0.25 if miner == "miner" else None,
        in_batch_negatives=in_batch_negatives,
    )
    output.loss.backward()

    key = f"{subcase}::{config}"
    world_size = len(prefixes)
    counted, anchors = ROUNDED_AWAY.get((case, subcase, config), (1, 1))
    expected = values[f"{key}::global_loss" if in_batch_negatives else f"{key}::loss"][0]
    gradient = gradient_of(values, key, prefixes) / world_size**2
    torch.testing.assert_close(output.loss, expected * counted / anchors, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(embeddings.grad, gradient * counted / anchors, rtol=1e-4, atol=1e-6)
    assert ("mined_pairs" in output.metrics) == (in_batch_negatives and miner == "miner")


@needs_golden
@pytest.mark.parametrize("distance", ["lp", "cos"])
@pytest.mark.parametrize("subcase", SUBCASES["contrastive_crossbatch_ws2"])
def test_golden_miner_keeps_the_same_pairs(subcase, distance):
    case = golden_case("contrastive_crossbatch_ws2")
    values, key = expected_values(case), f"{subcase}::NTXentLoss__{distance}__miner"
    embeddings, rows, kinds = batch_of(values, subcase, ["rank0::", "rank1::"])
    anchors = (kinds != NEGATIVE).nonzero().squeeze(1)  # they come first
    pairs = losses._pairs(anchors, rows.unique(return_inverse=True)[1], kinds, None, False, True)
    vectors = torch.nn.functional.normalize(embeddings)
    kept = losses._mine(vectors[anchors] @ vectors.T, *pairs, epsilon=0.25)
    for mask, names in zip(kept, (("a1", "p"), ("a2", "n")), strict=True):
        expected = torch.zeros_like(mask)
        expected[tuple(values[f"{key}::rank0::mined_{name}"] for name in names)] = True
        assert torch.equal(mask, expected)
    counts = read_json(case / "config.json")["losses"][key]["n_mined_pos_neg"]
    assert [mask.sum().item() for mask in kept] == counts
    loss, metrics = contrastive_loss(embeddings, rows, kinds, miner_epsilon=0.25)
    assert_same(metrics["mined_pairs"], sum(counts) / sum(mask.sum() for mask in pairs))
    if subcase == "easy":
        assert counts == [0, 0] and loss == 0


# The definition.


def make_batch(seed: int = 0, size: int = 6) -> dict[str, torch.Tensor]:
    """
    Six rows, one of them without a negative, in no order. Among the texts: a positive of two rows, a negative that is
    another row's positive, a query that is another row's negative, a positive that is its own row's negative.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [(1, 2), (3, 0), (2, 1), (1, 3), (1, 1), (2, 2)]
    rows, kinds, texts = [], [], []
    for row, (positives, negatives) in enumerate(counts):
        row_kinds = [QUERY] + [POSITIVE] * positives + [NEGATIVE] * negatives
        kinds += row_kinds
        rows += [row] * len(row_kinds)
        texts += [100 * row + number for number in range(len(row_kinds))]
    same_text = {201: 1, 2: 301, 303: 400, 503: 501}
    texts = torch.tensor([same_text.get(text, text) for text in texts])
    rows, kinds = torch.tensor(rows), torch.tensor(kinds)
    centres = torch.randn(len(counts), size, generator=generator)
    embeddings = 0.7 * centres[rows] + torch.randn(len(rows), size, generator=generator)
    by_text = {}
    for index, text in enumerate(texts.tolist()):
        embeddings[index] = embeddings[by_text.setdefault(text, index)]
    order = torch.randperm(len(rows), generator=generator)
    batch = {"embeddings": 3 * embeddings, "rows": 7 * rows - 3, "kinds": kinds, "text_ids": texts}
    return {name: tensor[order] for name, tensor in batch.items()}


def plain_loss(
    embeddings,
    rows,
    kinds,
    *,
    loss="ntxent",
    temperature=0.05,
    similarity="l2",
    miner_epsilon=None,
    in_batch_negatives=True,
    text_ids=None,
    false_negative_threshold=None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """`contrastive_loss` with one loop over the anchors and lists of pairs, in float64."""
    vectors = torch.nn.functional.normalize(embeddings.double(), dim=1)
    cosine = vectors @ vectors.T
    texts = range(len(rows))
    members = [text for text in texts if kinds[text] != NEGATIVE]
    ids = list(texts) if text_ids is None else text_ids.tolist()
    terms, positive_cosines, negative_cosines = [], [], []
    mined = query_negatives = 0
    for anchor in members:
        if loss == "infonce" and kinds[anchor] != QUERY:
            continue
        family = [text for text in members if rows[text] == rows[anchor]]
        own_rows = {int(rows[text]) for text in members if ids[text] == ids[anchor]}
        known = {ids[text] for text in members if int(rows[text]) in own_rows}
        positives = [text for text in family if text != anchor]
        negatives = [text for text in texts if text not in family and ids[text] not in known]
        if not in_batch_negatives:
            negatives = [text for text in negatives if rows[text] == rows[anchor]]
        if loss == "infonce":
            positives = [text for text in positives if kinds[text] == POSITIVE]
            negatives = [text for text in negatives if kinds[text] != QUERY]
        if false_negative_threshold is not None:
            limit = max(cosine[anchor, text] for text in positives) + false_negative_threshold
            negatives = [text for text in negatives if cosine[anchor, text] <= limit]
        positive_cosines += [cosine[anchor, text].item() for text in positives]
        negative_cosines += [cosine[anchor, text].item() for text in negatives]
        if miner_epsilon is not None and in_batch_negatives:
            nearest = max((cosine[anchor, text] for text in negatives), default=-math.inf)
            farthest = min((cosine[anchor, text] for text in positives), default=math.inf)
            positives = [text for text in positives if cosine[anchor, text] - miner_epsilon < nearest]
            negatives = [text for text in negatives if cosine[anchor, text] + miner_epsilon > farthest]
        mined += len(positives) + len(negatives)
        query_negatives += len(negatives) * int(kinds[anchor] == QUERY)

        def scores(others, anchor=anchor):
            if similarity == "cosine":
                return cosine[anchor, others] / temperature
            return -(vectors[anchor] - vectors[others]).norm(dim=1) / temperature

        if loss == "supcon":
            if positives and len(positives + negatives) > 1:
                terms.append(scores(positives + negatives).logsumexp(0) - scores(positives).mean())
        else:
            for positive in positives:
                terms.append(scores([positive, *negatives]).logsumexp(0) - scores([positive])[0])
    metrics = {
        "positive_similarity": sum(positive_cosines) / len(positive_cosines),
        "negative_similarity": sum(negative_cosines) / len(negative_cosines),
        "negatives_per_query": query_negatives / int((kinds == QUERY).sum()),
    }
    if miner_epsilon is not None and in_batch_negatives:
        metrics["mined_pairs"] = mined / len(positive_cosines + negative_cosines)
    return torch.stack(terms).mean(), metrics


def loss_and_gradient(function, embeddings: torch.Tensor, *args, **options):
    leaf = embeddings.clone().requires_grad_()
    loss, metrics = function(leaf, *args, **options)
    loss.backward()
    return loss.detach(), leaf.grad, {name: float(value) for name, value in metrics.items()}


def assert_same_results(actual, expected, tolerance: float = 1e-5):
    torch.testing.assert_close(actual[0], expected[0].to(actual[0].dtype), rtol=tolerance, atol=tolerance)
    scale = expected[1].abs().max().item()
    torch.testing.assert_close(actual[1], expected[1].to(actual[1].dtype), rtol=0, atol=tolerance * scale)
    assert actual[2] == pytest.approx(expected[2], rel=1e-5)


FILTERS = {
    "all": {},
    "mined": {"miner_epsilon": 0.1},
    "texts": {"text_ids": True},
    "threshold": {"false_negative_threshold": -0.05},
    "everything": {"miner_epsilon": 0.1, "text_ids": True, "false_negative_threshold": 0.2},
}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("in_batch_negatives", [True, False])
@pytest.mark.parametrize("similarity", losses.SIMILARITIES)
@pytest.mark.parametrize("loss", losses.LOSSES)
def test_is_the_definition(monkeypatch, loss, similarity, in_batch_negatives, filters):
    batch = make_batch()
    text_ids = batch.pop("text_ids")
    options = {
        "loss": loss,
        "similarity": similarity,
        "in_batch_negatives": in_batch_negatives,
        "temperature": 0.2,
        **FILTERS[filters],
    }
    if "text_ids" in options:
        options["text_ids"] = text_ids
    expected = loss_and_gradient(plain_loss, **batch, **options)
    assert expected[0] > 0.01 and expected[1].abs().max() > 0.005
    assert_same_results(loss_and_gradient(contrastive_loss, **batch, **options), expected)
    monkeypatch.setattr(losses, "_BLOCK", 3 * len(text_ids))  # three anchors at a time
    assert_same_results(loss_and_gradient(contrastive_loss, **batch, **options), expected)


@pytest.mark.parametrize("in_batch_negatives", [True, False])
@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_filter_changes_the_loss(loss, in_batch_negatives):
    """Otherwise the comparison above would say nothing about it."""
    batch = make_batch()
    text_ids = batch.pop("text_ids")
    common = {"loss": loss, "in_batch_negatives": in_batch_negatives, "temperature": 0.2}
    values = {}
    for name, options in FILTERS.items():
        if "text_ids" in options:
            options = {**options, "text_ids": text_ids}
        output = contrastive_loss(**batch, **common, **options)
        values[name] = round(output.loss.item(), 5)
    if not in_batch_negatives:
        assert values.pop("mined") == values["all"]  # a row's own negatives are mined already
    assert len(set(values.values())) == len(values)


def test_one_row_by_hand():
    """q at 0 degrees, its positives at 60 and 90, a negative at 180; temperature 1/2."""
    degrees = torch.tensor([0.0, 60.0, 90.0, 180.0]).deg2rad()
    embeddings = torch.stack([degrees.cos(), degrees.sin()], dim=1)
    rows, kinds = torch.zeros(4, dtype=torch.long), torch.tensor([QUERY, POSITIVE, POSITIVE, NEGATIVE])
    options = {"similarity": "cosine", "temperature": 0.5}
    pairs = [(0, 60, 180), (0, 90, 180), (60, 60, 120), (60, 30, 120), (90, 90, 90), (90, 30, 90)]  # anchor, +, -

    def term(positive, negative):
        weights = [math.exp(2 * math.cos(math.radians(angle))) for angle in (positive, negative)]
        return -math.log(weights[0] / sum(weights))

    ntxent = sum(term(positive, negative) for _, positive, negative in pairs) / 6
    infonce = sum(term(positive, negative) for anchor, positive, negative in pairs if anchor == 0) / 2
    assert contrastive_loss(embeddings, rows, kinds, **options).loss.item() == pytest.approx(ntxent, rel=1e-5)
    output = contrastive_loss(embeddings, rows, kinds, loss="infonce", **options)
    assert output.loss.item() == pytest.approx(infonce, rel=1e-5)
    assert output.metrics["positive_similarity"].item() == pytest.approx(0.25)
    assert output.metrics["negative_similarity"].item() == pytest.approx(-1)
    assert output.metrics["negatives_per_query"] == 1


def test_a_shared_passage_is_no_negative_of_the_questions_about_it():
    """Two questions about one passage: it is not the other question's negative, nor are they its negatives."""
    rows, kinds = torch.arange(3).repeat(2), torch.tensor([QUERY] * 3 + [POSITIVE] * 3)
    text_ids = torch.tensor([10, 11, 12, 20, 20, 22])
    _, negative = losses._pairs(torch.arange(6), rows, kinds, text_ids.unique(return_inverse=True)[1], False, True)
    assert [mask.nonzero().flatten().tolist() for mask in negative] == [
        [1, 2, 5],
        [0, 2, 5],
        [0, 1, 3, 4],
        [2, 5],
        [2, 5],
        [0, 1, 3, 4],
    ]


@pytest.mark.parametrize("similarity", losses.SIMILARITIES)
def test_matryoshka(similarity):
    batch = make_batch()
    embeddings = batch.pop("embeddings")
    options = {**batch, "similarity": similarity, "miner_epsilon": 0.1}
    loss, gradient, metrics = loss_and_gradient(contrastive_loss, embeddings, **options, matryoshka_dims=[6, 2, 3])
    parts = [loss_and_gradient(plain_loss, embeddings[:, :size], **options) for size in (6, 2, 3)]
    padded = [torch.nn.functional.pad(part[1], (0, 6 - part[1].shape[1])) for part in parts]
    expected = sum(part[0] for part in parts) / 3, sum(padded) / 3, parts[0][2]
    assert_same_results((loss, gradient, metrics), expected)


def test_order_of_the_texts_does_not_matter():
    batch = make_batch()
    order = torch.randperm(len(batch["rows"]), generator=torch.Generator().manual_seed(5))
    options = {"miner_epsilon": 0.1, "false_negative_threshold": 0.1}
    expected = loss_and_gradient(contrastive_loss, **batch, **options)
    actual = loss_and_gradient(contrastive_loss, **{name: tensor[order] for name, tensor in batch.items()}, **options)
    assert_same_results((actual[0], actual[1][order.argsort()], actual[2]), expected)


@pytest.mark.parametrize("similarity", losses.SIMILARITIES)
def test_precision(similarity):
    """bfloat16 embeddings and autocast change nothing but the embeddings' own rounding."""
    batch = make_batch()
    rounded = batch.pop("embeddings").bfloat16()
    expected = loss_and_gradient(plain_loss, rounded.float(), **batch, similarity=similarity)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient, metrics = loss_and_gradient(contrastive_loss, rounded, **batch, similarity=similarity)
        assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
        assert_same_results((loss, expected[1], metrics), expected)
        assert_same_results((loss, gradient, metrics), expected, tolerance=0.01)
        actual = loss_and_gradient(contrastive_loss, rounded.float(), **batch, similarity=similarity)
    assert_same_results(actual, expected)


@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-4, 1e-2])
def test_small_distances(distance):
    """Queries and positives that nearly meet: what the square root of 2 - 2 * cosine cannot tell in float32."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator))
    steps = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator))
    embeddings = 3 * torch.cat([queries, queries + distance * steps])
    rows, kinds = torch.arange(30).repeat(2), torch.tensor([QUERY, POSITIVE]).repeat_interleave(30)
    actual = loss_and_gradient(contrastive_loss, embeddings, rows, kinds, temperature=0.2)
    expected = loss_and_gradient(plain_loss, embeddings, rows, kinds, temperature=0.2)
    assert actual[1].isfinite().all()
    assert_same_results(actual, expected, tolerance=1e-3 if distance == 1e-6 else 1e-5)


@pytest.mark.parametrize("similarity", losses.SIMILARITIES)
def test_a_tiny_loss_is_not_rounded_away(similarity):
    """Two rows that are told apart already: in float32, 1 plus such a loss is 1."""
    embeddings = torch.tensor([[1.0, 0.1], [-1.0, 0.2], [1.0, 0.2], [-1.0, 0.15]])
    rows, kinds = torch.tensor([0, 1, 0, 1]), torch.tensor([QUERY, QUERY, POSITIVE, POSITIVE])
    options = {"similarity": similarity, "temperature": 0.1}
    loss, gradient, _ = loss_and_gradient(contrastive_loss, embeddings, rows, kinds, **options)
    expected, expected_gradient, _ = loss_and_gradient(plain_loss, embeddings, rows, kinds, **options)
    assert 1e-10 < expected < 2e-8
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=0)


def test_nothing_to_learn_from():
    """No positive, or no negative: a loss of 0 with a gradient of 0, not NaN."""
    embeddings = make_batch()["embeddings"][:4]
    alone = torch.arange(4), torch.tensor([QUERY, QUERY, NEGATIVE, NEGATIVE])
    pair = torch.tensor([0, 0, 1, 1]), torch.tensor([QUERY, POSITIVE, QUERY, POSITIVE])
    options = {"in_batch_negatives": False, "false_negative_threshold": 0.1}
    for loss, labels in itertools.product(losses.LOSSES, (alone, pair)):
        value, gradient, metrics = loss_and_gradient(contrastive_loss, embeddings, *labels, loss=loss, **options)
        assert value == 0 and torch.equal(gradient, torch.zeros_like(gradient))
        assert all(math.isfinite(metric) for metric in metrics.values())


def test_a_nan_is_not_hidden():
    batch = make_batch()
    batch["embeddings"][3, 2] = torch.nan
    assert contrastive_loss(**batch, miner_epsilon=0.25).loss.isnan()


def test_no_graph_without_gradient():
    batch = make_batch()
    with torch.no_grad():
        assert not contrastive_loss(**{**batch, "embeddings": batch["embeddings"].requires_grad_()}).loss.requires_grad


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_memory_does_not_grow_with_the_square(monkeypatch):
    queries, size = 64, 4
    rows = torch.arange(queries).repeat(8)
    kinds = torch.tensor([QUERY, POSITIVE, *[NEGATIVE] * 6]).repeat_interleave(queries)
    embeddings = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    monkeypatch.setattr(losses, "_BLOCK", 4 * len(rows))
    with LargestTensor() as largest:
        output = contrastive_loss(
            embeddings, rows, kinds, miner_epsilon=0.25, text_ids=torch.arange(len(rows)), false_negative_threshold=0.1
        )
        output.loss.backward()
    assert largest.entries <= 4 * len(rows) < 2 * queries * len(rows) / 8


@pytest.mark.parametrize(
    "message,options",
    [
        ("loss='triplet' is not one of ntxent, infonce, supcon", {"loss": "triplet"}),
        ("similarity='dot' is not one of l2, cosine", {"similarity": "dot"}),
        ("temperature=0", {"temperature": 0.0}),
        (r"rows has shape \(3,\): expected \(25,\)", {"rows": torch.zeros(3)}),
        (r"kinds has shape \(3,\)", {"kinds": torch.zeros(3)}),
        (r"text_ids has shape \(3,\)", {"text_ids": torch.zeros(3)}),
        (r"matryoshka_dims=\[8, 4\] must be sizes from 1 to 6", {"matryoshka_dims": [8, 4]}),
        (r"matryoshka_dims=\[0, 4\]", {"matryoshka_dims": [0, 4]}),
        (r"matryoshka_dims=\[\]", {"matryoshka_dims": []}),
        (r"Embeddings of shape \(0, 6\)", {"embeddings": torch.zeros(0, 6)}),
        (r"Embeddings of shape \(25,\)", {"embeddings": torch.zeros(25)}),
    ],
)
def test_bad_arguments(message, options):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**{**make_batch(), **options})
