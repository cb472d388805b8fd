"""The labelling server as a process of its own, for labelling.py: started, killed, and started again.

python benchmarks/labelling_server.py STORE PORT
"""

import os
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"
RUN_ID = "benchmark"
START_SECONDS = 120.0
"""How long a start may take."""
GUIDELINES = "# What to look for\n\nPrefer the answer that *helps*. When in doubt:\n\n1. true\n2. safe\n3. short\n"


class Server:
    """The labelling server as a process of its own, at the same address however often it is started."""

    def __init__(self, where: str) -> None:
        self._where = where
        with socket.create_server((HOST, 0)) as free:
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen([sys.executable, __file__, self._where, str(self.port)])
        give_up = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the server on port {self.port} did not start")
            time.sleep(0.02)

    def _answers(self) -> bool:
        connection = HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def cpu_seconds(self) -> float | None:
        """Processor time it has had since its start, where the system says (Linux)."""
        status = Path(f"/proc/{self._process.pid if self._process else 0}/stat")
        if not status.is_file():
            return None
        user, system = status.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """End it, with no chance to finish anything unless another signal is given."""
        if self._process is not None:
            self._process.send_signal(signal_number)
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(signal.SIGTERM)


def main() -> None:
    """Serve a store as the command does, until a signal."""
    from dissonance.feedback.store import Store
    from dissonance.feedback.web.serve import serve
    from dissonance.feedback.web.settings import LabelSettings

    where, port = sys.argv[1:]
    settings = LabelSettings(login_required=True, ask_safety=True, guidelines=GUIDELINES)
    with Store.open(where, RUN_ID) as store:
        serve(store, settings, HOST, int(port), ready=lambda _: None)


if __name__ == "__main__":
    main()
