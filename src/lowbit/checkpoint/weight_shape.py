"""What a stored matrix [N, K] is in the module: the options of a layer that say so, kept in its marker."""

from __future__ import annotations

from torch import Tensor

from lowbit.errors import CheckpointError

from .dialects import StoredLayer

KERNEL = "kernel_shape"  # the shape [O, I / groups, ...] of the convolution's kernel whose matrix this is
TURNED = "turned_over"  # the weight is [K, N], as in the Conv1D of transformers


def plain_shape(stored: StoredLayer) -> tuple[int, ...]:
    """The shape of the weight that a layer stands for. Raises `CheckpointError` for a marker that cannot be true."""
    (n, k), kernel = stored.shape, stored.options.get(KERNEL)
    if kernel is None:
        return (k, n) if stored.options.get(TURNED) else (n, k)
    whole = isinstance(kernel, list) and all(isinstance(size, int) and size > 0 for size in kernel)
    size = 1
    for edge in kernel[1:] if whole else ():
        size *= edge
    if not whole or len(kernel) < 3 or (kernel[0], size) != (n, k):
        raise CheckpointError(
            f"{stored.place}: {KERNEL} is {kernel!r} in the marker, which is no kernel of the matrix {[n, k]}; a "
            "program has changed it, convert again"
        )
    return tuple(kernel)


def as_plain(w: Tensor, stored: StoredLayer) -> Tensor:
    """A decoded matrix [N, K] as the weight that it stands for."""
    shape = plain_shape(stored)
    return w.t().contiguous() if stored.options.get(TURNED) else w.reshape(shape)
