"""Shell text as a person runs it: in bash, with `zipar-train` on PATH.

A new interpreter would spend seconds on imports for each command, so the program on PATH hands its arguments to the
test, which runs them in a process forked from one that has imported all (`forked`).
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from forked import Running

PROGRAM = """#!{python} -S
import os, sys
from multiprocessing.connection import Client
with Client({address!r}, family="AF_UNIX") as test:
    test.send((sys.argv[1:], dict(os.environ)))
    status, out, err = test.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(status)
"""


class Shell:
    """Runs shell text in the current folder.

    Args:
        folder: for the program on PATH and for what commands print.
        before: called in the process of each command before anything else.
    """

    def __init__(self, folder: Path, before: Callable[[], None] | None = None):
        self.folder, self.before = folder, before
        (folder / "bin").mkdir()
        address = str(folder / "socket")
        self.listener = Listener(address, family="AF_UNIX")
        program = folder / "bin" / "zipar-train"
        program.write_text(PROGRAM.format(python=sys.executable, address=address))
        program.chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self, text: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run text to its end, or to the first command that fails."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-eu", "-c", text], capture_output=True, text=True, env={**os.environ, **env, "PATH": path}
        )

    def close(self) -> None:
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection = self.listener.accept()
            except OSError:  # closed
                return
            with connection:
                self._answer(connection)

    def _answer(self, connection: Connection) -> None:
        args, env = connection.recv()
        number = len(list(self.folder.glob("*.out")))
        out, err = (self.folder / f"{number}.{kind}" for kind in ("out", "err"))
        status = Running(*args, log=out, errors=err, env=env, before=self.before).ended(240)
        connection.send((status, out.read_text(), err.read_text()))
