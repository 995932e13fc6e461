"""What runs while the menu is open: the home's peer, and on request a small cluster to try things out.

Owned here: starting them, ending them with the menu, and what the menu knows of its surroundings. The settings
that are chosen here go into our own environment, where the commands look for them.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType

import msgspec
from rich.console import Console

from peer.identity import SignIn
from peer.reports import TrimaranError
from trimaran.output import Output
from trimaran.processes import Started, free_base_port
from trimaran.settings import common_of_environment


class Backstage:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._peer: Started | None = None
        self._cluster: Started | None = None

    def __enter__(self) -> Backstage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._peer is not None and self._peer.alive:
            self._console.print("Sharing ends with the menu; `trimaran peer run` goes on without it.")
            self._peer.stop()
        if self._cluster is not None:
            self._cluster.stop()

    @property
    def home(self) -> Path:
        return common_of_environment().home_folder

    def knows_trackers(self) -> bool:
        return bool(common_of_environment().tracker_urls)

    def use_trackers(self, addresses: str, ca: str) -> None:
        os.environ["TRIMARAN_TRACKERS"] = addresses
        if ca:
            os.environ["TRIMARAN_CA"] = str(Path(ca).expanduser().absolute())
        else:
            os.environ["TRIMARAN_INSECURE"] = "1"

    def start_cluster(self) -> None:
        """Three trackers on this machine, in the home; what they know is still there the next time."""
        folder = self.home / "cluster"
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        base_port = _remembered_port(folder) or free_base_port(7000)
        self._console.print(f"Starting three trackers in {folder} ...")
        self._cluster = Started(
            *("tracker", "local", "--nodes", "3", "--data-dir", str(folder), "--base-port", str(base_port)),
            log=self.home / "cluster.log",
        )
        try:
            ready = self._cluster.wait_until_ready()
        except TrimaranError as error:
            Output().error(error)
            return
        (folder / "base-port").write_text(f"{base_port}\n")
        self.use_trackers(",".join(node["http"] for node in ready["nodes"]), ready["ca"] or "")
        self._console.print("They run for as long as this menu is open.")

    def user(self) -> str:
        try:
            return msgspec.json.decode((self.home / "session.json").read_bytes(), type=SignIn).user
        except (OSError, msgspec.DecodeError):
            return ""

    def peer_up(self) -> None:
        """The home's peer runs while the menu is open, so that downloads and shares go on between choices."""
        if (self._peer is not None and self._peer.alive) or self._answered():
            return
        common = common_of_environment()
        settings = {"TRIMARAN_TRACKERS": ",".join(common.tracker_urls), "TRIMARAN_CA": common.ca}
        if common.insecure:
            settings["TRIMARAN_INSECURE"] = "1"
        self._peer = Started(
            "peer", "run", "--home", str(self.home), log=self.home / "peer.err", settings=settings
        )
        try:
            self._peer.wait_until_ready()
        except TrimaranError as error:
            Output().error(error)

    def summary(self) -> str:
        parts = [f"{len(common_of_environment().tracker_urls)} trackers known"]
        if self._peer is not None and self._peer.alive:
            parts.append("sharing while this menu is open")
        elif self._answered():
            parts.append("a peer runs in this home")
        return " · ".join(parts)

    def _answered(self) -> bool:
        """Whether a `peer run` answers in this home."""
        with socket.socket(socket.AF_UNIX) as attempt:
            attempt.settimeout(1.0)
            try:
                attempt.connect(str(self.home / "control.sock"))
            except OSError:
                return False
        return True


def _remembered_port(folder: Path) -> int:
    try:
        return int((folder / "base-port").read_text())
    except (OSError, ValueError):
        return 0
