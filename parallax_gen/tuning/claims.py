"""The claims and results that tuners on several hosts share for a job, in an Optuna study of a shared storage.

A tuner is a process of `parallax-gen tune`; the storage calls it a worker.

A trial of the study is a tuner's claim of one config while it is RUNNING, and the config's result once it is finished.
A claim is valid as long as its tuner sends heartbeats, so the claims of a dead tuner expire. The clocks of the hosts
must agree to within a few seconds.
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

from parallax_gen.errors import StoreError, install_command
from parallax_gen.memory.old import renamed_json
from parallax_gen.memory.place import Place
from parallax_gen.memory.result import MALFORMED, Result
from parallax_gen.ops.base import KernelConfig, config_to_json

LEASE_S = 60.0  # a tuner that sent no heartbeat for this long counts as dead
CLAIM_ATTEMPTS = 8  # attempts to claim a config that another tuner claims at the same moment
CONNECT_ATTEMPTS = 5  # attempts to open a database while other tuners create its tables


class Storage:
    """The storage that tuners share: `postgresql://...` or another URL of SQLAlchemy's, or `journal:FILE`.

    A journal is for hosts that share a file system. Raises StoreError if the storage cannot be used; no message
    contains a password of a URL.
    """

    def __init__(self, url: str, *, lease_s: float = LEASE_S):
        self._name, self._lease_s = url, lease_s
        self.tuner = uuid.uuid4().hex
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if url.startswith("journal:"):
            with self._as_store_error():
                self._storage: BaseStorage = JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
        else:
            self._storage = self._database(url)

    def claims(self, place: Place, program: str) -> SharedClaims:
        """The shared claims of a place. Tuners that would compile another `program` have other claims."""
        return SharedClaims(self._storage, place, program, self.tuner, self._lease_s, self._as_store_error)

    def _database(self, text: str) -> BaseStorage:
        try:
            url = make_url(text)
        except UrlError:
            raise StoreError(
                "the storage is neither journal:FILE nor a URL such as postgresql://user@host/name"
            ) from None
        self._name = url.render_as_string(hide_password=True)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")  # the driver that the extra `postgresql` installs
        with self._as_store_error():
            for attempt in range(CONNECT_ATTEMPTS):
                try:
                    text = url.render_as_string(hide_password=False)
                    return get_storage(RDBStorage(text, engine_kwargs={"pool_pre_ping": True}))
                except (SQLAlchemyError, StorageInternalError):
                    if attempt == CONNECT_ATTEMPTS - 1:
                        raise
                    time.sleep(random.uniform(0.1, 0.5))
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _as_store_error(self) -> Iterator[None]:
        """Turn errors of the database or file into a StoreError that names it."""
        try:
            yield
        except (ImportError, NoSuchModuleError) as error:
            raise StoreError(
                f"the storage {self._name} needs a driver that is not installed ({error.__cause__ or error}); "
                f"for PostgreSQL: {install_command('postgresql')}"
            ) from error
        except (SQLAlchemyError, OptunaError, OSError) as error:
            reason = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())
            raise StoreError(f"cannot use the storage {self._name}: {reason}") from error


class SharedClaims:
    """One tuner's view of the claims and results of a place that tuners share."""

    def __init__(
        self,
        storage: BaseStorage,
        place: Place,
        program: str,
        tuner: str,
        lease_s: float,
        as_store_error: Callable[[], AbstractContextManager[None]],
    ):
        self._storage, self._place, self._tuner, self._lease_s = storage, place, tuner, lease_s
        self._as_store_error = as_store_error
        self._claims: dict[str, int] = {}  # this tuner's: JSON of the config -> trial id
        self._seen: set[int] = set()
        self._last_heartbeat = -float("inf")
        with as_store_error():
            study_name = f"parallax_gen {hashlib.sha256(f'{place.text} {program}'.encode()).hexdigest()[:32]}"
            optuna.create_study(storage=storage, study_name=study_name, load_if_exists=True)
            self._study = storage.get_study_id_from_name(study_name)
            if not storage.get_study_user_attrs(self._study).get("place"):
                readable = place.flat() | {"program": program}  # for people who inspect the storage
                storage.set_study_user_attr(self._study, "place", readable)
            self.heartbeat()

    def heartbeat(self) -> None:
        """Send this tuner's heartbeat, if the last one is older than a sixth of the lease."""
        if time.monotonic() - self._last_heartbeat > self._lease_s / 6:
            with self._as_store_error():
                self._storage.set_study_user_attr(self._study, _heartbeat_key(self._tuner), time.time())
            self._last_heartbeat = time.monotonic()

    def claim(self, config: KernelConfig) -> bool:
        """Claim a config for this tuner; False if another tuner has claimed or tried it."""
        config_json = config_to_json(config)
        with self._as_store_error():
            for _ in range(CLAIM_ATTEMPTS):
                if self._is_taken(config_json):
                    return False
                trial = self._storage.create_new_trial(self._study, _new_claim(config_json, self._tuner))
                # A competing claim is visible by now, or its tuner will see this one. If two tuners see each other's
                # claims, both withdraw and try again a little later.
                if not self._is_taken(config_json, except_trial=self._storage.get_trial_number_from_id(trial)):
                    self._claims[config_json] = trial
                    return True
                self._end(trial, TrialState.FAIL)
                time.sleep(random.uniform(0.01, 0.2))
        return False

    def finish(self, result: Result) -> None:
        """Share the result of a config that this tuner claimed."""
        trial = self._claims.pop(config_to_json(result.config), None)
        if trial is None:
            return
        # The suppressed error means that another tuner ended this claim, because this tuner seemed dead.
        with self._as_store_error(), contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial, "result", json.dumps(result.to_dict()))
            timed = result.outcome.timed and result.time_us is not None
            self._end(trial, TrialState.COMPLETE if timed else TrialState.FAIL, result.time_us if timed else None)

    def publish(self, result: Result) -> None:
        """Share a result that this tuner has no claim for: a finalist that was timed again."""
        config_json = config_to_json(result.config)
        with self._as_store_error():
            self._claims[config_json] = self._storage.create_new_trial(
                self._study, _new_claim(config_json, self._tuner)
            )
        self.finish(result)

    def others_have_claims(self) -> bool:
        """Whether another live tuner has a claim."""
        with self._as_store_error():
            heartbeats = self._storage.get_study_user_attrs(self._study)
            trials = self._storage.get_all_trials(self._study, deepcopy=False)
        running = [trial for trial in trials if not trial.state.is_finished()]
        return any(t.user_attrs.get("worker") != self._tuner and self._is_alive(t, heartbeats) for t in running)

    def release(self) -> None:
        """Withdraw this tuner's unfinished claims."""
        with self._as_store_error():
            for trial in self._claims.values():
                self._end(trial, TrialState.FAIL)
        self._claims.clear()

    def new_results(self) -> list[Result]:
        """The results that other tuners finished since the last call.

        Skips results that do not parse or are of another place, and faults of a tuner's machine that an earlier
        version stored.
        """
        results = []
        with self._as_store_error():
            trials = self._storage.get_all_trials(self._study, deepcopy=False)
        for trial in trials:
            if not trial.state.is_finished() or trial.number in self._seen:
                continue
            self._seen.add(trial.number)
            if trial.user_attrs.get("worker") != self._tuner and (result := self._result_of(trial)) is not None:
                results.append(result)
        return results

    def _is_taken(self, config_json: str, except_trial: int | None = None) -> bool:
        """Whether a config was tried, or a live tuner claims it in a trial other than `except_trial`.

        Ends dead claims.
        """
        heartbeats = self._storage.get_study_user_attrs(self._study)
        for trial in self._storage.get_all_trials(self._study, deepcopy=False):
            if renamed_json(trial.user_attrs.get("config")) != config_json or trial.number == except_trial:
                continue
            if trial.state.is_finished():
                if "result" in trial.user_attrs and not self._failed_elsewhere(trial):
                    return True
            elif self._is_alive(trial, heartbeats):
                return True
            else:
                self._end(
                    self._storage.get_trial_id_from_study_id_trial_number(self._study, trial.number), TrialState.FAIL
                )
        return False

    def _is_alive(self, trial: FrozenTrial, heartbeats: dict[str, Any]) -> bool:
        """Whether the tuner of a claim sent a heartbeat within the lease.

        A time further in the future than the lease is ignored.
        """
        heartbeat = heartbeats.get(_heartbeat_key(trial.user_attrs.get("worker")))
        return isinstance(heartbeat, int | float) and abs(time.time() - heartbeat) < self._lease_s

    def _end(self, trial: int, state: TrialState, value: float | None = None) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial, state, None if value is None else [value])

    def _failed_elsewhere(self, trial: FrozenTrial) -> bool:
        """Whether a trial ended by a fault of its tuner's machine: then its config may be claimed again."""
        result = _parsed(trial) if trial.state == TrialState.FAIL else None
        return result is not None and result.is_machine_fault

    def _result_of(self, trial: FrozenTrial) -> Result | None:
        result = _parsed(trial)
        return None if result is None or result.is_machine_fault or result.place != self._place else result


def _parsed(trial: FrozenTrial) -> Result | None:
    """A trial's result; None if there is none or it does not parse."""
    try:
        return Result.from_dict(json.loads(trial.user_attrs["result"]))
    except (*MALFORMED, KeyError, TypeError):  # the attribute is missing, or is not text
        return None


def _heartbeat_key(tuner: str | None) -> str:
    """The study attribute with the time of a tuner's last heartbeat."""
    return f"worker {tuner}"


def _new_claim(config_json: str, tuner: str) -> FrozenTrial:
    return create_trial(state=TrialState.RUNNING, user_attrs={"config": config_json, "worker": tuner})
