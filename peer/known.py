"""What trackers last said of the groups' files and of who has them, for when no tracker can be asked.

Owned here: that memory, its bounds, and keeping it in the home. With it a new download can begin in an outage: which
content a name stands for was said by trackers, and who has it is asked of the peers last heard of; those
tell of others (peer exchange). Nothing here decides about rights. Left to others: hearing (`tracker_agent.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from msgspec import Struct

from cluster.api import types as t

from .records import Records

FILES_MAX: Final = 4_096
PEERS_PER_FILE_MAX: Final = 24
PEERS_PER_GROUP_ASKED_MAX: Final = 24

_SETTING = "known"


class _Kept(Struct):
    user: str
    files: list[t.FileView]
    peers: dict[str, list[t.SwarmPeer]]  # by manifest


class Known:
    """Belongs to the event loop. `changed` says that there is something to `save`."""

    def __init__(self, records: Records, user: str) -> None:
        self._records = records
        self._user = user
        self._files: OrderedDict[tuple[str, str], t.FileView] = OrderedDict()
        self._peers: dict[str, OrderedDict[str, t.SwarmPeer]] = {}
        self.changed = False
        self._load()

    def _load(self) -> None:
        body = self._records.setting(_SETTING)
        if body is None:
            return
        try:
            kept = msgspec.msgpack.decode(body, type=_Kept)
        except msgspec.DecodeError:
            return
        if kept.user != self._user:
            return
        for file in kept.files:
            self._files[file.group, file.name] = file
        for manifest_id, peers in kept.peers.items():
            self._peers[manifest_id] = OrderedDict((peer.peer_id, peer) for peer in peers)

    def packed(self) -> tuple[str, bytes]:
        """What to keep in the home, as a setting's name and body."""
        self.changed = False
        peers = {manifest_id: list(known.values()) for manifest_id, known in self._peers.items()}
        return _SETTING, msgspec.msgpack.encode(_Kept(self._user, list(self._files.values()), peers))

    # --- asked ------------------------------------------------------------------------------------

    def file(self, group: str, name: str) -> t.FileView | None:
        return self._files.get((group, name))

    def peers(self, group: str, manifest_id: str) -> list[t.SwarmPeer]:
        """Who had it when last heard of; then other peers of the group, who may have it by now."""
        first = list(self._peers.get(manifest_id, {}).values())
        seen = {peer.peer_id for peer in first}
        others: list[t.SwarmPeer] = []
        for file in reversed(self._files.values()):
            if file.group != group or len(others) >= PEERS_PER_GROUP_ASKED_MAX:
                continue
            for peer in self._peers.get(file.manifest_id, {}).values():
                if peer.peer_id not in seen:
                    seen.add(peer.peer_id)
                    others.append(msgspec.structs.replace(peer, pieces=0, complete=False))
        return first + others

    # --- heard ------------------------------------------------------------------------------------

    def listed(self, group: str, files: Iterable[t.FileView]) -> None:
        """The group's files as they are."""
        now = {file.name: file for file in files}
        for key in [key for key in self._files if key[0] == group and key[1] not in now]:
            self._forget(key)
        for file in now.values():
            self.published(file)

    def published(self, file: t.FileView) -> None:
        self._files[file.group, file.name] = file
        self._files.move_to_end((file.group, file.name))
        while len(self._files) > FILES_MAX:
            self._forget(next(iter(self._files)))
        self.changed = True

    def take(self, group: str, name: str, value: Mapping[str, Any]) -> None:
        """A file as an event of the watch shows it."""
        try:
            file = msgspec.convert(
                {"seeders": 0, "leechers": 0, "shared_at": "", **value, "group": group, "name": name},
                t.FileView,
            )
        except msgspec.ValidationError:
            return
        self.published(file)

    def removed(self, group: str, name: str) -> None:
        self._forget((group, name))

    def swarm(self, manifest_id: str, peers: Iterable[t.SwarmPeer]) -> None:
        """A swarm as it is."""
        self._peers[manifest_id] = OrderedDict()
        for peer in peers:
            self.peer(manifest_id, peer)
        self.changed = True

    def peer(self, manifest_id: str, peer: t.SwarmPeer) -> None:
        known = self._peers.setdefault(manifest_id, OrderedDict())
        known.pop(peer.peer_id, None)
        if peer.quarantined or not peer.addresses:
            return
        known[peer.peer_id] = peer
        if len(known) > PEERS_PER_FILE_MAX:
            # Those who have all of it are worth more than those who were heard of later.
            known.pop(next((each for each, one in known.items() if not one.complete), next(iter(known))))
        self.changed = True

    def took(self, manifest_id: str, value: Mapping[str, Any]) -> None:
        """A peer as an event of the watch shows it."""
        try:
            self.peer(manifest_id, msgspec.convert(dict(value), t.SwarmPeer))
        except msgspec.ValidationError:
            return

    def left(self, manifest_id: str, peer_id: str) -> None:
        self._peers.get(manifest_id, OrderedDict()).pop(peer_id, None)

    def group_lost(self, group: str) -> None:
        for key in [key for key in self._files if key[0] == group]:
            self._forget(key)

    def _forget(self, key: tuple[str, str]) -> None:
        file = self._files.pop(key, None)
        if file is not None and not any(f.manifest_id == file.manifest_id for f in self._files.values()):
            self._peers.pop(file.manifest_id, None)
        self.changed = True
