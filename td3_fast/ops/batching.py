"""`torch.vmap` over the operators: a batch of rows is more rows."""

from typing import Any

import torch
from torch import Tensor

from td3_fast.ops.library import registered


def is_table(name: str) -> bool:
    """Whether an argument or result has a row per item, going by its name; the others have one per query."""
    return name.removeprefix("grad_").removeprefix("grad_") in ("keys", "values", "items")


def register_vmap(name: str) -> None:
    """Say what ``torch.ops.td3_fast.<name>`` does under `torch.vmap`, where the operator exists.

    While all elements of the batch share the item tables, and no table asks for a gradient per element, their
    rows are folded into one call: (batch, rows, d) becomes (batch * rows, d). Otherwise the operator runs once
    per element and the results are stacked. Either way the derivatives see the operator's own autograd nodes,
    so `torch.vmap` composes with `torch.func.grad`, `vjp` and `jvp` in any order.
    """
    operator = registered(name)
    if operator is None:
        return
    inputs = [argument.name for argument in operator._schema.arguments]
    results = [result.name for result in operator._schema.returns]

    def rule(
        info: Any, in_dims: tuple[Any, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        given = dict(zip(inputs, arguments, strict=True))
        dims = dict(zip(inputs, in_dims, strict=True))
        needed = given.get("needed", [False] * len(results))
        tables_move = any(is_table(name) and isinstance(dims[name], int) for name in inputs)
        tables_asked = any(asked and is_table(name) for asked, name in zip(needed, results, strict=True))
        if info.batch_size == 0:
            outputs = _of_no_element(operator, given, dims)
        elif tables_move or tables_asked:
            outputs = _one_by_one(operator, info.batch_size, given, dims)
        else:
            outputs = _folded(operator, info.batch_size, given, dims, results)
        return outputs, (0,) * len(results)

    torch.library.register_vmap(operator, rule)


def _folded(
    operator: torch._ops.OpOverload,
    batch: int,
    given: dict[str, Any],
    dims: dict[str, int | None],
    results: list[str],
) -> tuple[Tensor, ...]:
    """One call whose rows are those of every element of the batch."""

    def fold(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or is_table(name):
            return value
        if name == "probabilities":  # laid out for the rows of one element
            return value.new_empty(0)
        dim = dims[name]
        rows = value.expand(batch, *value.shape) if dim is None else value.movedim(dim, 0)
        return rows.flatten(0, 1)

    outputs = operator(*(fold(name, value) for name, value in given.items()))
    return tuple(
        # The derivatives make the probabilities anew where none are kept.
        x.new_empty(batch, 0) if name == "probabilities" else x.unflatten(0, (batch, len(x) // batch))
        for name, x in zip(results, outputs, strict=True)
    )


def _one_by_one(
    operator: torch._ops.OpOverload,
    batch: int,
    given: dict[str, Any],
    dims: dict[str, int | None],
) -> tuple[Tensor, ...]:
    """A call for each element of the batch."""

    def element(index: int) -> list[Any]:
        return [
            value.select(dim, index) if isinstance(dim := dims[name], int) else value
            for name, value in given.items()
        ]

    outputs = [operator(*element(index)) for index in range(batch)]
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))


def _of_no_element(
    operator: torch._ops.OpOverload, given: dict[str, Any], dims: dict[str, int | None]
) -> tuple[Tensor, ...]:
    """Empty results, of the shapes that an element of zeros has."""

    def one_of_zeros(value: Any, dim: int | None) -> Any:
        return (
            value.new_zeros(*value.shape[:dim], 1, *value.shape[dim + 1 :]) if isinstance(dim, int) else value
        )

    zeros = {name: one_of_zeros(value, dims[name]) for name, value in given.items()}
    return tuple(x[:0] for x in _one_by_one(operator, 1, zeros, dims))
