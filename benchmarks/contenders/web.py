"""What a web server gives: nginx for curl and for aria2's Metalink; and curl with a checksum after."""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

from benchmarks.contenders.contender import Contender, Run
from benchmarks.hosts import Host
from benchmarks.processes import Process, free_ports, wait_until


class WebServer:
    """nginx over one folder, sendfile on."""

    def __init__(self, root: Path, folder: Path, host: Host) -> None:
        port = free_ports(1)[0]
        configuration = folder / "nginx.conf"
        configuration.write_text(
            f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err; user root;\n"
            "events { worker_connections 256; }\n"
            f"http {{ access_log off; sendfile on; tcp_nopush on; client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2;\n"
            f"fastcgi_temp_path {folder}/t3; uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;\n"
            f"server {{ listen {host.address}:{port}; root {root}; }} }}\n"
        )
        self.url = f"http://{host.address}:{port}"
        self.process = Process(["nginx", "-c", str(configuration)], folder / "nginx.log", prefix=host.prefix)
        time.sleep(0.3) if host.prefix else wait_until(self._answers, 10, "nginx", [self.process])

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=1).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    @staticmethod
    def missing() -> str | None:
        return None if shutil.which("nginx") else "nginx is not installed (Debian: nginx-light)"


class Curl(Contender):
    """curl, then sha256sum: what a person does today."""

    name = "curl + sha256sum"

    @staticmethod
    def missing() -> str | None:
        return WebServer.missing() or (None if shutil.which("curl") else "curl is not installed")

    def start(self) -> None:
        self.web = WebServer(self.work.source.parent, self.work.folder, self.work.seeders[0])
        self.processes.append(self.web.process)
        (self.work.folder / "leecher-0").mkdir()

    def go(self) -> Run:
        work = self.work
        target = self.targets()[0]
        before = self.cpu_seconds()
        script = f'curl -sf -o "{target}" "{self.web.url}/{work.source.name}" && sha256sum "{target}" >/dev/null; cat /proc/$$/stat'
        begun = time.monotonic()
        done = subprocess.run(
            [*work.leechers[0].prefix, "sh", "-c", script], capture_output=True, text=True, check=True
        )
        seconds = time.monotonic() - begun
        fields = done.stdout.rpartition(")")[2].split()
        cpu = sum(int(field) for field in fields[11:15]) / 100
        return Run(seconds, seconds, self.cpu_seconds() - before + cpu, self.peak_bytes())
