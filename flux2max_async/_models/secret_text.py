"""A text that is a secret."""

from typing import Self, SupportsIndex


class SecretText(str):
    """A text that its repr, `attrs.asdict()` and pickles don't show: a pickle has None in its place."""

    __slots__ = ()

    __attrs_attrs__ = ()
    """attrs.asdict() takes it for a value without fields."""

    def __repr__(self) -> str:
        return "'***'"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[None], tuple[()]]:
        return type(None), ()
