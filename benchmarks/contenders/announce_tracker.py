"""`ADDRESS PORT`: the least BitTorrent HTTP tracker (BEP 3, compact by BEP 23) that introduces peers."""

from __future__ import annotations

import socket
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

SWARMS: dict[str, set[tuple[str, int]]] = {}


class Announce(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        query = dict(parse_qsl(urlsplit(self.path).query, encoding="latin-1"))
        me = (query.get("ip", self.client_address[0]), int(query["port"]))
        swarm = SWARMS.setdefault(query["info_hash"], set())
        if query.get("event") == "stopped":
            swarm.discard(me)
        else:
            swarm.add(me)
        peers = b"".join(
            socket.inet_aton(address) + struct.pack(">H", port)
            for address, port in swarm
            if (address, port) != me
        )
        body = b"d8:intervali2e12:min intervali2e5:peers%d:%se" % (len(peers), peers)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


server = ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Announce)
print("ready", flush=True)
server.serve_forever()
