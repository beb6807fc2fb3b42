"""Split tables: values, ranks and both orders of derivatives are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from td3_fast.parallel import WHOLE, Group, ItemTables, SplitTables
from td3_fast.parallel import tables as tables_module

NUM_ITEMS = 23
ROWS, RANK, WIDTH = 6, 5, 7
TOLERANCE = 1e-10
# name -> (shapes of inputs, which of them are tables, how an op is called)
Call = Callable[..., tuple[Tensor, ...]]
IDS = torch.tensor([0, 22, 5, 5, 11, 12])
CASES: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[int, ...], Call]] = {
    "look_up": (((NUM_ITEMS, WIDTH),), (0,), lambda t, table: (t.look_up(IDS.view(2, 3), table),)),
    "soft_embedding": (
        ((ROWS, RANK), (NUM_ITEMS, RANK), (NUM_ITEMS, WIDTH)),
        (1, 2),
        lambda t, *inputs: t.soft_embedding(*inputs),
    ),
    "item_cross_entropy, items": (
        ((ROWS, WIDTH), (NUM_ITEMS, WIDTH)),
        (1,),
        lambda t, hidden, table: (t.item_cross_entropy(hidden, table, IDS),),
    ),
    "item_cross_entropy, soft embeddings": (
        ((ROWS, WIDTH), (NUM_ITEMS, WIDTH), (ROWS, WIDTH)),
        (1,),
        lambda t, hidden, table, target: (t.item_cross_entropy(hidden, table, target),),
    ),
    **{
        f"normalized_embedding, {normalize}": (
            ((4, 6, RANK), (NUM_ITEMS, RANK), (NUM_ITEMS, WIDTH)),
            (1, 2),
            lambda t, *inputs, normalize=normalize: (t.normalized_embedding(*inputs, normalize=normalize),),
        )
        for normalize in ("softmax", "none")
    },
}


def orders(name: str, tables: ItemTables, cut: slice) -> list[Tensor]:
    """Outputs of a case, their gradients, and the gradients of those, all with random cotangents."""
    shapes, are_tables, call = CASES[name]
    generator = torch.Generator().manual_seed(1)

    def draw(shape: torch.Size | tuple[int, ...], index: int) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
        return drawn[cut] if index in are_tables else drawn

    inputs = [draw(shape, i).requires_grad_() for i, shape in enumerate(shapes)]
    outputs = call(tables, *inputs)
    upstream = [torch.randn(o.shape, dtype=o.dtype, generator=generator).requires_grad_() for o in outputs]
    first = torch.autograd.grad(outputs, inputs, upstream, create_graph=True)
    cotangents = [draw(shape, i) for i, shape in enumerate(shapes)]
    second = torch.autograd.grad(first, (*inputs, *upstream), cotangents, materialize_grads=True)
    assert all(len(inputs[i]) < NUM_ITEMS for i in are_tables) or tables is WHOLE
    return [x.detach() for x in (*outputs, *first, *second)]


def split_orders(group: Group, name: str) -> list[Tensor]:
    tables = SplitTables(group, NUM_ITEMS)
    return orders(name, tables, tables.rows())


@pytest.mark.parametrize("name", CASES)
def test_values_and_two_orders_of_derivatives_are_those_of_one_process(name: str, processes: Any) -> None:
    expected = orders(name, WHOLE, slice(None))
    for rank, results in enumerate(processes(split_orders, name)):
        cut = Group(rank, processes.size).rows(NUM_ITEMS)
        for mine, one in zip(results, expected, strict=True):
            whole = one if mine.shape == one.shape else one[cut]
            torch.testing.assert_close(mine, whole, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_every_process_has_the_same_bits_of_what_is_common(name: str, processes: Any) -> None:
    first, *others = processes(split_orders, name)
    for results in others:
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True) if a.shape == b.shape)


def checked_by_differences(group: Group, name: str) -> None:
    shapes, are_tables, call = CASES[name]
    tables = SplitTables(group, NUM_ITEMS)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    # of common inputs, with the tables fixed: each process then perturbs the same numbers
    leaves = [d[tables.rows()] if i in are_tables else d.requires_grad_() for i, d in enumerate(drawn)]
    assert torch.autograd.gradcheck(lambda *x: call(tables, *x), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: call(tables, *x), leaves, fast_mode=True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case[0]) > 1])
def test_derivatives_are_those_of_finite_differences(name: str, processes: Any) -> None:
    processes(checked_by_differences, name)


def ranks(tables: ItemTables, table: Tensor, hidden: Tensor, target: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    candidates = torch.randint(len(table) + 0, (len(hidden), 9), generator=generator)
    counts = torch.randint(4, (len(hidden),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    seen = torch.randint(len(table), (int(offsets[-1]),), generator=generator)
    own = table[tables.rows()]
    return [
        tables.target_rank(hidden, own, target),
        tables.target_rank(hidden, own, target, excluded=(offsets, seen)),
        tables.target_rank(hidden, own, target, candidates=candidates),
    ]


def case_of_ranks() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(101, 8, generator=generator)
    table[50:70] = table[:20]  # ties across processes
    return table, torch.randn(40, 8, generator=generator), torch.randint(101, (40,), generator=generator)


def split_ranks(group: Group, at_once: int) -> list[Tensor]:
    before = tables_module.RANKED_AT_ONCE
    tables_module.RANKED_AT_ONCE = at_once
    try:
        return ranks(SplitTables(group, 101), *case_of_ranks())
    finally:
        tables_module.RANKED_AT_ONCE = before


@pytest.mark.parametrize("at_once", [65536, 7])
def test_ranks_are_exactly_those_of_one_process(at_once: int, processes: Any) -> None:
    expected = ranks(WHOLE, *case_of_ranks())
    for results in processes(split_ranks, at_once):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def half_precision(group: Group) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(5, 8, generator=generator)
    table = torch.randn(31, 8, generator=generator).bfloat16()
    tables = SplitTables(group, 31)
    own = table[tables.rows()]
    split, _ = tables.soft_embedding(queries, own, own)
    whole, _ = WHOLE.soft_embedding(queries, table, table)
    return split, whole


def test_tables_of_half_precision_are_taken(processes: Any) -> None:
    for split, whole in processes(half_precision):
        assert split.dtype == whole.dtype == torch.float32
        torch.testing.assert_close(split, whole)


def refusals(group: Group) -> list[str]:
    found = []
    for make in (
        lambda: SplitTables(group, group.size - 1),
        lambda: SplitTables(group, 20).soft_embedding(
            torch.zeros(1, 3), torch.zeros(20, 3), torch.zeros(20, 3)
        ),
    ):
        try:
            make()
        except ValueError as error:
            found.append(str(error))
    return found


def test_tables_that_cannot_be_split_or_are_not_are_refused(processes: Any) -> None:
    for too_few, whole in processes(refusals):
        assert "use fewer of them" in too_few
        assert "cut the table by `tables.rows()`" in whole


def ids_that_are_no_items(group: Group) -> list[str]:
    tables, hidden = SplitTables(group, 20), torch.ones(2, 3)
    table, wrong, right = torch.ones(20, 3)[tables.rows()], torch.tensor([20, 3]), torch.tensor([9, 3])
    found = []
    for run in (
        lambda: tables.look_up(-wrong, table),
        lambda: tables.item_cross_entropy(hidden, table, wrong),
        lambda: tables.target_rank(hidden, table, wrong),
        lambda: tables.target_rank(hidden, table, right, candidates=wrong[:, None]),
        lambda: tables.target_rank(hidden, table, right, excluded=(torch.tensor([0, 1, 2]), wrong)),
    ):
        try:
            run()
        except IndexError as error:
            found.append(str(error))
    return found


def test_ids_that_no_process_has_are_refused_by_all(processes: Any) -> None:
    for found in processes(ids_that_are_no_items):
        assert ["item -20 is out of range", *["item 20 is out of range"] * 4] == [
            message.split(":")[0] for message in found
        ]
