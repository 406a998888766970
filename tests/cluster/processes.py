"""Node processes as a user starts them, paired without a keyboard."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading

from localreason.cluster.gate import TlsGate
from localreason.cluster.identity import Identity, Peers
from localreason.cluster.member import Address

_RUN = "from localreason.cli.main import run; run()"
RUN = [sys.executable, "-c", _RUN]


def _free_port():
    """A port that is free with the one behind it, below those that systems give to outgoing connections: a node that
    is started again must find its own free."""
    while True:
        port = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in (port, port + 1):
                stack.enter_context(socket.create_server(("127.0.0.1", number)))
            return port


class NodeProcess:
    """`localreason node` on a free port of this machine; a context manager. `prelude` is carried out before it."""

    def __init__(self, folder, name, head=None, *flags, is_loopback=True, prelude="pass"):
        self.name = name
        self._run = [sys.executable, "-c", f"{prelude}; {_RUN}"]
        self._place = ["--loopback"] if is_loopback else []
        self.folder = folder / name
        self.cache = folder / f"{name}-cache"
        self.identity = Identity.load(self.folder, name)
        self._head, self._flags = head, flags
        self.lines = []
        self._heard = threading.Condition()
        if head is not None:
            Peers(self.folder).add(head.certificate)
            Peers(head.folder).add(self.identity.certificate)

    def command(self, port=None):
        port = port or _free_port()
        command = [*self._run, "node", *self._place, "--port", str(port), "--threads", "1", "--name", self.name]
        return [*command, "--folder", str(self.folder), "--cache", str(self.cache), *self._flags]

    def start(self, port=None):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            self.command(port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert self.process.stdout is not None
        self._listener = threading.Thread(target=self._listen, args=[self.process.stdout])
        self._listener.start()
        self.port = int(self.wait_for("listening on port").rsplit(" ", 1)[1])
        self.wait_for("is ready")
        return self

    def _listen(self, stream):
        with stream:
            for line in stream:
                with self._heard:
                    self.lines.append(line.rstrip())
                    self._heard.notify_all()

    def wait_for(self, words, seconds=20):
        """The first line with these words."""

        def find():
            return next((line for line in self.lines if words in line), None)

        with self._heard:
            assert self._heard.wait_for(find, seconds), f"{words!r} was not said by {self.name}: {self.lines}"
            return find()

    @property
    def address(self):
        return Address(self.name, "127.0.0.1", self.port, self.identity.certificate.decode())

    def kill(self):
        self.process.kill()
        self.process.wait()
        self._listener.join(10)
        self.lines.clear()

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(15)
        finally:
            self.process.kill()
            self._listener.join(10)


class Relay:
    """A port that passes on to another one, connection by connection, until they are cut; a context manager."""

    def __init__(self, port):
        self._target = port
        self._pairs = []

    def __enter__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                pair = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._target))
                self._pairs.append(pair)
                for one, other in (pair, pair[::-1]):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def cut(self, first=0):
        """End the connections from this one on, in the order in which they were made."""
        for pair in self._pairs[first:]:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def __exit__(self, *_):
        self.cut()
        self._listener.close()


class Head:
    """An identity with what a `RingEngine` needs."""

    def __init__(self, folder, name="laptop"):
        self.folder = folder / name
        self.identity = Identity.load(self.folder, name)
        self.certificate = self.identity.certificate
        self.gate = TlsGate(self.identity, Peers(self.folder))
