"""Jobs on disk: SQLite, used by one thread, so that the event loop never waits for it.

A submitted job is answered for only once it is committed here (``synchronous=FULL``), so
one that a client knows of survives the loss of the process. The body of a job leaves the
file with its last run; ``secure_delete`` overwrites what is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from broker.jobs.record import Job, JobAnswer, JobSpec
from edge_runtime.contract.errors import BrokerFault, ConfigError
from edge_runtime.contract.jobs import JobFailure, JobState

__all__ = ["JOURNAL_NAME", "Journal"]

JOURNAL_NAME: Final = "jobs.sqlite"
_VERSION: Final = 1
_T = TypeVar("_T")

_SCHEMA: Final = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    key TEXT,
    spec BLOB NOT NULL,
    body BLOB,
    size_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    created_s REAL NOT NULL,
    updated_s REAL NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    failure BLOB,
    answer BLOB,
    answer_body BLOB,
    UNIQUE (tenant, key)
) STRICT;
"""
_COLUMNS: Final = (
    "number, id, tenant, key, spec, size_bytes, sha256, created_s, updated_s, state, attempts, "
    "failure, answer"
)


class Journal:
    """Every method may be awaited from one event loop; ``BrokerFault`` when the disk fails.

    ``folder`` None: in memory, for a broker that was given no folder; jobs end with it.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = ":memory:" if folder is None else str(folder / JOURNAL_NAME)
        self._folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nearfar-jobs")
        self._database: sqlite3.Connection | None = None

    async def open(self) -> list[Job]:
        """Every job there is. A job that was running is queued again.

        Raises ``ConfigError`` when the folder cannot be used or another broker uses it.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        except (OSError, sqlite3.Error, msgspec.DecodeError) as error:
            self._thread.shutdown()
            raise ConfigError(
                f"cannot use {self._path} for jobs ({error}): pass another --jobs folder, one "
                "for each broker"
            ) from None

    async def add(self, job: Job, body: bytes) -> None:
        """Store a new job; its ``number`` is set."""
        row = (
            *(job.id, job.tenant, job.key, msgspec.json.encode(job.spec), body, job.size_bytes),
            *(job.sha256, job.created_s, job.updated_s, job.state),
        )

        def insert(database: sqlite3.Connection) -> int:
            done = database.execute(
                "INSERT INTO jobs (id, tenant, key, spec, body, size_bytes, sha256, created_s, "
                "updated_s, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            return done.lastrowid or 0

        job.number = await self._do(insert)

    async def body(self, job: Job) -> bytes:
        """What is to be run."""
        return await self._blob(job, "SELECT body FROM jobs WHERE id = ?")

    async def answer_body(self, job: Job) -> bytes:
        """What came of it."""
        return await self._blob(job, "SELECT answer_body FROM jobs WHERE id = ?")

    async def update(self, job: Job, answer_body: bytes | None = None) -> None:
        """Store its state; the body leaves once the job has ended."""
        values = (
            *(job.state, job.updated_s, job.attempts),
            None if job.failure is None else msgspec.json.encode(job.failure),
            None if job.answer is None else msgspec.json.encode(job.answer),
            *(answer_body, job.ended, job.id),
        )

        def store(database: sqlite3.Connection) -> None:
            database.execute(
                "UPDATE jobs SET state = ?, updated_s = ?, attempts = ?, failure = ?, "
                "answer = ?, answer_body = ?, body = CASE WHEN ? THEN NULL ELSE body END "
                "WHERE id = ?",
                values,
            )

        await self._do(store)

    async def remove(self, job: Job) -> None:
        """Forget it."""

        def delete(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM jobs WHERE id = ?", (job.id,))

        await self._do(delete)

    async def close(self) -> None:
        """Finish what was begun, and free the file."""

        def shut() -> None:
            if self._database is not None:
                self._database.close()

        with contextlib.suppress(RuntimeError):  # it never opened
            await asyncio.get_running_loop().run_in_executor(self._thread, shut)
        self._thread.shutdown()

    # In the thread ----------------------------------------------------------------------

    def _open(self) -> list[Job]:
        if self._folder is not None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # images of users: for its owner alone
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        database = sqlite3.connect(self._path, isolation_level=None, timeout=1.0)
        self._database = database
        # Exclusive: two brokers on one folder would each run every job.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA secure_delete = ON")
        database.execute("BEGIN EXCLUSIVE")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            database.execute(_SCHEMA)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        elif version != _VERSION:
            raise sqlite3.DatabaseError(f"it has the format {version}, not {_VERSION}")
        database.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
        rows = database.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY number").fetchall()  # noqa: S608
        database.execute("COMMIT")
        return [_job(row) for row in rows]

    async def _blob(self, job: Job, query: str) -> bytes:
        def read(database: sqlite3.Connection) -> bytes | None:
            row = database.execute(query, (job.id,)).fetchone()
            return None if row is None else row[0]

        found = await self._do(read)
        if found is None:
            raise BrokerFault("the journal of jobs lost what it held of this job")
        return found

    async def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run ``work`` in the thread; it ends even when the caller is canceled."""

        def guarded() -> _T:
            assert self._database is not None  # noqa: S101  # open() was awaited
            return work(self._database)

        future = asyncio.get_running_loop().run_in_executor(self._thread, guarded)
        try:
            return await asyncio.shield(future)
        except sqlite3.Error as error:
            raise BrokerFault(f"the journal of jobs cannot be used ({error})") from error


class _Row(msgspec.Struct, frozen=True, array_like=True):
    """One row as ``_COLUMNS`` names it."""

    number: int
    id: str
    tenant: str
    key: str | None
    spec: bytes
    size_bytes: int
    sha256: str
    created_s: float
    updated_s: float
    state: JobState
    attempts: int
    failure: bytes | None
    answer: bytes | None


def _job(values: tuple[object, ...]) -> Job:
    row = msgspec.convert(values, _Row)
    return Job(
        id=row.id,
        number=row.number,
        tenant=row.tenant,
        key=row.key,
        spec=msgspec.json.decode(row.spec, type=JobSpec),
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        created_s=row.created_s,
        updated_s=row.updated_s,
        state=row.state,
        attempts=row.attempts,
        failure=None if row.failure is None else msgspec.json.decode(row.failure, type=JobFailure),
        answer=None if row.answer is None else msgspec.json.decode(row.answer, type=JobAnswer),
    )
