"""Shared files: publishing, replacing, taking off the group.

A replaced version's swarm stays as long as it has peers, so that running downloads end; removing a file
ends them all and revokes the right to its versions, unless the group shares the same content elsewhere.
"""

from __future__ import annotations

from typing import Any

from state_machine import limits
from state_machine.commands import PublishFile, RemoveFile
from state_machine.model import File, Member, OldVersion, State, file_key, revocation_key, swarm_key
from state_machine.moments import rfc3339
from state_machine.names import file_name_bytes, is_manifest_id, name_fault, quoted
from state_machine.outcomes import Code, Refused

from .draft import Draft
from .groups import record
from .leaving import leave_swarm, refuse_revocations, revoke
from .rights import require_member


def file_value(state: State, group: str, name: str, file: File) -> dict[str, Any]:
    """The file as the API shows it."""
    count = state.count(swarm_key(group, name, file.manifest_id))
    return {
        "group": group,
        "name": name,
        "kind": file.kind,
        "size_bytes": file.size_bytes,
        "pieces": file.pieces,
        "piece_bytes": file.piece_bytes,
        "algorithm": file.algorithm,
        "manifest_id": file.manifest_id,
        "seeders": count.seeders,
        "leechers": count.leechers,
        "shared_by": file.shared_by,
        "shared_at": rfc3339(file.shared_ms),
    }


def _form_fault(draft: Draft, command: PublishFile) -> Refused | None:
    fault = name_fault(command.name, "file name")
    if fault is not None:
        return draft.refuse(Code.INVALID, fault, "name", "Share it under another name.")
    name_bytes = file_name_bytes(command.name)
    if name_bytes > limits.FILE_NAME_BYTES_MAX:
        return draft.refuse(
            Code.OVER_LIMIT,
            f"the file name has {name_bytes} bytes in UTF-8, more than {limits.FILE_NAME_BYTES_MAX}",
            "name",
            "Share it under a shorter name.",
        )
    if not is_manifest_id(command.manifest_id):
        return draft.refuse(Code.INVALID, "a manifest's id is a SHA-256 in hex: 64 characters", "manifest_id")
    for field, value, low, high in (
        ("size_bytes", command.size_bytes, 0, limits.FILE_SIZE_BYTES_MAX),
        ("pieces", command.pieces, 0, limits.PIECES_PER_FILE_MAX),
        ("piece_bytes", command.piece_bytes, limits.PIECE_BYTES_MIN, limits.PIECE_BYTES_MAX),
    ):
        if value < low:
            return draft.refuse(Code.INVALID, f"{field} is {value}, less than {low}", field)
        if value > high:
            return draft.refuse(Code.OVER_LIMIT, f"{field} is {value}, more than {high}", field)
    if command.pieces * command.piece_bytes < command.size_bytes:
        return draft.refuse(
            Code.INVALID,
            f"{command.pieces} pieces of {command.piece_bytes} bytes cannot hold {command.size_bytes} bytes",
            "pieces",
        )
    return None


def publish_file(state: State, command: PublishFile, draft: Draft) -> Any:
    group, name = command.group, command.name
    actor = require_member(state, draft, group, command.actor)
    if isinstance(actor, Refused):
        return actor
    refused = _form_fault(draft, command)
    if refused is not None:
        return refused
    before = state.files.get(group, name)
    if before is not None:
        if before.manifest_id == command.manifest_id:
            return {"manifest_id": before.manifest_id, "changed": False}
        refused = _replace_fault(draft, command, before, actor)
        if refused is not None:
            return refused
    elif len(state.files.rows(group)) >= limits.FILES_PER_GROUP_MAX:
        return draft.refuse(
            Code.OVER_LIMIT,
            f"{quoted(group)} shares {limits.FILES_PER_GROUP_MAX} files already",
            "name",
            "Take another file off the group first.",
        )

    if before is not None:
        _retire_version(state, draft, group, name, before, command.manifest_id)
    file = File(
        command.kind,
        command.size_bytes,
        command.pieces,
        command.piece_bytes,
        command.algorithm,
        command.manifest_id,
        command.actor,
        command.at_ms,
        draft.revision,
    )
    state.put_file(group, name, file)
    # What was withdrawn is shared again: members' tokens, older than the withdrawal, are good for it.
    if state.revocations.get(group, revocation_key("", command.manifest_id)) is not None:
        state.revocations.drop(group, revocation_key("", command.manifest_id))
    value = file_value(state, group, name, file)
    path = f"/groups/{group}/files/{name}"
    if before is None:
        draft.emit("file.published", path, value)
    else:
        draft.emit("file.replaced", path, {**value, "replaced_manifest_id": before.manifest_id})
    return {"manifest_id": file.manifest_id, "changed": True}


def _replace_fault(draft: Draft, command: PublishFile, before: File, actor: Member) -> Refused | None:
    shown = f"{quoted(command.name)} in {quoted(command.group)}"
    if not command.replace:
        return draft.refuse(
            Code.CONFLICT,
            f"{shown} is taken by other content, shared by {quoted(before.shared_by)}",
            "name",
            "Share it under another name (--name), or replace the file (--replace).",
        )
    if command.actor != before.shared_by and actor.role == "member":
        return draft.refuse(
            Code.DENIED,
            f"only {quoted(before.shared_by)}, who shared {shown}, or an admin may replace it",
            hint="Share it under another name, or ask an admin of the group.",
        )
    return None


def _retire_version(
    state: State, draft: Draft, group: str, name: str, before: File, manifest_id: str
) -> None:
    """Make room for the version `manifest_id`: what was current becomes old, if anyone holds it."""
    key = file_key(group, name)
    if state.old_versions.get(key, manifest_id) is not None:
        state.drop_old_version(group, name, manifest_id)  # its swarm goes on as the current one
    if state.holdings.rows(swarm_key(group, name, before.manifest_id)):
        old = state.old_versions.rows(key)
        if len(old) >= limits.VERSIONS_PER_FILE_MAX:
            _, oldest = min((row.revision, old_id) for old_id, row in old.items())
            swarm = swarm_key(group, name, oldest)
            for peer_id in sorted(state.holdings.rows(swarm)):
                leave_swarm(state, draft, swarm, peer_id, "replaced too often")
        version = OldVersion(before.pieces, draft.revision)
        state.put_old_version(group, name, before.manifest_id, version)


def remove_file(state: State, command: RemoveFile, draft: Draft) -> Any:
    group, name = command.group, command.name
    actor = require_member(state, draft, group, command.actor)
    if isinstance(actor, Refused):
        return actor
    file = state.files.get(group, name)
    if file is None:
        return draft.refuse(
            Code.NOT_FOUND,
            f"group {quoted(group)} shares no {quoted(name)}",
            "name",
            "See what it shares: trimaran files GROUP",
        )
    if command.actor != file.shared_by and actor.role == "member":
        return draft.refuse(
            Code.DENIED,
            f"only {quoted(file.shared_by)}, who shared {quoted(name)}, or an admin may take it off",
            hint="Ask an admin of the group.",
        )
    refused = refuse_revocations(state, draft, 1 + limits.VERSIONS_PER_FILE_MAX)
    if refused is not None:
        return refused

    revoked = [
        manifest_id for manifest_id in state.drop_file(group, name) if not state.shares(group, manifest_id)
    ]
    for manifest_id in revoked:
        revoke(state, draft, group, manifest_id=manifest_id, expires_ms=command.token_expiry_ms)
    value = {
        "manifest_id": file.manifest_id,
        "epoch": draft.revision,
        "revoked_manifest_ids": revoked,
    }
    draft.emit("file.removed", f"/groups/{group}/files/{name}", value)
    if command.actor != file.shared_by:
        record(state, draft, group, command.at_ms, command.actor, "remove file", name)
    return {"manifest_id": file.manifest_id}
