"""Every verb with `--json` on a real cluster of three: documented answers and exit codes."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from rig import CLEAN, COMMAND, PASSWORD, Cluster, Person, Process, run, wait_for

MakePerson = Callable[[str], Person]
REVISION_ONLY = {"revision"}


def crew(owner: Person, group: str, *others: Person) -> None:
    """A group with these members, by the documented verbs."""
    assert owner.ok("group", "create", group).keys() >= REVISION_ONLY
    for each in others:
        assert each.ok("group", "join", group).keys() >= REVISION_ONLY
        assert owner.ok("group", "accept", group, each.name).keys() >= REVISION_ONLY


def test_people(cluster: Cluster, tmp_path: Path) -> None:
    ana = Person(cluster, tmp_path / "ana", "people-ana")
    ana.refused(4, "whoami")
    ana.refused(4, "group", "list")
    made = ana.ok("register", ana.name)
    assert made["user"] == ana.name
    ana.refused(5, "register", ana.name)
    assert ana.ok("login", ana.name) == made
    assert ana.ok("whoami") == made

    # a password never stands among the arguments: stdin, or the environment
    other = {"TRIMARAN_PASSWORD": "not the password"}
    ana.refused(4, "login", ana.name, environment=other)
    ana.refused(4, "login", "nobody-of-this-name")
    assert (
        ana.ok("login", ana.name, "--password-stdin", stdin=f"{PASSWORD}\n", environment=other)["user"]
        == ana.name
    )
    ana.refused(2, "register", "people-short", environment={"TRIMARAN_PASSWORD": "short"})
    ana.refused(2, "register", "bad\nname")

    new = "a new password altogether"
    ana.refused(4, "passwd", environment=other | {"TRIMARAN_NEW_PASSWORD": new})
    assert ana.ok("passwd", environment={"TRIMARAN_NEW_PASSWORD": new}).keys() >= REVISION_ONLY
    ana.refused(4, "login", ana.name)
    ana.environment["TRIMARAN_PASSWORD"] = new
    ana.ok("login", ana.name)
    assert ana.ok("logout").keys() >= REVISION_ONLY
    ana.refused(4, "whoami")

    # two homes are two peers of one user
    elsewhere = Person(cluster, tmp_path / "elsewhere", ana.name)
    elsewhere.environment["TRIMARAN_PASSWORD"] = new
    assert elsewhere.ok("login", ana.name)["peer_id"] != made["peer_id"]


def test_groups(person: MakePerson) -> None:
    ana, ben, cho = person("groups-ana"), person("groups-ben"), person("groups-cho")
    ana.ok("group", "create", "sailors")
    ana.refused(5, "group", "create", "sailors")
    ana.refused(2, "group", "create", "bad\tname")
    (listed,) = [each for each in ben.ok("group", "list") if each["name"] == "sailors"]
    assert (listed["owner"], listed["members"], listed["role"]) == (ana.name, 1, None)

    # a stranger cannot tell what exists: membership is checked before existence
    ben.refused(4, "group", "members", "no-such-group")
    ben.refused(4, "files", "sailors")
    ben.refused(4, "files", "no-such-group")
    ben.refused(4, "info", "sailors/nothing")
    ana.refused(3, "info", "sailors/nothing")

    # asking, withdrawing, asking twice, rejecting, accepting
    ben.ok("group", "join", "sailors")
    ben.ok("group", "join", "sailors")
    asking = ana.ok("group", "requests", "sailors")
    assert [each["user"] for each in asking] == [ben.name]
    assert asking[0]["requested_at"]
    ben.refused(4, "group", "requests", "sailors")
    ben.ok("group", "withdraw", "sailors")
    assert ana.ok("group", "requests", "sailors") == []
    ben.ok("group", "join", "sailors")
    ana.ok("group", "reject", "sailors", ben.name)
    ana.refused(3, "group", "accept", "sailors", ben.name)
    ben.ok("group", "join", "sailors")
    ana.ok("group", "accept", "sailors", ben.name)
    ben.refused(5, "group", "join", "sailors")
    cho.ok("group", "join", "sailors")
    ben.refused(4, "group", "accept", "sailors", cho.name)
    ana.ok("group", "accept", "sailors", cho.name)
    shown = ben.ok("group", "show", "sailors")
    assert (shown["name"], shown["owner"]) == ("sailors", ana.name)
    assert {each["user"]: each["role"] for each in shown["members"]} == {
        ana.name: "owner",
        ben.name: "member",
        cho.name: "member",
    }
    assert all(each["since"] for each in shown["members"])
    assert ben.ok("group", "members", "sailors")["members"] == shown["members"]

    # roles
    ben.refused(4, "group", "promote", "sailors", ben.name)
    ben.refused(4, "group", "kick", "sailors", cho.name)
    ana.ok("group", "promote", "sailors", ben.name)
    ana.ok("group", "demote", "sailors", ben.name)
    ana.ok("group", "promote", "sailors", ben.name)
    ben.refused(4, "group", "kick", "sailors", ana.name)
    ben.ok("group", "kick", "sailors", cho.name)
    cho.refused(4, "group", "members", "sailors")
    ana.refused(3, "group", "kick", "sailors", cho.name)
    entries = ben.ok("group", "log", "sailors")
    assert any((ben.name, cho.name) == (each["actor"], each["subject"]) for each in entries)
    ana.ok("group", "transfer", "sailors", ben.name)
    ana.refused(4, "group", "delete", "sailors")

    # the owner leaves: the longest-standing admin takes over; the last one out removes the group
    ben.ok("group", "leave", "sailors")
    assert ana.ok("group", "show", "sailors")["owner"] == ana.name
    ana.ok("group", "leave", "sailors")
    assert not [each for each in ana.ok("group", "list") if each["name"] == "sailors"]
    ana.ok("group", "create", "rowers")
    ana.ok("group", "delete", "rowers")
    ana.refused(4, "group", "members", "rowers")


def test_files_with_running_peers(person: MakePerson, tmp_path: Path) -> None:
    ana, ben, cho = person("files-ana"), person("files-ben"), person("files-cho")
    crew(ana, "files", ben)
    ready = ana.start_peer()
    assert ready.keys() >= {"peer_id", "listen", "pid"}
    assert ready["peer_id"] == ana.ok("whoami")["peer_id"]
    ana.refused(5, "peer", "run")

    source = tmp_path / "grüße 文件.bin"
    source.write_bytes(bytes(range(256)) * 20_000)
    shared = f"files/{source.name}"
    report = ana.ok("share", str(source), "--group", "files")
    assert (report["group"], report["name"], report["size_bytes"]) == ("files", source.name, 5_120_000)
    assert report["pieces"] >= 1
    cho.refused(4, "share", str(source), "--group", "files")
    ana.refused(3, "share", str(tmp_path / "none"), "--group", "files")

    (listed,) = ben.ok("files", "files")
    assert listed["manifest_id"] == report["manifest_id"]
    assert (listed["kind"], listed["size_bytes"], listed["pieces"]) == ("file", 5_120_000, report["pieces"])
    assert (listed["seeders"], listed["leechers"], listed["shared_by"]) == (1, 0, ana.name)
    told = ben.ok("info", shared)
    assert [(each["user"], each["complete"]) for each in told["peers"]] == [(ana.name, True)]
    assert told["peers"][0]["peer_id"] == ready["peer_id"]

    # downloading, without a running peer
    downloads = tmp_path / "downloads"
    got = ben.ok("get", shared, "-o", str(downloads), "--checksum")
    assert Path(got["path"]) == downloads / source.name
    assert Path(got["path"]).read_bytes() == source.read_bytes()
    assert got["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (got["verified"], got["size_bytes"], got["received_bytes"]) == (True, 5_120_000, 5_120_000)
    assert got["reused_bytes"] == 0
    assert [(each["peer_id"], each["bytes"]) for each in got["sources"]] == [(ready["peer_id"], 5_120_000)]
    assert sum(each["pieces"] for each in got["sources"]) == report["pieces"]
    again = ben.ok("get", "-o", str(downloads), shared)
    assert (again["received_bytes"], again["verified"]) == (0, True)
    assert "sha256" not in again
    other = tmp_path / "taken"
    other.mkdir()
    (other / source.name).write_bytes(b"something else")
    ben.refused(5, "get", shared, "-o", str(other))
    assert (other / source.name).read_bytes() == b"something else"
    ben.refused(3, "get", "files/none")
    cho.refused(4, "get", shared)

    # several names, one line each, and the first failure's exit code
    second = tmp_path / "second.txt"
    second.write_text("second")
    ana.ok("share", str(second), "--group", "files", "--name", "second")
    several = ben.run("get", shared, "files/none", "files/second", "-o", str(tmp_path / "several"))
    assert several.code == 3
    assert [json.loads(line)["size_bytes"] for line in several.out.splitlines()] == [5_120_000, 6]
    assert json.loads(several.err.splitlines()[-1])["error"]["code"]

    # the same content adds a seeder; other content under the name is refused, unless it replaces
    copy = tmp_path / "copy"
    copy.write_bytes(source.read_bytes())
    ben.start_peer()
    assert (
        ben.ok("share", str(copy), "--group", "files", "--name", source.name)["manifest_id"]
        == report["manifest_id"]
    )
    wait_for(lambda: ana.ok("info", shared)["seeders"] == 2, "the second seeder")
    ben.refused(5, "share", str(second), "--group", "files", "--name", source.name)
    replaced = ana.ok("share", str(second), "--group", "files", "--name", source.name, "--replace")
    assert replaced["manifest_id"] != report["manifest_id"]
    assert ben.ok("info", shared)["manifest_id"] == replaced["manifest_id"]

    # ps, unshare, remove
    row = ana.row("files", "second")
    assert row is not None
    assert row.keys() >= {
        *("group", "name", "state", "done_bytes", "size_bytes", "rate_bytes_per_second", "peers"),
    }
    assert (row["state"], row["done_bytes"]) == ("complete", 6)
    assert ana.ok("verify", "files/second")["state"] == "complete"
    ana.refused(3, "verify", "files/none")
    assert ana.ok("unshare", "files/second").keys() >= REVISION_ONLY
    ana_peer = ready["peer_id"]
    wait_for(
        lambda: ana_peer not in {each["peer_id"] for each in ben.ok("info", "files/second")["peers"]},
        "the seeder to be gone",
    )
    ben.refused(4, "remove", "files/second")
    assert ana.ok("remove", "files/second").keys() >= REVISION_ONLY
    ana.refused(3, "remove", "files/second")
    ana.refused(3, "info", "files/second")


def test_a_folder_keeps_its_shape(person: MakePerson, tmp_path: Path) -> None:
    ana, ben = person("folder-ana"), person("folder-ben")
    crew(ana, "folders", ben)
    folder = tmp_path / "tree"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty folder").mkdir()
    (folder / "empty").touch()
    (folder / "deep" / "er" / "名前").write_bytes(b"x" * 300_000)
    script = folder / "deep" / "run.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    ana.start_peer()
    report = ana.ok("share", str(folder), "--group", "folders")
    assert report["name"] == "tree"
    (listed,) = ben.ok("files", "folders")
    assert (listed["kind"], listed["size_bytes"]) == ("folder", 300_010)
    got = ben.ok("get", "folders/tree", "-o", str(tmp_path / "out"))
    copy = Path(got["path"])

    def shape(root: Path) -> dict[str, object]:
        return {
            each.relative_to(root).as_posix(): (
                each.is_dir() or (each.read_bytes(), bool(each.stat().st_mode & 0o100))
            )
            for each in root.rglob("*")
        }

    assert shape(copy) == shape(folder)


def test_a_peer_pauses_resumes_cancels_and_limits(person: MakePerson, tmp_path: Path) -> None:
    ana, ben = person("transfers-ana"), person("transfers-ben")
    crew(ana, "transfers", ben)
    source = tmp_path / "big"
    source.write_bytes(b"".join(number.to_bytes(4, "big") for number in range(3 << 20)))
    ana.start_peer()
    ana.ok("share", str(source), "--group", "transfers")
    ben.start_peer()
    assert ben.ok("peer", "limits", "--down", "2M", "--up", "0") == {
        "up_bytes_per_second": 0,
        "down_bytes_per_second": 2 << 20,
        "up_each_bytes_per_second": 0,
        "up_slots": 0,
    }
    assert ben.ok("peer", "limits", "--up-each", "1.5M", "--slots", "3") == {
        "up_bytes_per_second": 0,
        "down_bytes_per_second": 2 << 20,
        "up_each_bytes_per_second": 3 << 19,
        "up_slots": 3,
    }
    for absurd in (
        ("--up-each", "1K"),
        ("--up-each", "-1M"),
        ("--slots", "65"),
        ("--slots", "-1"),
        ("--slots", "x"),
    ):
        ben.refused(2, "peer", "limits", *absurd)
    ben.refused(2, "peer", "limits", "--up", "9" * 400)
    assert ben.ok("peer", "limits", "--up-each", "0", "--slots", "0")["up_each_bytes_per_second"] == 0
    assert ben.ok("peer", "limits")["down_bytes_per_second"] == 2 << 20
    getting = subprocess.Popen(
        [COMMAND, "get", "transfers/big", "-o", str(tmp_path / "out"), "--json"],
        env=CLEAN | ben.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: (ben.row("transfers", "big") or {}).get("done_bytes"), "the first bytes")
        assert (ben.row("transfers", "big") or {})["state"] == "downloading"
        ben.ok("pause", "transfers/big")
        wait_for(lambda: (ben.row("transfers", "big") or {})["state"] == "paused", "the pause")
        paused = (ben.row("transfers", "big") or {})["done_bytes"]
        assert not (tmp_path / "out" / "big").exists()
        ben.ok("resume", "transfers/big")
        wait_for(lambda: (ben.row("transfers", "big") or {})["done_bytes"] > paused, "it to go on")
        ben.ok("peer", "limits", "--down", "0")
        wait_for(lambda: (ben.row("transfers", "big") or {})["state"] == "complete", "completion")
        assert (tmp_path / "out" / "big").read_bytes() == source.read_bytes()
    finally:
        getting.kill()
        getting.communicate()
    ben.refused(3, "pause", "transfers/none")
    ben.refused(3, "cancel", "transfers/none")


def test_interrupting_a_get_keeps_what_is_there(person: MakePerson, tmp_path: Path) -> None:
    ana, ben = person("interrupt-ana"), person("interrupt-ben")
    crew(ana, "interrupts", ben)
    source = tmp_path / "big"
    source.write_bytes(b"".join(number.to_bytes(4, "little") for number in range(4 << 20)))
    ana.start_peer()
    ana.ok("share", str(source), "--group", "interrupts")
    out = tmp_path / "out"
    getting = subprocess.Popen(
        [COMMAND, "get", "interrupts/big", "-o", str(out), "--down", "4M", "--json"],
        env=CLEAN | ben.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: ana.ok("info", "interrupts/big")["leechers"] == 1, "the leecher")
    wait_for(lambda: uploaded(ana) > 5 << 20, "some pieces")
    getting.send_signal(2)
    printed, errors = getting.communicate(timeout=30)
    assert (getting.returncode, printed) == (130, "")
    assert "progress is kept" in json.loads(errors.splitlines()[-1])["error"]["message"].lower()
    got = ben.ok("get", "interrupts/big", "-o", str(out))
    assert Path(got["path"]).read_bytes() == source.read_bytes()
    assert got["reused_bytes"] > 0
    assert got["received_bytes"] + got["reused_bytes"] >= 16 << 20
    assert got["received_bytes"] < 14 << 20


def uploaded(person: Person) -> int:
    return sum(row["uploaded_bytes"] for row in person.ok("ps"))


def test_share_in_the_foreground_serves_until_ctrl_c(person: MakePerson, tmp_path: Path) -> None:
    ana, ben = person("foreground-ana"), person("foreground-ben")
    crew(ana, "foreground", ben)
    source = tmp_path / "f"
    source.write_bytes(b"f" * 100_000)
    serving = Process(["share", str(source), "--group", "foreground"], ana.environment)
    assert serving.ready["pieces"] >= 1
    assert ben.ok("get", "foreground/f", "-o", str(tmp_path / "out"))["size_bytes"] == 100_000
    assert serving.stop() == 0
    # after a restart, it is shared again
    ana.start_peer()
    wait_for(lambda: ben.ok("info", "foreground/f")["seeders"] >= 1, "sharing again")
    # what changed on disk is said, and not offered
    ana.stop_peer()
    source.write_bytes(b"changed")
    ana.start_peer()
    wait_for(lambda: (ana.row("foreground", "f") or {}).get("state") == "changed", "the change to be noticed")


def test_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    status = cluster.status()
    assert status["quorum"] is True
    assert status["leader"] in {node["id"] for node in cluster.nodes}
    assert status["revision"] >= 0
    assert status["term"] >= 1
    assert len(status["nodes"]) == 3
    for node in status["nodes"]:
        assert node.keys() >= {"id", "address", "role", "reachable", "applied", "committed"}
    assert sum(node["role"] == "leader" for node in status["nodes"]) == 1
    watched = cluster.run("cluster", "watch", "--count", "1")
    assert watched.json["leader"]
    # any one node answers for all
    for node in cluster.nodes:
        alone = run("cluster", "status", environment=cluster.options | {"TRIMARAN_TRACKERS": node["http"]})
        assert len(alone.json["nodes"]) == 3
    # operators alone
    home = {"TRIMARAN_HOME": str(tmp_path / "stranger")}
    follower = next(node["id"] for node in status["nodes"] if node["role"] == "follower")
    refused = run("cluster", "transfer", follower, environment=cluster.options | home)
    assert refused.code in (2, 4), refused
    operator = {"TRIMARAN_OPERATOR": str(cluster.data_dir)}
    moved = run("cluster", "transfer", follower, environment=cluster.options | operator)
    assert moved.code == 0, moved
    assert moved.json.keys() >= REVISION_ONLY
    wait_for(lambda: cluster.status()["leader"] == follower, "the new leader")
    # a second process on a data folder is refused
    second = run("tracker", "run", "--data-dir", cluster.nodes[0]["data_dir"], environment={})
    assert second.code == 5, second
    # a dead cluster
    dead = run("cluster", "status", environment={"TRIMARAN_TRACKERS": "https://127.0.0.1:9"})
    assert dead.code == 6
