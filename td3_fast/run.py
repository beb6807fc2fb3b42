"""Runs in a folder, to be interrupted at any time and continued: pretraining, distilling, evaluating."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from td3_fast.checkpoint import (
    Checkpoint,
    Settings,
    check_settings,
    describe_pretrained,
    differences,
    load_checkpoint,
    load_item_factors,
    load_pretrained,
    save_checkpoint,
    save_pretrained,
)
from td3_fast.data import Split
from td3_fast.distill import Distiller, distill, for_item_embedding
from td3_fast.distill_state import DistillState
from td3_fast.epochs import KeptEpochs, add_epoch, kept_epochs
from td3_fast.evaluate import Row
from td3_fast.evaluate_run import EvaluateRun
from td3_fast.files import make_folder
from td3_fast.learners import build_learner
from td3_fast.parallel import ALONE, LostRank, Ranks
from td3_fast.pretrain import PretrainState, pretrain
from td3_fast.recipes import Recipe
from td3_fast.report import JsonLines, read_results, write_results
from td3_fast.run_folder import (
    CHECKPOINT,
    LOG,
    PRETRAINED,
    RESULTS,
    SUMMARY,
    RunError,
    Stopped,
    Watcher,
    check_free,
    draw,
    environment,
    peak_memory_mib,
)
from td3_fast.summary import Summary, TuckerSummary, load_summary
from td3_fast.training import Pretrained, check_examples

SECONDS_BETWEEN_CHECKPOINTS = 30.0


@dataclass(kw_only=True)
class _Clock:
    """Seconds spent on each step, those before an interruption included."""

    seconds: dict[str, float] = field(default_factory=dict)
    _stage: str = ""
    _since: float = 0.0

    def start(self, stage: str) -> None:
        self._stage, self._since = stage, time.perf_counter()

    def so_far(self) -> dict[str, float]:
        """The seconds of every step up to now."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
            self._since = now
        return {stage: round(seconds, 3) for stage, seconds in self.seconds.items()}


@dataclass(kw_only=True)
class Run:
    """One data set, one recipe, one folder.

    source: what the user called the data; filters: what was left out of them, as arguments of
    `load_interactions`; ranks: the processes that distil together, in one folder that all of them see. Process 0 alone
    pretrains, writes and evaluates.
    """

    folder: Path
    split: Split
    recipe: Recipe
    seed: int
    source: str
    filters: dict[str, Any] = field(default_factory=dict)
    pretrained_from: Path | None = None
    watcher: Watcher = field(default_factory=Watcher)
    evaluation_seeds: int = 3  # of the first look at the finished summary
    keep_epochs: bool = False  # keep the summary's factors after each epoch, for runs of the next option
    # the folder of a run that kept its epochs: they are compared anew, if the two differ in how that is done alone
    same_epochs_as: Path | None = None
    ranks: Ranks = ALONE
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # that computes

    def __post_init__(self) -> None:
        self._clock = _Clock()
        self._settings: Settings = {}
        self._next_checkpoint = 0.0

    def distill(self, *, resume: bool = False, overwrite: bool = False) -> list[Row]:
        """Pretrain, or take what is pretrained already, distil, and score the summary beside the zero-step
        control. Processes other than the first take part in the second of these, and return no rows.

        resume: go on where the folder's run stopped; overwrite: remove the folder's run first, except a
        pretrained learner that fits.

        Raises:
            RunError: the folder holds a run and neither is asked for.
            CheckpointError: a file of the folder is damaged, or belongs to a run with other settings.
            Stopped: the watcher asked for it; a checkpoint is written.
            LostRank: another process has died.
        """
        if not self.ranks.first:
            self._take_part()
            return []
        checkpoint = self._claim(resume, overwrite)
        if self._complete(resume):
            self._tell_others(go=False)
            self.watcher.say(f"the run in {self.folder} is complete")
            return self._rows_of_complete()
        state = None if checkpoint is None else checkpoint.state
        if checkpoint is not None:
            self._clock.seconds = dict(checkpoint.seconds)
            self._compare_environment(checkpoint)
        with JsonLines(self.folder / LOG, keep=lambda entry: self._reached(entry, state)) as log:
            pretrained, _ = self._pretrained(state, log, overwrite)
            checkpoint = None  # what pretraining was at is freed
            state = state if isinstance(state, DistillState) else None
            if self.ranks.items.size > 1:
                pretrained = self._own_rows()
            pretrained = for_item_embedding(pretrained, self.recipe.distill)  # what it leaves out is freed
            self._tell_others(go=True)
            self._clock.start("distill")
            epochs = self._epochs_of_other()
            if epochs is not None:
                summary, state = self._choose(pretrained, epochs, log)
            else:
                summary, state = self._distill(pretrained, state, log)
        self._clock.so_far()
        summary.save(self.folder / SUMMARY)
        rows = self._first_look(summary, pretrained, state)
        # last, so that a run without it is a whole one
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return rows

    def pretrained(self, *, overwrite: bool = False) -> Pretrained:
        """Only the pretrained learner: the folder's, or made there, from a checkpoint where there is one."""
        make_folder(self.folder)
        self._settings = self.pretrain_settings()
        self._run_settings()  # refuses a learner of other data
        state = None
        path = self.folder / CHECKPOINT
        if path.exists() and not overwrite:
            checkpoint = load_checkpoint(path)
            check_settings(path, checkpoint.settings, self._settings)
            state = checkpoint.state
            self._clock.seconds = dict(checkpoint.seconds)

        def keep(entry: Mapping[str, Any]) -> bool:
            of_distillation = entry.get("event") != "pretrain"  # which the folder may hold as well
            return (of_distillation and not overwrite) or self._reached(entry, state)

        with JsonLines(self.folder / LOG, keep=keep) as log:
            pretrained, _ = self._pretrained(state, log, overwrite)
        path.unlink(missing_ok=True)
        return pretrained

    def baselines(self, *, rows: tuple[str, ...], seeds: int, overwrite: bool = False) -> list[Row]:
        """What a summary of the recipe's size has to beat, scored and written as by `EvaluateRun.evaluate`."""
        if any(row == "summary" or row.startswith("hard") for row in rows):
            raise RunError("there is no summary among the baselines: evaluate one with `td3-fast evaluate`")
        asked = any(row == "zero-step" or row.endswith("+embeddings") for row in rows)
        if asked or self.pretrained_from is not None:  # which says what to train, too
            pretrained = self.pretrained(overwrite=overwrite).to(self.device)
        else:
            name, config = self.recipe.learner_name, self.pretrain_settings()["learner_config"]
            untrained = build_learner(name, config, seed=self.seed).to(self.device).state_dict()
            pretrained = Pretrained(
                learner_name=name, learner_config=config, best=untrained, pool=[], history=[], best_epoch=0
            )
        stand_in = TuckerSummary.initialise(
            users=self.recipe.distill.users,
            positions=self.recipe.distill.positions,
            user_rank=1,
            position_rank=1,
            item_factors=pretrained.best["item_embeddings"],
            seed=self.seed,
        )
        run = EvaluateRun(
            folder=self.folder,
            summary=stand_in,
            split=self.split,
            source=self.source,
            seed=self.seed,
            rows=rows,
            seeds=seeds,
            fit=self.recipe.pretrain.fit,
            pretrained=pretrained,
            watcher=self.watcher,
        )
        return run.evaluate(overwrite=overwrite)

    def pretrain_settings(self) -> dict[str, Any]:
        """All that the pretrained learner depends on."""
        learner = {**self.recipe.learner, "num_items": self.split.interactions.num_items}
        return {
            "data": self.split.interactions.fingerprint,
            "seed": self.seed,
            "learner": self.recipe.learner_name,
            "learner_config": learner,
            "pretrain": self.recipe.pretrain.settings(),
        }

    def _run_settings(self) -> dict[str, Any]:
        made_with: Settings = self.pretrain_settings()
        if self.pretrained_from is not None:
            made_with = describe_pretrained(self.pretrained_from).settings
            if made_with.get("data") != self.split.interactions.fingerprint:
                raise RunError(
                    f"{self.pretrained_from} was pretrained on other data than {self.source}, or under other "
                    "filters: leave --pretrained out, or name one for these data"
                )
        return {"seed": self.seed, "distill": self.recipe.distill.settings(), "pretrained": dict(made_with)}

    def _claim(self, resume: bool, overwrite: bool) -> Checkpoint | None:
        make_folder(self.folder)
        self._settings = self._run_settings()
        present = check_free(self.folder, resume=resume, overwrite=overwrite)
        if overwrite:
            check_examples(self.split)  # nothing is lost to a run that cannot begin
            for name in present:
                (self.folder / name).unlink()
        path = self.folder / CHECKPOINT
        if not path.exists():
            if resume and not present:
                self.watcher.say(f"nothing to resume in {self.folder}: starting from the beginning")
            return None
        checkpoint = load_checkpoint(path)
        check_settings(path, checkpoint.settings, self._settings)
        return checkpoint

    def _complete(self, resume: bool) -> bool:
        path = self.folder / SUMMARY
        if not resume or not path.exists() or (self.folder / CHECKPOINT).exists():
            return False
        metadata = load_summary(path).metadata
        check_settings(path, {} if metadata is None else metadata.settings, self._settings)
        return True

    def _rows_of_complete(self) -> list[Row]:
        """What a complete run's results say; scored anew where they are gone."""
        path = self.folder / RESULTS
        if path.exists():
            return list(read_results(path)["rows"])
        self.watcher.say(f"{path} is gone: scoring the summary again")
        summary = load_summary(self.folder / SUMMARY).to(self.device)
        return self._evaluation(summary).evaluate()

    def _compare_environment(self, checkpoint: Checkpoint) -> None:
        found = differences(checkpoint.environment, self._environment())
        if found:
            self.watcher.say(f"note: {'; '.join(found)}; results may differ in the last digits for it")

    def _reached(self, entry: Mapping[str, Any], state: PretrainState | DistillState | None) -> bool:
        """Whether a line of the log lies before `state`; what lies after it is done again."""
        if isinstance(state, DistillState):
            return entry.get("event") == "pretrain" or entry.get("step", 0) <= state.step
        if entry.get("event") != "pretrain":
            return False
        if state is None:
            return (self.folder / PRETRAINED).exists()
        # lines of an ensemble's learners say which; that of the learner itself comes after them
        number = entry.get("member", self.recipe.pretrain.ensemble)
        return (number, entry.get("epoch", 0)) <= (len(state.members), state.fit.epoch)

    def _tell_others(self, *, go: bool) -> bool:
        """Meet the other processes; whether process 0 says that there is something to distil."""
        return bool(self.ranks.everyone.first_of({"go": float(go)})["go"])

    def _own_rows(self) -> Pretrained:
        """The folder's pretrained learner, with this process's rows of the item tables."""
        split = self.ranks.items.size > 1
        rows = self.ranks.items.rows(self.split.interactions.num_items) if split else None
        return load_pretrained(self.folder / PRETRAINED, items=rows)[0].to(self.device)

    def _take_part(self) -> None:
        """The distillation in a process that writes nothing, from what process 0 finds or leaves in the folder."""
        if not self._tell_others(go=True):
            return
        path = self.folder / CHECKPOINT
        # process 0 cannot overwrite it before all have taken a step together
        state = load_checkpoint(path).state if path.exists() else None

        def on_step(state: DistillState) -> None:
            if self.ranks.everyone.any(self.watcher.stop()):
                raise Stopped

        distill(
            self.split,
            self._own_rows(),
            self.recipe.distill,
            seed=self.seed,
            state=state.to(self.device) if isinstance(state, DistillState) else None,
            ranks=self.ranks,
            on_step=on_step,
        )

    def _environment(self) -> dict[str, Any]:
        ranks = self.ranks
        several = {"processes": ranks.everyone.size, "item_shards": ranks.items.size}
        return environment(self.device) | (several if ranks.everyone.size > 1 else {})

    def _checkpoint(self, state: PretrainState | DistillState, *, due: bool, stop: bool) -> None:
        """Save now and then, and when asked to stop; then stop."""
        if due or stop or time.monotonic() >= self._next_checkpoint:
            save_checkpoint(
                self.folder / CHECKPOINT,
                Checkpoint(
                    state=state,
                    settings=self._settings,
                    seconds=self._clock.so_far(),
                    environment=self._environment(),
                ),
            )
            self._next_checkpoint = time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS
        if stop:
            raise Stopped

    def _pretrained(
        self, state: PretrainState | DistillState | None, log: JsonLines, overwrite: bool
    ) -> tuple[Pretrained, Settings]:
        path = self.folder / PRETRAINED
        wanted = self.pretrain_settings()
        if self.pretrained_from is not None:
            pretrained, made_with = load_pretrained(self.pretrained_from)
            if self.pretrained_from.resolve() != path.resolve():
                if path.exists() and not overwrite:
                    check_settings(path, describe_pretrained(path).settings, made_with)
                save_pretrained(path, pretrained, made_with)
            return pretrained, made_with
        if path.exists():
            pretrained, made_with = load_pretrained(path)
            if not overwrite:
                check_settings(path, made_with, wanted)
            if not differences(made_with, wanted):
                self.watcher.say(f"pretrained already: {path} (best epoch {pretrained.best_epoch})")
                return pretrained, made_with
            path.unlink()  # to be overwritten; until then it would be in the way of what goes on here
        self._clock.start("pretrain")

        def on_step(state: PretrainState) -> None:
            ended = state.fit.batch == 0
            if ended:
                seconds = self._clock.so_far()["pretrain"]
                number = len(state.members)
                which = {"member": number} if number < self.recipe.pretrain.ensemble else {}
                log.write({"event": "pretrain", **which, "seconds": seconds, **state.fit.history[-1]})
            self._checkpoint(state, due=ended, stop=self.watcher.stop())

        pretrained = pretrain(
            self.split,
            build_learner(wanted["learner"], wanted["learner_config"], seed=self.seed).to(self.device),
            self.recipe.pretrain,
            seed=self.seed,
            state=state.to(self.device) if isinstance(state, PretrainState) else None,
            on_step=on_step,
            progress=self.watcher.progress,
        )
        save_pretrained(path, pretrained, wanted)
        seconds = self._clock.so_far()["pretrain"]
        best = pretrained.history[pretrained.best_epoch - 1]
        self.watcher.say(
            f"pretrained in {seconds:.1f} s: epoch {pretrained.best_epoch} of {len(pretrained.history)} is "
            f"the best, validation MRR@10 {100 * best['MRR@10']:.2f} %"
        )
        return pretrained, wanted

    def _distill(
        self, pretrained: Pretrained, state: PretrainState | DistillState | None, log: JsonLines
    ) -> tuple[Summary, DistillState]:
        latest: dict[str, float] = {}
        reached: tuple[DistillState, int] | None = None

        def progress(stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
            if "epoch" not in values:
                latest.update(values)
            self.watcher.progress(stage, done, total, values)

        def on_step(state: DistillState) -> None:
            nonlocal reached
            reached = state, state.step
            seconds = self._clock.so_far()["distill"]
            log.write({"event": "step", "step": state.step, "seconds": seconds, **latest})
            ended = not state.losses
            if ended:
                log.write({"event": "epoch", "step": state.step, "seconds": seconds, **state.history[-1]})
                if self.keep_epochs:
                    add_epoch(self.folder, len(state.history), state.factors.parameters)
            # all stop after the same step, whoever was asked
            self._checkpoint(state, due=ended, stop=self.ranks.everyone.any(self.watcher.stop()))

        try:
            summary, state = distill(
                self.split,
                pretrained.to(self.device),
                self.recipe.distill,
                seed=self.seed,
                state=state.to(self.device) if isinstance(state, DistillState) else None,
                ranks=self.ranks,
                on_step=on_step,
                progress=progress,
            )
        except LostRank:
            # a step changes the state when all have met, so one that was broken off has left it as it was
            if reached is not None and reached[0].step == reached[1]:
                self._checkpoint(reached[0], due=True, stop=False)
            raise
        if self.ranks.items.size > 1:
            summary.item_factors = load_item_factors(self.folder / PRETRAINED).to(self.device)
        return self._with_settings(summary), state

    def _epochs_of_other(self) -> KeptEpochs | None:
        if self.same_epochs_as is None or self.ranks.everyone.size > 1:
            return None
        epochs = kept_epochs(self.same_epochs_as, self.recipe.distill, self._settings)
        if epochs is None:
            self.watcher.say(f"no epochs are kept in {self.same_epochs_as}: distilling them here")
        return epochs

    def _choose(
        self, pretrained: Pretrained, epochs: KeptEpochs, log: JsonLines
    ) -> tuple[Summary, DistillState]:
        """The summary that this run would have led to, from the epochs of another."""
        distiller = Distiller(self.split, pretrained.to(self.device), self.recipe.distill, seed=self.seed)

        def on_epoch(state: DistillState) -> None:
            seconds = self._clock.so_far()["distill"]
            log.write({"event": "epoch", "step": state.step, "seconds": seconds, **state.history[-1]})
            if self.watcher.stop():
                raise Stopped

        state = distiller.choose(
            epochs.factors, epochs.history, on_epoch=on_epoch, progress=self.watcher.progress
        )
        return self._with_settings(distiller.best(state)), state

    def _with_settings(self, summary: Summary) -> Summary:
        metadata = summary.metadata
        assert metadata is not None
        summary.metadata = replace(
            metadata,
            preprocessing=replace(metadata.preprocessing, filters=self.filters),
            settings=json.loads(json.dumps(self._settings)),
        )
        return summary

    def _evaluation(self, summary: Summary) -> EvaluateRun:
        """What costs little."""
        return EvaluateRun(
            folder=self.folder,
            summary=summary,
            split=self.split,
            source=self.source,
            seed=self.seed,
            rows=("summary", "zero-step"),
            seeds=self.evaluation_seeds,
            watcher=self.watcher,
        )

    def _first_look(self, summary: Summary, pretrained: Pretrained, state: DistillState) -> list[Row]:
        """Evaluate, and write the results of the whole run."""
        run = self._evaluation(summary)
        self._clock.start("first evaluation")
        rows = run.rows_now()
        distillation = {
            "settings": {
                "source": self.source,
                "recipe": self.recipe.name,
                "filters": self.filters,
                **self._settings,
            },
            "history": state.history,
            "best_epoch": state.best_epoch,
            "pretraining": {"history": pretrained.history, "best_epoch": pretrained.best_epoch},
            "seconds": self._clock.so_far(),
            "peak_memory_mib": peak_memory_mib(),
            "environment": self._environment(),
        }
        write_results(self.folder / RESULTS, rows, settings=run.settings(), distillation=distillation)
        draw(self.folder, self.watcher)
        return rows
