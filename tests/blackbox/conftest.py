from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig import Cluster, Person, running_cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def person(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[str], Person]]:
    """Makes a registered, signed-in person with a home of their own."""
    people: list[Person] = []

    def make(name: str) -> Person:
        someone = Person(cluster, tmp_path / f"home-of-{name}", name)
        people.append(someone)
        answer = someone.ok("register", name)
        assert answer["user"] == name
        assert answer["peer_id"]
        return someone

    yield make
    for someone in people:
        if someone.peer is not None:
            someone.stop_peer()
