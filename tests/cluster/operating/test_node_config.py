"""Settings of a node: which source wins, and what is refused in which words."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import config as node_config
from cluster.config import (
    ConfigError,
    DataFolder,
    HostPort,
    default_listen,
    load_config,
    parse_config,
    render,
)
from cluster.raft.settings import RaftSettings
from cluster.settings import ServiceSettings

FLAGS = {"node_id": "n1", "http": "host1:7000", "raft": "host1:7100"}


@given(st.sets(st.sampled_from(["flag", "environment", "file"])))
def test_flag_before_environment_before_file_before_default(sources: set[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = ['node_id = "n1"', 'http = "host1:7000"', 'raft = "host1:7100"']
        if "file" in sources:
            lines.append('log_level = "warning"')
        DataFolder(folder).settings.write_text("\n".join(lines))
        environment = {"TRIMARAN_LOG_LEVEL": "error"} if "environment" in sources else {}
        flags = {"log_level": "debug"} if "flag" in sources else {"log_level": None}
        expected = next(
            (
                value
                for source, value in (("flag", "debug"), ("environment", "error"), ("file", "warning"))
                if source in sources
            ),
            "info",
        )
        assert load_config(folder, flags=flags, environment=environment).log_level == expected


def test_the_data_folder_comes_from_the_environment_too(tmp_path: Path) -> None:
    DataFolder(tmp_path).settings.write_text(render(parse_config(tmp_path, flags=FLAGS)))
    assert load_config(None, environment={"TRIMARAN_DATA_DIR": str(tmp_path)}).node_id == "n1"
    with pytest.raises(ConfigError, match="--data-dir or TRIMARAN_DATA_DIR"):
        load_config(None, environment={})


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"node_id": "N 1"}, "node_id", "no node id"),
        ({"node_id": None}, "node_id", "TRIMARAN_NODE_ID"),
        ({"http": "host1"}, "http", "HOST:PORT"),
        ({"http": "https://host1:7000/x"}, "http", "HOST:PORT"),
        ({"http": "http://host1:7000"}, "http", "--insecure"),
        ({"http": "https://host1:7000", "insecure": True}, "http", "plain http"),
        ({"http": "ftp://host1:7000"}, "http", "--http"),
        ({"http": "https://host1:99999"}, "http", "HOST:PORT"),
        ({"raft": "host1:0"}, "raft", "HOST:PORT"),
        ({"raft": "host1:seven"}, "raft", "HOST:PORT"),
        ({"raft": None}, "raft", "--raft"),
        ({"insecure": "perhaps"}, "insecure", "neither"),
        ({"log_level": "loud"}, "log_level", "none of"),
        ({"http_listen": "x"}, "http_listen", "HOST:PORT"),
        ({"service": {"lease_second": 3}}, "lease_second", "no such setting"),
        ({"service": {"lease_seconds": "soon"}}, "lease_seconds", "float"),
        ({"service": {"announce_seconds": 99.0}}, "service", "shorter"),
        ({"service": {"cluster_id": "x"}}, "cluster_id", "no such setting"),
        ({"raft_settings": {"election_seconds_min": 5.0}}, "service", "election_seconds_min"),
    ],
)
def test_what_is_refused_and_how(tmp_path: Path, changes: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(tmp_path, flags={**FLAGS, **changes})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node_id = ", "not TOML"),
        ('node = "n1"', "no setting"),
        ("service = 3", "must be a table"),
        ("\xff", "TOML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = DataFolder(tmp_path).settings
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(tmp_path, flags=FLAGS, environment={})
    assert str(file) in str(caught.value)


def test_a_setting_of_the_service_from_file_and_environment(tmp_path: Path) -> None:
    DataFolder(tmp_path).settings.write_text(
        render(
            parse_config(tmp_path, flags={**FLAGS, "service": {"lease_seconds": 40.0, "token_seconds": 60.0}})
        )
    )
    config = load_config(tmp_path, environment={"TRIMARAN_SERVICE_LEASE_SECONDS": "50"})
    assert dict(config.service) == {"lease_seconds": 50.0, "token_seconds": 60.0}


@given(
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True),
    st.sampled_from(["host.example", "10.1.2.3", "localhost", "[::1]", "[fe80::1]"]),
    st.integers(1, 65_535),
    st.booleans(),
    st.sampled_from(["", "0.0.0.0:9", "[::]:9"]),
)
def test_what_init_writes_reads_back_the_same(
    node_id: str, host: str, port: int, insecure: bool, listen: str
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        flags = {
            "node_id": node_id,
            "http": f"{host}:{port}",
            "raft": f"{host}:{port}",
            "insecure": insecure,
            "http_listen": listen,
        }
        config = parse_config(Path(name), flags=flags)
        config.folder.settings.write_text(render(config))
        assert load_config(Path(name), environment={}) == config


def test_where_it_listens() -> None:
    assert default_listen(HostPort("tracker1.example", 1)) == HostPort("0.0.0.0", 1)
    assert default_listen(HostPort("10.0.0.1", 1)) == HostPort("10.0.0.1", 1)
    assert default_listen(HostPort("localhost", 1)) == HostPort("127.0.0.1", 1)
    assert default_listen(HostPort("::1", 1)) == HostPort("::1", 1)


def test_nothing_of_this_process_leaks_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMARAN_LOG_LEVEL", "error")
    assert os.environ["TRIMARAN_LOG_LEVEL"] == "error"
    assert parse_config(tmp_path, flags=FLAGS).log_level == "info"


def test_the_page_of_settings_is_up_to_date() -> None:
    pages = Path(__file__).parents[3] / "docs" / "reference"
    generator = runpy.run_path(str(pages / "generate_tracker_settings.py"))
    assert (pages / "tracker-settings.md").read_text() == generator["page"]()
    for kind in (ServiceSettings, RaftSettings):
        for name in node_config._tunable_fields(kind):
            assert f"| `{name}` |" in generator["page"]()
