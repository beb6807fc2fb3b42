"""The CUDA encoder and the inner step in one call, on the host, by what checks those of the CPU."""

import functools

import pytest
import test_inner_gradient as step
import test_next_item_gradient as real
import test_transformer_encoder as encoder
import torch

from td3_fast.ops import DropoutStream, encode_histories, inner_gradient, known_gradient

DROPOUT = pytest.mark.parametrize("dropout", [None, 7], ids=["no dropout", "dropout"])


@DROPOUT
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 3},
        {"batch": 3, "layers": 2, "heads": 2},
        {"batch": 1, "asked": 1},
        {"batch": 2, "length": 1},
        {"batch": 2, "rates": (0.0, 0.3)},
        {"batch": 270},  # more sequences than blocks
    ],
    ids=str,
)
def test_encoder_at_every_order(simt, changes, dropout):
    encoder.test_equals_the_modules_at_every_order(changes, dropout)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@DROPOUT
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 3},
        {"batch": 3, "layers": 2, "heads": 2},
        {"batch": 2, "asked": 1, "positions": 2},
        {"batch": 4, "asked": 3, "items": 700},  # more items than threads
        {"batch": 2, "asked": 9},  # more targets than are compared in the pass
    ],
    ids=str,
)
def test_inner_gradient(simt, changes, dropout, trained):
    step.test_equals_autograd_through_the_modules(changes, dropout, trained)


# those of the kernels that are compiled for them
USUAL_SIZES = {"hidden": 32, "inner": 64}


@pytest.mark.parametrize("sizes", [{}, USUAL_SIZES], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_inner_gradient_in_float32(simt, trained, sizes):
    step.test_float32_is_as_near_to_float64_as_autograd_is(trained, {"batch": 6, "items": 400, **sizes})


@pytest.mark.parametrize("sizes", [{}, USUAL_SIZES], ids=str)
def test_encoder_in_float32(simt, sizes):
    encoder.test_float32_is_as_near_to_float64_as_the_modules_are({"batch": 5, **sizes}, 8.0)


def test_any_order_of_threads(simt):
    simt.simt_reverse(1)
    step.test_equals_autograd_through_the_modules({"batch": 3, "layers": 2, "heads": 2}, 7, True)
    step.test_equals_autograd_through_the_modules({"batch": 3}, 7, False)


@pytest.mark.parametrize(
    "check",
    [
        step.test_a_direction_of_some_of_the_inputs,
        step.test_embeds_that_are_a_cut_of_longer_sequences,
        *(
            functools.partial(check, trained=trained)
            for check in (
                step.test_embeds_that_lie_otherwise,
                functools.partial(step.test_users_are_rows_of_all_embeds, chosen=[3, 12, 0, 5]),
            )
            for trained in (False, True)
        ),
    ],
    ids=["directions", "cut", "turned", "turned, trained", "users", "users, trained"],
)
def test_inputs_of_the_inner_gradient(simt, check):
    check()


def test_nothing_saved_where_it_is_needed_is_refused(simt):
    learner, _, (theta, items, embeds, targets) = step.setting(batch=2, dtype=torch.float32)
    shape = learner.encoder_shape()
    for table in (items.bfloat16(), items.repeat(400, 1)):
        made = known_gradient(theta, theta, table, embeds, targets, shape)
        with pytest.raises(ValueError, match="saved"):
            made.tangent(theta)


def test_items_and_users_that_are_not_there(simt):
    learner, _, (theta, items, embeds, targets) = step.setting(batch=2)
    shape = learner.encoder_shape()
    with pytest.raises(RuntimeError, match="trap"):
        inner_gradient(theta, items, embeds, targets, shape, users=torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match="trap"):
        encode_histories(theta, items, torch.tensor([[3, 30]]), torch.tensor([2]), shape)
    with pytest.raises(ValueError, match="n >= 1"):
        inner_gradient(theta, items[:0], embeds, targets, shape)


@pytest.mark.parametrize(("batch", "asked"), [(0, 2), (3, 0)])
def test_nothing_asked(simt, batch, asked):
    encoder.test_nothing_asked_is_nothing(batch, asked, both_ways=False)


def test_attention_both_ways_is_refused(simt):
    _, flat, theta, inputs, positions = encoder.setting(batch=2, both_ways=True)
    with pytest.raises(ValueError, match="later inputs"):
        flat.encode(theta, inputs, positions)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@DROPOUT
@pytest.mark.parametrize("changes", [{"batch": 5}, {"batch": 4, "layers": 2, "heads": 2}], ids=str)
def test_real_examples(simt, changes, dropout, trained):
    learner, _, (theta, table, histories, lengths, _) = real.setting(**changes)
    shape, stream = learner.encoder_shape(), lambda: None if dropout is None else DropoutStream(dropout)
    features = encode_histories(theta, table, histories, lengths, shape, dropout=stream())
    embeds = torch.nn.functional.embedding(histories, table)
    expected = learner_outputs(learner, theta, embeds, lengths, stream())
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-11)
    real.test_equals_autograd_through_the_modules(changes, dropout, True, trained)


def learner_outputs(learner, theta, embeds, lengths, dropout):
    flat = encoder.FlatParameters(learner)
    return flat._filled(theta).encode(embeds, (lengths - 1).unsqueeze(1), dropout=dropout).squeeze(1)
