"""Figures of RecBole's own learners on the full data, by RecBole's own split, training and ranking.

    python benchmarks/beside_recbole.py ml-100k.inter SASRec --seed 0

in an environment of its own: torch, numpy below 2, pandas below 3, scipy, scikit-learn, tensorboard, plotly, tabulate,
texttable, colorlog, colorama, psutil, pyyaml, tqdm, and by `--no-deps` recbole 1.2.1 and thop. Sizes and dropout are
the defaults of `td3_fast.learners`; the loss is full cross-entropy, the best epoch is chosen by validation MRR@10 among
100 sampled items, as for the row `full` of an evaluation.
"""

import argparse
import json
import sys
import time
import types
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description="RecBole's own learners on a RecBole file.")
    parser.add_argument("data", type=Path)
    parser.add_argument("learner", choices=SIZES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=200, help="at most")
    parser.add_argument("--batch-size", type=int, default=512)
    given = parser.parse_args()

    # what its search of hyperparameters alone needs
    sys.modules.setdefault("ray", types.SimpleNamespace(tune=None))  # type: ignore[arg-type]
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    torch.autograd.set_detect_anomaly(False)  # which importing one of its models switches on
    load = torch.load  # a checkpoint of RecBole's holds its configuration
    torch.load = lambda *args, **named: load(*args, **{"weights_only": False, **named})

    folder = Path("recbole") / given.data.stem
    folder.mkdir(parents=True, exist_ok=True)
    (folder / given.data.name).write_bytes(given.data.read_bytes())
    scores = {}
    for mode in ("uni100", "full"):
        config = Config(
            model=given.learner,
            dataset=given.data.stem,
            config_dict={
                **SIZES[given.learner],
                "data_path": "recbole",
                "checkpoint_dir": f"recbole/saved-{given.learner}-{given.seed}",
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "MAX_ITEM_LIST_LENGTH": 50,
                "loss_type": "CE",
                "train_neg_sample_args": None,
                "learning_rate": 1e-3,
                "train_batch_size": given.batch_size,
                "eval_batch_size": 4096,
                "epochs": given.epochs,
                "stopping_step": 10,
                "eval_args": {
                    "split": {"LS": "valid_and_test"},
                    "order": "TO",
                    "group_by": "user",
                    "mode": mode,
                },
                "metrics": ["Hit", "NDCG", "MRR"],
                "topk": [5, 10, 20],
                "valid_metric": "MRR@10",
                "metric_decimal_place": 6,
                "seed": given.seed,
                "reproducibility": True,
                "use_gpu": False,
                "show_progress": False,
                "state": "WARNING",
            },
        )
        init_seed(given.seed, True)
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
        if mode == "uni100":
            init_seed(given.seed, True)
            model = get_model(given.learner)(config, train.dataset).to("cpu")
            trainer = get_trainer(config["MODEL_TYPE"], given.learner)(config, model)
            began = time.perf_counter()
            trainer.fit(train, valid, verbose=False, saved=True, show_progress=False)
            seconds = time.perf_counter() - began
            saved = trainer.saved_model_file
        else:
            trainer = get_trainer(config["MODEL_TYPE"], given.learner)(config, model)
        scores[mode] = dict(trainer.evaluate(test, load_best_model=True, model_file=saved))
    print(json.dumps({"learner": given.learner, "seed": given.seed, "seconds": round(seconds), **scores}))


if __name__ == "__main__":
    main()
