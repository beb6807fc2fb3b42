import json
import os
import pickle
import random
import shutil

import pytest
import torch

from td3_fast.distilled_data import LearnerTrainConfig
from td3_fast.summary import SummaryError, TuckerSummary

USERS, POSITIONS, ITEMS, D1, D2, D3 = 6, 4, 9, 2, 3, 5
SHAPES = {"G": (D1, D2, D3), "U": (USERS, D1), "V": (ITEMS, D3), "T": (POSITIONS, D2)}
CONFIG = {
    "config": {
        "pretrained_data_path": None,
        "seq_num": USERS,
        "seq_len": POSITIONS,
        "seq_dim1": D1,
        "seq_dim2": D2,
        "seq_dim3": D3,
        "farzi_dim": 32,
        "fix_order": True,
    },
    "train_config": {"train_step": 200, "batch_size": 2},
    "item_num": ITEMS,
    "item_emb": None,
}


def tensors():
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def make_summary():
    factors = tensors()
    summary = TuckerSummary(factors["G"], factors["U"], factors["T"], factors["V"])
    summary.train_config = LearnerTrainConfig(batch_size=2)
    return summary


def write_folder(folder, data, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(data, folder / "data_dict")
    return folder


def test_a_batch_is_the_softmax_of_the_tucker_product_of_its_users():
    summary = make_summary()
    data = summary.data_dict()
    for step, users in enumerate([[0, 1], [2, 3], [4, 5], [0, 1]]):
        expected = torch.einsum(
            "ijk,ai,bj,ck->abc", data["G"], data["U"][users], data["T"], data["V"]
        ).softmax(-1)
        batch = summary.get_batch(step)
        assert list(batch) == ["inputs_embeds"]
        torch.testing.assert_close(batch["inputs_embeds"], expected)
        assert summary.get_batch_indices(step).tolist() == users


def test_batches_wrap_around_where_the_size_does_not_divide_the_users():
    summary = make_summary()
    summary.train_config = LearnerTrainConfig(batch_size=4)
    assert [summary.get_batch_indices(step).tolist() for step in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 0, 1],
        [2, 3, 4, 5],
    ]
    summary.train_config = LearnerTrainConfig(batch_size=100)
    assert summary.get_batch_indices(3).tolist() == list(range(USERS))


def test_without_a_fixed_order_batches_are_draws_that_depend_on_the_step():
    summary = make_summary()
    summary.fix_order = False
    draws = [summary.get_batch_indices(step).tolist() for step in range(30)]
    assert draws == [summary.get_batch_indices(step).tolist() for step in range(30)]
    assert len({tuple(draw) for draw in draws}) > 10
    assert all(len(set(draw)) == 2 for draw in draws)


def test_an_optimiser_on_data_dict_moves_what_get_batch_gives():
    summary = make_summary()
    data = summary.data_dict()
    before = summary.get_batch(0)["inputs_embeds"]
    optimiser = torch.optim.Adam([{"params": data[name]} for name in ("G", "U", "T")], lr=0.1)
    before.square().sum().backward()
    torch.nn.utils.clip_grad_norm_(data.values(), max_norm=1.0)
    optimiser.step()
    assert not torch.equal(before, summary.get_batch(0)["inputs_embeds"])
    assert data["V"].grad is None


def test_a_detached_data_dict_holds_plain_tensors():
    data = make_summary().data_dict(detach=True)
    assert {name: tuple(value.shape) for name, value in data.items()} == SHAPES
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in data.values())


def test_load_data_dict_copies_what_is_learned_in_place():
    summary, other = make_summary(), tensors()
    before = {name: value.data_ptr() for name, value in summary.data_dict().items()}
    summary.load_data_dict(other)
    for name, value in summary.data_dict().items():
        assert torch.equal(value, other[name])
        assert (value.data_ptr() == before[name]) == (name != "V")  # which other summaries may share


@pytest.mark.parametrize("change", [{"V": None}, {"G": torch.zeros(1, 2, 3)}, {"emb": torch.zeros(1)}])
def test_load_data_dict_refuses_other_keys_and_shapes_and_changes_nothing(change):
    summary, other = make_summary(), {**tensors(), **change}
    other = {name: value for name, value in other.items() if value is not None}
    before = summary.data_dict(detach=True)["U"].clone()
    with pytest.raises(ValueError, match=next(iter(change))):
        summary.load_data_dict(other)
    assert torch.equal(summary.user_factors, before)


def test_the_folder_has_the_files_keys_and_fields_of_the_released_program(tmp_path):
    make_summary().save_pretrained(tmp_path / "deep" / "folder")
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == ["config.json", "data_dict"]
    assert json.loads((tmp_path / "deep" / "folder" / "config.json").read_text()) == CONFIG
    data = torch.load(tmp_path / "deep" / "folder" / "data_dict", weights_only=True)
    assert {name: tuple(value.shape) for name, value in data.items()} == SHAPES
    assert all(type(value) is torch.Tensor for value in data.values())


def test_a_summary_comes_back_from_its_folder(tmp_path):
    summary = make_summary()
    summary.save_pretrained(tmp_path / "a")
    loaded = TuckerSummary.from_pretrained(tmp_path / "a", item_emb=summary.item_factors.tolist())
    for name, value in summary.data_dict().items():
        assert torch.equal(value, loaded.data_dict()[name])
    assert (loaded.config, loaded.train_config) == (summary.config, summary.train_config)
    assert loaded.item_num == ITEMS
    assert loaded.metadata is None


def test_a_folder_of_an_earlier_version_with_parameters_inside_is_read(tmp_path):
    data = {name: torch.nn.Parameter(value) for name, value in tensors().items()}
    config = {**CONFIG, "config": {k: v for k, v in CONFIG["config"].items() if k != "farzi_dim"}}
    loaded = TuckerSummary.from_pretrained(write_folder(tmp_path / "a", data, config))
    assert torch.equal(loaded.core, data["G"])
    assert not loaded.item_factors.requires_grad


def test_saving_over_an_old_folder_replaces_it_and_keeps_other_files(tmp_path):
    make_summary().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "notes").write_text("mine")
    summary = make_summary()
    summary.save_pretrained(tmp_path / "a")
    assert torch.equal(TuckerSummary.from_pretrained(tmp_path / "a").core, summary.core)
    assert (tmp_path / "a" / "notes").read_text() == "mine"


def test_only_a_view_is_saved_and_not_the_storage_behind_it(tmp_path):
    factors = tensors()
    table = torch.randn(100_000, D3)[:ITEMS]
    TuckerSummary(factors["G"], factors["U"], factors["T"], table).save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "data_dict").stat().st_size < 10_000


def test_an_order_that_the_released_program_refuses_is_not_asked_of_it(tmp_path):
    summary = make_summary()
    summary.train_config = LearnerTrainConfig(batch_size=4)
    summary.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["config"]["fix_order"] is False


def test_a_bare_product_is_not_written_as_a_softmax(tmp_path):
    summary = make_summary()
    summary.normalize = "none"
    with pytest.raises(ValueError, match=r"softmax"):
        summary.save_pretrained(tmp_path / "a")


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return shutil.copyfile, (os.devnull, self.path)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare"])
def test_code_in_data_dict_is_refused_and_never_run(tmp_path, how):
    sprung = tmp_path / "sprung"
    bomb = {**tensors(), "G": Trap(str(sprung))}
    folder = write_folder(tmp_path / "a", bomb)
    if how == "legacy":
        torch.save(bomb, folder / "data_dict", _use_new_zipfile_serialization=False)
    if how == "bare":
        (folder / "data_dict").write_bytes(pickle.dumps({"G": Trap(str(sprung))}))
    with pytest.raises(SummaryError, match=r"data_dict cannot be loaded without running code"):
        TuckerSummary.from_pretrained(folder)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"G": torch.zeros(D1, D2, D3 + 1)}, "G has the shape"),
        ({"U": torch.zeros(USERS, D1, dtype=torch.int64)}, "U is torch.int64"),
        ({"U": torch.zeros(1, 1).expand(USERS, D1)}, "U repeats its memory"),
        ({"V": torch.full((ITEMS, D3), float("nan"))}, "V has values that are not finite"),
        ({"V": torch.zeros(ITEMS, D3).to_sparse()}, "V is not a dense tensor"),
        ({"V": torch.zeros(ITEMS, D3, device="meta")}, "V is not a dense tensor"),
        ({"T": [[1.0]]}, "T is not a dense tensor"),
        ({"T": None}, "lacks 'T'"),
        ({"emb": torch.zeros(1)}, "unknown 'emb'"),
        ({"U": torch.zeros(USERS, D1, dtype=torch.float64)}, "one dtype"),
    ],
)
def test_a_dict_that_does_not_fit_is_refused(tmp_path, change, fault):
    data = {**tensors(), **change}
    if change.get("T", 0) is None:
        del data["T"]
    with pytest.raises(SummaryError, match=fault):
        TuckerSummary.from_pretrained(write_folder(tmp_path / "a", data))


@pytest.mark.parametrize("data", [[1], {}, 3, {1: 2}, "G"])
def test_something_else_than_the_dict_is_refused(tmp_path, data):
    with pytest.raises(SummaryError, match=r"data_dict does not hold a Tucker summary"):
        TuckerSummary.from_pretrained(write_folder(tmp_path / "a", data))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\xff",
        "[" * 100_000,
        json.dumps({**CONFIG, "item_num": "9"}),
        json.dumps({**CONFIG, "more": 1}),
        json.dumps({**CONFIG, "config": None}),
        json.dumps({**CONFIG, "config": {**CONFIG["config"], "seq_num": 2.5}}),
        json.dumps({**CONFIG, "config": {**CONFIG["config"], "fix_order": 1}}),
        json.dumps({**CONFIG, "config": {"seq_num": 6}}),
        json.dumps({**CONFIG, "train_config": {"train_step": 0, "batch_size": 2}}),
        json.dumps({"config": CONFIG["config"]}),
    ],
)
def test_a_malformed_configuration_is_refused(tmp_path, text):
    folder = write_folder(tmp_path / "a", tensors())
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SummaryError, match=r"config.json is not a configuration of distilled data"):
        TuckerSummary.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "data_dict"])
def test_an_incomplete_folder_is_refused(tmp_path, name):
    folder = write_folder(tmp_path / "a", tensors())
    (folder / name).unlink()
    with pytest.raises(SummaryError, match=rf"{name} is missing"):
        TuckerSummary.from_pretrained(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_dict_never_raises_another_error(tmp_path, zipped):
    folder = write_folder(tmp_path / "a", tensors())
    file = folder / "data_dict"
    torch.save(tensors(), file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    random.seed(0)
    damaged = [content[:length] for length in range(0, len(content), 29)]
    for index in range(0, len(content), 13):
        damaged.append(
            content[:index] + bytes([content[index] ^ (1 << random.randrange(8))]) + content[index + 1 :]
        )
    refused = 0
    for variant in damaged:
        file.write_bytes(variant)
        try:
            TuckerSummary.from_pretrained(folder)
        except SummaryError:
            refused += 1
    assert refused > len(content) // 40
