"""Evaluations in a folder, each finished run of which is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from td3_fast.artefact import from_json, tensors_sha256
from td3_fast.checkpoint import differences
from td3_fast.data import Split
from td3_fast.distill_config import Semantics
from td3_fast.evaluate import (
    ROWS,
    EvaluateConfig,
    Row,
    Scores,
    evaluate,
    has_own_positions,
    learner_for,
)
from td3_fast.files import make_folder
from td3_fast.learners import Learner
from td3_fast.metrics import mean_and_sd
from td3_fast.ops import derive_seed
from td3_fast.report import JsonLines, read_results, write_results
from td3_fast.run_folder import RESULTS, RUNS, TUNING, RunError, Watcher, draw, environment
from td3_fast.summary import Summary
from td3_fast.training import FitConfig, Pretrained, Ranker
from td3_fast.tune import Tried, TuneConfig, tune


@dataclass(kw_only=True)
class EvaluateRun:
    """An evaluation of one summary in one folder, each finished run of which is kept for later.

    learner: another class than the summary was distilled for; pretrained: for a summary without metadata, of which
    only the size counts.

    Raises:
        RunError: the data are not those of the summary.
    """

    folder: Path
    summary: Summary
    split: Split
    source: str
    seed: int = 0
    rows: tuple[str, ...] = ROWS
    seeds: int = 3
    fit: FitConfig | None = None  # None: as the learner was pretrained
    max_epochs: int | None = None  # instead of that of `fit`
    learner: str | None = None  # None: what the summary was distilled for
    pretrained: Pretrained | None = None  # None: the summary says how it is used
    tune: TuneConfig | None = None  # None: learners train on the summary as it was distilled for
    watcher: Watcher = field(default_factory=Watcher)

    def __post_init__(self) -> None:
        metadata = self.summary.metadata
        self.teacher = None
        if self.pretrained is not None:
            self.teacher = self.pretrained.learner(share_items=True)
        elif self.learner is not None:
            self.teacher = learner_for(self.summary, name=self.learner)
        made_with = {} if metadata is None else metadata.settings
        if self.fit is None:
            self.fit = fit_config_of(self.summary)
        if self.max_epochs is not None:
            self.fit = replace(self.fit, max_epochs=self.max_epochs)
        semantics = made_with.get("distill", {}).get("semantics", asdict(Semantics()))
        semantics = from_json(Semantics, semantics, "settings.distill.semantics")
        self.config = EvaluateConfig(
            seeds=self.seeds,
            rows=self.rows,
            fit=self.fit,
            redraw_negatives=semantics.redraw_negatives,
            carry_embeddings=semantics.carry_embeddings,
            ddof=semantics.ddof,
        )
        if self.tune is not None and "summary" not in self.rows:
            raise ValueError("only the row summary is tuned: name it among the rows, or tune nothing")
        check_data(self.summary, self.split, self.source)
        self._tried: list[Tried] | None = None

    def tried(self) -> list[Tried]:
        """The ways to train on the summary that `tune` compares, the best first; the folder keeps finished trials.

        Raises:
            ValueError: there is no `tune`, or the summary has no metadata.
            Stopped: the watcher asked for it.
        """
        if self.tune is None:
            raise ValueError("nothing is to be tuned: give `tune`")
        if self._tried is not None:
            return self._tried
        settings, keys = self._options_to_try(), self._trial_keys()
        make_folder(self.folder)
        with JsonLines(self.folder / TUNING) as trials:
            known: dict[tuple[int, int], Scores] = {
                (keys.index(entry["settings"]), entry["run"]): entry["scores"]
                for entry in trials.entries
                if entry.get("settings") in keys
            }

            def keep(trial: tuple[int, int], scores: Scores) -> None:
                number, run = trial
                options = {"options": settings[number]}
                trials.write({"settings": keys[number], **options, "run": run, "scores": scores})

            self._tried = tune(
                self.summary,
                self.split,
                learner=self.learner,
                config=self.tune,
                seed=self.seed,
                known=known,
                on_trial=keep,
                progress=self.watcher.interruptible,
            )
        return self._tried

    def _options_to_try(self) -> list[dict[str, Any]]:
        assert self.tune is not None
        if self.summary.metadata is None:
            raise ValueError("the summary does not say how it is used: set `summary.metadata`")
        return self.tune.settings(self.summary.metadata.training.fit_options())

    def _trial_keys(self) -> list[str]:
        assert self.tune is not None
        identity = self._identity()
        common = {name: identity[name] for name in ("summary", "data", "seed")} | self._other_learner()
        return [
            _hash({**common, "options": options, "protocol": self.tune.protocol})
            for options in self._options_to_try()
        ]

    def evaluate(self, *, overwrite: bool = False) -> list[Row]:
        """The rows, also written into the folder's results, and drawn.

        overwrite: results of something else are replaced, and no finished run is taken from there.

        Raises:
            RunError: the folder holds results of something else, unless `overwrite`.
            Stopped: the watcher asked for it; finished runs are kept.
        """
        make_folder(self.folder)
        path = self.folder / RESULTS
        if overwrite:
            self._forget()
        distillation = None
        if path.exists() and overwrite and not _are_results(path):
            path.unlink()
        if path.exists():
            before = read_results(path)
            own = self._identity()
            if all(
                before["settings"].get(name) == own.get(name)
                for name in ("summary", "data", "size", "learner")
            ):
                distillation = before.get("distillation")
            elif overwrite:
                path.unlink()  # until there are new ones it would be in the way of what goes on here
            else:
                raise RunError(
                    f"{path} holds results of something else: choose another folder, or --overwrite them"
                )
        rows = self.rows_now()
        write_results(path, rows, settings=self.settings(), distillation=distillation)
        draw(self.folder, self.watcher)
        return rows

    def rows_now(self) -> list[Row]:
        """The rows, with runs that the folder's earlier evaluations have finished taken from there."""
        fit_options: dict[str, Any] | None = None if self.pretrained is None else {}
        key = key_of_summary = _hash(self._identity())
        if self.tune is not None:
            fit_options = self.tried()[0].options
            key_of_summary = _hash({**self._identity(), "fit_options": fit_options})
        with JsonLines(self.folder / RUNS) as runs:
            finished = [
                entry
                for entry in runs.entries
                if entry.get("settings") == (key_of_summary if entry["row"] == "summary" else key)
                and entry["row"] in self.rows
            ]
            known: dict[tuple[str, int], Scores] = {
                (entry["row"], entry["run"]): entry["scores"] for entry in finished
            }
            made_with = environment(self.summary.item_factors.device)
            say_made_elsewhere(finished, made_with, self.watcher)

            def keep(row: str, run: int, scores: Scores) -> None:
                settings = key_of_summary if row == "summary" else key
                line = {"settings": settings, "row": row, "run": run, "scores": scores}
                runs.write({**line, "made_with": made_with})

            return evaluate(
                self.summary,
                self.split,
                self.teacher,
                fit_options=fit_options,
                config=self.config,
                seed=self.seed,
                known=known,
                on_run=keep,
                progress=self.watcher.interruptible,
            )

    def _forget(self) -> None:
        """Take what this evaluation would make again out of the folder's finished runs and trials."""
        own = _hash(self._identity())
        trials: set[str] = set()
        summaries = {own}
        if self.tune is not None:
            trials = set(self._trial_keys())
            summaries |= {
                _hash({**self._identity(), "fit_options": options}) for options in self._options_to_try()
            }

        def keep(entry: Mapping[str, Any]) -> bool:
            made_here = summaries if entry.get("row") == "summary" else {own}
            return entry.get("settings") not in made_here or entry.get("row") not in self.rows

        if (self.folder / RUNS).exists():
            JsonLines(self.folder / RUNS, keep=keep).close()
        if trials and (self.folder / TUNING).exists():
            JsonLines(self.folder / TUNING, keep=lambda entry: entry.get("settings") not in trials).close()

    def settings(self) -> dict[str, Any]:
        """What a reader of the results has to know."""
        return {
            "source": self.source,
            "data_name": self.split.interactions.name,
            "rows": list(self.config.rows),
            "seeds": self.config.seeds,
            "ddof": self.config.ddof,
            **self._identity(),
            **self._tuned(),
            "environment": environment(self.summary.item_factors.device),
        }

    def _tuned(self) -> dict[str, Any]:
        """How learners were trained on the summary, where that was chosen, and what it was chosen from."""
        if self._tried is None or self.tune is None:
            return {}
        return {
            "fit_options": self._tried[0].options,
            "tune": {"config": asdict(self.tune), "tried": [asdict(tried) for tried in self._tried]},
        }

    def _identity(self) -> dict[str, Any]:
        """All that the score of a single run depends on."""
        metadata = self.summary.metadata
        tensors = self.summary.state_dict() if self.pretrained is None else self.pretrained.best
        config = asdict(self.config)
        return {
            "summary": tensors_sha256(tensors),
            "size": self.summary.size,
            "data": self.split.interactions.fingerprint,
            "seed": self.seed,
            "fit_options": {} if metadata is None else metadata.training.fit_options(),
            **{name: value for name, value in config.items() if name not in ("rows", "seeds", "ddof")},
            **self._other_learner(),
        }

    def _other_learner(self) -> dict[str, Any]:
        """The learner's class and hyperparameters where they are not those that the summary was distilled for."""
        metadata = self.summary.metadata
        if self.teacher is None or metadata is None:
            return {}
        name, config = type(self.teacher).__name__, self.teacher.hyperparameters()
        if not has_own_positions(self.summary, name):
            return {}
        # runs of before, whose learners all shared their positions, have no such entry
        drawn = {} if self.teacher.position_embeddings is None else {"positions": "drawn"}
        return {"learner": name, "learner_config": config, **drawn}


def say_made_elsewhere(
    finished: Iterable[Mapping[str, Any]], made_with: Mapping[str, Any], watcher: Watcher
) -> None:
    """Tell the user of kept runs that other versions, threads or devices have made."""
    others = [entry["made_with"] for entry in finished if entry.get("made_with", made_with) != made_with]
    if others:
        found = "; ".join(differences(others[0], made_with))
        watcher.say(
            f"note: {len(others)} kept runs were made otherwise, {found}; --overwrite makes them anew"
        )


def _are_results(path: Path) -> bool:
    """Whether they are an evaluation's."""
    try:
        read_results(path)
    except ValueError:
        return False
    return True


def _hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def fit_config_of(summary: Summary) -> FitConfig:
    """How the learner that a summary came from was trained on the log; the defaults where it does not say."""
    made_with = {} if summary.metadata is None else summary.metadata.settings
    fit = made_with.get("pretrained", {}).get("pretrain", {}).get("fit")
    # a summary that is older than a field of it was made with what is now the default
    return from_json(FitConfig, {**asdict(FitConfig()), **(fit or {})}, "settings.pretrain.fit")


def check_data(summary: Summary, split: Split, source: str) -> None:
    """Refuse data, which the user called `source`, that a summary was not distilled from.

    Raises:
        ValueError: the items are others, or are numbered in another way.
        RunError: the interactions are others.
    """
    if summary.metadata is None:
        return
    summary.metadata.check_items(split.interactions.item_ids.tolist())
    origin = summary.metadata.preprocessing
    if origin.fingerprint != split.interactions.fingerprint:
        raise RunError(
            f"{source} holds other interactions than the summary was distilled from, which were "
            f"{origin.data!r} with the filters {origin.filters or 'none'}; data of that name from elsewhere, "
            "or with its rows in another order, may differ"
        )


def score(learner: Learner, split: Split, *, seed: int = 0) -> list[Row]:
    """The test metrics of one learner, in rows of its class's name; `uni100` draws its negatives as `evaluate` does."""
    ranker = Ranker(split.test, seed=derive_seed(seed, "ranker"))
    name = type(learner).__name__
    return [
        Row(
            name=name,
            protocol=protocol,
            metrics=mean_and_sd([metrics]),
            recovery={},
            runs={metric: [value] for metric, value in metrics.items()},
        )
        for protocol, metrics in ranker.metrics(learner).items()
    ]
