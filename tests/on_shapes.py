"""The loop on a device that only has shapes: what mixes devices fails, and so does waiting for a value on the host.

Run by test_device.py in a process of its own: a device has to be there before the first derivative is taken.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_unroll import VARIANTS, small_distiller
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from td3_fast.distill import Distiller
from td3_fast.distill_state import DistillState
from td3_fast.learners import LEARNERS
from td3_fast.training import fresh_like
from td3_fast.unroll import fit_on_summary

NAME = "shapes"


class OnlyShapes(TorchDispatchMode):
    """Tensors of the device have no values; those of the CPU are what they are."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._recording = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if self._recording:
            # a graph would keep the copy of a moment
            assert not any(map(self._on_host, leaves)), (
                f"{func} takes a tensor of the host to a recorded step"
            )
        if any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == NAME) for x in leaves):
            args, kwargs = tree_map(self._without_values, (args, kwargs))
            with self._fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _on_host(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)

    def _without_values(self, leaf: Any) -> Any:
        return self._fake.from_tensor(leaf) if self._on_host(leaf) else leaf

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Calls the step, as a recorder that sees to it that all it uses is on the device."""

        def recorded() -> None:
            self._recording = True
            step()
            self._recording = False

        return recorded


@pytest.fixture
def mode() -> Iterator[OnlyShapes]:
    # not a promise of PyTorch's: some versions do not have it
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch has no devices made in Python")
    if torch._C._get_privateuse1_backend_name() != NAME:
        backend_registration._setup_privateuseone_for_python_backend(NAME)
    with OnlyShapes() as mode:
        yield mode


def moved(name: str, **changes: object) -> tuple[Distiller, DistillState]:
    """`small_distiller` with its tables on the device."""
    device = torch.device(NAME, 0)
    distiller, state = small_distiller(name=name, **changes)
    pretrained = distiller.pretrained.to(device)
    there = Distiller(distiller.split, pretrained, distiller.config, seed=distiller.seed)
    return there, state.to(device)


def first_read(work: Callable[[], object]) -> str:
    """The function of the package that first wanted to know a value of the device."""
    with pytest.raises(DataDependentOutputException) as caught:
        work()
    frames = traceback.extract_tb(caught.value.__traceback__)
    return [frame.name for frame in frames if "td3_fast" in frame.filename][-1]


SEPARATE = "separate passes, dropout everywhere"
# short loops, for what has no values takes its time
SHORT = {"inner_steps": 2, "window": 2, "batch_size": 8, "positions": 6}


@pytest.mark.parametrize(
    ("name", "variant", "item_embedding"),
    [("SASRec", SEPARATE, "frozen"), ("BERT4Rec", "plain", "trained"), ("GRU4Rec", "plain", "frozen")],
)
def test_an_outer_step_is_under_way_before_the_host_reads_a_figure(
    mode: OnlyShapes, name: str, variant: str, item_embedding: str
) -> None:
    changes = {"item_embedding": item_embedding, **VARIANTS[variant], **SHORT}
    distiller, state = moved(name, **changes)
    distiller.follower.recorder = lambda: mode.record
    # the device cuts the batches, except where dropout is drawn for them
    assert (distiller.follower.train_there is None) == (variant == SEPARATE)
    assert first_read(lambda: distiller.meta_gradient(state)) == "_over_ranks"


@pytest.mark.parametrize("recorded", [True, False])
def test_training_on_a_summary_is_under_way_before_the_host_reads_its_losses(
    mode: OnlyShapes, recorded: bool
) -> None:
    distiller, state = moved("SASRec", item_embedding="trained", **SHORT)
    summary = distiller.summary(state.factors.parameters)
    learner = distiller.pretrained.learner()
    options = {**distiller.config.fit_options(), "record": mode.record if recorded else None}
    assert first_read(lambda: fit_on_summary(learner, summary, **options)) == "fit_on_summary"


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by copy.deepcopy
@pytest.mark.parametrize("name", LEARNERS)
def test_fresh_learners_are_made_where_the_pretrained_one_is(mode: OnlyShapes, name: str) -> None:
    distiller, _ = moved(name, **SHORT)
    fresh = fresh_like(distiller.teacher, seed=1)
    assert all(parameter.device.type == NAME for parameter in fresh.parameters())


def test_a_mixture_of_devices_is_noticed(mode: OnlyShapes) -> None:
    distiller, state = moved("SASRec", **SHORT)
    distiller.follower.items = distiller.items.cpu()
    with pytest.raises((RuntimeError, ValueError), match="device"):
        distiller.meta_gradient(state)
