import dataclasses
import hashlib
import os
import pickle
import random
import shutil

import pytest
import torch

from td3_fast.artefact import HEADER_START, read_artefact, write_artefact
from td3_fast.learners import build_learner
from td3_fast.summary import Preprocessing, SummaryError, SummaryMetadata, TrainingRecipe, TuckerSummary
from td3_fast.summary_file import FORMAT_VERSION
from td3_fast.unroll import fit_on_summary

USERS, POSITIONS, ITEMS, D1, D2, D3 = 4, 8, 11, 2, 3, 5


def make_metadata(num_items=ITEMS, **changes):
    recipe = TrainingRecipe(
        learner="SASRec",
        learner_config={"num_items": num_items, "hidden": D3, "inner": 8, "max_len": POSITIONS},
        learning_rate=0.01,
        steps=3,
        batch_size=2,
        item_embedding="trained",
    )
    fields = {
        "item_ids": ("[PAD]", *(f"item {i} é\t日本" for i in range(1, num_items))),
        "preprocessing": Preprocessing(
            data="synthetic", filters={"min_item_interactions": 3}, fingerprint="ab"
        ),
        "training": recipe,
        "metrics": {"HR@10": 0.5, "MRR@10": 1},
        "settings": {"seed": 3, "nested": {"a": [None]}},
        **changes,
    }
    return SummaryMetadata(**fields)


def make_summary(
    *, dtype=torch.float32, normalize="softmax", metadata=True, position_embeddings=True, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return TuckerSummary(
        normal(D1, D2, D3),
        normal(USERS, D1),
        normal(POSITIONS, D2),
        normal(ITEMS, D3),
        position_embeddings=normal(POSITIONS, D3) if position_embeddings else None,
        normalize=normalize,
        metadata=make_metadata() if metadata else None,
    )


def assert_equal(first, second):
    own, other = first.state_dict(), second.state_dict()
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name])
    assert (first.normalize, first.metadata) == (second.normalize, second.metadata)


# what it computes


@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("users", [None, [2], [3, 0, 3]])
def test_embeddings_are_probabilities_times_the_item_table(normalize, users):
    summary = make_summary(dtype=torch.float64, normalize=normalize)
    users = None if users is None else torch.tensor(users)
    rows = range(USERS) if users is None else users.tolist()
    scores = torch.einsum(
        "ijk,ai,bj,ck->abc",
        summary.core,
        summary.user_factors[rows],
        summary.position_factors,
        summary.item_factors,
    )
    expected = scores.softmax(-1) if normalize == "softmax" else scores
    table = torch.randn(ITEMS, 7, dtype=torch.float64)
    torch.testing.assert_close(summary.probabilities(users), expected)
    torch.testing.assert_close(summary(users, table), expected @ table)
    torch.testing.assert_close(summary(users), expected @ summary.item_factors)
    torch.testing.assert_close(summary.queries(users) @ summary.item_factors.T, scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_embeddings_have_the_dtype_of_the_table_that_they_are_of(dtype):
    summary = make_summary()
    table = summary.item_factors.to(dtype)
    expected = summary(item_embeddings=table.float())
    found = summary(item_embeddings=table)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_a_table_that_summaries_share_is_not_written_to_by_one_of_them():
    summary, other = make_summary(), make_summary(seed=1)
    before = summary.item_factors.clone()
    copy = summary.with_factors(summary.factors)
    copy.load_data_dict(other.data_dict())
    assert torch.equal(summary.item_factors, before)
    assert torch.equal(copy.item_factors, other.item_factors)
    assert torch.equal(copy.core, other.core)


def test_a_copy_goes_round_in_the_same_way():
    summary = make_summary()
    summary.fix_order = False
    summary.train_config = dataclasses.replace(summary.train_config, batch_size=3)
    copy = summary.with_factors(summary.factors)
    assert torch.equal(copy.get_batch_indices(1), summary.get_batch_indices(1))


def test_the_three_factors_are_parameters_and_the_item_table_is_not():
    summary = make_summary()
    assert [name for name, _ in summary.named_parameters()] == ["core", "user_factors", "position_factors"]
    assert [name for name, _ in summary.named_buffers()] == ["item_factors", "position_embeddings"]
    summary().sum().backward()
    assert all(p.grad is not None for p in summary.parameters())
    assert not summary.item_factors.requires_grad
    assert (summary.num_users, summary.num_positions, summary.num_items) == (USERS, POSITIONS, ITEMS)
    assert summary.size == "4x8"


def test_a_16_bit_item_table_is_allowed_beside_32_bit_factors():
    full = make_summary()
    half = TuckerSummary(full.core, full.user_factors, full.position_factors, full.item_factors.bfloat16())
    assert half().dtype == torch.float32
    torch.testing.assert_close(half.probabilities().sum(-1), torch.ones(USERS, POSITIONS))


def test_initial_factors_have_the_stated_spread_and_depend_on_the_seed_alone():
    def make(seed, dtype=torch.float32):
        torch.rand(seed + 1)
        return TuckerSummary.initialise(
            users=500,
            positions=400,
            user_rank=16,
            position_rank=20,
            item_factors=torch.zeros(7, 32, dtype=dtype),
            seed=seed,
        )

    first = make(0)
    assert first.size == "500x400"
    assert first.user_factors.std().item() == pytest.approx(0.02, rel=0.03)
    assert first.position_factors.std().item() == pytest.approx(0.02, rel=0.03)
    assert first.core.std().item() == pytest.approx((2 / (20 * 32)) ** 0.5, rel=0.03)
    assert torch.equal(first.core, make(0).core)
    assert torch.equal(first.core, make(0, torch.float64).core.float())
    assert make(0, torch.bfloat16).core.dtype == torch.float32
    assert not torch.equal(first.core, make(1).core)


@pytest.mark.parametrize("name", ["users", "positions", "user_rank", "position_rank"])
def test_a_size_below_1_is_refused(name):
    sizes = {"users": 2, "positions": 2, "user_rank": 2, "position_rank": 2, name: 0}
    with pytest.raises(ValueError, match=rf"{name} must be at least 1"):
        TuckerSummary.initialise(**sizes, item_factors=torch.zeros(3, 2), seed=0)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"core": torch.zeros(2, 3)}, "core must have the shape"),
        ({"user_factors": torch.zeros(4, 3)}, "user_factors must have the shape"),
        ({"position_factors": torch.zeros(3)}, "position_factors must have the shape"),
        ({"item_factors": torch.zeros(11, 4)}, "item_factors must have the shape"),
        ({"item_factors": torch.zeros(0, 5)}, "item_factors must not be empty"),
        ({"position_embeddings": torch.zeros(8, 6)}, "position_embeddings must have the shape"),
        ({"core": torch.zeros(2, 3, 5, dtype=torch.int64)}, "core must be floating"),
        ({"user_factors": torch.zeros(4, 2, dtype=torch.float64)}, "one dtype"),
        ({"normalize": "sum"}, "normalize must be"),
    ],
)
def test_factors_that_do_not_fit_together_are_refused(changes, fault):
    fitting = {
        "core": torch.zeros(D1, D2, D3),
        "user_factors": torch.zeros(USERS, D1),
        "position_factors": torch.zeros(POSITIONS, D2),
        "item_factors": torch.zeros(ITEMS, D3),
    }
    with pytest.raises(ValueError, match=fault):
        TuckerSummary(**{**fitting, **changes})


# training a learner on it


def test_fit_follows_the_recipe_and_takes_other_options():
    summary = make_summary(dtype=torch.float32)
    config = summary.metadata.training.learner_config
    learners = [build_learner("SASRec", config, seed=1) for _ in range(3)]
    losses = summary.fit(learners[0], seed=5)
    options = {"steps": 3, "learning_rate": 0.01, "batch_size": 2, "item_embedding": "trained"}
    assert losses == fit_on_summary(learners[1], summary, seed=5, **options)
    assert all(
        torch.equal(a, b) for a, b in zip(learners[0].parameters(), learners[1].parameters(), strict=True)
    )
    assert len(summary.fit(learners[2], steps=1, item_embedding="frozen")) == 1


def test_fit_needs_options_where_there_is_no_recipe():
    summary = make_summary(metadata=False)
    learner = build_learner("SASRec", make_metadata().training.learner_config, seed=1)
    with pytest.raises(TypeError, match=r"steps"):
        summary.fit(learner)


def test_a_recipe_that_training_cannot_follow_is_refused():
    recipe = dataclasses.replace(make_metadata().training, betas=(0.5, 0.9))
    with pytest.raises(ValueError, match=r"betas"):
        recipe.fit_options()
    for changes in ({"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            dataclasses.replace(recipe, **changes)


def test_items_of_other_data_are_told_apart():
    metadata = make_metadata()
    metadata.check_items(list(metadata.item_ids))
    with pytest.raises(ValueError, match=r"over 11 items, padding included, and the data has 10"):
        metadata.check_items(metadata.item_ids[:-1])
    with pytest.raises(ValueError, match=r"item 10 is .* in the data: read 'synthetic'"):
        metadata.check_items((*metadata.item_ids[:-1], "other"))


# saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("position_embeddings", [True, False])
@pytest.mark.parametrize("item_factors", ["inside", "reference"])
def test_a_loaded_summary_equals_the_saved_one(tmp_path, dtype, normalize, position_embeddings, item_factors):
    summary = make_summary(dtype=dtype, normalize=normalize, position_embeddings=position_embeddings)
    summary.save(tmp_path / "a.safetensors", item_factors=item_factors)
    loaded = TuckerSummary.load(tmp_path / "a.safetensors")
    assert_equal(summary, loaded)
    assert all(p.requires_grad for p in loaded.parameters())


def test_equal_summaries_are_saved_as_equal_bytes(tmp_path):
    make_summary().save(tmp_path / "a")
    make_summary().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_summary_with_many_items_keeps_its_header_small(tmp_path):
    many = 100_000
    summary = TuckerSummary.initialise(
        users=2, positions=2, user_rank=2, position_rank=2, item_factors=torch.zeros(many, 2), seed=0
    )
    summary.metadata = make_metadata(many)
    summary.save(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    assert int.from_bytes(content[:8], "little") < 4096
    assert_equal(summary, TuckerSummary.load(tmp_path / "a"))


def test_summaries_of_one_learner_share_the_file_of_item_factors(tmp_path):
    for name in ("a", "b"):
        make_summary().save(tmp_path / name, item_factors="reference")
    assert len(list(tmp_path.glob("item_factors-*.safetensors"))) == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_referenced_item_table_can_be_handed_over(tmp_path):
    summary = make_summary()
    summary.save(tmp_path / "a", item_factors="reference")
    (table,) = tmp_path.glob("item_factors-*")
    moved = tmp_path / "moved"
    table.rename(moved)
    with pytest.raises(SummaryError, match=r"No such file.*takes its item factors from there"):
        TuckerSummary.load(tmp_path / "a")
    assert_equal(summary, TuckerSummary.load(tmp_path / "a", item_factors=moved))
    assert_equal(summary, TuckerSummary.load(tmp_path / "a", item_factors=summary.item_factors))


@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(ITEMS, D3),
        torch.zeros(ITEMS, D3, dtype=torch.float64),
        torch.zeros(ITEMS, D3, dtype=torch.complex64),
        torch.zeros(ITEMS, D3).to(torch.float8_e4m3fn),
        torch.full((ITEMS, D3), float("nan")),
        torch.zeros(ITEMS + 1, D3),
        torch.zeros(()),
    ],
)
def test_another_item_table_than_the_referenced_one_is_refused(tmp_path, table):
    make_summary().save(tmp_path / "a", item_factors="reference")
    with pytest.raises(SummaryError, match=r"/a is not a valid summary, .*item.factors"):
        TuckerSummary.load(tmp_path / "a", item_factors=table)


def test_a_damaged_or_wrong_file_of_item_factors_is_refused(tmp_path):
    make_summary().save(tmp_path / "a", item_factors="reference")
    (table,) = tmp_path.glob("item_factors-*")
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(SummaryError, match=r"item_factors-.* checksum does not match.*/a takes"):
        TuckerSummary.load(tmp_path / "a")
    with pytest.raises(SummaryError, match=r"holds 'td3_fast.TuckerSummary', not 'td3_fast.ItemFactors'"):
        TuckerSummary.load(tmp_path / "a", item_factors=tmp_path / "a")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    summary = make_summary()
    summary.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with torch.no_grad():
        summary.core[0, 0, 0] = float("inf")
    with pytest.raises(SummaryError, match=r"/a is not written, core has values that are not finite"):
        summary.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"item_ids": ("[PAD]", "x")}, "2 item ids for 11 items"),
        ({"item_ids": ("[PAD]",) * ITEMS}, "twice"),
        ({"item_ids": ("\ud800", *map(str, range(ITEMS - 1)))}, "surrogates"),
        ({"metrics": {"HR@10": float("nan")}}, "metadata.metrics.HR@10 must be float, got nan"),
        ({"metrics": {"HR@10": "high"}}, "metadata.metrics.HR@10 must be float, got 'high'"),
        ({"versions": {"torch": 2}}, "metadata.versions.torch must be str"),
        ({"preprocessing": Preprocessing(data="x", filters={"a": {1}}, fingerprint="")}, "JSON"),
    ],
)
def test_metadata_that_could_not_be_loaded_are_not_saved(tmp_path, changes, fault):
    summary = make_summary()
    summary.metadata = make_metadata(**changes)
    with pytest.raises(SummaryError, match=rf"/a is not written, .*{fault}"):
        summary.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_summary_without_metadata_is_not_saved(tmp_path):
    with pytest.raises(SummaryError, match=r"no metadata"):
        make_summary(metadata=False).save(tmp_path / "a")


# what is refused


def parts(path):
    return read_artefact(path, kind=TuckerSummary.kind, version=FORMAT_VERSION)


@pytest.mark.parametrize(
    "name", ["core", "user_factors", "position_factors", "item_factors", "item_ids.bytes"]
)
def test_a_missing_tensor_is_refused(tmp_path, name):
    make_summary().save(tmp_path / "a")
    tensors, document = parts(tmp_path / "a")
    del tensors[name]
    write_artefact(tmp_path / "a", tensors, document, kind=TuckerSummary.kind, version=FORMAT_VERSION)
    with pytest.raises(SummaryError, match=rf"/a is not a valid summary, the set of tensors lacks '{name}'"):
        TuckerSummary.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("more", torch.zeros(1), "unknown 'more'"),
        ("core", torch.zeros(D1, D2), "core must have the shape"),
        ("core", torch.zeros(D1, D2, D3, dtype=torch.int64), "core must be floating"),
        ("core", torch.full((D1, D2, D3), float("inf")), "core has values that are not finite"),
        ("core", torch.zeros(D1, D2, D3, dtype=torch.float64), "one dtype"),
        ("user_factors", torch.zeros(USERS, D1 + 1), "user_factors must have the shape"),
        ("position_factors", torch.zeros(()), "position_factors must have the shape"),
        ("position_embeddings", torch.zeros(POSITIONS, D3 + 1), "position_embeddings must have the shape"),
        ("item_factors", torch.zeros(ITEMS, D3), "not those that it was saved with"),
        ("item_ids.bytes", torch.zeros(3, dtype=torch.uint8), "out of order"),
        ("item_ids.bytes", torch.zeros(1000), "uint8 and int64"),
        ("item_ids.bytes", torch.full((1000,), 255, dtype=torch.uint8), "utf-8"),
        ("item_ids.ends", torch.arange(ITEMS).flip(0), "out of order"),
        ("item_ids.ends", torch.arange(ITEMS) - 1, "out of order"),
        ("item_ids.ends", torch.arange(ITEMS + 1), "12 item ids for 11 items"),
        ("item_ids.ends", torch.zeros(ITEMS, dtype=torch.int64), "an item id occurs twice"),
        ("item_ids.ends", torch.zeros(0, dtype=torch.int64), "0 item ids for 11 items"),
        ("item_ids.ends", torch.arange(ITEMS).int(), "uint8 and int64"),
        ("item_ids.ends", torch.tensor(3), "one-dimensional"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path, name, value, fault):
    make_summary().save(tmp_path / "a")
    tensors, document = parts(tmp_path / "a")
    write_artefact(
        tmp_path / "a", {**tensors, name: value}, document, kind=TuckerSummary.kind, version=FORMAT_VERSION
    )
    with pytest.raises(SummaryError, match=rf"/a is not a valid summary, .*{fault}.*: save it anew"):
        TuckerSummary.load(tmp_path / "a")


def mistyped(document, free=("filters", "learner_config", "settings")):
    """Copies of a JSON object with one thing wrong in each; below the keys `free` everything is right."""
    yield {**document, "more": 1}
    for key, value in document.items():
        yield {k: v for k, v in document.items() if k != key}
        for wrong in ([value], "7" if isinstance(value, float | int) and not isinstance(value, bool) else 7):
            yield {**document, key: wrong}
        if isinstance(value, dict) and key not in free:
            for inner in mistyped(value):
                # these two map any names to values of one type
                if key not in ("metrics", "versions") or (inner.keys() == value.keys()):
                    yield {**document, key: inner}


def test_every_missing_added_or_mistyped_entry_of_the_metadata_is_refused(tmp_path):
    make_summary().save(tmp_path / "a")
    tensors, document = parts(tmp_path / "a")
    variants = list(mistyped(document))
    assert len(variants) > 60
    for variant in variants:
        write_artefact(tmp_path / "a", tensors, variant, kind=TuckerSummary.kind, version=FORMAT_VERSION)
        with pytest.raises(SummaryError, match=r"/a is not a valid summary, metadata"):
            TuckerSummary.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["../item_factors.safetensors", "/etc/passwd", "a/b", "..", ""])
def test_a_reference_out_of_the_folder_is_refused(tmp_path, name):
    make_summary().save(tmp_path / "a", item_factors="reference")
    tensors, document = parts(tmp_path / "a")
    document["item_factors"]["file"] = name
    write_artefact(tmp_path / "a", tensors, document, kind=TuckerSummary.kind, version=FORMAT_VERSION)
    with pytest.raises(SummaryError, match=r"leads out of its folder"):
        TuckerSummary.load(tmp_path / "a")


def test_another_format_or_version_is_refused(tmp_path):
    make_summary().save(tmp_path / "a")
    tensors, document = parts(tmp_path / "a")
    write_artefact(tmp_path / "a", tensors, document, kind="other", version=FORMAT_VERSION)
    with pytest.raises(SummaryError, match=r"/a holds 'other', not 'td3_fast.TuckerSummary': name a file"):
        TuckerSummary.load(tmp_path / "a")
    write_artefact(tmp_path / "a", tensors, document, kind=TuckerSummary.kind, version=99)
    with pytest.raises(SummaryError, match=r"/a has version 99 .* reads version 1"):
        TuckerSummary.load(tmp_path / "a")


def test_what_is_no_readable_file_is_refused(tmp_path):
    with pytest.raises(SummaryError, match=r"/missing cannot be read .*No such file"):
        TuckerSummary.load(tmp_path / "missing")
    with pytest.raises(SummaryError, match=r"cannot be read .*directory"):
        TuckerSummary.load(tmp_path)
    (tmp_path / "text").write_text("user,item,time\n1,2,3\n")
    with pytest.raises(SummaryError, match=r"/text is not a safetensors file"):
        TuckerSummary.load(tmp_path / "text")


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return shutil.copyfile, (os.devnull, self.path)


@pytest.mark.parametrize("how", [*range(6), "torch", "torch legacy", "appended", "inside"])
def test_a_pickle_is_refused_and_never_run(tmp_path, how):
    path, sprung = tmp_path / "a.safetensors", tmp_path / "sprung"
    bomb = {"core": Trap(str(sprung))}
    if isinstance(how, int):
        path.write_bytes(pickle.dumps(bomb, protocol=how))
    elif how.startswith("torch"):
        torch.save(bomb, path, _use_new_zipfile_serialization=how == "torch")
    else:
        make_summary().save(path)
        content, pickled = path.read_bytes(), pickle.dumps(bomb)
        path.write_bytes(content + pickled if how == "appended" else content[: -len(pickled)] + pickled)
    with pytest.raises(SummaryError, match=r"/a\.safetensors .*: ") as caught:
        TuckerSummary.load(path)
    if how in (2, 3, 4, 5, "torch", "torch legacy"):
        assert "pickles can run code" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(bomb))
    assert sprung.exists()  # the trap does work


def sign(content):
    first = 8 + len(HEADER_START)
    zeroed = content[:first] + b"0" * 64 + content[first + 64 :]
    return content[:first] + hashlib.sha256(zeroed).hexdigest().encode() + content[first + 64 :]


def test_flipped_bits_and_truncations_are_refused_wherever_they_are(tmp_path):
    path = tmp_path / "a"
    make_summary().save(path)
    content = path.read_bytes()
    random.seed(0)
    damaged = [content[:length] for length in range(0, len(content), 16)]
    damaged += [content + bytes(extra) for extra in (1, 8, 100)]
    for index in range(0, len(content), 2):
        flipped = content[index] ^ 1 << random.randrange(8)
        damaged.append(content[:index] + bytes([flipped]) + content[index + 1 :])
    for variant in damaged:
        path.write_bytes(variant)
        with pytest.raises(SummaryError, match=r"/a .*: ") as caught:
            TuckerSummary.load(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_forged_header_under_a_right_checksum_never_raises_another_error(tmp_path):
    path = tmp_path / "a"
    make_summary().save(path)
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    random.seed(0)
    refused = 0
    for index in range(8 + len(HEADER_START) + 64, header_end, 3):
        byte = random.choice(b'0123456789"\\,:[]{}') if index % 6 else random.randrange(256)
        path.write_bytes(sign(content[:index] + bytes([byte]) + content[index + 1 :]))
        try:
            TuckerSummary.load(path)
        except SummaryError:
            refused += 1
    assert refused > header_end / 6
