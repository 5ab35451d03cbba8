"""Secrets that a process comes to know while it runs, which the log has to know before anything tells of them."""

from __future__ import annotations

from collections.abc import Callable

from service.domain.tasks import Sealer

Learn = Callable[[str], None]
"""Has the log leave a secret out from now on."""


def unheard(_: str) -> None:
    """Nobody keeps a log."""


class Overheard:
    """A sealer that tells of each secret it seals or opens, as the text that `spell` makes of it."""

    def __init__(self, sealer: Sealer, learn: Learn, spell: Callable[[bytes], str] = bytes.decode) -> None:
        self._sealer = sealer
        self._learn = learn
        self._spell = spell

    def seal(self, plain: bytes) -> bytes:
        """Encrypt under the first key."""
        self._learn(self._spell(plain))
        return self._sealer.seal(plain)

    def open(self, sealed: bytes) -> bytes | None:
        """Decrypt under whichever key fits; None if none does or the bytes were altered."""
        plain = self._sealer.open(sealed)
        if plain is not None:
            self._learn(self._spell(plain))
        return plain
