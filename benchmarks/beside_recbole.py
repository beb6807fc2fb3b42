"""Figures of RecBole's own learners on the full data, by RecBole's own split, training and ranking.

    python benchmarks/beside_recbole.py ml-100k.inter SASRec --seed 0

in an environment of its own: torch, numpy below 2, pandas below 3, scipy, scikit-learn, tensorboard, plotly, tabulate,
texttable, colorlog, colorama, psutil, pyyaml, tqdm, and by `--no-deps` recbole 1.2.1 and thop. Sizes and dropout are
the defaults of `td3_fast.learners`; the loss is full cross-entropy, the best epoch is chosen by validation MRR@10 among
100 sampled items, as for the row `full` of an evaluation.
"""

import argparse
import contextlib
import gzip
import json
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

DATA = "given"  # no name for which RecBole has a file of its own

SIZES = {
    "SASRec": {
        "hidden_size": 32, "inner_size": 64, "n_layers": 1, "n_heads": 1, "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.5, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02,
    },
    "GRU4Rec": {"embedding_size": 32, "hidden_size": 64, "num_layers": 1, "dropout_prob": 0.3},
    "NARM": {"embedding_size": 32, "hidden_size": 64, "n_layers": 1, "dropout_probs": [0.25, 0.5]},
    "BERT4Rec": {
        "hidden_size": 32, "inner_size": 128, "n_layers": 2, "n_heads": 2, "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02,
        "mask_ratio": 0.2, "ft_ratio": 0.5,
    },
}  # fmt: skip


def options(learner: str, folder: Path, seed: int, epochs: int, batch_size: int, mode: str) -> dict[str, Any]:
    return {
        **SIZES[learner],
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": 50,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "learning_rate": 1e-3,
        "train_batch_size": batch_size,
        "eval_batch_size": 4096,
        "epochs": epochs,
        "stopping_step": 10,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": mode},
        "metrics": ["Hit", "NDCG", "MRR"],
        "topk": [5, 10, 20],
        "valid_metric": "MRR@10",
        "metric_decimal_place": 6,
        "seed": seed,
        "use_gpu": False,
        "show_progress": False,
        "state": "WARNING",
    }


def figures(
    log: Path, learner: str, *, seed: int, epochs: int, batch_size: int, folder: Path
) -> dict[str, Any]:
    """Seconds of training, and the test figures among 100 items and among all."""
    # what its search of hyperparameters alone needs
    sys.modules.setdefault("ray", types.SimpleNamespace(tune=None))  # type: ignore[arg-type]
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    load = torch.load  # a checkpoint of RecBole's holds its configuration
    torch.load = lambda *args, **named: load(*args, **{"weights_only": False, **named})
    data = folder / DATA / f"{DATA}.inter"
    data.parent.mkdir()
    opened = gzip.open if log.suffix == ".gz" else open
    with opened(log, "rb") as stream:
        data.write_bytes(stream.read())
    found: dict[str, Any] = {}
    model, saved = None, ""
    for mode in ("uni100", "full"):
        config = Config(learner, DATA, config_dict=options(learner, folder, seed, epochs, batch_size, mode))
        init_seed(seed, reproducibility=True)
        train, valid, test = data_preparation(config, create_dataset(config))
        if model is None:
            model = get_model(learner)(config, train.dataset)
        trainer = get_trainer(config["MODEL_TYPE"], learner)(config, model)
        if not saved:
            torch.autograd.set_detect_anomaly(False)  # which importing one of its models has switched on
            began = time.perf_counter()
            trainer.fit(train, valid, verbose=False, saved=True, show_progress=False)
            found["seconds"] = round(time.perf_counter() - began)
            saved = trainer.saved_model_file
        found[mode] = dict(trainer.evaluate(test, load_best_model=True, model_file=saved))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="RecBole's own learners on a RecBole file.")
    parser.add_argument("data", type=Path, help="plain or gzipped")
    parser.add_argument("learner", choices=SIZES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=200, help="at most")
    parser.add_argument("--batch-size", type=int, default=512)
    given = parser.parse_args()
    log = given.data.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # where RecBole leaves its logs
        found = figures(
            log,
            given.learner,
            seed=given.seed,
            epochs=given.epochs,
            batch_size=given.batch_size,
            folder=Path(folder),
        )
    print(json.dumps({"learner": given.learner, "seed": given.seed, **found}))


if __name__ == "__main__":
    main()
