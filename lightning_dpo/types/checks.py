"""Checks of arguments that are numbers in a range."""

from __future__ import annotations

__all__ = ["check_bounds"]


def check_bounds(
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    unit: str = "",
    hint: str = "",
    **values: float | None,
) -> None:
    """Refuse numbers that are out of their range.

    Args:
        least: They must be at least this.
        above: They must be above this.
        most: They must be at most this.
        unit: Follows the range in the error.
        hint: Follows the value in the error.
        values: The numbers by the names of their arguments; None is not checked.

    Raises:
        ValueError: For the first that is out of the range.
    """
    given = {"at least": least, "above": above, "at most": most}
    wanted = " and ".join(f"{words} {bound}" for words, bound in given.items() if bound is not None)
    for name, value in values.items():
        is_within = value is None or (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
        )
        if not is_within:
            raise ValueError(f"`{name}` must be {wanted}{unit}, got {value}{hint}")
