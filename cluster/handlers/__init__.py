"""What each route does: one function for each row of the route table, found by its name.

A handler gets the service and the call, and returns an answer of the route's type, or refuses by raising
`ProblemError`. What is the same for all routes (session, body, envelope, problems) is `http.py`'s.
"""

from __future__ import annotations

from cluster.call import Handler

from . import files, groups, meta, nodes, people, rights, swarms, watching

HANDLERS: dict[str, Handler] = {
    handler.__name__: handler
    for module in (files, groups, meta, nodes, people, rights, swarms, watching)
    for handler in module.HANDLERS
}
