"""The tree of commands: which verbs there are and which module does each.

Owned here: names and order. Modules are loaded when their verb is used.
"""

from __future__ import annotations

from functools import cache

from cyclopts import App, Group, Parameter

from trimaran.cli.help import TwoColumns
from trimaran.settings import from_environment_and_file

PEOPLE = Group("People", sort_key=1)
FILES = Group("Files", sort_key=2)
GROUPS = Group("Groups", sort_key=3)
RUNNING = Group("Peers and the cluster", sort_key=4)
TRY = Group("Try it", sort_key=0)

_ABOUT = """\
Share large files inside groups of people, peer to peer, through a cluster that nothing can take down.

Alone on a terminal, `trimaran` opens a menu with everything below. Every option may also stand in the environment
(`TRIMARAN_DATA_DIR` for `--data-dir`) or in the settings file (`data_dir` in `HOME/config.toml`).

Exit codes: 0 done, 2 usage, 3 not found, 4 denied, 5 conflict, 6 cluster unavailable, 7 unfinished but resumable,
8 integrity, 9 no space, 130 interrupted, 1 unexpected.
"""
# The sentences are the docstrings' own, repeated so that listing them loads no module; a test compares them.
_COMMANDS: tuple[tuple[str, str, Group, str], ...] = (
    (
        "demo",
        "trimaran.cli.demo:demo",
        TRY,
        "See it work on this machine: three trackers, three peers, a real file, and nodes lost on the way.",
    ),
    (
        "register",
        "trimaran.cli.people:register",
        PEOPLE,
        "Make an account, and sign in with it on this peer.",
    ),
    (
        "login",
        "trimaran.cli.people:login",
        PEOPLE,
        "Sign in on this peer. What it shared before, it shares again.",
    ),
    (
        "logout",
        "trimaran.cli.people:logout",
        PEOPLE,
        "Sign out: the session ends, and this peer stops sharing.",
    ),
    ("whoami", "trimaran.cli.people:whoami", PEOPLE, "Tell who is signed in on this peer."),
    (
        "passwd",
        "trimaran.cli.people:passwd",
        PEOPLE,
        "Change the password. All other sessions of the account end.",
    ),
    ("share", "trimaran.cli.files:share", FILES, "Share a file or a folder with a group."),
    (
        "unshare",
        "trimaran.cli.files:unshare",
        FILES,
        "Stop sharing a file from this peer. Nothing is deleted; others keep what they have.",
    ),
    (
        "remove",
        "trimaran.cli.files:remove",
        FILES,
        "Take a file off its group: who shared it may, and the group's admins.",
    ),
    (
        "files",
        "trimaran.cli.files:files",
        FILES,
        "List a group's files with their seeders and leechers as they are now.",
    ),
    ("info", "trimaran.cli.files:info", FILES, "Show one shared file and the peers that have it."),
    (
        "get",
        "trimaran.cli.files:get",
        FILES,
        "Download shared files, from all their peers at once, every piece verified.",
    ),
    ("ps", "trimaran.cli.transfers:ps", FILES, "List the downloads and shares of this peer."),
    (
        "pause",
        "trimaran.cli.transfers:pause",
        FILES,
        "Pause a download. What is complete stays, and stays offered.",
    ),
    ("resume", "trimaran.cli.transfers:resume", FILES, "Go on with a paused download."),
    ("cancel", "trimaran.cli.transfers:cancel", FILES, "Give a download up and delete its unfinished part."),
    (
        "verify",
        "trimaran.cli.transfers:verify",
        FILES,
        "Read a share or download again and check every piece.",
    ),
    ("group", "trimaran.cli.groups:app", GROUPS, "Groups: make them, join them, run them."),
    ("peer", "trimaran.cli.peer:app", RUNNING, "Run a peer, and limit what it sends and receives."),
    ("tracker", "trimaran.cli.tracker:app", RUNNING, "Start a cluster of trackers, and run its nodes."),
    ("cluster", "trimaran.cli.cluster:app", RUNNING, "The cluster's nodes, for its operators."),
)


@cache
def build(verb: str = "") -> App:
    """The tree. The help of `verb` is its docstring, whole; the others are listed with one sentence."""
    from trimaran import __version__

    app = App(
        name="trimaran",
        help=_ABOUT,
        version=f"trimaran {__version__}",
        help_format="plaintext",
        default_parameter=Parameter(show_default=False, negative=""),
        config=from_environment_and_file,
        help_formatter=TwoColumns(),
        usage="Usage: trimaran VERB [OPTIONS] [ARGUMENTS]\n",
    )
    for index, (name, target, group, about) in enumerate(_COMMANDS):
        app.command(target, name=name, group=group, help=None if name == verb else about, sort_key=index)
    return app
