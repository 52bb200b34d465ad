"""What may still be spent: money is reserved before a submit, and settled by what the task really cost."""

from decimal import Decimal

import attrs

from flux2max_async._exceptions import BudgetExceededError

_FIRST, _FURTHER = Decimal("0.07"), Decimal("0.03")
"""US dollars for the first megapixel, and for each further one of output and input."""


@attrs.define
class Budget:
    """What one session has spent and what its tasks in flight will probably cost, in US dollars."""

    budget: Decimal | None
    price_guess: Decimal | None
    """For any request; None guesses by megapixels."""
    _spent: Decimal = attrs.field(default=Decimal(0), init=False)
    _reserved: Decimal = attrs.field(default=Decimal(0), init=False)
    _dearest: Decimal | None = attrs.field(default=None, init=False)
    """The most that a task was seen to cost."""
    _dearest_guess: Decimal = attrs.field(default=Decimal(0), init=False)
    """What would have been guessed for that task."""

    def price(self, megapixels: int) -> Decimal:
        """Give the probable cost of a request: the dearest seen, and more where more is asked for than then."""
        guess = self._guess(megapixels)
        if self._dearest is None:
            return guess
        if not guess > self._dearest_guess > 0:
            return self._dearest
        return self._dearest * guess / self._dearest_guess

    def saw(self, megapixels: int, cost: Decimal) -> None:
        """Learn what a task cost; one that was free says nothing of what others will cost."""
        if cost > (self._dearest or 0):
            self._dearest, self._dearest_guess = cost, self._guess(megapixels)

    def reserve(self, price: Decimal) -> None:
        """Set money aside for a submit.

        Raises:
            BudgetExceededError: There is not enough left.
        """
        if self.budget is not None:
            check_budget(self.budget, self._spent + self._reserved, price)
        self._reserved += price

    def settle(self, reserved: Decimal, cost: Decimal) -> None:
        """Replace what was set aside by what it cost, or by nothing."""
        self._reserved -= reserved
        self._spent += cost

    def _guess(self, megapixels: int) -> Decimal:
        return _FIRST + _FURTHER * (megapixels - 1) if self.price_guess is None else self.price_guess


def check_budget(budget: Decimal, committed: Decimal, price: Decimal) -> None:
    """Refuse a price that would pass the budget.

    Raises:
        BudgetExceededError: It would.
    """
    if committed + price > budget:
        raise BudgetExceededError(
            f"the budget of ${budget:f} doesn't allow another picture for about ${price:.2f}: "
            f"${committed:f} are spent or set aside for tasks whose cost isn't known yet"
        )
