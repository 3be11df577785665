"""The one way the demo says no."""


class RefusalError(Exception):
    """Something the user can change stands in the way. The message is one line: what is wrong and what to pass."""
