"""Interaction data: reading, splitting, batching, generating."""

from td3_fast.data.batches import Batch, cut_batch, history_csr, sample_negatives, shuffled
from td3_fast.data.generator import generate_interactions
from td3_fast.data.interactions import Interactions, load_interactions
from td3_fast.data.raw_log import DataError
from td3_fast.data.readers import FORMATS
from td3_fast.data.split import Examples, Split, leave_one_out

__all__ = [
    "FORMATS",
    "Batch",
    "DataError",
    "Examples",
    "Interactions",
    "Split",
    "cut_batch",
    "generate_interactions",
    "history_csr",
    "leave_one_out",
    "load_interactions",
    "sample_negatives",
    "shuffled",
]
