"""What an account holds, and what a task takes from it. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec


class Balance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is left of an account.

    Attributes:
        count: prepaid uses.
        money: yuan.

    """

    count: Annotated[int, msgspec.Meta(ge=0)]
    money: Annotated[int, msgspec.Meta(ge=0)]

    def pay(self, price: int) -> Balance | None:
        """Give what is left after a task: a prepaid use goes first, then money; None if neither suffices.

        Args:
            price: of the task, in yuan.

        """
        if self.count > 0:
            return Balance(self.count - 1, self.money)
        if self.money >= price:
            return Balance(0, self.money - price)
        return None
