"""BERT4Rec (Sun et al., CIKM 2019): masked items told from both sides; the next item is a mask behind the history."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from td3_fast.checks import check_rates, check_sizes
from td3_fast.learners.base import CrossEntropy, Learner, causal_bias, normal_
from td3_fast.learners.transformer import INITIAL_STD, LAYER_NORM_EPS, Block, check_heads, reset_layers
from td3_fast.ops import (
    DropoutStream,
    EncoderShape,
    has_transformer_encoder,
    item_cross_entropy,
    look_up,
    seeded_generator,
    transformer_encoder,
)

PositionsFrom = Literal["last", "first"]


@dataclass(frozen=True, kw_only=True)
class BERT4RecConfig:
    """Sizes and rates of a BERT4Rec; `num_items` counts the padding item."""

    num_items: int
    max_len: int
    hidden: int = 32
    inner: int = 128
    heads: int = 2
    layers: int = 2
    hidden_dropout: float = 0.2
    attention_dropout: float = 0.2
    mask_ratio: float = 0.2  # of the items of a cloze
    cloze_share: float = 0.5  # of the real examples; of the others only the next item is masked
    positions_from: PositionsFrom = "last"  # item that is seen, back; or "first", as in the published program

    def __post_init__(self) -> None:
        check_sizes(self, "num_items", "max_len", "hidden", "inner", "heads", "layers")
        check_heads(self.hidden, self.heads)
        check_rates(self, "hidden_dropout", "attention_dropout", "mask_ratio")
        if not 0 <= self.cloze_share <= 1:
            raise ValueError(f"BERT4RecConfig.cloze_share must lie in [0, 1], got {self.cloze_share}")
        if self.positions_from not in get_args(PositionsFrom):
            raise ValueError(
                f'BERT4RecConfig.positions_from must be "last" or "first", got {self.positions_from!r}'
            )


class BERT4Rec(Learner):
    """Token + position embedding, LayerNorm, dropout, bidirectional attention blocks, a dense layer with GELU and
    LayerNorm, and a bias per item.

    An output is that of a learned mask embedding put behind the inputs it may see, so several outputs of one sequence
    are as many passes, each over its own prefix. The mask takes a position: there are `max_len + 1`. They are counted
    back from the last one that is seen, as where histories are padded in front: so the next item's mask stands at the
    same position behind histories of all lengths, also those longer than the sequences that it was trained on.

    On the CPU the blocks are `transformer_encoder`, differentiable twice; elsewhere, and under `torch.func`, modules.

    The bias of an item is one more column of the item table, which faces a constant 1 in the outputs: a table of
    (num_items, hidden + 1), frozen or trained as a whole. Inputs ignore that column.

    Weights start from N(0, 0.02²), the bias of items from 0.
    """

    def __init__(self, config: BERT4RecConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.item_embeddings = nn.Parameter(torch.zeros(config.num_items, config.hidden + 1))
        self.position_embeddings: nn.Parameter = nn.Parameter(torch.empty(config.max_len + 1, config.hidden))
        self.mask_embedding = nn.Parameter(torch.empty(config.hidden))
        self.norm = nn.LayerNorm(config.hidden, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(
            Block(
                hidden=config.hidden,
                inner=config.inner,
                heads=config.heads,
                hidden_dropout=config.hidden_dropout,
                attention_dropout=config.attention_dropout,
            )
            for _ in range(config.layers)
        )
        self.output = nn.Linear(config.hidden, config.hidden)
        self.output_norm = nn.LayerNorm(config.hidden, eps=LAYER_NORM_EPS)
        generator = seeded_generator(seed, "embeddings")
        normal_(self.item_embeddings.detach()[:, :-1], INITIAL_STD, generator)
        normal_(self.position_embeddings, INITIAL_STD, generator)
        self.reset_encoder(seed=seed)

    @property
    def max_len(self) -> int:
        return self.config.max_len

    def hyperparameters(self) -> dict[str, Any]:
        return asdict(self.config)

    def reset_encoder(self, *, seed: int) -> None:
        generator = seeded_generator(seed, "encoder")
        normal_(self.mask_embedding, INITIAL_STD, generator)
        reset_layers(self, generator)

    def encode(
        self, inputs_embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None = None
    ) -> Tensor:
        batch, length, _ = inputs_embeds.shape
        if length > self.max_len:
            raise ValueError(
                f"got sequences of {length} items, but this BERT4Rec reads {self.max_len}: "
                "cut the histories or build it with a larger max_len"
            )
        k = positions.shape[1]
        behind = (positions + 1).flatten()  # (batch * k,), where the masks go
        slots = F.pad(inputs_embeds, (0, 0, 0, 1)).unsqueeze(1).expand(-1, k, -1, -1).flatten(0, 1)
        masked = torch.arange(length + 1, device=slots.device) == behind.unsqueeze(1)
        rows = self._fill_in(slots, masked, behind, behind.unsqueeze(1), dropout)
        return self._told(rows).view(batch, k, inputs_embeds.shape[-1])

    def loss(
        self,
        items: Tensor,
        histories: Tensor,
        lengths: Tensor,
        targets: Tensor,
        *,
        dropout: DropoutStream,
        cross_entropy: CrossEntropy = item_cross_entropy,
    ) -> Tensor:
        """Cross-entropy of masked items: the mean over the masks of a sequence, then over the sequences.

        A sequence is an example's history and next item. As in the paper some samples have only the last item masked,
        which is what prediction asks for: here the first examples of a batch, whose order is random anyway. Of each
        other one, the share `cloze_share`, every item is masked with probability `mask_ratio`, the next item where
        the draw masks none.
        """
        count = len(targets)
        plain = count - int(count * self.config.cloze_share)
        total = items.new_zeros(())
        if plain:
            first = super().loss(
                items,
                histories[:plain],
                lengths[:plain],
                targets[:plain],
                dropout=dropout,
                cross_entropy=cross_entropy,
            )
            total = total + first * (plain / count)
        if plain < count:
            cloze = self._cloze_loss(
                items, histories[plain:], lengths[plain:], targets[plain:], dropout, cross_entropy
            )
            total = total + cloze * ((count - plain) / count)
        return total

    def _cloze_loss(
        self,
        items: Tensor,
        histories: Tensor,
        lengths: Tensor,
        targets: Tensor,
        dropout: DropoutStream,
        cross_entropy: CrossEntropy,
    ) -> Tensor:
        last = lengths.unsqueeze(1)
        sequences = F.pad(histories, (0, 1)).scatter(1, last, targets.unsqueeze(1))
        slots = torch.arange(sequences.shape[1], device=items.device)
        masked = self._drawn(sequences.shape, items, dropout) & (slots <= last)
        masked |= (slots == last) & ~masked.any(dim=1, keepdim=True)
        # the masks of a sequence first, and as many columns as the sequence with the most of them has
        most = int(masked.sum(dim=1).max())
        asked = masked.long().sort(dim=1, descending=True, stable=True).indices[:, :most]
        real = masked.gather(1, asked)
        rows = self._fill_in(look_up(items, sequences), masked, lengths, asked, dropout, real)
        losses = cross_entropy(self._told(rows[real]), items, sequences.gather(1, asked)[real])
        share = (real / real.sum(dim=1, keepdim=True)).to(losses.dtype)[real]
        return (losses * share).sum() / len(targets)

    def _drawn(self, shape: torch.Size, like: Tensor, dropout: DropoutStream) -> Tensor:
        """Each position with probability `mask_ratio`."""
        if self.config.mask_ratio == 0:
            return torch.zeros(shape, dtype=torch.bool, device=like.device)
        return dropout.mask(shape, self.config.mask_ratio, dtype=like.dtype, device=like.device) == 0

    def _fill_in(
        self,
        slots: Tensor,  # (batch, length, hidden + 1), the item table's rows
        masked: Tensor,  # (batch, length) bool, which of them are masks
        last: Tensor,  # (batch,), the last one that is seen
        asked: Tensor,  # (batch, k), whose outputs are asked for
        dropout: DropoutStream | None,
        real: Tensor | None = None,  # (batch, k) bool, all where there is none: the others are not read
    ) -> Tensor:  # (batch, k, hidden), what the blocks make of them
        length = slots.shape[1]
        places = torch.arange(length, device=last.device)
        if self.config.positions_from == "last":
            places = (last.unsqueeze(1) - places).clamp(min=0)
        embeds = torch.where(masked.unsqueeze(-1), self.mask_embedding, slots[..., :-1])
        embeds = embeds + look_up(self.position_embeddings, places)
        shape = self._blocks_shape()
        if has_transformer_encoder(shape, embeds):
            wanted = asked if real is None else asked.masked_fill(~real, -1)
            positions = torch.cat([wanted, last.unsqueeze(1)], dim=1)
            return transformer_encoder(self._blocks_vector(), embeds, positions, shape, dropout=dropout)
        hidden = self.norm(embeds)
        if dropout is not None:
            hidden = dropout(hidden, self.config.hidden_dropout)
        seen = causal_bias(last.unsqueeze(1), length, hidden.dtype)  # (batch, 1, length)
        *first, final = self.blocks
        for block in first:
            hidden = block(hidden, hidden, seen.expand(-1, length, -1), dropout)
        rows = hidden.gather(1, asked.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        outputs: Tensor = final(hidden, rows, seen.expand(-1, asked.shape[1], -1), dropout)
        return outputs

    def _told(self, rows: Tensor) -> Tensor:
        """What is scored against the item table, (..., hidden + 1), of what the blocks made of masks."""
        return F.pad(self.output_norm(F.gelu(self.output(rows))), (0, 1), value=1.0)

    def _blocks_shape(self) -> EncoderShape:
        config = self.config
        return EncoderShape(
            positions=config.max_len + 1,
            width=config.hidden,
            inner=config.inner,
            heads=config.heads,
            layers=config.layers,
            hidden_dropout=config.hidden_dropout,
            attention_dropout=config.attention_dropout,
            bidirectional=True,
        )

    def _blocks_vector(self) -> Tensor:
        """The parameters of the blocks as `transformer_encoder` takes them: no positions, which its inputs have."""
        tensors: list[Tensor] = [torch.zeros_like(self.position_embeddings), self.norm.weight, self.norm.bias]
        for block in self.blocks:
            assert isinstance(block, Block)
            tensors += block.tensors()
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
