"""
The research code's learning rate schedules, which start and end at a floor instead of zero.

Everything else is transformers' own: `lr_scheduler_type` with `lr_scheduler_kwargs`.
"""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_with_floor(step: int, num_warmup_steps: float, num_training_steps: int, floor: float = 0.0) -> float:
    """
    The share of the learning rate at `step`: a line from `floor` to 1 at `num_warmup_steps`, then a cosine back to
    `floor` at `num_training_steps`. As in the research code it is not clamped: after the last step it rises again.
    """
    if step < num_warmup_steps:
        share = step / max(1, num_warmup_steps)
    else:
        progress = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        share = (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * share


def cosine_annealing_with_floor(
    step: int, num_warmup_steps: float, num_training_steps: int, floor: float = 0.0, num_cycles: int = 1
) -> float:
    """
    [`cosine_with_floor`] in cycles of `num_training_steps // num_cycles` steps, each with its warm-up; the steps left
    over begin one more. From `num_training_steps` on: `floor`.
    """
    if step >= num_training_steps:
        return floor
    length = num_training_steps // num_cycles
    return cosine_with_floor(step % length, num_warmup_steps, length, floor)


SCHEDULES = {
    "cosine_with_floor": cosine_with_floor,
    "cosine_annealing_with_floor": cosine_annealing_with_floor,
}


def make_scheduler(optimizer: Optimizer, args, num_training_steps: int) -> LambdaLR:
    """
    The schedule that `args` ([`TrainingConfig`]) names in `schedule`, for a trainer's `create_scheduler`.

    Raises:
        `ValueError`: if the run has fewer steps than cycles.
    """
    options = {
        "num_warmup_steps": args.get_warmup_steps(num_training_steps),
        "num_training_steps": num_training_steps,
        "floor": (args.min_learning_rate or 0.0) / args.learning_rate,
    }
    if args.schedule == "cosine_annealing_with_floor":
        if num_training_steps < args.num_cycles:
            raise ValueError(f"num_cycles={args.num_cycles} is more than the {num_training_steps} steps of the run.")
        options["num_cycles"] = args.num_cycles
    return LambdaLR(optimizer, partial(SCHEDULES[args.schedule], **options))
