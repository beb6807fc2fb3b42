"""Operations that meet every item of a catalogue, without a tensor of rows x items."""

from td3_fast.ops.adam import has_one_pass_adam, one_pass_adam_adjoint_, one_pass_adam_step_
from td3_fast.ops.additive_attention import additive_attention, additive_attention_reference
from td3_fast.ops.dropout import (
    DropoutStream,
    derive_seed,
    derive_seeds,
    random_words,
    random_words_of_sites,
    seed_path,
    seeded_generator,
)
from td3_fast.ops.gru import gru, gru_reference
from td3_fast.ops.inner_gradient import (
    InnerGradient,
    for_inner_gradient,
    gradient_is_enough,
    inner_gradient,
    known_gradient,
)
from td3_fast.ops.inner_steps import (
    KeptSteps,
    StepTensors,
    has_inner_steps,
    inner_steps_,
    kept_inner_steps,
    pull_back_inner_steps_,
)
from td3_fast.ops.item_cross_entropy import (
    ItemLogsumexp,
    item_cross_entropy,
    item_logsumexp,
    kept_score_bytes,
)
from td3_fast.ops.library import FusedUnavailableWarning, build_facts, has_fused
from td3_fast.ops.look_up import look_up
from td3_fast.ops.mix_items import item_probabilities, mix_items, mix_items_transposed, weigh_products
from td3_fast.ops.next_item_gradient import (
    EXAMPLES_AT_ONCE,
    SMALL_TABLE,
    has_next_item_gradient,
    next_item_gradient,
)
from td3_fast.ops.precision import full_precision
from td3_fast.ops.soft_embedding import SoftEmbedding, soft_embedding
from td3_fast.ops.target_rank import target_rank
from td3_fast.ops.transformer_encoder import (
    EncoderShape,
    encode_histories,
    has_transformer_encoder,
    transformer_encoder,
)
from td3_fast.ops.tucker import Normalize, normalized_embedding, tucker_queries, tucker_soft_embedding

__all__ = [
    "EXAMPLES_AT_ONCE",
    "SMALL_TABLE",
    "DropoutStream",
    "EncoderShape",
    "FusedUnavailableWarning",
    "InnerGradient",
    "ItemLogsumexp",
    "KeptSteps",
    "Normalize",
    "SoftEmbedding",
    "StepTensors",
    "additive_attention",
    "additive_attention_reference",
    "build_facts",
    "derive_seed",
    "derive_seeds",
    "encode_histories",
    "for_inner_gradient",
    "full_precision",
    "gradient_is_enough",
    "gru",
    "gru_reference",
    "has_fused",
    "has_inner_steps",
    "has_next_item_gradient",
    "has_one_pass_adam",
    "has_transformer_encoder",
    "inner_gradient",
    "inner_steps_",
    "item_cross_entropy",
    "item_logsumexp",
    "item_probabilities",
    "kept_inner_steps",
    "kept_score_bytes",
    "known_gradient",
    "look_up",
    "mix_items",
    "mix_items_transposed",
    "next_item_gradient",
    "normalized_embedding",
    "one_pass_adam_adjoint_",
    "one_pass_adam_step_",
    "pull_back_inner_steps_",
    "random_words",
    "random_words_of_sites",
    "seed_path",
    "seeded_generator",
    "soft_embedding",
    "target_rank",
    "transformer_encoder",
    "tucker_queries",
    "tucker_soft_embedding",
    "weigh_products",
]
