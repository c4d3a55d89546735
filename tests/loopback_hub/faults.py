"""What goes wrong on demand."""

import re
from dataclasses import dataclass, field


ALWAYS = 1_000_000
# what the Hub says, with status 403, when a user's private storage is used up
QUOTA_MESSAGE = (
    "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."
)


@dataclass
class Fault:
    """
    What happens to the next `times` requests of which "METHOD path" matches.

    Args:
        pattern: Regular expression that is searched in "METHOD /path".
        times: How many of them are concerned.
        status: HTTP status of a refusal.
        message: What the Hub says then.
        headers: Further headers of the refusal.
        cut_after: Bytes of the request's body, or of the answer's where the request has none, after which the
            connection is cut.
        delay: Seconds before the answer.
    """

    pattern: str
    times: int
    status: int | None = None
    message: str = "on demand"
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    delay: float = 0.0

    def concerns(self, request: str) -> bool:
        """Whether a request is one of them; counts it."""
        if self.times <= 0 or re.search(self.pattern, request) is None:
            return False
        self.times -= 1
        return True
