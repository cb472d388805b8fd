"""A storage that is no folder of this machine's: an FTP server in a process of its own."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import until

SERVER = """
import sys
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer

authorizer = DummyAuthorizer()
authorizer.add_anonymous(sys.argv[2], perm=sys.argv[3])
FTPHandler.authorizer = authorizer
ThreadedFTPServer(("127.0.0.1", int(sys.argv[1])), FTPHandler).serve_forever()
"""


@contextmanager
def ftp(folder: Path, *, rights: str = "elradfmwMT") -> Iterator[str]:
    """Serve a folder, with these rights of pyftpdlib's; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER, str(port), str(folder), rights],
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: _answers(port) or server.poll() is not None, 120)
        assert server.poll() is None, "the server has ended"
        yield f"ftp://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0
