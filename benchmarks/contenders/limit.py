"""The limit: what this machine can do at most, one to one, with every byte hashed and on the disk.

    python -m benchmarks.contenders.limit send ADDRESS FILE
    python -m benchmarks.contenders.limit receive ADDRESS PORT TARGET BYTES

One connection, sendfile on one side; on the other one thread that receives into reused buffers and two that hash
(SHA-256) and write past the page cache. No protocol, no rights, no choice of pieces, one end known to the other.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
from pathlib import Path
from queue import Queue

from benchmarks.contenders.contender import Contender, Run
from benchmarks.processes import Process, wait_until
from peer.direct import DirectWriter, aligned_buffer

PIECE_BYTES = 4 << 20
BUFFERS = 8


def send(address: str, path: str) -> None:
    with socket.create_server((address, 0)) as listener, open(path, "rb") as file:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
        with connection:
            connection.sendfile(file)


def receive(address: str, port: int, target: str, size: int) -> None:
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.posix_fallocate(descriptor, 0, size)
    writer = DirectWriter()
    direct = writer.opened(descriptor)
    free: Queue[memoryview] = Queue()
    full: Queue[tuple[int, memoryview, int] | None] = Queue()
    for _ in range(BUFFERS):
        free.put(aligned_buffer(PIECE_BYTES))

    def keep() -> None:
        while (piece := full.get()) is not None:
            offset, buffer, length = piece
            hashlib.sha256(buffer[:length]).digest()
            writer.write(descriptor, direct, buffer[:length], offset)
            free.put(buffer)

    threads = [threading.Thread(target=keep) for _ in range(2)]
    for thread in threads:
        thread.start()
    with socket.create_connection((address, port)) as connection:
        for offset in range(0, size, PIECE_BYTES):
            buffer, length, got = free.get(), min(PIECE_BYTES, size - offset), 0
            while got < length:
                count = connection.recv_into(buffer[got:length])
                if count == 0:
                    raise ConnectionResetError
                got += count
            full.put((offset, buffer, length))
    for _ in threads:
        full.put(None)
    for thread in threads:
        thread.join()
    os.fdatasync(descriptor)


class Limit(Contender):
    name = "limit"

    @staticmethod
    def missing() -> str | None:
        return None

    def start(self) -> None:
        work = self.work
        (work.folder / "leecher-0").mkdir()
        self._sender = self._program(work.folder / "sender.log", "send", str(work.source))
        wait_until(lambda: self._sender.log.read_text().strip().isdigit(), 10, "the sender", [self._sender])

    def _program(self, log: Path, what: str, *words: str) -> Process:
        host = self.work.seeders[0]
        command = [sys.executable, "-m", "benchmarks.contenders.limit", what, host.address, *words]
        process = Process(command, log, prefix=host.prefix)
        self.processes.append(process)
        return process

    def go(self) -> Run:
        work = self.work
        port = self._sender.log.read_text().strip()
        before = self.cpu_seconds()
        receiver = self._program(
            work.folder / "receiver.log", "receive", port, str(self.targets()[0]), str(work.size_bytes)
        )
        code = receiver.child.wait(work.seconds_max)
        if code:
            raise RuntimeError(receiver.log.read_text())
        told = (work.folder / "receiver.log").read_text().split()
        seconds, cpu, peak = float(told[0]), float(told[1]), int(told[2])
        return Run(seconds, seconds, self.cpu_seconds() - before + cpu, peak)


if __name__ == "__main__":
    import re
    import resource
    import time

    what, *words = sys.argv[1:]
    if what == "send":
        send(words[0], words[1])
    else:
        begun = time.monotonic()
        receive(words[0], int(words[1]), words[2], int(words[3]))
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = time.monotonic() - begun
        # Not ru_maxrss: it begins at that of the process that started this one.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        print(seconds, used.ru_utime + used.ru_stime, int(peak[1]) * 1024 if peak else 0)
