"""Flag, environment, file, default: for every option of every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cyclopts import App
from hypothesis import given
from hypothesis import strategies as st

from peer.reports import Exit, TrimaranError
from trimaran import settings
from trimaran.cli.app import build
from trimaran.cli.main import hoisted
from trimaran.settings import Common


def parsed(*argv: str) -> dict[str, Any]:
    ordered = hoisted(argv)
    _, bound, *_ = build(ordered[0]).parse_args(ordered, exit_on_error=False, print_error=False)
    return dict(bound.arguments)


def every_option() -> set[tuple[str, str]]:
    """(command, option) for all commands, as the parser knows them."""
    found: set[tuple[str, str]] = set()

    def walk(app: App, path: str) -> None:
        if app.default_command is not None:
            for argument in app.assemble_argument_collection():
                if argument.name.startswith("--") and argument.parse:
                    found.add((path, argument.name))
        for name in app:
            if not name.startswith("-"):
                walk(app[name], f"{path} {name}".strip())

    walk(build(), "")
    return found


def test_every_option_has_a_key_in_the_file_and_every_key_an_option() -> None:
    options = {name.removeprefix("--").replace("-", "_") for _, name in every_option()}
    assert options - {"config"} == settings.FILE_KEYS


def test_flag_before_environment_before_file_before_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert parsed("get", "g/n", "--home", str(home)).get("down", "") == ""
    (home / "config.toml").write_text('down = "1K"\n')
    assert parsed("get", "g/n", "--home", str(home))["down"] == "1K"
    monkeypatch.setenv("TRIMARAN_DOWN", "2K")
    assert parsed("get", "g/n", "--home", str(home))["down"] == "2K"
    assert parsed("get", "g/n", "--home", str(home), "--down", "3K")["down"] == "3K"


def test_values_of_the_file_may_be_lists_numbers_and_booleans(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('trackers = ["https://a:1", "https://b:2"]\njson = true\nbase-port = 7100\n')
    common: Common = parsed("ps", "--config", str(file))["common"]
    assert common.tracker_urls == ("https://a:1", "https://b:2")
    assert common.json


@pytest.mark.parametrize(
    ("content", "says"),
    [("trackers = [", "is not TOML"), ('treckers = "x"', "which is no setting")],
)
def test_a_broken_file_is_told(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(content)
    with pytest.raises(TrimaranError, match=says) as caught:
        parsed("ps", "--config", str(file))
    assert caught.value.exit_code is Exit.USAGE


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(TrimaranError, match="no settings file"):
        parsed("ps", "--config", str(tmp_path / "none.toml"))


def test_trackers_are_remembered_once(tmp_path: Path) -> None:
    common = Common(
        home=str(tmp_path), trackers="localhost:7000,localhost:7001", ca=str(tmp_path / 'c"a.pem')
    )
    assert settings.remember_trackers(common) == tmp_path / "config.toml"
    again: Common = parsed("ps", "--home", str(tmp_path))["common"]
    assert again.tracker_urls == ("https://localhost:7000", "https://localhost:7001")
    assert again.ca == common.ca
    other = Common(home=str(tmp_path), trackers="https://elsewhere:1")
    assert settings.remember_trackers(other) is None
    assert "elsewhere" not in (tmp_path / "config.toml").read_text()


@pytest.mark.parametrize(
    "argv",
    [
        ("--json", "--home", "/h", "get", "g/n", "-o", "d"),
        ("get", "--json", "g/n", "--home=/h", "-o", "d"),
        ("get", "-o", "d", "--home", "/h", "g/n", "--json"),
        ("get", "g/n", "-o=d", "--json", "--home", "/h"),
    ],
)
def test_options_stand_anywhere(argv: tuple[str, ...]) -> None:
    got = parsed(*argv)
    assert (got["shared"], got["output"]) == (("g/n",), "d")
    assert (got["common"].json, got["common"].home) == (True, "/h")


def test_common_options_stand_between_noun_and_verb() -> None:
    assert parsed("group", "--json", "show", "crew") == {"group": "crew", "common": Common(json=True)}


def test_what_begins_with_a_dash_is_named_after_two_dashes() -> None:
    assert parsed("files", "--json", "--", "-odd")["group"] == "-odd"


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        ("0", 0),
        ("700", 700),
        ("20M", 20 << 20),
        ("1.5k", 1536),
        ("2G", 2 << 30),
        ("5MiB/s", 5 << 20),
        ("8KB", 8192),
    ],
)
def test_rates(text: str, bytes_per_second: int) -> None:
    assert settings.rate(text) == bytes_per_second


@pytest.mark.parametrize("text", ["", "fast", "-1", "1T", "M", "1 2", "1e9", "٣M" + "x", "nan"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(TrimaranError) as caught:
        settings.rate(text)
    assert caught.value.exit_code is Exit.USAGE


@given(st.text(max_size=40))
def test_no_text_breaks_the_readers(text: str) -> None:
    for reader in (settings.rate, settings.urls, settings.group_and_name):
        try:
            reader(text)
        except TrimaranError as error:
            assert error.exit_code is Exit.USAGE
    try:
        settings.host_and_port(text, "--listen")
    except TrimaranError as error:
        assert error.exit_code is Exit.USAGE


def test_urls_are_whole_and_distinct() -> None:
    assert settings.urls("a:1, https://a:1/ ,http://b:2,") == ("https://a:1", "http://b:2")
    assert settings.urls("a:1", insecure=True) == ("http://a:1",)
    with pytest.raises(TrimaranError):
        settings.urls("ftp://a:1")
    with pytest.raises(TrimaranError):
        settings.urls("https://a:99999")


def test_a_name_may_hold_slashes_after_the_group() -> None:
    assert settings.group_and_name("crew/a/b") == ("crew", "a/b")
