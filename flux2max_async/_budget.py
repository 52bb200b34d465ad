"""The budget: an amount is reserved before each submit, and settled by the task's real cost."""

from decimal import Decimal

import attrs

from flux2max_async._exceptions import BudgetExceededError

# US dollars for output and input images together, as the vendor bills FLUX.2 [max].
_FIRST_MEGAPIXEL_PRICE, _NEXT_MEGAPIXEL_PRICE = Decimal("0.07"), Decimal("0.03")


@attrs.define
class Budget:
    """The US dollars that a session has spent, and those that its tasks in flight will probably cost.

    `reserve()` makes a reservation and `settle()` ends it. If its task is not followed to the end, `suspend()` keeps
    the reservation under the task's id, so that whoever follows the task later can `resume()` and settle it.
    """

    budget: Decimal | None
    """The limit for spent and reserved dollars together; None sets no limit."""
    price_guess: Decimal | None
    """The estimate for any request until a real cost is known; None estimates by megapixels."""
    _spent: Decimal = attrs.field(default=Decimal(0), init=False)
    _reserved: Decimal = attrs.field(default=Decimal(0), init=False)
    _suspended: dict[str, Decimal] = attrs.field(factory=dict[str, Decimal], init=False)
    """Reservations by the ids of tasks that are not followed at present; part of `_reserved`."""
    _highest_cost: Decimal | None = attrs.field(default=None, init=False)
    _guess_for_highest: Decimal = attrs.field(default=Decimal(0), init=False)
    """The guess for the task with the highest cost."""

    @property
    def committed(self) -> Decimal:
        """US dollars that are spent or reserved."""
        return self._spent + self._reserved

    def estimate(self, megapixels: int) -> Decimal:
        """Return the probable cost: the highest cost so far, scaled up if that task had fewer megapixels."""
        guess = self._guess(megapixels)
        if self._highest_cost is None:
            return guess
        if not guess > self._guess_for_highest > 0:
            return self._highest_cost
        return self._highest_cost * guess / self._guess_for_highest

    def observe(self, megapixels: int, cost: Decimal) -> None:
        """Learn from the cost of a completed task; a cost of 0 says nothing about other tasks."""
        if cost > (self._highest_cost or 0):
            self._highest_cost, self._guess_for_highest = cost, self._guess(megapixels)

    def reserve(self, amount: Decimal) -> None:
        """Reserve an amount for a submit.

        Raises:
            BudgetExceededError: The budget doesn't allow it.
        """
        if self.budget is not None:
            check_budget(self.budget, self.committed, amount)
        self._reserved += amount

    def settle(self, reserved: Decimal, cost: Decimal) -> None:
        """Replace a reservation by the real cost, which may be 0."""
        self._reserved -= reserved
        self._spent += cost

    def suspend(self, task_id: str, reserved: Decimal) -> None:
        """Keep the reservation of a task that is no longer followed: the task may still cost money."""
        self._suspended[task_id] = reserved

    def resume(self, task_id: str) -> Decimal | None:
        """Return the suspended reservation of a task, which the caller must settle; None if there is none."""
        return self._suspended.pop(task_id, None)

    def _guess(self, megapixels: int) -> Decimal:
        if self.price_guess is not None:
            return self.price_guess
        return _FIRST_MEGAPIXEL_PRICE + _NEXT_MEGAPIXEL_PRICE * (megapixels - 1)


def check_budget(budget: Decimal, committed: Decimal, amount: Decimal) -> None:
    """Check that a budget allows an amount on top of what is committed; all in US dollars.

    Raises:
        BudgetExceededError: It doesn't.
    """
    if committed + amount > budget:
        raise BudgetExceededError(
            f"the budget of ${budget:f} doesn't allow another image for about ${amount:.2f}: "
            f"${committed:f} are spent or reserved for tasks whose cost isn't known yet"
        )
