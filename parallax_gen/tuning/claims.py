"""What workers on several hosts share of a job, in a study of Optuna's storages: who tries what, and what came of it.

A trial of the study is a claim of one config while it is RUNNING, and a result once it is finished. A claim counts as
long as its worker says from time to time that it is there, so that what a dead worker claimed is free again. Clocks
of the hosts must agree to within some seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import optuna
from optuna.exceptions import OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError as UrlError
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from parallax_gen.errors import StoreError
from parallax_gen.memory.place import Place
from parallax_gen.memory.result import MALFORMED, Result
from parallax_gen.ops.base import KernelConfig, config_to_json

LEASE_S = 60.0  # a worker that has not been heard of for so long is gone
ATTEMPTS = 8  # at a claim that another makes at the same moment
CONNECTIONS = 5  # attempts at a database in which several workers make the tables at the same moment


class Storage:
    """A place where workers meet: `postgresql://...` or another URL of SQLAlchemy's, or `journal:FILE`.

    A journal is for hosts that share a file system. Raises StoreError where it cannot be used; what a URL holds of
    passwords is in no message.
    """

    def __init__(self, url: str, *, lease_s: float = LEASE_S):
        self._name, self._lease_s = url, lease_s
        self.worker = uuid.uuid4().hex
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if url.startswith("journal:"):
            with self._as_store_error():
                self._storage: BaseStorage = JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
        else:
            self._storage = self._database(url)

    def board(self, place: Place, program: str) -> Board:
        """The board of a place: workers that would compile other programs, which `program` tells, have another one."""
        return Board(self._storage, place, program, self.worker, self._lease_s, self._as_store_error)

    def _database(self, text: str) -> BaseStorage:
        try:
            url = make_url(text)
        except UrlError:
            raise StoreError("the storage is no journal:FILE and no URL such as postgresql://user@host/name") from None
        self._name = url.render_as_string(hide_password=True)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")  # the one that the extra `postgresql` brings
        with self._as_store_error():
            for attempt in range(CONNECTIONS):
                try:
                    text = url.render_as_string(hide_password=False)
                    return get_storage(RDBStorage(text, engine_kwargs={"pool_pre_ping": True}))
                except (SQLAlchemyError, StorageInternalError):
                    if attempt == CONNECTIONS - 1:
                        raise
                    time.sleep(random.uniform(0.1, 0.5))
        raise AssertionError("a database was found or an error raised")

    @contextmanager
    def _as_store_error(self) -> Iterator[None]:
        """Turn what a database or a file says into a StoreError that names it."""
        try:
            yield
        except (ImportError, NoSuchModuleError) as error:
            raise StoreError(
                f"the storage {self._name} needs a driver that is not installed ({error.__cause__ or error}); "
                "for PostgreSQL: pip install 'parallax-gen[postgresql]'"
            ) from error
        except (SQLAlchemyError, OptunaError, OSError) as error:
            reason = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())
            raise StoreError(f"cannot use the storage {self._name}: {reason}") from error


class Board:
    """One place's claims and results, as one worker sees them."""

    def __init__(
        self,
        storage: BaseStorage,
        place: Place,
        program: str,
        worker: str,
        lease_s: float,
        as_store_error: Callable[[], AbstractContextManager[None]],
    ):
        self._storage, self._place, self._worker, self._lease_s = storage, place, worker, lease_s
        self._as_store_error = as_store_error
        self._claims: dict[str, int] = {}  # mine, by the config's text: the id of a trial
        self._seen: set[int] = set()
        self._last_beat = -float("inf")
        with as_store_error():
            name = f"parallax_gen {hashlib.sha256(f'{place.text} {program}'.encode()).hexdigest()[:32]}"
            optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
            self._study = storage.get_study_id_from_name(name)
            if not storage.get_study_user_attrs(self._study).get("place"):
                in_clear = place.flat() | {"program": program}  # for who looks into it
                storage.set_study_user_attr(self._study, "place", in_clear)
            self.beat()

    def beat(self) -> None:
        """Say that this worker is there, if that was not said lately."""
        if time.monotonic() - self._last_beat > self._lease_s / 6:
            with self._as_store_error():
                self._storage.set_study_user_attr(self._study, _beat_of(self._worker), time.time())
            self._last_beat = time.monotonic()

    def claim(self, config: KernelConfig) -> bool:
        """Take a config for this worker; False if another one has it, or has tried it."""
        text = config_to_json(config)
        with self._as_store_error():
            for _ in range(ATTEMPTS):
                if self._taken(text):
                    return False
                trial = self._storage.create_new_trial(self._study, _claim_of(text, self._worker))
                # Whoever claimed it too is seen by now, or will see this claim: of two that see each other, none
                # has it, and both try again a little later.
                if not self._taken(text, but=self._storage.get_trial_number_from_id(trial)):
                    self._claims[text] = trial
                    return True
                self._end(trial, TrialState.FAIL)
                time.sleep(random.uniform(0.01, 0.2))
        return False

    def finish(self, result: Result) -> None:
        """Tell the others what came of a config that this worker claimed."""
        text = config_to_json(result.config)
        trial = self._claims.pop(text, None)
        if trial is None:
            return
        with self._as_store_error(), contextlib.suppress(UpdateFinishedTrialError):  # another took this worker for dead
            self._storage.set_trial_user_attr(trial, "result", json.dumps(result.to_dict()))
            fine = result.outcome.timed and result.time_us is not None
            self._end(trial, TrialState.COMPLETE if fine else TrialState.FAIL, result.time_us if fine else None)

    def publish(self, result: Result) -> None:
        """Tell the others of a result that no claim of this worker stands for: of a finalist that was timed again."""
        text = config_to_json(result.config)
        with self._as_store_error():
            self._claims[text] = self._storage.create_new_trial(self._study, _claim_of(text, self._worker))
        self.finish(result)

    def others_at_work(self) -> bool:
        """Whether another worker that is there has a claim."""
        with self._as_store_error():
            beats = self._storage.get_study_user_attrs(self._study)
            trials = self._storage.get_all_trials(self._study, deepcopy=False)
        running = [trial for trial in trials if not trial.state.is_finished()]
        return any(t.user_attrs.get("worker") != self._worker and self._there(t, beats) for t in running)

    def release(self) -> None:
        """Let go of what this worker claimed and did not finish."""
        with self._as_store_error():
            for trial in self._claims.values():
                self._end(trial, TrialState.FAIL)
        self._claims.clear()

    def news(self) -> list[Result]:
        """What others finished since this was last asked.

        What does not read as a result of this place is passed over, and so are faults of a worker's machine that an
        earlier version has put there.
        """
        found = []
        with self._as_store_error():
            trials = self._storage.get_all_trials(self._study, deepcopy=False)
        for trial in trials:
            if not trial.state.is_finished() or trial.number in self._seen:
                continue
            self._seen.add(trial.number)
            if trial.user_attrs.get("worker") != self._worker and (result := self._result_of(trial)) is not None:
                found.append(result)
        return found

    def _taken(self, text: str, but: int | None = None) -> bool:
        """Whether a config was tried, or a worker that is there has it, but for one trial. Ends claims of the dead."""
        beats = self._storage.get_study_user_attrs(self._study)
        for trial in self._storage.get_all_trials(self._study, deepcopy=False):
            if trial.user_attrs.get("config") != text or trial.number == but:
                continue
            if trial.state.is_finished():
                if "result" in trial.user_attrs and not self._failed_elsewhere(trial):
                    return True
            elif self._there(trial, beats):
                return True
            else:
                self._end(
                    self._storage.get_trial_id_from_study_id_trial_number(self._study, trial.number), TrialState.FAIL
                )
        return False

    def _there(self, trial: FrozenTrial, beats: dict[str, Any]) -> bool:
        """Whether the worker of a claim was heard of lately: no time that is yet to come says so."""
        beat = beats.get(_beat_of(trial.user_attrs.get("worker")))
        return isinstance(beat, int | float) and abs(time.time() - beat) < self._lease_s

    def _end(self, trial: int, state: TrialState, value: float | None = None) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial, state, None if value is None else [value])

    def _failed_elsewhere(self, trial: FrozenTrial) -> bool:
        """Whether a trial holds a fault of its worker's machine: the config is free."""
        result = _parsed(trial) if trial.state == TrialState.FAIL else None
        return result is not None and result.is_machine_fault

    def _result_of(self, trial: FrozenTrial) -> Result | None:
        result = _parsed(trial)
        return None if result is None or result.is_machine_fault or result.place != self._place else result


def _parsed(trial: FrozenTrial) -> Result | None:
    """The result that a trial holds; None where there is none that reads."""
    try:
        return Result.from_dict(json.loads(trial.user_attrs["result"]))
    except (*MALFORMED, KeyError, TypeError):  # of an attribute that is not there, or no text
        return None


def _beat_of(worker: str | None) -> str:
    """Under which attribute of a study a worker says when it was last there."""
    return f"worker {worker}"


def _claim_of(text: str, worker: str) -> FrozenTrial:
    return create_trial(state=TrialState.RUNNING, user_attrs={"config": text, "worker": worker})
