"""What `inner_gradient` and `next_item_gradient` do in one call, beside autograd through the ops of its parts.

The gradient of an inner step with its derivative in a direction, and that of the loss on real examples, of learners as
they are for ml-100k and ml-1m; on the CPU. Of the other learners what they are made of, beside its references.
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch

from td3_fast import ops
from td3_fast.learners import FlatParameters, SASRec, SASRecConfig, build_learner

# Of a learner, the names under which it meets its kernels, and what stands there without them.
REFERENCES = {
    "GRU4Rec": {"recurrent.gru": ops.gru_reference},
    "NARM": {
        "recurrent.gru": ops.gru_reference,
        "narm.additive_attention": ops.additive_attention_reference,
    },
    "BERT4Rec": {"bert4rec.has_transformer_encoder": lambda *_: False},
}

PARAMETERS = {
    # what, sequences, items, d
    "size": {
        "small": [
            ("inner", 25, 1_683, 32),
            ("inner with items", 25, 1_683, 32),
            ("real", 512, 1_683, 32),
            *((name, 256, 1_683, 32) for name in REFERENCES),
        ],
        "acceptance": [
            *(
                (what, 25, n, d)
                for what in ("inner", "inner with items")
                for n, d in ((1_683, 32), (3_417, 64))
            ),
            ("real", 2_048, 1_683, 32),
            ("real", 2_048, 3_417, 64),
            *((name, 2_048, 1_683, 32) for name in REFERENCES),
        ],
        "full": [("inner", 200, 1_683, 32), ("inner", 25, 100_000, 64), ("real", 4_096, 3_417, 64)],
    },
    "variant": ["fused", "by autograd"],
}
POSITIONS, TARGETS = 50, 2


def real_examples(sequences, n):
    generator = torch.Generator().manual_seed(0)
    histories = torch.randint(1, n, (sequences, POSITIONS), generator=generator)
    lengths = torch.randint(1, POSITIONS + 1, (sequences,), generator=generator)
    return histories, lengths, torch.randint(1, n, (sequences,), generator=generator)


def make_other_learner(variant, name, sequences, n, d):
    learner = build_learner(name, {"num_items": n, "max_len": POSITIONS, "hidden": d}, seed=0)
    flat = FlatParameters(learner)
    theta, items = flat.gather(learner.state_dict()), learner.item_embeddings.detach()
    batch = real_examples(sequences, n)

    def run():
        loss, gradients = flat.loss_gradient(theta, items, *batch, dropout=ops.DropoutStream(0))
        return loss, *gradients

    def by_references():
        with ExitStack() as stack:
            for where, reference in REFERENCES[name].items():
                stack.enter_context(patch(f"td3_fast.learners.{where}", reference))
            return run()

    return run if variant == "fused" else by_references


def make_run(variant, size, device):
    what, sequences, n, d = size
    if what in REFERENCES:
        return make_other_learner(variant, what, sequences, n, d)
    learner = SASRec(SASRecConfig(num_items=n, max_len=POSITIONS, hidden=d, inner=2 * d), seed=0).to(device)
    flat = FlatParameters(learner)
    theta = flat.gather(learner.state_dict())
    items = learner.item_embeddings.detach()
    generator = torch.Generator().manual_seed(0)
    shape = learner.encoder_shape()
    if what == "real":
        histories, lengths, targets = real_examples(sequences, n)

        def real():
            dropout = ops.DropoutStream(0)
            if variant == "fused":
                made = ops.next_item_gradient(
                    theta, items, histories, lengths, targets, shape, dropout=dropout, trained=True
                )
                return made.loss, made.parameters, made.items
            leaves = [p.detach().requires_grad_() for p in (theta, items)]
            loss = flat.loss(*leaves, histories, lengths, targets, dropout=dropout)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        return real

    trained = what == "inner with items"
    embeds = torch.randn(sequences, POSITIONS, d, generator=generator)
    targets = torch.randint(1, POSITIONS, (sequences, TARGETS), generator=generator)
    moved = [theta, items, embeds] if trained else [theta]
    directions = [torch.randn(x.shape, generator=generator) for x in moved]

    def inner():
        if variant == "fused":
            made = ops.inner_gradient(theta, items, embeds, targets, shape, trained=trained)
            return tuple(x for x in made.tangent(*directions) if x is not None)
        leaves = [x.detach().requires_grad_() for x in moved]
        x = leaves[2] if trained else embeds.detach().requires_grad_()
        hidden = flat.encode(leaves[0], x[:, :-1], targets - 1).flatten(0, 1)
        rows = x.gather(1, targets.unsqueeze(-1).expand(-1, -1, d)).flatten(0, 1)
        loss = ops.item_cross_entropy(hidden, leaves[1] if trained else items, rows).mean()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(first, leaves if trained else [*leaves, x], directions)

    return inner


def test_gradients_in_one_call(size, variant, device, measure):
    if device.type != "cpu":
        pytest.skip("the ops are the CPU's")
    what, sequences, n, d = size
    name = f"{what}, with its derivative"
    if what in ("real", *REFERENCES):
        name = f"loss of {'SASRec' if what == 'real' else what} on real examples"
    measure(
        f"{name}: {sequences} x {n} x {d} float32",
        variant,
        make_run(variant, size, device),
        make_run("fused", size, device),
        make_run("by autograd", size, device)(),
        flops=None,
    )
