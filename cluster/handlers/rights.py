"""Tokens, the keys that signed them, and what was withdrawn."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from typing import TYPE_CHECKING

from cluster.api import types as t
from cluster.api.tokens import Claims
from cluster.call import Call
from cluster.handlers.groups import require_member
from cluster.handlers.people import require_key
from cluster.handlers.swarms import not_yours
from state_machine import queries

if TYPE_CHECKING:
    from cluster.service import Service


async def issue_token(service: Service, call: Call) -> t.TokenAnswer:
    body: t.TokenBody = call.body
    membership = await require_member(service, call)
    peer = queries.peer(service.machine.state, body.peer_id)
    if peer is None or peer.user != call.user:
        raise not_yours(body.peer_id)
    require_key(service)
    issued_at_ms = service.wall_ms() // 1000 * 1000
    expires_at_ms = issued_at_ms + int(service.settings.token_seconds) * 1000
    claims = Claims(
        user=call.user,
        peer_id=body.peer_id,
        group=call.group,
        epoch=membership.epoch,
        issued_at_ms=issued_at_ms,
        expires_at_ms=expires_at_ms,
    )
    return t.TokenAnswer(
        token=service.keys.sign_token(claims),
        epoch=membership.epoch,
        issued_at_ms=issued_at_ms,
        expires_at_ms=expires_at_ms,
    )


async def list_revocations(service: Service, call: Call) -> t.RevocationsAnswer:
    await require_member(service, call)
    revocations = [
        t.RevocationView(group=row.group, user=row.user, manifest_id=row.manifest_id, epoch=row.epoch)
        for row in queries.revocations(service.machine.state, call.group)
    ]
    return t.RevocationsAnswer(revocations=revocations)


async def list_keys(service: Service, call: Call) -> t.KeysAnswer:
    await service.fresh(call)
    keys = [
        t.SigningKeyView(
            key_id=key.key_id,
            node_id=key.node_id,
            public_key=urlsafe_b64encode(key.public_key).rstrip(b"=").decode(),
            valid_until_ms=key.valid_until_ms,
        )
        for key in queries.signing_keys(service.machine.state)
    ]
    return t.KeysAnswer(keys=keys)


HANDLERS = (issue_token, list_revocations, list_keys)
