"""Methods of equal size: how large each has to be so that as many parameters train as the budget says."""

from flashbone.compare.sizes.budgets import Budget as Budget
from flashbone.compare.sizes.budgets import budget_of as budget_of
from flashbone.compare.sizes.matching import Sized as Sized
from flashbone.compare.sizes.matching import match as match
