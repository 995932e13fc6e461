"""What a leader keeps about each node it replicates to, beyond the engine's next and match index."""

from __future__ import annotations

from collections import deque


class Progress:
    """What the leader knows of one node beyond the engine's next and match index."""

    __slots__ = (
        "applied_index",
        "began_at",
        "commit_sent",
        "contact_at",
        "disk_full",
        "reset_at",
        "unacknowledged",
        "unacknowledged_bytes",
    )

    def __init__(self, now: float) -> None:
        self.began_at = now  # as leader, or with this node: what answers an earlier message is not about it
        self.contact_at = now  # when the latest message that it answered was sent
        self.reset_at = float("-inf")
        self.disk_full = False
        self.applied_index = 0
        self.commit_sent = 0
        self.unacknowledged: deque[tuple[int, int]] = deque()  # (last index, bytes) of messages under way
        self.unacknowledged_bytes = 0

    def heard(self, sent_at: float, now: float) -> None:
        """It answered what was sent then; no answer reaches into the future."""
        self.contact_at = max(self.contact_at, min(sent_at, now))

    def sent(self, last_index: int, size_bytes: int) -> None:
        self.unacknowledged.append((last_index, size_bytes))
        self.unacknowledged_bytes += size_bytes

    def acknowledged(self, index: int) -> None:
        while self.unacknowledged and self.unacknowledged[0][0] <= index:
            self.unacknowledged_bytes -= self.unacknowledged.popleft()[1]

    def restart(self) -> None:
        self.unacknowledged.clear()
        self.unacknowledged_bytes = 0
