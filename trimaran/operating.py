"""Where an operator's commands find the cluster and the operator's certificate.

Owned here: the order in which they are looked for. `tracker init` and `tracker local` note their data folder in
the home (`HOME/tracker-folder`), so that on that machine `tracker invite` and `cluster ...` need no options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from peer.reports import Exit, TrimaranError

from .settings import Common, usage

_NOTE = "tracker-folder"


@dataclass(frozen=True, slots=True)
class Operator:
    common: Common  # with trackers and CA filled in
    certificate: tuple[Path, Path] | None  # None where the cluster runs without certificates


def remember_folder(common: Common, data_dir: Path) -> None:
    """Note the data folder that was made last on this machine by this user."""
    home = common.home_folder
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / _NOTE).write_text(f"{data_dir.absolute()}\n", encoding="utf-8")


def with_cluster(common: Common, folder: str = "") -> Common:
    """The same options, with trackers and CA from a node's data folder where none were named."""
    if common.tracker_urls:
        return common
    where = Path(folder).expanduser() if folder else _remembered(common)
    return _from_folder(common, where) if where is not None else common


def operator_of(common: Common, folder: str) -> Operator:
    """Raises `TrimaranError` when no certificate is found and one is needed."""
    where = Path(folder).expanduser() if folder else _remembered(common)
    if where is None:
        usage(
            "No operator's certificate is known.",
            "Name the data folder of the node that was made first with --operator DIR (or TRIMARAN_OPERATOR).",
        )
    filled = common if common.tracker_urls else _from_folder(common, where)
    for place in (where, where / "operator"):
        pair = place / "operator.pem", place / "operator.key"
        if all(each.exists() for each in pair):
            return Operator(filled, pair)
    if filled.insecure:
        return Operator(filled, None)
    raise TrimaranError(
        f"There is no operator's certificate in {where}.",
        exit_code=Exit.DENIED,
        code="operators-only",
        hint="It is in the data folder of the node that was made by `trimaran tracker init` without --join.",
    )


def _remembered(common: Common) -> Path | None:
    try:
        return Path((common.home_folder / _NOTE).read_text(encoding="utf-8").strip())
    except OSError:
        return None


def _from_folder(common: Common, folder: Path) -> Common:
    from cluster.config import ConfigError, load_config

    for place in (folder, folder / "n1"):  # `tracker local` keeps a folder for each node
        if not (place / "node.toml").exists():
            continue
        try:
            config = load_config(place, environment={})
        except ConfigError as error:
            usage(f"{place} is no node's data folder: {error}.")
        ca = "" if config.insecure else str(config.folder.ca)
        return replace(common, trackers=config.http, ca=common.ca or ca, insecure=config.insecure)
    return common
