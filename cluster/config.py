"""What a node is told by its operator, and where its things lie.

Owned here: the settings of `tracker run`, their sources and checks, and the layout of a data folder.
A setting comes from a flag, else from the environment (`TRIMARAN_HTTP` for `http`), else from
`node.toml` in the data folder (written by `tracker init`), else it has its default. The tables
`[service]` and `[raft_settings]` of the file, or `TRIMARAN_SERVICE_<NAME>` and
`TRIMARAN_RAFT_SETTINGS_<NAME>`, change any of `cluster/settings.py` and `cluster/raft/settings.py`.

    node.toml       the settings            ca.pem           the cluster's CA, for users
    cluster.json    which cluster, and its  ca/ca.key        its key: this node may invite and renew
                    members at the start    tls/             this node's certificates and keys
    begun           this node has run       operator/        an operator's certificate and key
    lock            held while it runs      invites/         hashes of invites made here
    raft/           log and snapshots       signing/         keys that sign sessions and tokens
"""

from __future__ import annotations

import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from cluster.consensus import NodeInfo
from cluster.raft.settings import RaftSettings
from cluster.settings import ServiceSettings

PREFIX = "TRIMARAN_"
LOG_LEVELS = ("debug", "info", "warning", "error")
_NODE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class ConfigError(Exception):
    """A setting is missing or wrong. `field` names it; the message says where it came from."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class HostPort:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Checked, and with every default filled in."""

    data_dir: Path
    node_id: str
    http: str  # whole URL that users dial
    raft: HostPort  # what other nodes dial
    insecure: bool
    http_listen: HostPort  # where this process listens, if it is not where it is dialled
    raft_listen: HostPort
    log_level: str = "info"
    service: Mapping[str, Any] = field(default_factory=dict)  # settings that differ from the defaults
    raft_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> DataFolder:
        return DataFolder(self.data_dir)

    @property
    def http_hosts(self) -> list[str]:
        """The hosts that this node's certificate must name."""
        return certificate_hosts(self.http, str(self.raft))


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The layout. Nothing here touches the disk."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "node.toml"

    @property
    def cluster(self) -> Path:
        return self.path / "cluster.json"

    @property
    def begun(self) -> Path:
        return self.path / "begun"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def raft(self) -> Path:
        return self.path / "raft"

    @property
    def invites(self) -> Path:
        return self.path / "invites"

    @property
    def ca(self) -> Path:
        return self.path / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.path / "ca" / "ca.key"

    @property
    def certificate(self) -> Path:
        return self.path / "tls" / "node.pem"

    @property
    def key(self) -> Path:
        return self.path / "tls" / "node.key"

    @property
    def peer_authority(self) -> Path:
        return self.path / "tls" / "peer-authority.pem"

    @property
    def peer_authority_key(self) -> Path:
        return self.path / "tls" / "peer-authority.key"

    @property
    def operator(self) -> Path:
        return self.path / "operator" / "operator.pem"

    @property
    def operator_key(self) -> Path:
        return self.path / "operator" / "operator.key"


class ClusterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`cluster.json`: what a node must know before it has heard from anyone."""

    cluster_id: str
    members: list[NodeInfo]

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self)) + b"\n"

    @classmethod
    def load(cls, folder: DataFolder) -> ClusterFacts:
        try:
            return msgspec.json.decode(folder.cluster.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(
                f"{folder.path} is not a node's data folder ({folder.cluster.name}: {error.strerror}); "
                "make one with `trimaran tracker init`",
                field="data_dir",
            ) from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"{folder.cluster} is damaged: {error}", field="data_dir") from error


_DEFAULTS: Mapping[str, Any] = {"insecure": False, "log_level": "info", "http_listen": "", "raft_listen": ""}
_FIELDS = ("node_id", "http", "raft", "insecure", "http_listen", "raft_listen", "log_level")
_MANAGED = frozenset({"cluster_id", "data_dir", "insecure", "version", "node", "founders", "may_create"})


def load_config(
    data_dir: Path | None, *, flags: Mapping[str, Any] | None = None, environment: Mapping[str, str]
) -> NodeConfig:
    """Everything `tracker run` needs. `flags` holds those that were given (None counts as not given).
    Raises `ConfigError`."""
    where = data_dir or (
        Path(environment[PREFIX + "DATA_DIR"]) if environment.get(PREFIX + "DATA_DIR") else None
    )
    if where is None:
        raise ConfigError(
            "the node's data folder is not given: --data-dir or TRIMARAN_DATA_DIR", field="data_dir"
        )
    folder = DataFolder(where.expanduser().absolute())
    table = _read(folder.settings)
    sources = _Sources(flags or {}, environment, table, folder.settings)
    return _checked(folder, sources)


def parse_config(
    data_dir: Path, *, flags: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> NodeConfig:
    """The same for a folder that is yet to be made (`tracker init`)."""
    folder = DataFolder(data_dir.expanduser().absolute())
    return _checked(folder, _Sources(flags, environment or {}, {}, folder.settings))


def render(config: NodeConfig) -> str:
    """`node.toml` for these settings."""
    lines = [
        "# Written by `trimaran tracker init`. Flags and TRIMARAN_* variables go before this file.",
        f"node_id = {_quoted(config.node_id)}",
        f"http = {_quoted(config.http)}",
        f"raft = {_quoted(str(config.raft))}",
        f"insecure = {'true' if config.insecure else 'false'}",
        f"log_level = {_quoted(config.log_level)}",
    ]
    if config.http_listen != default_listen(http_address(config.http)):
        lines.append(f"http_listen = {_quoted(str(config.http_listen))}")
    if config.raft_listen != default_listen(config.raft):
        lines.append(f"raft_listen = {_quoted(str(config.raft_listen))}")
    for name, table in (("service", config.service), ("raft_settings", config.raft_settings)):
        if table:
            lines += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


# --- values -------------------------------------------------------------------------------------


class _Sources:
    """One setting from the first source that has it, and the name of that source for messages."""

    def __init__(
        self, flags: Mapping[str, Any], environment: Mapping[str, str], table: Mapping[str, Any], file: Path
    ) -> None:
        self.flags = {name: value for name, value in flags.items() if value is not None}
        self.environment = environment
        self.table = table
        self.file = file

    def get(self, name: str) -> tuple[Any, str]:
        if name in self.flags:
            return self.flags[name], f"--{name.replace('_', '-')}"
        variable = PREFIX + name.upper()
        if variable in self.environment:
            return self.environment[variable], variable
        if name in self.table:
            return self.table[name], f"{name} in {self.file}"
        if name in _DEFAULTS:
            return _DEFAULTS[name], "the default"
        raise ConfigError(
            f"{name} is not set: --{name.replace('_', '-')}, {variable}, or {name} in {self.file}", field=name
        )

    def tunables(self, name: str, variable: str, kind: type) -> dict[str, Any]:
        """A table of settings of another struct, each checked against that struct's own field."""
        known = _tunable_fields(kind)
        given: dict[str, tuple[Any, str]] = {}
        table = self.table.get(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"[{name}] in {self.file} must be a table", field=name)
        for key, value in table.items():
            given[key] = value, f"{key} in [{name}] of {self.file}"
        for key, value in self.environment.items():
            if key.startswith(variable):
                given[key.removeprefix(variable).lower()] = value, key
        given |= {key: (value, f"{name}.{key}") for key, value in self.flags.get(name, {}).items()}
        checked = {}
        for key, (value, source) in given.items():
            if key not in known:
                raise ConfigError(
                    f"{source}: there is no such setting; see docs/reference/tracker-settings.md", field=key
                )
            try:
                checked[key] = msgspec.convert(value, known[key], strict=not isinstance(value, str))
            except msgspec.ValidationError as error:
                raise ConfigError(f"{source}: {error}", field=key) from error
        return checked


def _tunable_fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {name: hint for name, hint in hints.items() if name not in _MANAGED}


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for key in table:
        if key not in (*_FIELDS, "service", "raft_settings"):
            raise ConfigError(f"{path} holds {key!r}, which is no setting of a node", field=key)
    return table


def _checked(folder: DataFolder, sources: _Sources) -> NodeConfig:
    node_id, source = sources.get("node_id")
    if not isinstance(node_id, str) or not _NODE_ID.fullmatch(node_id):
        raise ConfigError(
            f"{source}: {node_id!r} is no node id (a-z, 0-9 and -, at most 63, not starting with -)",
            field="node_id",
        )
    insecure = _flag(*sources.get("insecure"))
    value, source = sources.get("http")
    http = http_url(value, insecure=insecure, source=source)
    value, source = sources.get("raft")
    raft = host_port(value, field="raft", source=source)
    value, source = sources.get("http_listen")
    listen = (
        host_port(value, field="http_listen", source=source) if value else default_listen(http_address(http))
    )
    value, source = sources.get("raft_listen")
    raft_listen = host_port(value, field="raft_listen", source=source) if value else default_listen(raft)
    level, source = sources.get("log_level")
    if level not in LOG_LEVELS:
        raise ConfigError(f"{source}: {level!r} is none of {', '.join(LOG_LEVELS)}", field="log_level")
    config = NodeConfig(
        data_dir=folder.path,
        node_id=node_id,
        http=http,
        raft=raft,
        insecure=insecure,
        http_listen=listen,
        raft_listen=raft_listen,
        log_level=level,
        service=sources.tunables("service", PREFIX + "SERVICE_", ServiceSettings),
        raft_settings=sources.tunables("raft_settings", PREFIX + "RAFT_SETTINGS_", RaftSettings),
    )
    probe = NodeInfo(node_id, str(raft), http, "")
    try:
        service_settings(config, "probe")
        raft_settings(config, "probe", probe, (probe,), may_create=False)
    except ValueError as error:
        raise ConfigError(str(error), field="service") from error
    return config


def service_settings(config: NodeConfig, cluster_id: str) -> ServiceSettings:
    return ServiceSettings(
        cluster_id=cluster_id, data_dir=config.data_dir, insecure=config.insecure, **config.service
    )


def raft_settings(
    config: NodeConfig, cluster_id: str, node: NodeInfo, members: tuple[NodeInfo, ...], *, may_create: bool
) -> RaftSettings:
    return RaftSettings(
        node=node, cluster_id=cluster_id, founders=members, may_create=may_create, **config.raft_settings
    )


def host_port(value: Any, *, field: str, source: str) -> HostPort:
    text = str(value)
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ConfigError(f"{source}: {text!r} is not HOST:PORT, like tracker1.example:7100", field=field)
    return HostPort(host, int(port))


def http_url(value: Any, *, insecure: bool, source: str) -> str:
    """A whole URL from `host:port` or a URL."""
    text = str(value)
    scheme = "http" if insecure else "https"
    parts = urlsplit(text if "://" in text else f"{scheme}://{text}")
    try:
        usable = bool(parts.hostname) and bool(parts.port) and parts.path in ("", "/") and not parts.query
    except ValueError:
        usable = False
    if not usable or parts.scheme not in ("http", "https"):
        raise ConfigError(
            f"{source}: {text!r} is not HOST:PORT or a URL like https://tracker1:7000", field="http"
        )
    if parts.scheme != scheme:
        advice = "give --insecure as well" if parts.scheme == "http" else "an insecure node speaks plain http"
        raise ConfigError(f"{source}: {text!r} does not fit: {advice}", field="http")
    return f"{scheme}://{parts.netloc}"


def http_address(url: str) -> HostPort:
    parts = urlsplit(url)
    return HostPort(parts.hostname or "", parts.port or 0)


def default_listen(dialled: HostPort) -> HostPort:
    """Where to listen for what is dialled there: on that address if it is one, else on all."""
    host = dialled.host
    if host == "localhost":
        host = "127.0.0.1"
    elif not re.fullmatch(r"[0-9.]+|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", host):
        host = "0.0.0.0"  # noqa: S104 - a name may stand for any interface; TLS decides who gets in
    return HostPort(host, dialled.port)


def certificate_hosts(http: str, raft: str) -> list[str]:
    """The hosts in a node's two addresses; on loopback, all of its names."""
    hosts = [http_address(http).host, host_port(raft, field="raft", source="raft").host]
    if any(host == "localhost" or host.startswith("127.") for host in hosts):
        hosts += ["localhost", "127.0.0.1"]
    return list(dict.fromkeys(hosts))


def _flag(value: Any, source: str) -> bool:
    if isinstance(value, bool):
        return value
    words: Mapping[str, bool] = types.MappingProxyType(
        dict.fromkeys(("1", "true", "yes", "on"), True)
        | dict.fromkeys(("", "0", "false", "no", "off"), False)
    )
    known = words.get(str(value).lower())
    if known is None:
        raise ConfigError(f"{source}: {value!r} is neither true nor false", field="insecure")
    return known


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _quoted(value) if isinstance(value, str) else repr(value)
