"""A limit on everything that is replicated. One owner: other packages import these, never repeat them.

Units stand last in each name. Over a limit the machine answers `Refused(code=OVER_LIMIT, field=...)`.
"""

from __future__ import annotations

from typing import Final

USER_NAME_CHARS_MAX: Final = 64
GROUP_NAME_CHARS_MAX: Final = 64
FILE_NAME_BYTES_MAX: Final = 255  # of a shared file's name, UTF-8, after NFC
PASSWORD_HASH_CHARS_MAX: Final = 512
PEER_ID_CHARS: Final = 52  # base32 (no padding, lower case) of a SHA-256
MANIFEST_ID_CHARS: Final = 64  # hex SHA-256
REQUEST_ID_CHARS: Final = 36  # a UUIDv7 in canonical form

USERS_MAX: Final = 10_000_000
GROUPS_PER_USER_MAX: Final = 1_000  # groups a user owns
GROUPS_MAX: Final = 1_000_000
MEMBERS_PER_GROUP_MAX: Final = 10_000
JOIN_REQUESTS_PER_GROUP_MAX: Final = 1_000
FILES_PER_GROUP_MAX: Final = 100_000
PEERS_PER_USER_MAX: Final = 256
ADDRESSES_PER_PEER_MAX: Final = 8
ADDRESS_CHARS_MAX: Final = 256
SEEDERS_PER_SWARM_MAX: Final = 10_000
VERSIONS_PER_FILE_MAX: Final = 8  # swarms of replaced versions that still have peers
FACTS_PER_ANNOUNCE_MAX: Final = 20_000

FILE_SIZE_BYTES_MAX: Final = 1 << 50
PIECES_PER_FILE_MAX: Final = 1 << 22
PIECE_BYTES_MIN: Final = 16 * 1024
PIECE_BYTES_MAX: Final = 1 << 30

COMMAND_BYTES_MAX: Final = 1 << 20
COMMANDS_PER_ENTRY_MAX: Final = 4_096
ENTRY_BYTES_MAX: Final = 4 << 20

# Request ids: outcomes are kept for this many commands or bytes, whichever is reached first; an id that
# was minted before the oldest kept one is answered "too old" (indefinite), never executed twice.
REQUESTS_KEPT_MAX: Final = 200_000
REQUESTS_KEPT_BYTES_MAX: Final = 64 << 20
# How long each caller's own mark of what was forgotten is kept; then one for all takes its place, and a
# request id from before that (of a machine whose clock is that slow) is too old whoever sends it.
REQUEST_MARKS_KEPT_MS: Final = 7 * 24 * 3600 * 1000
# How far a request id's own clock may run ahead of the proposer's before it is refused.
REQUEST_ID_AHEAD_MS_MAX: Final = 10 * 60 * 1000

GROUP_LOG_ENTRIES_MAX: Final = 1_000  # per group, oldest dropped first
REVOCATIONS_MAX: Final = 1_000_000
QUARANTINE_WITNESSES: Final = 3  # distinct members, none of them the peer's own user
UNREACHABLE_WITNESSES: Final = 2  # distinct members; the peer's next announce brings it back
SIGNING_KEYS_MAX: Final = 1_000
REVOKED_SESSIONS_MAX: Final = 1_000_000
INVITATIONS_MAX: Final = 10_000
