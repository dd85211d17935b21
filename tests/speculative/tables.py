"""Costs by hand, for the choice of K."""


class Table:
    """Costs from a table by K, the same for any number of rows."""

    def __init__(self, verify, draft, read=0.0):
        self.by_tokens, self.by_k, self.per_token = verify, draft, read

    def prepare(self, rows):
        return 0.0

    def verify(self, rows, n_tokens):
        return self.by_tokens[n_tokens - 1]

    def draft(self, rows, n_tokens):
        return None if self.by_k is None else self.by_k[n_tokens - 1]

    def read(self, rows, n_tokens):
        return self.per_token * n_tokens


def linear(slope, draft, read=0.0, max_k=16):
    """A target call of 1 and `slope` more per token behind the first, a draft of `draft` per token."""
    return Table([1 + slope * k for k in range(max_k + 1)], [draft * k for k in range(1, max_k + 1)], read)
