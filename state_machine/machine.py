"""The replicated state machine: bytes of the log in, outcomes and changes out.

Owned here: dispatch, request ids, the revision, and the promise to Raft (`cluster.consensus.Replica`):
given the same bytes in the same order it reaches the same state in every process, and no bytes make it
raise. What each command does is in `rules/`; an assertion there means that the state is not what this
code can bring about, and the node that meets one must stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from . import codec, limits
from . import commands as c
from .events import Change
from .model import State
from .names import uuid7_ms
from .outcomes import Applied, Code, Outcome, Refused
from .requests import HASH_BYTES, request_key
from .rules import files, groups, keys, people, swarms
from .rules.draft import Draft
from .snapshot import FrozenMachine, Loader, crumble, digest

_RULES: Final[dict[type[c.Command], Callable[[State, Any, Draft], Any]]] = {
    c.RegisterUser: people.register_user,
    c.ChangePassword: people.change_password,
    c.RevokeSession: people.revoke_session,
    c.SetPolicy: people.set_policy,
    c.CreateInvitation: people.create_invitation,
    c.CreateGroup: groups.create_group,
    c.DeleteGroup: groups.delete_group,
    c.RequestJoin: groups.request_join,
    c.WithdrawRequest: groups.withdraw_request,
    c.AcceptRequest: groups.accept_request,
    c.RejectRequest: groups.reject_request,
    c.LeaveGroup: groups.leave_group,
    c.KickMember: groups.kick_member,
    c.PromoteMember: groups.promote_member,
    c.DemoteMember: groups.demote_member,
    c.TransferGroup: groups.transfer_group,
    c.PublishFile: files.publish_file,
    c.RemoveFile: files.remove_file,
    c.PutPeer: swarms.put_peer,
    c.AnnouncePeers: swarms.announce_peers,
    c.RenewPeers: swarms.renew_peers,
    c.ExpirePeers: swarms.expire_peers,
    c.ReportPeer: swarms.report_peer,
    c.LiftQuarantine: swarms.lift_quarantine,
    c.PutSigningKey: keys.put_signing_key,
    c.RetireSigningKey: keys.retire_signing_key,
    c.Prune: keys.prune,
}

_CRUMBLE_ROWS: Final = 500  # of a state that was replaced, freed with each entry applied


class StateMachine:
    """`on_change` is called once for each revision, in order, with its events (perhaps none), while
    `apply` runs; it must not raise. `on_restore` is called when a snapshot has replaced the state:
    revisions then jump, and whoever follows changes must start anew."""

    def __init__(
        self,
        on_change: Callable[[Change], None] | None = None,
        on_restore: Callable[[], None] | None = None,
    ) -> None:
        self.state = State()
        self._on_change = on_change
        self._on_restore = on_restore
        self._discarded: list[Iterator[None]] = []

    @property
    def revision(self) -> int:
        return self.state.revision

    def follow(self, on_change: Callable[[Change], None], on_restore: Callable[[], None]) -> None:
        """Set whom to tell from now on, in the place of who was told so far."""
        self._on_change = on_change
        self._on_restore = on_restore

    def apply(self, commands: Sequence[bytes]) -> list[Outcome]:
        """Apply the commands of one entry in order; one outcome for each."""
        if self._discarded and next(self._discarded[-1], False) is False:
            self._discarded.pop()
        return [self._apply(data) for data in commands]

    def freeze(self) -> FrozenMachine:
        """The state as it is now, in constant time; encoding may go on while `apply` does."""
        return FrozenMachine(self.state)

    def loader(self) -> Loader:
        return Loader(self._restore)

    def digest(self) -> bytes:
        """SHA-256 of the whole state, the same in every process. Slow; for tests."""
        return digest(self.state)

    def _restore(self, state: State) -> None:
        self._discarded.append(crumble(self.state, _CRUMBLE_ROWS))
        self.state = state
        if self._on_restore is not None:
            self._on_restore()

    def _apply(self, data: bytes) -> Outcome:
        entry = codec.decode(data)
        revision = self.state.revision
        if isinstance(entry, Refused):
            return Refused(entry.code, entry.message, entry.field, entry.hint, revision)
        if not entry.request_id:
            return self._execute(entry.command)

        minted_ms = uuid7_ms(entry.request_id)
        refused = self._form_fault(entry, minted_ms)
        if refused is not None:
            return refused
        assert minted_ms is not None
        requests = self.state.requests
        key = request_key(entry.caller, entry.request_id)
        kept = requests.find(key)
        if kept is not None:
            return requests.replay(kept, entry.request_hash, revision)
        refused = self._time_fault(entry, minted_ms)
        if refused is not None:
            return refused
        outcome = self._execute(entry.command)
        requests.keep(key, entry.request_hash, outcome)
        return outcome

    # Why a request id cannot be used. Such refusals are not kept: nothing was executed.

    def _form_fault(self, entry: c.Entry, minted_ms: int | None) -> Refused | None:
        field, revision = "Idempotency-Key", self.state.revision
        if minted_ms is None:
            return Refused(
                Code.INVALID, "a request id is a UUIDv7 in its canonical form", field, revision=revision
            )
        if len(entry.request_hash) != HASH_BYTES or len(entry.caller) > limits.USER_NAME_CHARS_MAX:
            return Refused(
                Code.INVALID,
                "a request id needs its caller and the hash of its request",
                field,
                revision=revision,
            )
        return None

    def _time_fault(self, entry: c.Entry, minted_ms: int) -> Refused | None:
        field, revision = "Idempotency-Key", self.state.revision
        at_ms = getattr(entry.command, "at_ms", None)
        if at_ms is not None and minted_ms > at_ms + limits.REQUEST_ID_AHEAD_MS_MAX:
            return Refused(
                Code.INVALID,
                "the request id was minted in the future",
                field,
                "Set this machine's clock, then try again with a new request id.",
                revision,
            )
        if self.state.requests.too_old(entry.caller, minted_ms):
            return Refused(
                Code.REQUEST_TOO_OLD,
                "the answer to this request is no longer kept; it may have taken effect",
                field,
                "Look whether it did; if not, try again with a new request id.",
                revision,
            )
        return None

    def _execute(self, command: c.Command) -> Outcome:
        state, on_change = self.state, self._on_change
        draft = Draft(state, watched=on_change is not None)
        value = _RULES[type(command)](state, command, draft)
        if type(value) is Refused:
            return value
        if draft.changed:
            state.revision = draft.revision
            if on_change is not None:
                on_change(Change(draft.revision, tuple(draft.events)))
        return Applied(state.revision, value)
