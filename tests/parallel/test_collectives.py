"""Collectives: what comes out, and the convention of their adjoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from td3_fast.parallel import Group, copied, gather, select, total


def values(group: Group) -> dict[str, Any]:
    own = torch.full((3,), float(group.rank + 1))
    common = torch.arange(group.size * 2.0).view(group.size, 2)
    return {
        "gather": gather(own, group),
        "select": select(common, group),
        "total": total(own, group),
        "copied": copied(common, group),
        "any": (group.any(group.rank == 1), group.any(False)),
        "first": group.first_of({"a": group.rank + 0.5, "b": 3.0}),
        "rows": group.rows(11),
        "turns": group.turns(11),
        "in order": group.in_order(
            [(torch.tensor(task), torch.ones(2) * task) for task in group.turns(11)], 11
        ),
    }


def test_what_collectives_give(processes: Any) -> None:
    size = processes.size
    common = torch.arange(size * 2.0).view(size, 2)
    results = processes(values)
    for rank, result in enumerate(results):
        assert result["gather"].tolist() == [[r + 1.0] * 3 for r in range(size)]
        assert torch.equal(result["select"], common[rank])
        assert result["total"].tolist() == [size * (size + 1) / 2] * 3
        assert torch.equal(result["copied"], common)
        assert result["any"] == (True, False)
        assert result["first"] == {"a": 0.5, "b": 3.0}
        assert [int(number) for number, _ in result["in order"]] == list(range(11))
        assert [pair.tolist() for _, pair in result["in order"]] == [[task] * 2 for task in range(11)]
    assert [i for result in results for i in range(11)[result["rows"]]] == list(range(11))
    assert sorted(i for result in results for i in result["turns"]) == list(range(11))
    assert [len(result["turns"]) for result in results] == sorted(
        (len(result["turns"]) for result in results), reverse=True
    )


def derivatives(group: Group) -> tuple[Tensor, ...]:
    """Of loss = |sum_r w_r x y_r|^2 in the common x and the own y_r, and of |dloss/dx|^2 + sum_r |dloss/dy_r|^2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    every = torch.randn(2, group.size, 5, dtype=torch.float64, generator=generator)
    weights, y = every[0, group.rank], every[1, group.rank].clone().requires_grad_()
    loss = total(weights * copied(x, group) * y, group).square().sum()
    first = torch.autograd.grad(loss, (x, y), create_graph=True)
    second = first[0].square().sum() + total(first[1].square().sum(), group)
    return tuple(x.detach() for x in (*first, *torch.autograd.grad(second, (x, y))))


def test_derivatives_are_those_of_one_process(processes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    weights, y = torch.randn(2, processes.size, 5, dtype=torch.float64, generator=generator)
    y.requires_grad_()
    loss = (weights * x * y).sum(0).square().sum()
    first = torch.autograd.grad(loss, (x, y), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, y))
    for rank, (to_x, to_y, again_x, again_y) in enumerate(processes(derivatives)):
        torch.testing.assert_close(to_x, first[0])
        torch.testing.assert_close(to_y, first[1][rank])
        torch.testing.assert_close(again_x, second[0])
        torch.testing.assert_close(again_y, second[1][rank])


def test_alone_collectives_are_the_identity() -> None:
    tensor = torch.randn(3)
    assert total(tensor, Group()) is tensor
    assert copied(tensor, Group()) is tensor
    assert torch.equal(gather(tensor, Group()), tensor.unsqueeze(0))
    assert Group().any(True)
    assert Group().rows(7) == slice(0, 7)
    assert Group().turns(7) == range(7)
