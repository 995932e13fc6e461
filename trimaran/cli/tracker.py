"""Tracker nodes: three on this machine in one command, or one on each of several hosts."""

from __future__ import annotations

from cyclopts import App

app = App(name="tracker", help="Start a cluster of trackers, and run its nodes.")
