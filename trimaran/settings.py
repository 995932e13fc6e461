"""Where every setting comes from: flag, environment, file, default, in that order.

Owned here: the options that every command takes (`Common`), the environment twin and the file key of
every option, rates (`20M`), and lists of URLs. Left to the commands: their own options.

An option `--base-port` is `TRIMARAN_BASE_PORT` in the environment and `base_port` (or `base-port`) at the
top of the TOML file. The file is `--config FILE`, else `TRIMARAN_CONFIG`, else `config.toml` in the home.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import Group, Parameter, Token

if TYPE_CHECKING:
    from cyclopts import App, ArgumentCollection

    from peer.reports import PeerSettings

PREFIX = "TRIMARAN_"
TRUE = frozenset({"1", "true", "yes", "on", "y", "t"})
COMMON = Group("Common options", sort_key=90)

# Every key that the file may hold: the options of all commands. A test compares it with the commands.
FILE_KEYS = frozenset(
    (
        "advertise",
        "algorithm",
        "base_port",
        "ca",
        "checksum",
        "count",
        "data_dir",
        "down",
        "file",
        "group",
        "home",
        "http",
        "http_listen",
        "insecure",
        "interval_seconds",
        "invitation",
        "join",
        "json",
        "keep",
        "key_fingerprint",
        "kill",
        "lift",
        "listen",
        "log_level",
        "name",
        "node_id",
        "nodes",
        "operator",
        "output",
        "password_stdin",
        "picture",
        "quiet",
        "raft",
        "raft_listen",
        "replace",
        "seed",
        "slots",
        "trackers",
        "up",
        "up_each",
        "valid_seconds",
    )
)
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?(?:/s)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Common:
    """The options that every command takes."""

    home: Annotated[str, Parameter(group=COMMON, help="The peer's folder. Two homes are two peers.")] = ""
    trackers: Annotated[
        str, Parameter(group=COMMON, metavar="URL,URL", help="The cluster's nodes; any of them will do.")
    ] = ""
    ca: Annotated[
        str, Parameter(group=COMMON, metavar="FILE", help="The certificate of the cluster's CA.")
    ] = ""
    insecure: Annotated[
        bool, Parameter(group=COMMON, negative="", help="Plain HTTP, without certificates.")
    ] = False
    config: Annotated[str, Parameter(group=COMMON, metavar="FILE", help="A TOML file with settings.")] = ""
    json: Annotated[
        bool, Parameter(group=COMMON, negative="", help="One JSON document on stdout, nothing else.")
    ] = False
    quiet: Annotated[
        bool, Parameter(name=["--quiet", "-q"], group=COMMON, negative="", help="No progress, no notes.")
    ] = False

    @property
    def home_folder(self) -> Path:
        return home_folder(self.home)

    @property
    def tracker_urls(self) -> tuple[str, ...]:
        return urls(self.trackers, insecure=self.insecure)

    @property
    def ca_file(self) -> Path | None:
        return Path(self.ca).expanduser() if self.ca else None


DEFAULTS = Common()


def common_of_environment() -> Common:
    """The common options as they stand in the environment and the file, for who has no flags: the menu."""
    table = read_file(os.environ.get(twin("config"), ""), os.environ.get(twin("home"), ""))

    def said(key: str) -> str:
        return os.environ.get(twin(key), _as_text(table.get(key, "")))

    return Common(
        home=said("home"),
        trackers=said("trackers"),
        ca=said("ca"),
        insecure=said("insecure").lower() in TRUE,
        config=os.environ.get(twin("config"), ""),
    )


def home_folder(home: str) -> Path:
    if home:
        return Path(home).expanduser().absolute()
    from platformdirs import user_data_path

    return user_data_path("trimaran", appauthor=False)


def urls(text: str, *, insecure: bool = False) -> tuple[str, ...]:
    """`host:7000,https://other:7000/` as whole URLs, without trailing slashes. Raises `TrimaranError`."""
    from urllib.parse import urlsplit

    found: list[str] = []
    for part in (each.strip().rstrip("/") for each in text.split(",")):
        if not part:
            continue
        url = part if "://" in part else f"{'http' if insecure else 'https'}://{part}"
        try:
            split = urlsplit(url)
            usable = split.scheme in ("http", "https") and bool(split.hostname)
            _ = split.port
        except ValueError:
            usable = False
        if not usable:
            usage(
                f"“{part}” is no address of a tracker.",
                "Write it like https://host:7000, several with commas.",
            )
        if url not in found:
            found.append(url)
    return tuple(found)


def rate(text: str) -> int:
    """`20M` as bytes per second: K, M and G are 1024, 1024² and 1024³, as in aria2c; 0 is unlimited.

    Raises `TrimaranError`."""
    from peer.reports import RATE_MAX

    match = _RATE.fullmatch(text.strip())
    if match is None:
        usage(f"“{text}” is no rate.", "Rates are bytes per second, like 500K, 20M or 1.5G; 0 is unlimited.")
    value = float(match[1]) * _UNITS[match[2].lower()]
    if value > RATE_MAX:
        usage(f"“{text}” is more than any rate.", "At most 1024G; 0 is unlimited.")
    return int(value)


def group_and_name(text: str) -> tuple[str, str]:
    """`GROUP/NAME` as its two halves. Raises `TrimaranError`."""
    group, slash, name = text.partition("/")
    if not (group and slash and name):
        usage(
            f"“{text}” does not name a shared file.",
            "Write it as GROUP/NAME; `trimaran files GROUP` lists them.",
        )
    return group, name


def a_name(_type: Any, value: Any) -> None:
    """For names that may be anything but nothing."""
    if not value:
        raise ValueError("A name cannot be empty.")


def host_and_port(text: str, option: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`. Raises `TrimaranError`."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        usage(
            f"“{text}” is no HOST:PORT for {option}.", "Write it like 0.0.0.0:7000; port 0 picks a free one."
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def usage(message: str, hint: str = "") -> NoReturn:
    from peer.reports import Exit, TrimaranError

    raise TrimaranError(message, exit_code=Exit.USAGE, code="usage", hint=hint)


def peer_settings(
    common: Common,
    *,
    listen: str = "",
    advertise: str = "",
    up: str = "",
    up_each: str = "",
    slots: int = 0,
    down: str = "",
    algorithm: str = "",
) -> PeerSettings:
    """What the engine needs, from what was said and the defaults. Raises `TrimaranError`."""
    from peer.reports import PeerSettings

    trackers = common.tracker_urls
    if not trackers:
        usage(
            "No tracker is known.",
            "Name the cluster's nodes once with --trackers URL,URL,URL (or TRIMARAN_TRACKERS), "
            "or start a cluster on this machine: trimaran tracker local --data-dir DIR",
        )
    plain = [url for url in trackers if url.startswith("http:")]
    if plain and not common.insecure:
        usage(f"{plain[0]} is not encrypted.", "Use https, or allow plain HTTP with --insecure.")
    known: dict[str, Any] = {}
    if listen:
        host_and_port(listen, "--listen")
        known["listen"] = listen
    if algorithm:
        if algorithm not in ("sha256", "blake3"):
            usage(f"“{algorithm}” is no algorithm for pieces.", "Choose sha256 or blake3.")
        known["algorithm"] = algorithm
    if advertise:
        known["advertise"] = urls(advertise, insecure=common.insecure)
    if up:
        known["up_bytes_per_second"] = rate(up)
    if up_each:
        known["up_each_bytes_per_second"] = rate(up_each)
    if down:
        known["down_bytes_per_second"] = rate(down)
    return PeerSettings(
        home=common.home_folder,
        trackers=trackers,
        ca=common.ca_file,
        insecure=common.insecure,
        up_slots=slots,
        **known,
    )


def from_environment_and_file(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Cyclopts calls this between reading the flags and converting them: fill what no flag named."""
    said = {argument.name: argument for argument in arguments}

    def choice(option: str) -> str:
        tokens = said[option].tokens if option in said else []
        return tokens[-1].value if tokens else os.environ.get(twin(option), "")

    table = read_file(choice("--config"), choice("--home"))
    for argument in arguments:
        if argument.tokens or not argument.name.startswith("--") or not argument.parse:
            continue
        key = argument.name.removeprefix("--")
        name = twin(argument.name)
        if name in os.environ:
            argument.append(Token(keyword=name, value=os.environ[name], source="environment"))
        elif (value := table.get(key.replace("-", "_"))) is not None:
            argument.append(Token(keyword=key, value=_as_text(value), source="file"))


def twin(option: str) -> str:
    """`--base-port` as `TRIMARAN_BASE_PORT`."""
    return PREFIX + option.lstrip("-").replace("-", "_").upper()


def read_file(config: str, home: str) -> dict[str, Any]:
    """The file's table, keys with underscores. A missing default file is an empty one."""
    import tomllib

    path = Path(config).expanduser() if config else home_folder(home) / "config.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if config:
            usage(f"There is no settings file {path}.", "Check --config or TRIMARAN_CONFIG.")
        return {}
    except OSError as error:
        usage(f"The settings file {path} cannot be read: {error.strerror}.")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        usage(f"The settings file {path} is not TOML: {error}.")
    known = {key.replace("-", "_"): value for key, value in table.items()}
    unknown = sorted(known.keys() - FILE_KEYS)
    if unknown:
        usage(
            f"The settings file {path} holds “{unknown[0]}”, which is no setting.",
            "Its keys are the options' names: trackers, ca, home, listen, ...",
        )
    return known


def remember_trackers(common: Common) -> Path | None:
    """After a first sign-in: keep which cluster this home belongs to, unless the home has settings.

    Answers the file it wrote, or None."""
    path = common.home_folder / "config.toml"
    if path.exists() or not common.tracker_urls:
        return None
    lines = [
        "# Written at the first sign-in. Flags and the environment come before this file.",
        f"trackers = [{', '.join(_quoted(url) for url in common.tracker_urls)}]",
    ]
    if common.ca_file is not None:
        lines.append(f"ca = {_quoted(str(common.ca_file.absolute()))}")
    if common.insecure:
        lines.append("insecure = true")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(_as_text(each) for each in value)
    return str(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
