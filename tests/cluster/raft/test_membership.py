"""A node that comes back under its old name with another key is a new one: what its predecessor had is not its own."""

from cluster.consensus import NodeInfo
from cluster.raft.entries import Configuration, encode_configuration
from cluster.raft.messages import Ack, AppendEntries, Removed
from tests.cluster.raft.lone_node import LoneNode, entry, info

REINSTALLED = NodeInfo("n3", "n3:1", "http://n3", "another key")


def leader_of_three() -> LoneNode:
    node = LoneNode()
    node.lead()
    node.acknowledge("n2", node.core.guard.last_index)
    node.acknowledge("n3", node.core.guard.last_index)
    node.pass_seconds()
    return node


def change(node: LoneNode, verb: str, member: NodeInfo) -> list[tuple[str, str]]:
    """Ask for it, and let n2 acknowledge it."""
    ends: list[tuple[str, str]] = []
    membership, due = node.core.membership, node.runtime.now() + 5
    if verb == "add":
        membership.add(member, due, lambda *end: ends.append(end))
    else:
        membership.remove(member.node_id, due, lambda *end: ends.append(end))
    node.acknowledge("n2", node.core.guard.last_index)
    node.pass_seconds(0.05)
    node.acknowledge("n2", node.core.guard.last_index)
    return ends


def test_a_late_word_of_its_predecessor_makes_no_node_a_voter() -> None:
    node = leader_of_three()
    assert change(node, "remove", info(3)) == [("done", "")]
    late = Ack(node.core.guard.term, node.core.guard.last_index + 1, True, False, node.runtime.now())
    assert change(node, "add", REINSTALLED) == []
    node.hear("n3", late)
    node.pass_seconds(0.05)
    assert node.core.guard.match_index("n3") == 0
    assert node.core.membership.current.learners == (REINSTALLED,)
    node.acknowledge("n3", node.core.guard.last_index)  # its own word
    assert REINSTALLED in node.core.membership.current.voters


def test_the_connection_of_its_predecessor_is_closed_before_it_is_dialled() -> None:
    node = leader_of_three()
    change(node, "remove", info(3))
    node.links.clear()
    change(node, "add", REINSTALLED)
    assert node.links == [("hang_up", "n3"), ("dial", "n3")]
    node.pass_seconds(1.5)
    assert len(node.links) == 2  # what was to close the old one does not close the new one


def test_it_is_dialled_anew_where_the_change_is_learned_in_one_step() -> None:
    node = LoneNode()
    node.links.clear()
    node.core.membership.installed(1, Configuration((info(1), info(2), REINSTALLED)))
    assert node.links == [("hang_up", "n3"), ("dial", "n3")]


def test_a_removal_that_gave_way_leaves_the_connection_as_it_is() -> None:
    node = LoneNode()
    node.links.clear()
    without = Configuration((info(1), info(2)), (), (info(3),))
    node.append([(encode_configuration(without), 2, 1)])
    node.append([entry(2, 2)], term=2, sender="n3")
    node.pass_seconds(1.5)
    assert ("hang_up", "n3") not in node.links


def test_a_node_removed_a_second_time_is_told_a_second_time() -> None:
    node = leader_of_three()
    change(node, "remove", info(3))
    change(node, "add", REINSTALLED)
    node.acknowledge("n3", node.core.guard.last_index)
    node.acknowledge("n2", node.core.guard.last_index)
    node.pass_seconds(0.05)
    node.acknowledge("n2", node.core.guard.last_index)
    node.sent = [item for item in node.sent if isinstance(item[1], AppendEntries)]
    assert change(node, "remove", REINSTALLED) == [("done", "")]
    assert [to for to, message in node.sent if isinstance(message, Removed)] == ["n3"]
