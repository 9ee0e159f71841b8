"""
GradCache (https://arxiv.org/abs/2101.06983): the gradient of a loss over a whole batch in the memory of one chunk.

1. Embed every chunk without a graph, keeping the random state before each.
2. The loss of all embeddings, and its gradient with respect to them.
3. Embed every chunk again with a graph and the same random state, so that dropout draws the same masks, and send the
   chunk's part of that gradient backward.

Step 1 could keep the last chunk's graph and spare step 3 one forward pass. But DDP exchanges gradients after the chunk
whose forward pass comes last, so that graph would lie in memory beside every other chunk's.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from .losses import LossOutput


def gradcache_step(
    chunks: Sequence[dict[str, torch.Tensor]],
    embed: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    loss: Callable[[torch.Tensor], LossOutput],
    *,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> LossOutput:
    """
    Add the gradients of the loss to the parameters. One chunk is embedded once, in the ordinary way.

    Args:
        chunks: the model's inputs, as many on every process (see [`~distributed.same_number_of_chunks`]).
        embed: embeddings `(n, D)` of a chunk; called twice, the second time with a graph.
        loss: takes the embeddings of all chunks in float32, in the chunks' order.
        backward: such as `accelerator.backward`. It sees each chunk's part once, so that a loss scale enters once.
        no_sync: context in which gradients are not exchanged between processes; the last chunk runs outside it.

    Returns:
        What `loss` returned, detached.
    """
    if len(chunks) == 1:
        output = loss(embed(chunks[0]).float())
        backward(output.loss)
        return output._replace(loss=output.loss.detach())

    modules, states, embeddings = _random_modules(chunks[0]), [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append([module.get_rng_state() for module in modules])
            embeddings.append(embed(chunk).float())

    sizes = [len(part) for part in embeddings]
    embeddings = torch.cat(embeddings).requires_grad_()
    output = loss(embeddings)
    gradients = torch.autograd.grad(output.loss, embeddings)[0].split(sizes)
    output = output._replace(loss=output.loss.detach())

    for index, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients, strict=True)):
        # Forward included: there DDP decides whether the backward pass will exchange gradients.
        with no_sync() if index < len(chunks) - 1 else nullcontext():
            for module, value in zip(modules, state, strict=True):
                module.set_rng_state(value)
            backward((embed(chunk).float() * gradient).sum())
    return output


def split_by_rows(rows: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Indices of the texts of `size` rows at a time; `rows (M,)` says which row a text belongs to."""
    if size < 1:
        raise ValueError(f"gradcache_rows={size} must be at least 1.")
    chunk = rows.unique(return_inverse=True)[1] // size
    return list(chunk.argsort(stable=True).split(chunk.bincount().tolist()))


def split_by_tokens(lengths: torch.Tensor, budget: int) -> list[torch.Tensor]:
    """
    Indices of texts of like lengths, longest first, each chunk at most `budget` tokens with the padding counted; a
    longer text is a chunk by itself. `lengths (M,)` are in tokens.
    """
    if budget < 1:
        raise ValueError(f"gradcache_tokens={budget} must be at least 1.")
    order = lengths.argsort(descending=True, stable=True)
    starts, longest = [], 0
    for position, length in enumerate(lengths[order].tolist()):
        if not starts or longest * (position + 1 - starts[-1]) > budget:
            starts.append(position)
            longest = length
    return list(order.tensor_split(starts[1:]))


def _random_modules(chunk: dict[str, torch.Tensor]) -> list:
    """Where torch keeps the random state of the CPU and of the chunk's device."""
    device = next(iter(chunk.values())).device
    return [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
