"""Checks that the layers of fields share: what is kept must be there, when they are built and when they are called."""

from s5eqx._typing import Array, Float


def check_sizes(**sizes: int) -> None:
    """Refuses a number of channels or layers below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")


def check_band(modes: tuple[int, ...], grid: tuple[int, ...], room: tuple[int, ...]) -> None:
    """Refuses a band that is not within `room`, the modes that there are along each axis of `grid`."""
    if not 1 <= len(grid) <= 3 or len(modes) != len(grid):
        raise ValueError(f"A field has 1 to 3 axes, and modes one number for each; got grid={grid}, modes={modes}.")
    if not all(1 <= kept <= most for kept, most in zip(modes, room, strict=True)):
        raise ValueError(
            f"modes must lie between 1 and what the grid has along each axis, {room} for grid={grid}; got "
            f"modes={modes}. Keep fewer, or take a finer grid."
        )


def check_field(x: Float[Array, "*grid D"], num_axes: int, channels: int) -> tuple[int, ...]:
    """The grid of `x`, which must have so many axes, with so many channels after them."""
    if x.ndim != num_axes + 1 or x.shape[-1] != channels:
        raise ValueError(
            f"A field must have the axes of its grid, {num_axes} here, and an axis of {channels} channels after them; "
            f"got shape {x.shape}. Give a single channel an axis of its own, and map over a batch with jax.vmap."
        )
    return x.shape[:-1]
