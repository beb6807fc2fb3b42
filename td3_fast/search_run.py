"""A model search in a folder, trial by trial, to be stopped at any time and gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from rich.box import SIMPLE_HEAD
from rich.table import Table

from td3_fast.artefact import tensors_sha256
from td3_fast.data import Split
from td3_fast.evaluate import described_learner
from td3_fast.evaluate_run import check_data, say_made_elsewhere
from td3_fast.files import make_folder, write_json
from td3_fast.report import JsonLines, in_percent, versions
from td3_fast.run_folder import RESULTS, RunError, Watcher, environment
from td3_fast.search import (
    Candidate,
    RankBy,
    SearchConfig,
    Source,
    Standing,
    Trial,
    TrialKey,
    agreement,
    grid,
    search,
    standings,
)
from td3_fast.summary import Summary

TRIALS = "trials.jsonl"


@dataclass(kw_only=True)
class SearchRun:
    """One summary, its data, and a folder that keeps the finished trials and `results.json`.

    source: what the user called the data.

    Raises:
        ValueError: the data are not those of the summary, or the summary does not say how it is used.
    """

    folder: Path
    summary: Summary
    split: Split
    source: str
    candidates: Sequence[Candidate] | None = None  # None: `grid(summary)`
    config: SearchConfig = field(default_factory=SearchConfig)
    seed: int = 0
    watcher: Watcher = field(default_factory=Watcher)

    def __post_init__(self) -> None:
        check_data(self.summary, self.split, self.source)
        if self.candidates is None:
            self.candidates = grid(self.summary, start=self.config.start)

    def run(self, *, overwrite: bool = False) -> list[Standing]:
        """The candidates, best first; `results.json` is written anew after each trial.

        overwrite: what is there is replaced, finished trials of these candidates included.

        Raises:
            RunError: the folder holds results of something else, unless `overwrite`.
            Stopped: the watcher asked for it; finished trials are kept.
        """
        assert self.candidates is not None
        make_folder(self.folder)
        path = self.folder / RESULTS
        if path.exists() and not (self.folder / TRIALS).exists() and not overwrite:
            raise RunError(
                f"{path} is of something else than a search: choose another folder, or --overwrite"
            )
        sources: tuple[Source, ...] = ("summary", "full")
        keys = {(c.name, source): self._key(c, source) for c in self.candidates for source in sources}

        def kept(entry: Mapping[str, Any]) -> bool:
            key = keys.get((entry.get("candidate", ""), entry.get("source", "summary")))
            made_here = entry.get("source") == "summary" or self.config.full_seeds > 0
            return not (overwrite and made_here) or entry.get("settings") != key

        made_with = environment(self.summary.item_factors.device)
        with JsonLines(self.folder / TRIALS, keep=kept) as lines:
            say_made_elsewhere(
                (entry for entry in lines.entries if entry.get("settings") in keys.values()),
                made_with,
                self.watcher,
            )
            trials: dict[TrialKey, Trial] = {
                (entry["candidate"], entry["source"], entry["run"]): Trial(
                    entry["scores"], entry["seconds"], entry.get("loss")
                )
                for entry in lines.entries
                if entry.get("settings") == keys.get((entry["candidate"], entry["source"]))
                and (entry["source"] == "full" or "loss" in entry)  # earlier revisions kept none
            }

            def keep(where: TrialKey, trial: Trial) -> None:
                name, source, run = where
                entry = {"settings": keys[name, source], "candidate": name, "source": source, "run": run}
                if trial.loss is not None:
                    entry["loss"] = trial.loss
                seconds = round(trial.seconds, 3)
                lines.write({**entry, "scores": trial.scores, "seconds": seconds, "made_with": made_with})
                trials[where] = trial
                self._write(trials)

            found = search(
                self.summary,
                self.split,
                self.candidates,
                config=self.config,
                seed=self.seed,
                known=trials,
                on_trial=keep,
                progress=self.watcher.interruptible,
            )
            self._write(trials)
        return found

    def _write(self, trials: dict[TrialKey, Trial]) -> None:
        assert self.candidates is not None
        found = standings(self.candidates, trials, self.config)
        config = self.config
        judged = {
            rank_by: agreement(found, protocol=config.protocol, metric=config.metric, rank_by=rank_by)
            for rank_by in get_args(RankBy)
        }
        own = judged[config.rank_by]
        results = {
            "candidates": [asdict(standing) for standing in found],
            "agreement": None if own is None else asdict(own),
            "agreements": {name: None if one is None else asdict(one) for name, one in judged.items()},
            "settings": {
                "source": self.source,
                "data_name": self.split.interactions.name,
                "searched": len(self.candidates),
                "seeds": self.config.seeds,
                "full_seeds": self.config.full_seeds,
                "protocol": self.config.protocol,
                "metric": self.config.metric,
                "rank_by": self.config.rank_by,
                **self._identity(),
                "environment": environment(self.summary.item_factors.device),
            },
            "versions": versions(),
        }
        write_json(self.folder / RESULTS, results)

    def _key(self, candidate: Candidate, source: Source) -> str:
        """Of all that a trial depends on; one on the full data does not on the summary and how that is trained on."""
        learner, hyperparameters = described_learner(
            self.summary, name=candidate.learner, hyperparameters=candidate.hyperparameters
        )
        identity = {**self._identity(), "learner": learner, "learner_config": hyperparameters}
        if source == "full":
            del identity["summary"], identity["fit_options"], identity["start"]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def _identity(self) -> dict[str, Any]:
        """All that a trial depends on besides its candidate."""
        metadata = self.summary.metadata
        assert metadata is not None
        return {
            "summary": tensors_sha256(self.summary.state_dict()),
            "data": self.split.interactions.fingerprint,
            "seed": self.seed,
            "fit_options": metadata.training.fit_options() | self.config.fit_changes(),
            "start": self.config.start,
            "fit": asdict(self.config.fit),
        }


def search_table(found: Sequence[Standing], config: SearchConfig) -> Table:
    """The candidates, best first: mean ± sd in percent over seeds, and the seconds that they took."""
    table = Table(
        title=f"validation {config.metric}, {config.protocol}, in %",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", justify="right")
    table.add_column("candidate")
    table.add_column("on the summary", justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    full = any(standing.full is not None for standing in found)
    if full:
        table.add_column("on full data", justify="right", no_wrap=True)
        table.add_column("seconds", justify="right", no_wrap=True)
    for place, standing in enumerate(found, start=1):
        cells = [
            _percent(standing.summary, config, config.seeds),
            f"{standing.summary_loss['mean']:.4g}",
            f"{standing.summary_seconds:.1f}",
        ]
        if full and standing.full is None:
            cells += ["", ""]
        elif standing.full is not None:
            cells += [_percent(standing.full, config, config.full_seeds), f"{standing.full_seconds:.1f}"]
        table.add_row(str(place), standing.candidate.name, *cells, style="bold" if place == 1 else None)
    return table


def _percent(means: Any, config: SearchConfig, runs: int) -> str:
    return in_percent(means[config.protocol][config.metric], runs=runs)
