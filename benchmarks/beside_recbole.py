"""RecBole's own learners on the full data: split and trained by RecBole, ranked as this project ranks.

    python benchmarks/beside_recbole.py ml-100k.inter SASRec --seed 0

in an environment of its own: td3_fast, numpy below 2, pandas below 3, scipy, scikit-learn, tensorboard, plotly,
tabulate, texttable, colorlog, colorama, psutil, pyyaml, tqdm, and by `--no-deps` recbole 1.2.1 and thop. Sizes and
dropout are the defaults of `td3_fast.learners`, the loss is full cross-entropy, and the best epoch has the highest
MRR@10 among 100 items that RecBole draws. It draws them from all items, those of the user's history too, and ranks
among these as well, so that its own test figures, printed beside, are of a harder task.
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
LENGTH = 50  # of histories

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
    """What RecBole is told; mode: "uni100" or "full", by which it ranks."""
    return {
        **SIZES[learner],
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": LENGTH,
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
        "state": "INFO",
    }


def ranked(model: Any, token2id: dict[str, int], log: Path) -> dict[str, dict[str, float]]:
    """The test figures of a RecBole learner by the protocols of this project, with the negatives of `--seed 0`."""
    import torch
    from recbole.data.interaction import Interaction

    from td3_fast.data import cut_batch, leave_one_out, load_interactions
    from td3_fast.metrics import metrics_from_ranks
    from td3_fast.ops import derive_seed
    from td3_fast.training import Ranker

    split = leave_one_out(load_interactions(log))
    ranker = Ranker(split.test, seed=derive_seed(0, "ranker"))
    ours = [0, *(token2id[token] for token in split.interactions.item_ids[1:])]  # our number -> RecBole's
    rows = torch.arange(len(split.test))
    histories, lengths, _ = cut_batch(split.test, rows.numpy(), LENGTH)
    histories = torch.nn.functional.pad(torch.tensor(ours)[histories], (0, LENGTH - histories.shape[1]))
    model.eval()
    with torch.no_grad():
        scores = model.full_sort_predict(
            Interaction({model.ITEM_SEQ: histories, model.ITEM_SEQ_LEN: lengths})
        )[:, ours]
    every = torch.eye(len(ours))  # of which each item's score is the product
    return {p: metrics_from_ranks(ranker._rank(scores, every, rows, p)) for p in ("uni100", "full")}


def figures(
    log: Path, learner: str, *, seed: int, epochs: int, batch_size: int, folder: Path
) -> dict[str, Any]:
    """Seconds of training, the test figures, and RecBole's own of them."""
    # RecBole imports ray wherever it is used, for its search of hyperparameters alone, which is not used here
    sys.modules.setdefault("ray", types.SimpleNamespace(tune=None))  # type: ignore[arg-type]
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_logger, init_seed

    # RecBole reads back the checkpoint that it has just written, which holds an object of its configuration
    load = torch.load
    torch.load = lambda *args, **named: load(*args, **{"weights_only": False, **named})
    data = folder / DATA / f"{DATA}.inter"
    data.parent.mkdir()
    opened = gzip.open if log.suffix == ".gz" else open
    with opened(log, "rb") as stream:
        data.write_bytes(stream.read())
    found: dict[str, Any] = {}
    model, saved, tokens = None, "", {}
    for mode in ("uni100", "full"):
        config = Config(learner, DATA, config_dict=options(learner, folder, seed, epochs, batch_size, mode))
        init_seed(seed, reproducibility=True)
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
        tokens = dataset.field2token_id["item_id"]
        if model is None:
            init_logger(config)  # says how training goes
            model = get_model(learner)(config, train.dataset)
        trainer = get_trainer(config["MODEL_TYPE"], learner)(config, model)
        if not saved:
            torch.autograd.set_detect_anomaly(False)  # which importing one of its models has switched on
            began = time.perf_counter()
            trainer.fit(train, valid, verbose=True, saved=True, show_progress=False)
            found["seconds"] = round(time.perf_counter() - began)
            saved = trainer.saved_model_file
        own = trainer.evaluate(test, load_best_model=True, model_file=saved)
        found[f"RecBole's own, {mode}"] = {name: own[name] for name in ("hit@10", "ndcg@10")}
    return found | ranked(model, tokens, log)


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
