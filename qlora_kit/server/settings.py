"""What a server is started with: who may talk to it, and how much it takes on; checked before any model is loaded."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from qlora_kit.errors import ConfigError

MAX_BODY_BYTES = 1 << 20
KEY_VARIABLE = "QLORA_KIT_API_KEY"
SHORT_KEY_CHARACTERS = 16
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """The server's limits.

    Attributes:
        host: The address to listen on; any but this machine's own needs an API key.
        port: 0 takes a free one.
        api_key: What clients must send; None lets every local program in.
        allowed_hosts: Further names by which browsers may reach a server that listens on this machine only.
        max_running: Answers generated at once.
        max_waiting: Answers that may wait beyond those; more are refused with 429.
        deadline_seconds: Longest time from a request to its last token.
        drain_seconds: How long running requests may take to finish after SIGTERM.
        body_seconds: Longest time that a request's body may take to arrive.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_running: int = 32
    max_waiting: int = 64
    deadline_seconds: float = 300.0
    drain_seconds: int = 30
    body_seconds: float = 20.0

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key and all("!" <= character <= "~" for character in key)):
            raise ConfigError(
                "the API key is empty or holds a character that an HTTP header cannot carry",
                expected="visible ASCII characters without spaces",
                fix='make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"',
            )
        if not self.is_local and key is None:
            raise ConfigError(
                f"--host {self.host}: others on the network could use the server without any key",
                expected=f"an API key for every address but {', '.join(_LOCAL_NAMES)}",
                fix=f"give --api-key-file FILE (or {KEY_VARIABLE}), or leave --host out and put a proxy in front",
            )

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def capacity(self) -> int:
        """Answers that are running or waiting at most."""
        return self.max_running + self.max_waiting

    @property
    def host_names(self) -> frozenset[str] | None:
        """Names that a request's Host may give; None for any.

        A page of another site can make a browser resolve that site's name to 127.0.0.1 (DNS rebinding). Its requests
        carry the site's name, and a server for this machine only has no other names than these.
        """
        return (
            frozenset(name.lower() for name in (*_LOCAL_NAMES, self.host, *self.allowed_hosts))
            if self.is_local
            else None
        )


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine's own address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(settings: ServerSettings) -> socket.socket:
    """A socket bound to the address of ``settings``; clients are refused until the server accepts them.

    Raises:
        ConfigError: The address is taken, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {settings.host} --port {settings.port}: cannot listen there: {error.strerror}",
            expected="a free port at an address of this machine",
            fix="give another --port (0 takes any that is free), or stop the program that uses this one",
        ) from error
    return listener
