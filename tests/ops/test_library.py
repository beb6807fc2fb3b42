import shutil
import warnings
from dataclasses import replace

import pytest
import torch

from td3_fast import ops
from td3_fast.learners import FlatParameters, SASRec, SASRecConfig
from td3_fast.ops import library


def test_kernels_are_built_where_there_is_a_compiler():
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    facts = ops.build_facts()
    assert facts is not None
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert "baseline" in facts["instruction_sets"]


def test_a_missing_library_warns_once_and_runs_the_reference(monkeypatch):
    monkeypatch.setattr(library, "_kernels", None)
    monkeypatch.setattr(library, "_warned", set())
    inputs = torch.randn(3, 2), torch.randn(5, 2), torch.randn(5, 4)
    expected = ops.soft_embedding(*inputs, backend="reference")
    with pytest.warns(ops.FusedUnavailableWarning, match="cpu"):
        actual = ops.soft_embedding(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.soft_embedding(*inputs)


def test_a_device_without_kernels_warns_by_its_name(monkeypatch):
    monkeypatch.setattr(library, "has_fused", lambda device: False)
    monkeypatch.setattr(library, "_warned", set())
    with pytest.warns(ops.FusedUnavailableWarning, match="cuda"):
        assert not library.use_fused("fused", torch.device("cuda"))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        ops.soft_embedding(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), backend="fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_instruction_set_gives_the_same_derivatives(dtype):
    kernels = library._kernels
    if kernels is None:
        pytest.skip("no fused kernels are built")
    names = kernels.build_facts()["instruction_sets"]
    inputs = [
        torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((37, 19), (301, 19), (301, 21))
    ]
    config = SASRecConfig(num_items=9, max_len=7, hidden=36, inner=50, heads=2, layers=2)
    learner = SASRec(config, seed=1).to(dtype)
    flat = FlatParameters(learner)
    theta = flat.gather(learner.state_dict())
    embeds, table = torch.randn(37, 8, 36, dtype=dtype), torch.randn(301, 36, dtype=dtype)
    targets = torch.randint(1, 8, (37, 2))
    probabilities = torch.rand(37, 301, dtype=dtype)
    both_ways = replace(learner.encoder_shape(), bidirectional=True)
    seen = torch.randint(7, (37, 3))
    cut = embeds[:, :-1]

    def derivatives():
        embedding, logsumexp = ops.soft_embedding(*inputs)
        first = torch.autograd.grad(embedding.square().sum() + logsumexp.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        ranks = ops.target_rank(inputs[0].detach(), inputs[1].detach(), torch.arange(37))
        step = ops.inner_gradient(
            theta, table, embeds, targets, learner.encoder_shape(), dropout=ops.DropoutStream(7), trained=True
        )
        moved = step.tangent(theta, table, embeds)
        given = (theta.clone().requires_grad_(), cut.clone().requires_grad_())
        encoded = ops.transformer_encoder(*given, seen, both_ways, dropout=ops.DropoutStream(7))
        # not the square: that of a norm's outputs is the same for all inputs
        to_given = torch.autograd.grad(encoded.pow(3).sum(), given, create_graph=True)
        twice = torch.autograd.grad(sum(x.square().sum() for x in to_given), given)
        chosen = ops.item_probabilities(table[:40], table)
        mixed = ops.mix_items(probabilities, table)
        sums = ops.mix_items_transposed(probabilities, mixed)
        pairs = [mixed, mixed[:, :5]], [table, table[:, :5]]
        weighted = ops.weigh_products(probabilities, *pairs, table[:, :3], mixed[:, :3])
        return [embedding.detach(), logsumexp.detach(), *(x.detach() for x in first), *second, ranks,
                step.loss, step.parameters, step.items, step.embeds, *moved, chosen, mixed, sums, *weighted,
                encoded.detach(), *(x.detach() for x in to_given), *twice]  # fmt: skip

    try:
        results = []
        for name in names:
            kernels.select_instruction_set(name)
            results.append(derivatives())
    finally:
        kernels.select_instruction_set(names[0])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            tolerance = 1e-10 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))
    with pytest.raises(ValueError, match="instruction set"):
        kernels.select_instruction_set("sse9")
