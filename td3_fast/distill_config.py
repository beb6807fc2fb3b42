"""What a distillation depends on, besides the data, the pretrained learner and the seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from td3_fast.checks import check_choices, check_not_negative, check_positive, check_rates, check_sizes
from td3_fast.learners import learner_named
from td3_fast.training import Protocol
from td3_fast.unroll import CACHED_PROBABILITIES_LIMIT, KEPT_STATES_LIMIT, ItemEmbedding

Window = Literal["random", "fixed", "full"]
Engine = Literal["native", "higher"]
Start = Literal["pool", "fresh"]
Initial = Literal["noise", "sequences"]
ItemDtype = Literal["float32", "bfloat16"]
Kind = Literal["tucker", "farzi"]
Criterion = Literal["MRR@10", "cross_entropy"]


@dataclass(frozen=True, kw_only=True)
class Semantics:
    """Where the released program departs from the paper, one switch each; the defaults follow the paper.

    Two are approximations of the program. Its alignment features are those of pretraining's own passes, at weights
    that differ from batch to batch; here they are passes of the finished model with dropout. And `carry_embeddings`
    hands the item table from run to run, but not from the learner of the distillation to the first run.
    """

    reload_learner: Literal["step", "epoch"] = (
        "step"  # "epoch": the warm-up steps of one outer step carry to the next
    )
    alignment_dropout: bool = False  # features of the pretrained model from passes with dropout
    outer_dropout: bool = False  # dropout in the pass over real examples
    validation_dropout: bool = False  # dropout on while the epochs' summaries are compared
    redraw_negatives: bool = False  # at each evaluation
    shuffle: bool = True  # a new order of the real examples in each epoch
    restart_batches: bool = False  # the cycle of synthetic users starts over at the window
    separate_passes: bool = False  # an encoder pass for each inner target, with its own dropout
    carry_embeddings: bool = False  # evaluation runs start from the item table that the last one left
    ddof: int = 1  # of reported standard deviations

    @property
    def but_for_comparing(self) -> Semantics:
        """The same without what matters only where finished epochs are compared, and their summary scored."""
        return replace(self, validation_dropout=False, redraw_negatives=False, carry_embeddings=False, ddof=1)

    @property
    def masks_real_examples(self) -> bool:
        """Whether dropout is drawn for real examples: by micro-batch, and for as many positions as that has."""
        return self.outer_dropout or self.alignment_dropout


SEMANTICS = {
    "paper": Semantics(),
    "authors": Semantics(
        reload_learner="epoch",
        alignment_dropout=True,
        outer_dropout=True,
        validation_dropout=True,
        redraw_negatives=True,
        shuffle=False,
        restart_batches=True,
        separate_passes=True,
        carry_embeddings=True,
        ddof=0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that a distillation depends on, besides the data, the pretrained model and the seed."""

    users: int  # synthetic users, μ
    positions: int  # of each, ζ
    user_rank: int  # d1
    position_rank: int  # d2
    batch_size: int  # real examples per outer step
    users_per_step: int  # synthetic users per inner step
    summary_lr: float  # α
    learner_lr: float  # η
    epochs: int = 30
    inner_steps: int = 200  # N
    window: int = 40  # W
    window_kind: Window = "random"  # RaT-BPTT; "fixed": the window ends at step N; "full": all N steps
    growth_limit: float | None = None  # a window is cut short where its adjoint has grown so many times
    start: Start = "pool"  # checkpoints of pretraining; "fresh": new encoders, as the summary is used
    other_learners: tuple[
        str, ...
    ] = ()  # classes that take turns with the pretrained learner's, on its item table
    initial: Initial = "noise"  # factors to start from; "sequences": of items of real users
    sharpness: float = 2.0  # of these: what an item scores on its own query, in nats
    summary_weight_decay: float = 1e-4
    learner_weight_decay: float = 5e-5
    max_norm: float = 1.0
    alignment: float = 1.0  # weight of feature space alignment, 0 switches it off
    augmentation: bool = True
    middle_positions: int = 1  # targets of augmentation, of each synthetic user in each inner step
    inner_dropout: bool = True  # in training on the summary
    item_embedding: ItemEmbedding = "trained"
    item_dtype: ItemDtype = "float32"  # a frozen table can be kept in bfloat16, once for all its uses
    normalize: Literal["softmax", "none"] = "softmax"
    engine: Engine = "native"
    semantics: Semantics = field(default_factory=Semantics)
    selection: Protocol = "uni100"
    criterion: Criterion = (
        "MRR@10"  # of the learners whose mean chooses the best epoch, on the validation part
    )
    validation_runs: int = 1
    selection_start: float = 0.0  # share of the epochs after which the best is looked for
    micro_batch: int = (
        1024  # real examples per pass, shortest histories first; more where a GPU makes no embeddings
    )
    summary: Kind = "tucker"
    latent_rank: int = 32  # of a Farzi summary, which has no other rank
    trajectories: int = 1  # learners per outer step, whose meta-gradients are averaged
    memory_limit: int | None = (
        None  # bytes above data and libraries; decides on `Limits`, see `td3_fast.memory`
    )

    def __post_init__(self) -> None:
        counts = ("users", "user_rank", "position_rank", "batch_size", "users_per_step", "epochs", "window")
        more = (
            "inner_steps",
            "validation_runs",
            "micro_batch",
            "latent_rank",
            "trajectories",
            "middle_positions",
        )
        check_choices(self)
        check_choices(self.semantics)
        check_sizes(self, *counts, *more)
        check_positive(self, "summary_lr", "learner_lr", "sharpness", "max_norm")
        check_not_negative(self, "summary_weight_decay", "learner_weight_decay", "alignment")
        if self.initial == "sequences" and self.summary == "farzi":
            raise ValueError('a Farzi summary starts from noise: use initial="noise"')
        check_rates(self, "selection_start")
        if self.growth_limit is not None and not self.growth_limit > 1:
            raise ValueError(f"DistillConfig.growth_limit must be above 1, got {self.growth_limit}")
        if self.growth_limit is not None and self.engine == "higher":
            raise ValueError(
                'growth_limit asks for engine="native": "higher" goes back through the whole window'
            )
        if self.semantics.reload_learner == "epoch" and self.engine == "higher":
            raise ValueError(
                'reload_learner="epoch", as in the released program, asks for engine="native": "higher" reloads the '
                "learner at every outer step"
            )
        if self.positions < 2:
            raise ValueError(f"a summary needs at least 2 positions to predict one, got {self.positions}")
        if self.window > self.inner_steps and self.window_kind != "full":
            raise ValueError(
                f"the window ({self.window}) cannot be longer than the inner loop ({self.inner_steps}): "
                "shorten `window` or raise `inner_steps`"
            )
        if self.semantics.carry_embeddings and self.item_embedding == "frozen":
            raise ValueError(
                'carry_embeddings asks for item_embedding="trained": a frozen table has nothing to carry'
            )
        known = tuple(learner_named(name) for name in self.other_learners)
        if len(set(known)) < len(known):
            raise ValueError(f"other_learners names a class twice: {', '.join(known)}")
        object.__setattr__(self, "other_learners", known)
        if self.other_learners and (self.item_embedding, self.start) != ("frozen", "fresh"):
            raise ValueError(
                'other_learners asks for item_embedding="frozen" and start="fresh": only the pretrained learner\'s own '
                "class has checkpoints and tables to start from"
            )
        if self.other_learners and self.semantics.reload_learner == "epoch":
            raise ValueError(
                'other_learners asks for reload_learner="step": a learner cannot go on as one of another class'
            )
        if self.item_dtype == "bfloat16" and (self.item_embedding, self.engine) != ("frozen", "native"):
            raise ValueError(
                'item_dtype="bfloat16" asks for item_embedding="frozen" and engine="native": a table that is trained '
                "needs more digits"
            )

        if self.memory_limit is not None and self.engine == "higher":
            raise ValueError(
                'memory_limit asks for engine="native": "higher" keeps what it differentiates whole'
            )

    def check_pretrained(self, learner_name: str) -> None:
        """ValueError where the class of the pretrained learner is named among the others."""
        if learner_name in self.other_learners:
            raise ValueError(
                f"other_learners names {learner_name}, the class of the pretrained learner, which has its turns in any "
                "case: leave it out"
            )

    def settings(self) -> dict[str, Any]:
        """What a distillation depends on; without what came later, where it changes nothing."""
        settings = asdict(self)
        for name in ("other_learners", "selection_start"):
            if not settings[name]:
                del settings[name]
        return settings

    def fit_options(self) -> dict[str, Any]:
        """How a learner is trained on the summary, as `fit_on_summary` takes it."""
        return {
            "steps": self.inner_steps,
            "learning_rate": self.learner_lr,
            "weight_decay": self.learner_weight_decay,
            "batch_size": self.users_per_step,
            "item_embedding": self.item_embedding,
            "augmentation": self.augmentation,
            "middle_positions": self.middle_positions,
            "dropout": self.inner_dropout,
            "separate_passes": self.semantics.separate_passes,
        }

    def draw_window(self, generator: torch.Generator) -> tuple[int, int]:
        """(warm-up steps, differentiated steps) of one outer step."""
        if self.window_kind == "full":
            return 0, self.inner_steps
        latest = self.inner_steps - self.window
        if self.window_kind == "fixed":
            return latest, self.window
        return int(torch.randint(latest + 1, (), generator=generator, device="cpu")), self.window


def with_semantics(config: DistillConfig, name: Literal["paper", "authors"]) -> DistillConfig:
    """`config` under the paper's or the released program's semantics; the latter trains the item table."""
    changes: dict[str, Any] = {"semantics": SEMANTICS[name]}
    if name == "authors":
        changes["item_embedding"] = "trained"
    return replace(config, **changes)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of what may be kept or taken at once; what lies beyond is recomputed, or taken in parts."""

    micro_batch: int  # real examples per pass
    kept_states: int = KEPT_STATES_LIMIT  # bytes of the states and gradients of a window
    cached_probabilities: int = CACHED_PROBABILITIES_LIMIT  # bytes, their gradient included
