"""What the processes of the representation stage exchange; on one process nothing happens."""

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """
    The rows `(n, ...)` of every process, one process after the other; n may differ.

    Differentiable in this process's own rows, with the gradient times the number of processes. For a loss that all
    processes compute alike from all rows, that is what `torch.distributed.nn.functional.all_gather` gives, without its
    exchange on the way back. The factor is there because DDP and FSDP take the mean over processes of what is a sum:
    each process holds the part of a parameter's gradient that flows through its own rows.
    """
    state = PartialState()
    if state.num_processes == 1:
        return tensor
    sizes = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = gather(pad_across_processes(tensor.detach())).chunk(state.num_processes)
    parts = [part[:size] for part, size in zip(padded, sizes, strict=True)]
    if tensor.requires_grad:
        own = tensor.view_as(tensor)
        own.register_hook(lambda gradient: gradient * state.num_processes)
        parts[state.process_index] = own
    return torch.cat(parts)


def same_number_of_chunks(chunks: list) -> list:
    """
    The chunks, with the last one repeated up to the largest number on any process.

    FSDP hangs if processes run different numbers of passes. The loss leaves the repeated embeddings, which come last,
    out, so that their gradient is 0.
    """
    number = torch.tensor([len(chunks)], device=PartialState().device)
    return chunks + chunks[-1:] * (int(gather(number).max()) - len(chunks))
