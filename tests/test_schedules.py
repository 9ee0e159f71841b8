"""
Contract: the schedules are the research code's, number by number (golden `lr_schedules`), and a trainer gets them by
name with the floor given as a learning rate.
"""

from types import SimpleNamespace

import pytest
import torch
from golden import golden_case, needs_golden, read_json

from lusifer_hf.training.schedules import SCHEDULES, make_scheduler


NAMES = {
    "get_cosine_schedule_with_warmup": "cosine_with_floor",
    "get_cosine_annealing_schedule_with_warmup": "cosine_annealing_with_floor",
}


@needs_golden
@pytest.mark.parametrize("setting", ["warmup", "warmup_default_min0", "annealing_3cycles", "annealing_1cycle"])
def test_golden(setting):
    case = read_json(golden_case("lr_schedules") / "config.json")["settings"]
    assert len(case) == 4
    golden = case[setting]
    options = dict(golden["kw"])
    options["floor"] = options.pop("min_reduce_rate", 0.0)
    schedule = SCHEDULES[NAMES[golden["fn"]]]
    multipliers = [schedule(step, **options) for step in range(golden["n"])]
    assert multipliers == pytest.approx(golden["multiplier"], rel=1e-12, abs=1e-15)
    rates = [golden["base_lr"] * multiplier for multiplier in multipliers]
    assert rates == pytest.approx(golden["lr_at_step"], rel=1e-12, abs=1e-18)


def arguments(**fields):
    """What `make_scheduler` reads of a `TrainingConfig`."""
    defaults = {"schedule": "cosine_annealing_with_floor", "learning_rate": 2e-4, "min_learning_rate": None}
    fields = {**defaults, "num_cycles": 1, "get_warmup_steps": lambda steps: 10, **fields}
    return SimpleNamespace(**fields)


def learning_rates(args, steps: int, optimizer=None) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=args.learning_rate)
    scheduler = make_scheduler(optimizer, args, steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_floor_is_a_learning_rate(schedule):
    rates = learning_rates(arguments(schedule=schedule, min_learning_rate=1e-6), steps=60)
    assert rates[0] == rates[60] == pytest.approx(1e-6)
    assert rates[10] == max(rates) == pytest.approx(2e-4)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_cycles():
    rates = learning_rates(arguments(num_cycles=3), steps=90)
    peaks = [step for step in range(1, 90) if rates[step - 1] < rates[step] > rates[step + 1]]
    assert peaks == [10, 40, 70]
    with pytest.raises(ValueError, match="num_cycles=3 is more than the 2 steps"):
        learning_rates(arguments(num_cycles=3), steps=2)


def test_resumed_schedule_goes_on_where_it_stopped():
    args, optimizers = arguments(min_learning_rate=1e-6), []
    for _ in range(2):
        optimizers.append(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=args.learning_rate))
    first, second = (make_scheduler(optimizer, args, 60) for optimizer in optimizers)
    for _ in range(25):
        optimizers[0].step()
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(10):
        for optimizer, scheduler in zip(optimizers, (first, second), strict=True):
            optimizer.step()
            scheduler.step()
        assert first.get_last_lr() == second.get_last_lr()
