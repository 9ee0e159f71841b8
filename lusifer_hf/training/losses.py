"""
Contrastive losses as functions of embeddings.

A batch is M texts: the queries, positives and negatives of some rows. An anchor's positives are the other queries and
positives of its row, its negatives everything else; negatives of a row are nobody's positives. Anchors are queries
and positives (for "infonce" queries only, and then queries are nobody's negatives either).

The similarity matrix is made one block of anchors at a time, and each block's gradient together with its loss, so that
memory grows with M, not with its square, and no list of pairs exists.

Shapes: M texts, D size of an embedding, A anchors of one block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable


LOSSES = ("ntxent", "infonce", "supcon")
SIMILARITIES = ("l2", "cosine")
QUERY, POSITIVE, NEGATIVE = range(3)

_BLOCK = 2**23  # entries of the similarity matrix at a time: under 1 GB with everything that is computed from them
_NOTHING = -1e30  # a score that weighs nothing; infinity would make the gradient of an anchor without negatives NaN


class LossOutput(NamedTuple):
    """
    Args:
        loss (`torch.Tensor`): Scalar, float32.
        metrics (`dict[str, torch.Tensor]`):
            Scalars: `positive_similarity` and `negative_similarity` (mean cosine of all pairs, before mining),
            `negatives_per_query` (that take part in the loss) and, with the miner, `mined_pairs` (share that it kept).
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def contrastive_loss(
    embeddings: torch.Tensor,
    rows: torch.Tensor,
    kinds: torch.Tensor,
    *,
    loss: str = "ntxent",
    temperature: float = 0.05,
    similarity: str = "l2",
    miner_epsilon: float | None = None,
    in_batch_negatives: bool = True,
    text_ids: torch.Tensor | None = None,
    false_negative_threshold: float | None = None,
    matryoshka_dims: list[int] | None = None,
) -> LossOutput:
    """
    The loss of a whole batch, computed in float32 or better whatever the embeddings' dtype and autocast.

    Args:
        embeddings (`torch.Tensor` of shape `(M, D)`):
            Of any length; they are normalised here.
        rows (`torch.LongTensor` of shape `(M,)`):
            The row of each text. Equal numbers are one row, whichever process the texts come from.
        kinds (`torch.LongTensor` of shape `(M,)`):
            0 query, 1 positive, 2 negative.
        loss (`str`, *optional*, defaults to `"ntxent"`):
            `"ntxent"` and `"infonce"`: one term for each pair of an anchor and a positive, against the anchor's
            negatives; its other positives are not in the denominator. Mean over pairs. `"supcon"`: an anchor's
            positives are averaged, against its negatives and positives. Mean over the anchors that have a positive and
            another candidate.
        temperature (`float`, *optional*, defaults to 0.05):
            Divides the similarities.
        similarity (`str`, *optional*, defaults to `"l2"`):
            `"l2"` is minus the distance (not squared) of the normalised embeddings.
        miner_epsilon (`float`, *optional*):
            Keep the pairs that a MultiSimilarity miner keeps: positives less similar than the anchor's nearest
            negative plus epsilon, negatives more similar than its farthest positive minus epsilon (by cosine). The
            negatives that a row brings along are mined already, so without in-batch negatives all are kept.
        in_batch_negatives (`bool`, *optional*, defaults to `True`):
            `False`: an anchor's negatives are those of its own row.
        text_ids (`torch.LongTensor` of shape `(M,)`, *optional*):
            Equal numbers are equal texts. A text that somewhere in the batch stands in a row together with the
            anchor's text, as query or positive, is then never the anchor's negative.
        false_negative_threshold (`float`, *optional*):
            Leave out negatives whose cosine exceeds that of the anchor's nearest positive by more than this, as
            Qwen3-Embedding does with 0.1. It is minus the `margin` of sentence-transformers' GIST losses.
        matryoshka_dims (`list[int]`, *optional*):
            Mean of the losses of the embeddings cut to these sizes. The metrics are those of the largest.

    Raises:
        `ValueError`: if an argument is out of range, or shapes do not fit.
    """
    _check(embeddings, rows, kinds, loss, temperature, similarity, text_ids, matryoshka_dims)
    epsilon = miner_epsilon if in_batch_negatives else None
    rows = rows.unique(return_inverse=True)[1]
    texts = None if text_ids is None else text_ids.unique(return_inverse=True)[1]
    anchors = (kinds == QUERY if loss == "infonce" else kinds != NEGATIVE).nonzero().squeeze(1)
    # Where vectors meet, 2 - 2 * cosine leaves no digit of the distance in float32. MPS has nothing better.
    exact = similarity == "l2" and embeddings.device.type != "mps"

    def block_terms(cosine: torch.Tensor, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the block's terms (differentiable in the cosines), and what the averages are made of."""
        similarities = cosine.detach().float()
        positive, negative = _pairs(block, rows, kinds, texts, loss == "infonce", in_batch_negatives)
        if false_negative_threshold is not None:
            nearest = similarities.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
            negative &= similarities <= nearest + false_negative_threshold
        pairs = positive.sum(), negative.sum()
        sums = [(similarities * mask).sum() for mask in (positive, negative)]
        if epsilon is not None:
            positive, negative = _mine(similarities, positive, negative, epsilon)
        kept = positive.sum() + negative.sum()
        query_negatives = negative[kinds[block] == QUERY].sum()

        if similarity == "l2":
            # The floor is far below what matters, and gives a distance of 0 the gradient 0 instead of NaN.
            cosine = -(2 - 2 * cosine).clamp(min=1e-14).sqrt()
        total, count = _terms((cosine / temperature).float(), positive, negative, loss)
        return total, torch.stack([count, *sums, *pairs, kept, query_negatives])

    def average(size: int) -> LossOutput:
        total, sums = _SumOverBlocks.apply(embeddings[:, :size].float(), anchors, block_terms, exact)
        count, positive_sum, negative_sum, positives, negatives, kept, query_negatives = sums.unbind()
        metrics = {
            "positive_similarity": positive_sum / positives.clamp(min=1),
            "negative_similarity": negative_sum / negatives.clamp(min=1),
            "negatives_per_query": query_negatives / (kinds == QUERY).sum().clamp(min=1),
        }
        if epsilon is not None:
            metrics["mined_pairs"] = kept / (positives + negatives).clamp(min=1)
        return LossOutput(total / count.clamp(min=1), metrics)

    with torch.autocast(embeddings.device.type, enabled=False):
        outputs = [average(size) for size in sorted(matryoshka_dims or [embeddings.shape[1]])]
    return LossOutput(torch.stack([output.loss for output in outputs]).mean(), outputs[-1].metrics)


class _SumOverBlocks(torch.autograd.Function):
    """Sum `block_terms` over blocks of anchors, with the gradient made on the way: one block is alive at a time."""

    @staticmethod
    def forward(
        ctx, embeddings: torch.Tensor, anchors: torch.Tensor, block_terms: Callable, exact: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        vectors = embeddings.double() if exact else embeddings.clone()
        lengths = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
        vectors /= lengths
        gradient = torch.zeros_like(vectors) if needs_gradient else None
        totals, sums = [], []
        for block in anchors.split(max(1, _BLOCK // len(vectors))):
            cosine = vectors[block] @ vectors.T  # (A, M)
            with torch.set_grad_enabled(needs_gradient):
                total, block_sums = block_terms(cosine.requires_grad_(needs_gradient), block)
            if needs_gradient:
                (weights,) = torch.autograd.grad(total, cosine)
                gradient.index_add_(0, block, weights @ vectors)
                gradient.addmm_(weights.T, vectors[block])
            totals.append(total.detach())
            sums.append(block_sums)
        if needs_gradient:
            # Through the normalisation: what points along an embedding does not change its direction.
            along = torch.einsum("md,md->m", gradient, vectors).unsqueeze(1)
            gradient.addcmul_(along, vectors, value=-1).div_(lengths)
            ctx.save_for_backward(gradient.to(embeddings.dtype))
        total, sums = torch.stack(totals).sum(), torch.stack(sums).sum(dim=0)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: torch.Tensor, _) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total, None, None, None


def _pairs(
    anchors: torch.Tensor,  # (A,)
    rows: torch.Tensor,
    kinds: torch.Tensor,
    texts: torch.Tensor | None,
    queries_only: bool,
    in_batch_negatives: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks `(A, M)` of the anchors' positives and negatives."""
    members = kinds != NEGATIVE
    same_row = rows[anchors].unsqueeze(1) == rows
    family = same_row & members  # the anchor itself and its positives
    positive = family.scatter(1, anchors.unsqueeze(1), False)
    negative = ~family if in_batch_negatives else same_row & ~members
    if texts is not None:
        twins = (texts[anchors].unsqueeze(1) == texts) & members  # the anchor's text, its own row's and others'
        families = _spread(twins, rows) & members
        negative &= ~_spread(families, texts)
    if queries_only:
        positive &= kinds == POSITIVE
        negative &= kinds != QUERY
    return positive, negative


def _spread(mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mask `(A, M)` of the texts whose label (a number below M) is that of a text in the mask."""
    anchor, text = mask.nonzero(as_tuple=True)
    marked = torch.zeros_like(mask)
    marked[anchor, labels[text]] = True
    return marked[:, labels]


def _mine(
    similarities: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of masks `(A, M)` that the MultiSimilarity miner keeps."""
    nearest_negative = similarities.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
    farthest_positive = similarities.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
    return (
        positive & (similarities - epsilon < nearest_negative),
        negative & (similarities + epsilon > farthest_positive),
    )


def _terms(
    scores: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, loss: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the terms of scores `(A, M)`, and the number to divide it by."""
    candidates = positive | negative if loss == "supcon" else negative
    against = scores.masked_fill(~candidates, _NOTHING).logsumexp(dim=1, keepdim=True)
    if loss == "supcon":
        number = positive.sum(dim=1)
        losses = against.squeeze(1) - (scores * positive).sum(dim=1) / number.clamp(min=1)
        # Not `losses > 0`, which would ask float32's last digit.
        counts = (number > 0) & (candidates.sum(dim=1) > 1)
        return (losses * counts).sum(), counts.sum()
    # -log(e^s / (e^s + e^against)), without the cancellation.
    return (nn.functional.softplus(against - scores) * positive).sum(), positive.sum()


def _check(embeddings, rows, kinds, loss, temperature, similarity, text_ids, matryoshka_dims):
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not one of {', '.join(LOSSES)}.")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity={similarity!r} is not one of {', '.join(SIMILARITIES)}.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    if embeddings.dim() != 2 or len(embeddings) == 0:
        raise ValueError(f"Embeddings of shape {tuple(embeddings.shape)}: expected (texts, size), at least one text.")
    for name, tensor in (("rows", rows), ("kinds", kinds), ("text_ids", text_ids)):
        if tensor is not None and tensor.shape != embeddings.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected ({len(embeddings)},), one a text.")
    size = embeddings.shape[1]
    if matryoshka_dims is not None and not (
        matryoshka_dims and min(matryoshka_dims) >= 1 and max(matryoshka_dims) <= size
    ):
        raise ValueError(f"matryoshka_dims={matryoshka_dims} must be sizes from 1 to {size}, the embeddings' own.")
