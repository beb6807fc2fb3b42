"""Interaction data: reading, splitting, batching, generating."""

from td3_fast.data.batches import (
    Batch,
    ExamplesOnDevice,
    FewNegativesWarning,
    cut_batch,
    history_csr,
    sample_negatives,
    shuffled,
)
from td3_fast.data.catalogue import DATASETS, Dataset, FetchError, absent, fetch, find_dataset, resolve
from td3_fast.data.generator import generate_interactions
from td3_fast.data.interactions import (
    Interactions,
    Report,
    check_interactions,
    filter_interactions,
    load_interactions,
    write_interactions,
)
from td3_fast.data.raw_log import DataError
from td3_fast.data.readers import FORMATS
from td3_fast.data.split import Examples, Split, every_prefix, leave_one_out

__all__ = [
    "DATASETS",
    "FORMATS",
    "Batch",
    "DataError",
    "Dataset",
    "Examples",
    "ExamplesOnDevice",
    "FetchError",
    "FewNegativesWarning",
    "Interactions",
    "Report",
    "Split",
    "absent",
    "check_interactions",
    "cut_batch",
    "every_prefix",
    "fetch",
    "filter_interactions",
    "find_dataset",
    "generate_interactions",
    "history_csr",
    "leave_one_out",
    "load_interactions",
    "resolve",
    "sample_negatives",
    "shuffled",
    "write_interactions",
]
