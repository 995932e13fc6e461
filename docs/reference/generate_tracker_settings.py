"""Writes `tracker-settings.md` from the settings' own definitions: names, defaults, and the comments on them.

python docs/reference/generate_tracker_settings.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_name("tracker-settings.md")
TABLES = (
    (
        "service",
        "cluster/settings.py",
        "ServiceSettings",
        "The service: deadlines, bounds, rights, leases, the watch.",
    ),
    (
        "raft_settings",
        "cluster/raft/settings.py",
        "RaftSettings",
        "Agreement: times and sizes. All nodes alike.",
    ),
)
HEAD = """# Settings of a tracker node

Made by `docs/reference/generate_tracker_settings.py`; a test compares.

A setting comes from a flag of `trimaran tracker run`, else from the environment, else from `node.toml` in the data folder
(written by `tracker init`), else it has its default. A value that does not fit ends the start with a message that names it.

| key in `node.toml` | environment | default | what |
|---|---|---|---|
| `node_id` | `TRIMARAN_NODE_ID` | | the node's name: a-z, 0-9 and `-`; for good |
| `http` | `TRIMARAN_HTTP` | | the URL users dial |
| `raft` | `TRIMARAN_RAFT` | | the host:port other nodes dial |
| `http_listen` | `TRIMARAN_HTTP_LISTEN` | from `http` | host:port to listen on; for a host name: all interfaces |
| `raft_listen` | `TRIMARAN_RAFT_LISTEN` | from `raft` | the same for other nodes |
| `insecure` | `TRIMARAN_INSECURE` | `false` | plain HTTP, no certificates; the whole cluster alike |
| `log_level` | `TRIMARAN_LOG_LEVEL` | `info` | `debug`, `info`, `warning` or `error` |

The tables below change what rarely needs it: `lease_seconds = 60.0` under `[service]`, or `TRIMARAN_SERVICE_LEASE_SECONDS=60`.
"""
MANAGED = frozenset({"cluster_id", "data_dir", "insecure", "version", "node", "founders", "may_create"})


def page() -> str:
    parts = [HEAD]
    for table, file, name, about in TABLES:
        parts.append(f"\n## `[{table}]`\n\n{about}\n\n| key | default | what |\n|---|---|---|\n")
        parts.extend(rows(ROOT / file, name))
    return "".join(parts)


def rows(file: Path, name: str) -> list[str]:
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    found = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    made = []
    for statement, following in zip(found.body, [*found.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        key = statement.target.id
        if key in MANAGED or statement.value is None:
            continue
        _, _, said = lines[statement.lineno - 1].partition("  # ")
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            said = " ".join(str(following.value.value).split())
        made.append(f"| `{key}` | `{ast.unparse(statement.value)}` | {said} |\n")
    return made


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
