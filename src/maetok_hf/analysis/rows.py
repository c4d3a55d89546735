"""Rows of features that need not fit into memory together, and their moments."""

from collections.abc import Callable, Iterable, Iterator

import torch

from ..moments import RunningMoments


# All that a pass over a data set needs: latents of shape (num_samples, ...), or such chunks of them, again and again.
Rows = torch.Tensor | Iterable[torch.Tensor] | Callable[[], Iterable[torch.Tensor]]

# numbers of a chunk held in memory at once: 8 MiB in float64
_CHUNK_NUMEL = 2**20


def iterate_rows(
    data: Rows, device: torch.device | str | None = None, *, width: int = 1, name: str = "data"
) -> Iterator[torch.Tensor]:
    """
    One pass over a data set in chunks of bounded size.

    Args:
        data (`torch.Tensor`, `Iterable` or `Callable`): Samples of shape `(num_samples, ...)`, which may be mapped
            from a file; or an iterable of chunks of them that starts anew each time, such as a list; or a function
            without arguments that gives one, such as a function with `yield`.
        device (`torch.device` or `str`, *optional*): Where the chunks are wanted; by default where they are.
        width (`int`, *optional*, defaults to 1): Numbers per sample that the caller is about to compute, if more than
            the sample has: it makes the chunks shorter.
        name (`str`, *optional*, defaults to `"data"`): What errors call the data.

    Returns:
        `Iterator[torch.Tensor]`: Chunks of shape `(num_rows, num_features)` in float64, flattened from the second
            dimension on, in order and without empty ones.

    Raises:
        ValueError: If the data can be gone through only once, or chunks are not floating-point, not finite or differ
            in their number of features.
    """
    num_features = None
    for chunk in iterate_chunks(data, width=width, name=name):
        rows = chunk.flatten(1).to(device).double()
        num_features = num_features or rows.shape[1]
        if rows.shape[1] != num_features:
            raise ValueError(f"`{name}` has samples of {rows.shape[1]} features after others of {num_features}.")
        if not rows.isfinite().all():
            raise ValueError(f"`{name}` is not finite: the tokenizer is broken or its training diverged.")
        yield rows


def iterate_chunks(data: Rows, *, width: int = 1, name: str = "data") -> Iterator[torch.Tensor]:
    """
    One pass over a data set in chunks of bounded size, as they are: see [`iterate_rows`], which this is a part of.

    Args:
        data (`torch.Tensor`, `Iterable` or `Callable`): Samples of shape `(num_samples, ...)`.
        width (`int`, *optional*, defaults to 1): Numbers per sample that the caller is about to compute.
        name (`str`, *optional*, defaults to `"data"`): What errors call the data.

    Returns:
        `Iterator[torch.Tensor]`: Chunks of shape `(num_rows, ...)`, none of them empty.

    Raises:
        ValueError: If the data can be gone through only once, or chunks are not floating-point.
    """
    for part in _parts(data, name):
        if part.ndim < 2 or not part.is_floating_point():
            raise ValueError(
                f"`{name}` must be floating-point numbers of shape (num_samples, ...), got {part.dtype} of shape "
                f"{tuple(part.shape)}."
            )
        if part.numel():
            yield from part.detach().split(max(1, _CHUNK_NUMEL // max(width, part[0].numel())))


def _parts(data: Rows, name: str) -> Iterable[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        return [data]
    if isinstance(data, Iterator):
        raise ValueError(
            f"`{name}` is an iterator, which can be gone through once, but several passes are needed: give a tensor, "
            "a list, or the function that makes the iterator."
        )
    return data() if callable(data) else data


def moments_of(
    data: Rows, device: torch.device | str | None = None, *, diagonal: bool = False, name: str = "data"
) -> RunningMoments:
    """
    The moments of a data set, in one pass.

    Args:
        data (`torch.Tensor`, `Iterable` or `Callable`): Samples, see [`iterate_rows`].
        device (`torch.device` or `str`, *optional*): Where to compute; by default where the data is.
        diagonal (`bool`, *optional*, defaults to `False`): Keep only the diagonal of the scatter.
        name (`str`, *optional*, defaults to `"data"`): What errors call the data.

    Returns:
        [`RunningMoments`]: Of the samples, flattened from the second dimension on.

    Raises:
        ValueError: If there is no sample, or [`iterate_rows`] refuses the data.
    """
    moments = None
    for rows in iterate_rows(data, device, name=name):
        if moments is None:
            moments = RunningMoments.zeros(rows.shape[1], diagonal=diagonal, device=rows.device)
        moments.update(rows)
    if moments is None:
        raise ValueError(f"`{name}` has no samples.")
    return moments
