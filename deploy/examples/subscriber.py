#!/usr/bin/env python3
"""Prints a site's events as they come, one line of JSON each.

usage: subscriber.py SITE_FOLDER CERTIFICATE [COUNT]      needs: pip install 'nats-py[nkeys]'

It connects as the user `reader`, who may listen to events and nothing else, with a certificate of the site, as from
`kiln pki issue subscriber --out subscriber.pem`. Nothing here is needed but a NATS client:
the payload is protobuf of the package kiln.events.v1, in proto/.
"""

import asyncio
import json
import pathlib
import ssl
import sys
import tomllib

import nats


async def main(folder: pathlib.Path, certificate: str, count: int | None) -> None:
    site = tomllib.loads((folder / "site.toml").read_text())
    # It believes none but the site's authority, whatever else the machine trusts.
    tls = ssl.create_default_context(cafile=str(folder / "keys" / "pki" / "authority.pem"))
    tls.load_cert_chain(certificate)
    connection = await nats.connect(
        site["nats"]["url"].split(","),
        tls=tls,
        tls_handshake_first=True,
        nkeys_seed=str(folder / "keys" / "nats" / "reader.nk"),
        inbox_prefix=b"_INBOX.reader",
    )
    seen = set()
    done = asyncio.Event()

    async def show(message):
        headers = message.headers or {}
        if headers.get("ce-id") in seen:
            return  # an event may come twice; its id stays the same
        seen.add(headers.get("ce-id"))
        line = {"subject": message.subject, "bytes": len(message.data)}
        line |= {name: value for name, value in headers.items() if name.startswith("ce-") or name == "traceparent"}
        print(json.dumps(line), flush=True)
        if count is not None and len(seen) >= count:
            done.set()

    await connection.subscribe(f"kiln.v1.{site['name']}.>", cb=show)
    await connection.flush()
    print("listening", file=sys.stderr, flush=True)
    await done.wait()
    await connection.drain()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    asyncio.run(main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) == 4 else None))
