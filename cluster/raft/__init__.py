"""Raft under the tracker: PySyncObj as the engine, and around it what makes its word good (docs: `raft.md`).

The one place that imports pysyncobj. The service uses `open_node` and `RaftSettings`, and speaks to what they make
through `cluster.consensus.Consensus`.
"""

from cluster.raft.node import RaftNode, open_node
from cluster.raft.settings import RaftSettings

__all__ = ["RaftNode", "RaftSettings", "open_node"]
