"""Who may ask a server for what: keys, names of hosts, pages of other origins, sizes."""

from dataclasses import dataclass

BODY_SECONDS = 10.0  # in which a request's body must have come
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
DOCS = ("/docs", "/openapi.json")  # paths where the API is described, if it is


@dataclass(frozen=True)
class Access:
    """Who may ask for what.

    Args:
        api_key: what clients must send as a bearer token, if anything.
        open_paths: those that need no key.
        hosts: names under which the server may be asked, in lower case; "*" is any.
        any_address: it may also be asked under any IP address, as a server for all networks is.
        origins: those of pages elsewhere that may use the server, such as "http://localhost:3000"; "*" is any.
        max_body_bytes: longest body.
        body_seconds: in which a body must have come.
    """

    api_key: str | None
    open_paths: frozenset[str]
    hosts: frozenset[str]
    any_address: bool
    origins: frozenset[str]
    max_body_bytes: int
    body_seconds: float


def access_to(
    host: str,
    api_key: str | None,
    more_hosts: list[str],
    origins: list[str],
    max_body_bytes: int,
    timeout: float,
    docs: bool,
) -> Access:
    """Who may ask a server for what.

    Args:
        host: address that it listens on.
        api_key: what clients must send as a bearer token, if anything.
        more_hosts: other names that it has.
        origins: those of pages elsewhere that may use it.
        max_body_bytes: longest body.
        timeout: seconds that an answer may take.
        docs: describe the API to everybody.

    Raises:
        ValueError: the longest body is empty.
    """
    if max_body_bytes <= 0:
        raise ValueError(f"--max_body_bytes is {max_body_bytes}, which is too small")
    open_paths = {"/", "/health", *(DOCS if docs else ())}
    hosts, any_address = allowed_hosts(host, more_hosts)
    body_seconds = min(timeout, BODY_SECONDS)
    return Access(api_key, frozenset(open_paths), hosts, any_address, frozenset(origins), max_body_bytes, body_seconds)


def allowed_hosts(host: str, more: list[str]) -> tuple[frozenset[str], bool]:
    """`Access.hosts` and `Access.any_address` of a server.

    Args:
        host: that it listens on.
        more: other names that it has.
    """
    own = f"[{host}]" if ":" in host else host
    return frozenset(name.lower() for name in (*LOOPBACK, own, *more)), host in ("0.0.0.0", "::", "")
