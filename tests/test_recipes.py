from __future__ import annotations

import pytest

from td3_fast.learners import LEARNERS, SASRecConfig, build_learner
from td3_fast.recipes import RECIPES, parse_size, recipe_named


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_together(name: str) -> None:
    recipe = recipe_named(name).sized("12x150")
    learner = SASRecConfig(num_items=10, **recipe.learner)
    assert (recipe.distill.users, recipe.distill.positions) == (12, 150)
    assert learner.max_len >= 150


@pytest.mark.parametrize("name", LEARNERS)
def test_any_learner_takes_a_recipe(name: str) -> None:
    recipe = recipe_named("epinions").with_learner(name.upper()).sized("12x150")
    assert recipe.learner_name == name
    learner = build_learner(name, {**recipe.learner, "num_items": 10}, seed=0)
    assert learner.max_len == 150
    assert learner.hyperparameters()["hidden"] == 32
    assert recipe_named("epinions").with_learner("SASRec") == recipe_named("epinions")


@pytest.mark.parametrize("size", ["50", "50x", "x50", "0x5", "5x1", "-1x5", "axb", "5x5x5"])
def test_bad_sizes_are_refused(size: str) -> None:
    with pytest.raises(ValueError, match="USERSxPOSITIONS"):
        parse_size(size)


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="magazine"):
        recipe_named("netflix")


@pytest.mark.parametrize("name", RECIPES)
def test_improved_learners_move_no_faster_than_the_long_window_bears(name: str) -> None:
    recipe = recipe_named(name)
    assert recipe.improved().distill.learner_lr == min(recipe.distill.learner_lr, 0.005)


@pytest.mark.parametrize(("size", "users"), [("50x50", 25), ("201x100", 101), ("31x20", 25)])
def test_a_step_takes_half_of_the_users_of_a_large_summary(size: str, users: int) -> None:
    sized = recipe_named("ml-1m").sized(size)
    assert sized.distill.users_per_step == users
    assert sized.improved().distill.users_per_step == users


def test_a_summary_of_more_users_than_the_recipe_has_takes_what_is_said_of_larger_ones() -> None:
    recipe = recipe_named("ml-1m")
    assert recipe.sized("50x200").distill.user_rank == recipe.distill.user_rank
    for size, ranks in (("100x50", (64, 50)), ("60x150", (60, 64))):
        larger = recipe.sized(size).distill
        assert (larger.user_rank, larger.position_rank) == ranks
        assert larger.item_embedding == "frozen"


@pytest.mark.parametrize(
    ("name", "heads", "layers", "hidden", "inner", "rank", "size", "batch", "users", "rates"),
    [
        ("epinions", 1, 2, 32, 32, 8, (15, 30), 2048, 15, (0.01, 0.003)),
        ("ml-100k", 1, 1, 32, 64, 16, (50, 50), 4096, 25, (0.03, 0.005)),  # its size and ranks in the tables
        ("ml-1m", 1, 1, 32, 64, 16, (50, 50), 32768, 25, (0.03, 0.01)),
    ],
)
def test_recipes_have_the_presets_of_the_paper(
    name: str, heads: int, layers: int, hidden: int, inner: int, rank: int, size: tuple[int, int], batch: int,
    users: int, rates: tuple[float, float],
) -> None:  # fmt: skip
    recipe = recipe_named(name)
    learner = SASRecConfig(num_items=10, **recipe.learner)
    assert (learner.heads, learner.layers, learner.hidden, learner.inner) == (heads, layers, hidden, inner)
    config = recipe.distill
    assert (config.user_rank, config.position_rank, config.users, config.positions) == (rank, rank, *size)
    assert (config.batch_size, config.users_per_step) == (batch, users)
    assert (config.summary_lr, config.learner_lr) == rates
    assert (config.epochs, config.inner_steps, config.window) == (30, 200, 40)
    assert (config.summary_weight_decay, config.learner_weight_decay, config.max_norm) == (1e-4, 5e-5, 1.0)
