import numpy as np
import pytest
import torch

from td3_fast.data import generate_interactions, leave_one_out
from td3_fast.initial import summary_of_sequences, training_sequences


@pytest.fixture(scope="module")
def split():
    return leave_one_out(generate_interactions(num_users=12, num_items=30, mean_length=12, seed=0))


def test_sequences_are_training_items_in_the_order_of_time(split):
    log = split.interactions
    training = [log.items[a : b - 2].tolist() for a, b in zip(log.offsets, log.offsets[1:], strict=False)]
    shortest = min(len(items) for items in training)
    sequences = training_sequences(split.train, users=12, positions=shortest, seed=1)
    assert sorted(map(tuple, sequences.tolist())) == sorted(tuple(items[-shortest:]) for items in training)


def test_short_histories_are_chained_and_users_drawn_again(split):
    longest = int(split.interactions.lengths.max())
    sequences = training_sequences(split.train, users=20, positions=3 * longest, seed=1)
    ends = {tuple(sequence[-2:]) for sequence in sequences.tolist()}
    log = split.interactions
    assert ends <= {tuple(log.items[b - 4 : b - 2].tolist()) for b in log.offsets[1:]}
    assert set(np.unique(sequences)) <= set(np.unique(log.items))
    assert (sequences > 0).all()


def test_no_training_example_is_an_error(split):
    with pytest.raises(ValueError, match="no training example"):
        training_sequences(split.train.subset([]), users=2, positions=3, seed=0)


def test_full_ranks_give_the_items_themselves_and_fewer_the_closest_tensor_of_that_rank():
    torch.manual_seed(0)
    items, sequences = torch.randn(40, 6), torch.randint(1, 40, (5, 7))
    exact = summary_of_sequences(items[sequences], items, user_rank=5, position_rank=7, sharpness=3.0, seed=0)
    queries = exact.queries()
    own = (queries * items[sequences]).sum(-1)
    torch.testing.assert_close(own.mean(), torch.tensor(3.0))
    torch.testing.assert_close(torch.cosine_similarity(queries, items[sequences], dim=-1), torch.ones(5, 7))
    errors = []
    for rank in (1, 2, 4):
        made = summary_of_sequences(
            items[sequences], items, user_rank=rank, position_rank=rank, sharpness=3.0, seed=0
        )
        assert (made.user_factors.shape, made.position_factors.shape) == ((5, rank), (7, rank))
        errors.append(float((made.queries() - queries).detach().norm() / queries.detach().norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1


def test_ranks_beyond_the_tensor_change_nothing_and_can_be_learned():
    torch.manual_seed(0)
    items, sequences = torch.randn(40, 6), torch.randint(1, 40, (3, 4))
    exact, wide = (
        summary_of_sequences(items[sequences], items, user_rank=r, position_rank=r + 1, sharpness=3.0, seed=0)
        for r in (3, 8)
    )
    torch.testing.assert_close(wide.queries(), exact.queries())
    wide.queries().square().sum().backward()
    assert wide.core.grad[3:].any()
