"""A group's files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.api import problems as kinds
from cluster.api import types as t
from cluster.call import Call
from cluster.handlers.groups import done, require_member, token_expiry_ms
from cluster.problems import ProblemError
from state_machine import queries
from state_machine.commands import PublishFile, RemoveFile
from state_machine.moments import rfc3339
from state_machine.queries import FileInfo

if TYPE_CHECKING:
    from cluster.service import Service


def no_file(call: Call) -> ProblemError:
    return ProblemError(
        kinds.NOT_FOUND,
        f"Group {call.group!r} shares no file {call.params['name']!r}.",
        field="name",
        hint="See what it shares: trimaran files GROUP",
    )


def _view(info: FileInfo) -> t.FileView:
    return t.FileView(
        group=info.group,
        name=info.name,
        kind=info.kind,
        size_bytes=info.size_bytes,
        pieces=info.pieces,
        piece_bytes=info.piece_bytes,
        algorithm=info.algorithm,
        manifest_id=info.manifest_id,
        seeders=info.seeders,
        leechers=info.leechers,
        shared_by=info.shared_by,
        shared_at=rfc3339(info.shared_ms),
    )


async def list_files(service: Service, call: Call) -> t.FilesAnswer:
    await require_member(service, call)
    return t.FilesAnswer(
        files=[_view(info) for info in queries.list_files(service.machine.state, call.group)]
    )


async def show_file(service: Service, call: Call) -> t.FileAnswer:
    await require_member(service, call)
    info = queries.show_file(service.machine.state, call.group, call.params["name"])
    if info is None:
        raise no_file(call)
    return t.FileAnswer(file=_view(info))


async def publish_file(service: Service, call: Call) -> t.FileAnswer:
    body: t.FileBody = call.body
    group, name, now_ms = call.group, call.params["name"], service.wall_ms()
    command = PublishFile(
        group,
        name,
        body.kind,
        body.size_bytes,
        body.pieces,
        body.piece_bytes,
        body.algorithm,
        body.manifest_id,
        body.replace,
        call.user,
        now_ms,
        token_expiry_ms(service),
    )
    outcome = await service.write(call, command)
    info = queries.show_file(service.machine.state, group, name)
    if info is None or info.manifest_id != body.manifest_id:
        # A repetition, or a change right after: the answer is about what was published.
        info = FileInfo(
            group,
            name,
            body.kind,
            body.size_bytes,
            body.pieces,
            body.piece_bytes,
            body.algorithm,
            body.manifest_id,
            0,
            0,
            call.user,
            now_ms,
        )
    return t.FileAnswer(file=_view(info), revision=outcome.revision)


async def remove_file(service: Service, call: Call) -> t.Done:
    command = RemoveFile(
        call.group, call.params["name"], call.user, service.wall_ms(), token_expiry_ms(service)
    )
    return await done(service, call, command)


HANDLERS = (list_files, show_file, publish_file, remove_file)
