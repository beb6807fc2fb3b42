"""The meta-gradient: native = higher = finite differences, for what is inside a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from td3_fast.data import generate_interactions, leave_one_out
from td3_fast.distill import Distiller
from td3_fast.distill_config import DistillConfig, Semantics
from td3_fast.distill_state import DistillState
from td3_fast.learners import LEARNERS, build_learner
from td3_fast.training import Pretrained
from td3_fast.unroll import (
    AdamConfig,
    CachedMixture,
    FixedEmbeddings,
    InnerLoop,
    LinearMixture,
    StreamedMixture,
    adam_adjoint_,
    adam_step_,
    flat_pair,
    initial_state,
)
from td3_fast.unroll.adam import step_size

NUM_ITEMS = 23
OTHERS = [name for name in LEARNERS if name != "SASRec"]


def small_distiller(*, name: str = "SASRec", **changes: object) -> tuple[Distiller, DistillState]:
    split = leave_one_out(generate_interactions(num_users=30, num_items=NUM_ITEMS, mean_length=9, seed=3))
    sizes = {"num_items": split.interactions.num_items, "max_len": 9, "hidden": 8, "inner": 12, "layers": 2}
    sizes |= {"heads": 2} if name in ("SASRec", "BERT4Rec") else {}
    learners = [build_learner(name, sizes, seed=seed) for seed in (1, 2)]
    for learner in learners:
        if changes.get("item_dtype") != "bfloat16":  # beside such a table all else is float32
            learner.double()
        for parameter in learner.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.3, generator=torch.Generator().manual_seed(5))
    state_dicts = [{k: v.detach() for k, v in learner.state_dict().items()} for learner in learners]
    pretrained = Pretrained(
        learner_name=name,
        learner_config=learners[0].hyperparameters(),
        best=state_dicts[0],
        pool=state_dicts,
        history=[],
        best_epoch=1,
    )
    options = {
        "users": 5, "positions": 8, "user_rank": 3, "position_rank": 4, "batch_size": 40, "users_per_step": 3,
        "summary_lr": 0.01, "learner_lr": 0.01, "inner_steps": 12, "window": 5, "micro_batch": 16,
    }  # fmt: skip
    distiller = Distiller(split, pretrained, DistillConfig(**{**options, **changes}), seed=11)
    state = distiller.initial_state()
    for factor in state.factors.parameters:
        torch.nn.init.normal_(factor, 0.0, 0.8, generator=torch.Generator().manual_seed(7))
    return distiller, state


def check_against_higher(*, step: int = 0, **options: Any) -> Distiller:
    """The meta-gradient of an outer step is that of the engine "higher"."""
    native, state = small_distiller(**options)
    oracle, _ = small_distiller(**options, engine="higher")
    state.step = step
    ours, losses = native.meta_gradient(state, window=(3, 5))
    theirs, oracle_losses = oracle.meta_gradient(state, window=(3, 5))
    assert losses["loss"] == pytest.approx(oracle_losses["loss"], rel=1e-10)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-9 * torch.linalg.vector_norm(b)
        assert torch.linalg.vector_norm(b) > 0
    return native


VARIANTS = {
    "plain": {},
    "without alignment": {"alignment": 0.0},
    "little alignment, much weight decay": {"alignment": 0.3, "learner_weight_decay": 0.1},
    "without augmentation": {"augmentation": False},
    "separate passes, dropout everywhere": {
        "semantics": Semantics(separate_passes=True, outer_dropout=True, restart_batches=True, shuffle=False)
    },
    "farzi": {"summary": "farzi", "latent_rank": 4},
    "more middle positions, no dropout": {"middle_positions": 3, "inner_dropout": False},
}


CASES = [("SASRec", variant) for variant in VARIANTS] + [(name, "plain") for name in OTHERS]


@pytest.mark.parametrize(("middle", "expected"), [(1, 1), (3, 3), (99, 14)])
def test_middle_positions_of_a_user_differ_and_end_before_the_last(middle: int, expected: int) -> None:
    learner = build_learner("SASRec", {"num_items": 9, "max_len": 19, "hidden": 4, "inner": 4}, seed=0)
    loop = InnerLoop(
        learner=learner, num_users=3, num_positions=20, batch_size=2, adam=AdamConfig(learning_rate=0.1), seed=0,
        middle_positions=middle,
    )  # fmt: skip
    targets = loop.targets(0)
    assert targets.shape == (2, 1 + expected)
    assert (targets[:, 0] == 19).all()
    for of_user in targets.tolist():
        assert len(set(of_user)) == len(of_user)
        assert all(5 <= position <= 18 for position in of_user[1:])
    assert torch.equal(targets, loop.targets(0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": False},
        {"augmentation": False, "separate_passes": True},
        {"middle_positions": 3, "separate_passes": True},
        {"restart_batches_at": 70},
        {"batch_size": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 64, 150])
def test_the_inputs_of_many_steps_are_those_of_each(changes: dict[str, Any], count: int) -> None:
    learner = build_learner("SASRec", {"num_items": 9, "max_len": 19, "hidden": 4, "inner": 4}, seed=0)
    options: dict[str, Any] = {"num_users": 7, "num_positions": 20, "batch_size": 3, "seed": 2**60, **changes}
    loop = InnerLoop(learner=learner, adam=AdamConfig(learning_rate=0.1), **options)
    together = loop.first_inputs(count)
    separate = [loop.inputs(step) for step in range(count)]
    for stacked, rows in zip(together[:3], list(zip(*separate, strict=True))[:3], strict=True):
        assert torch.equal(stacked, torch.stack(rows))
    assert together.size.tolist() == [inputs.size for inputs in separate]


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_native_meta_gradient_equals_that_of_higher(item_embedding: str, name: str, variant: str) -> None:
    check_against_higher(name=name, item_embedding=item_embedding, **VARIANTS[variant])


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
@pytest.mark.parametrize(
    ("name", "normalize", "summary"),
    [
        ("SASRec", "softmax", "tucker"),
        ("SASRec", "none", "tucker"),
        ("SASRec", "softmax", "farzi"),
        ("SASRec", "none", "farzi"),
        *((name, "softmax", "tucker") for name in OTHERS),
    ],
)
def test_meta_gradient_equals_central_differences(
    item_embedding: str, name: str, normalize: str, summary: str
) -> None:
    distiller, state = small_distiller(
        name=name, item_embedding=item_embedding, normalize=normalize, summary=summary
    )
    # without warm-up the whole dependence lies inside the window
    gradients, _ = distiller.meta_gradient(state, window=(0, 5))
    generator = torch.Generator().manual_seed(0)
    for factor, gradient in zip(state.factors.parameters, gradients, strict=True):
        direction = torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
        values = []
        for step in (5e-8, -1e-7):
            factor += step * direction
            values.append(distiller.meta_gradient(state, window=(0, 5))[1]["loss"])
        factor += 5e-8 * direction
        difference = (values[0] - values[1]) / 1e-7
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_adjoint_equals_automatic_differentiation(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p, m, g, *cotangents = (torch.randn(7, dtype=torch.float64, generator=generator) for _ in range(6))
    v = torch.rand(7, dtype=torch.float64, generator=generator)
    config = AdamConfig(learning_rate=0.1, weight_decay=weight_decay)

    def step(p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        g = g + weight_decay * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        return p - 0.1 * (1 - 0.999**3) ** 0.5 / (1 - 0.9**3) * m / (v.sqrt() + 1e-8), m, v

    leaves = [x.clone().requires_grad_() for x in (p, m, v, g)]
    expected = torch.autograd.grad(step(*leaves), leaves, cotangents)
    to_gradient = adam_adjoint_((p, m, v), g, tuple(cotangents), step_size(3, config), config)
    for a, b in zip((*cotangents, to_gradient), expected, strict=True):
        torch.testing.assert_close(a, b)
    state = initial_state((p,))._replace(first_moments=(m.clone(),), second_moments=(v.clone(),), step=2)
    torch.testing.assert_close(adam_step_(state, (g,), config).parameters[0], step(p, m, v, g)[0])


def test_no_derivative_flows_where_the_second_moment_is_zero() -> None:
    zero = torch.zeros(3)
    adjoint = (torch.ones(3), torch.ones(3), torch.ones(3))
    to_gradient = adam_adjoint_((zero, zero, zero), zero, adjoint, 0.1, AdamConfig(learning_rate=0.1))
    assert torch.equal(adjoint[2], zero)
    assert all(torch.isfinite(t).all() for t in (*adjoint, to_gradient))


def test_streamed_mixture_equals_the_cached_one() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, items, other = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 6, 5), (NUM_ITEMS, 5), (NUM_ITEMS, 7), (NUM_ITEMS, 7))
    )
    cotangent = torch.randn(3, 6, 7, dtype=torch.float64, generator=generator)
    for users in (torch.tensor([1, 2, 3]), torch.tensor([3, 0, 1])):
        results = []
        for mixture in (CachedMixture(queries, keys), StreamedMixture(queries, keys)):
            mixture.note(users, cotangent, items)
            mixture.note(users.flip(0), cotangent, other)
            results.append(
                (mixture.embed(users, items), mixture.embed_transposed(users, cotangent), mixture.gradient())
            )
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mixture_class", [CachedMixture, StreamedMixture, LinearMixture])
def test_what_is_asked_of_a_mixture_does_not_depend_on_what_was_asked_before(mixture_class: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, items, other = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 6, 5), (NUM_ITEMS, 5), (NUM_ITEMS, 7), (NUM_ITEMS, 7))
    )
    cotangent = torch.randn(3, 6, 7, dtype=torch.float64, generator=generator)
    users, others = torch.tensor([1, 2, 3]), torch.tensor([3, 0, 1])

    def fresh() -> Any:
        return mixture_class(queries, keys)

    used = fresh()
    for chosen, table in ((users, items), (others, other), (users, other)):
        torch.testing.assert_close(used.embed(chosen, table), fresh().embed(chosen, table))
        for noted in (table, items):
            apart = fresh()
            for mixture in (used, apart):
                mixture.note(chosen, cotangent, noted)
            torch.testing.assert_close(used.gradient(), apart.gradient())
        for transposed in (chosen, others, chosen):
            expected = fresh().embed_transposed(transposed, cotangent)
            torch.testing.assert_close(used.embed_transposed(transposed, cotangent), expected)


@pytest.mark.parametrize("mixture_class", [CachedMixture, StreamedMixture, LinearMixture])
def test_gradient_of_learned_keys_equals_automatic_differentiation(mixture_class: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, items, other = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 6, 5), (NUM_ITEMS, 5), (NUM_ITEMS, 7), (NUM_ITEMS, 7))
    )
    cotangents = torch.randn(2, 3, 6, 7, dtype=torch.float64, generator=generator)
    batches = (torch.tensor([1, 2, 3]), torch.tensor([3, 0, 1]))
    pair = flat_pair(queries, keys).requires_grad_()
    q, k = (
        part.view(shape)
        for part, shape in zip(
            pair.split([queries.numel(), keys.numel()]), (queries.shape, keys.shape), strict=True
        )
    )
    scores = q @ k.T
    dense = scores if mixture_class is LinearMixture else scores.softmax(-1)
    mixture = mixture_class(queries, keys, learned_keys=True)
    total = torch.zeros((), dtype=torch.float64)
    for users, cotangent, table in zip(batches, cotangents, (items, other), strict=True):
        mixture.note(users, cotangent, table)
        total = total + ((dense[users] @ table) * cotangent).sum()
    (expected,) = torch.autograd.grad(total, pair)
    torch.testing.assert_close(mixture.gradient(), expected)
    assert not mixture.gradient().any()  # what was noted is fetched once


def test_bare_product_is_the_product_with_the_dense_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, items = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 6, 5), (NUM_ITEMS, 5), (NUM_ITEMS, 7))
    )
    users = torch.tensor([2, 0])
    mixture = LinearMixture(queries, keys)
    leaf, table = queries.clone().requires_grad_(), items.clone().requires_grad_()
    dense = (leaf[users] @ keys.T) @ table
    cotangent = torch.randn(dense.shape, dtype=torch.float64, generator=generator)
    to_queries, to_table = torch.autograd.grad(dense, (leaf, table), cotangent)
    mixture.note(users, cotangent, items)
    torch.testing.assert_close(mixture.embed(users, items), dense.detach())
    torch.testing.assert_close(mixture.embed_transposed(users, cotangent), to_table)
    torch.testing.assert_close(mixture.gradient(), to_queries)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("mixture_class", [FixedEmbeddings, CachedMixture, StreamedMixture, LinearMixture])
def test_notes_of_several_steps_are_those_of_each(mixture_class: Any, permuted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, items, cotangents = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((6, 4, 5), (NUM_ITEMS, 5), (6, NUM_ITEMS, 7), (6, 3, 6, 7))
    )
    queries = queries.transpose(0, 1) if permuted else queries.reshape(4, 6, 5)
    users = torch.tensor([[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3], [0, 1, 2], [3, 0, 1]])

    def made() -> Any:
        if mixture_class is FixedEmbeddings:
            return FixedEmbeddings(queries @ keys.T @ items[0])
        return mixture_class(queries, keys)

    together, separate = made(), made()
    for start in (0, 4):
        steps = slice(start, start + 4)
        together.note_steps(users[steps], cotangents[steps], items[steps])
        for step in zip(users[steps], cotangents[steps], items[steps], strict=True):
            separate.note(*step)
    torch.testing.assert_close(together.gradient(), separate.gradient())
    assert not together.gradient().any()


def test_window_draws_cover_their_range() -> None:
    distiller, _ = small_distiller()
    generator = torch.Generator().manual_seed(0)
    draws = {distiller.config.draw_window(generator) for _ in range(200)}
    assert draws == {(warm_up, 5) for warm_up in range(8)}
    fixed, _ = small_distiller(window_kind="fixed")
    full, _ = small_distiller(window_kind="full")
    assert fixed.config.draw_window(generator) == (7, 5)
    assert full.config.draw_window(generator) == (0, 12)
