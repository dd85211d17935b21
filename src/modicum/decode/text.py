"""Turning one row's tokens into text as they come, and noticing stop strings."""

from modicum.checkpoint.tokenizer import StreamDecoder, Tokenizer


class RowText:
    """The text of one row. Nothing that a stop string would cut off again is ever released."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.stops = stops
        self.held = ""  # decoded, but possibly the beginning of a stop string
        self.released = ""

    def feed(self, token: int) -> tuple[str, bool]:
        """Add a token: the text it releases, and whether it completed a stop string."""
        self.held += self.decoder.feed(token)
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            return self._release(min(found)), True
        return self._release(len(self.held) - self._overlap()), False

    def flush(self) -> str:
        """What is left when no more tokens come."""
        self.held += self.decoder.flush()
        return self._release(len(self.held))

    def _overlap(self) -> int:
        """The length of the longest end of the held text that a stop string begins with."""
        return max(
            (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])),
            default=0,
        )

    def _release(self, end: int) -> str:
        text, self.held = self.held[:end], self.held[end:]
        self.released += text
        return text
