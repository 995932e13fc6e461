"""Announce calls against Trimaran's trackers: peers of several users, bound and heard of beforehand.

`changes` is a call with one changed fact (how many pieces of a file a peer has), each by another peer than
the last; `heartbeats` is the same call when there is nothing to say, as a peer sends it every few seconds.
"""

from __future__ import annotations

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.clusters import Trimaran, ask, request_id

USERS = 4
PEERS_PER_USER = 250
PIECES = 4_000_000
MANIFEST_ID = "ab" * 32
ADDRESS = "https://127.0.0.1:7400"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


@dataclass
class Owner:
    """A user with a group and a file of its own, and a session."""

    name: str
    session: str
    peers: list[str]


def peer_id(number: int) -> str:
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(0, 25, 5)).ljust(52, "q")


class Announcers:
    def __init__(self, cluster: Trimaran) -> None:
        self._cluster = cluster
        self._number = 0
        self.owners = [self._owner(number) for number in range(USERS)]

    @property
    def _url(self) -> str:
        return self._cluster.urls[self._cluster.until_led()]

    def _write(self, method: str, path: str, body: object, session: str = "") -> dict[str, object]:
        self._number += 1
        headers = {"Idempotency-Key": request_id(self._number)}
        if session:
            headers["Authorization"] = f"Bearer {session}"
        status, answer = ask(self._url + path, method, body, headers, 20)
        assert status == 200, (method, path, status, answer)
        return answer

    def _owner(self, number: int) -> Owner:
        name = f"crew-{number}"
        user = {"user": name, "password": "a long enough password"}
        self._write("POST", "/v1/users", user)
        session = str(self._write("POST", "/v1/sessions", user)["session"])
        self._write("POST", "/v1/groups", {"name": name}, session)
        file = {
            "kind": "file", "size_bytes": PIECES * 16_384, "pieces": PIECES, "piece_bytes": 16_384,
            "algorithm": "sha256", "manifest_id": MANIFEST_ID,
        }  # fmt: skip
        self._write("PUT", f"/v1/groups/{name}/files/hull", file, session)
        peers = [peer_id(number * PEERS_PER_USER + place) for place in range(PEERS_PER_USER)]
        for peer in peers:
            self._write("PUT", f"/v1/peers/{peer}", {"csr_pem": ""}, session)
        return Owner(name, session, peers)

    def say_all(self) -> None:
        """Every peer says where it is and what it holds, whole; those that were silent for long live again."""
        url = self._url

        def say(said: tuple[Owner, str]) -> None:
            owner, peer = said
            fact = {
                "group": owner.name, "name": "hull", "manifest_id": MANIFEST_ID, "pieces": 0, "complete": False,
            }  # fmt: skip
            body = {"addresses": [ADDRESS], "facts": [fact], "whole": True}
            headers = {"Authorization": f"Bearer {owner.session}"}
            status, answer = ask(f"{url}/v1/peers/{peer}/announce", "POST", body, headers, 20)
            assert status == 200, (status, answer)

        with ThreadPoolExecutor(32) as threads:
            list(threads.map(say, [(owner, peer) for owner in self.owners for peer in owner.peers]))

    def logged(self) -> float:
        """How many announcements the leader's node has put into the log, or handed on for it."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=5) as response:
            text = response.read().decode()
        found = re.search(r"(?m)^trimaran_announcements_logged (\S+)", text)
        assert found
        return float(found.group(1))

    def script(self, *, changes: bool) -> str:
        fact = {"group": "GROUP", "name": "hull", "manifest_id": MANIFEST_ID, "pieces": 1, "complete": False}
        document = {"addresses": [ADDRESS], "facts": [fact] if changes else []}
        body = json.dumps(document, separators=(",", ":"))
        owners = ",".join(
            f'{{name="{owner.name}",session="{owner.session}",peers={{{peers}}}}}'
            for owner in self.owners
            for peers in [",".join(f'"{peer}"' for peer in owner.peers)]
        )
        before, _, after = body.partition('"pieces":1')
        between = f"'{before}\"pieces\":' .. said .. '{after}'" if changes else f"'{body}'"
        return f"""
local owners = {{{owners}}}
local threads = 0
function setup(thread) thread:set("id", threads); threads = threads + 1 end
local mine, place, n, said = {{}}, 0, 0, 0
function init(args)
  -- Each thread has its own owners, each call another peer; a peer's turn comes again with another fact.
  for number, owner in ipairs(owners) do if number % 2 == id % 2 then mine[#mine + 1] = owner end end
  said = (os.time() * 1000) % {PIECES - 1_000_000}
end
request = function()
  local owner = mine[n % #mine + 1]
  local peer = owner.peers[math.floor(n / #mine) % #owner.peers + 1]
  n = n + 1
  if n % (#mine * #owner.peers) == 1 then said = said + 1 end
  local body = {between}
  return wrk.format("POST", "/v1/peers/" .. peer .. "/announce",
    {{["Content-Type"]="application/json", ["Authorization"]="Bearer " .. owner.session}},
    (body:gsub("GROUP", owner.name, 1)))
end
"""
