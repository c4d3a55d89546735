"""What is said when a package of the extra `evaluation` is not installed."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needing(package: str) -> Iterator[None]:
    """
    Imports that evaluations need and the rest of the library does not.

    Args:
        package (`str`): Name of the package, as `pip` knows it.

    Raises:
        ImportError: In place of what was raised inside.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"This needs `{package}` ({error}): install `maetok_hf[evaluation]`.") from error
