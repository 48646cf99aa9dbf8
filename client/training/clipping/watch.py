"""Whose parameters a layer uses: the critic's own, by identity, and weights that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.training.clipping.book import Book, Target
from common.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """An effective weight that is a parameter."""

    number: int
    is_the_parameter: bool = True

    @property
    def numbers(self) -> Sequence[int]:
        """Of the parameters behind it."""
        return [self.number]

    def pull_back(self, rows: Tensor) -> Sequence[tuple[int, Tensor]]:
        """Itself."""
        return [(self.number, rows)]


@dataclass(frozen=True, kw_only=True, eq=False)
class NormedWeight:
    """An effective weight W = length * direction / ||direction||.  [Salimans and Kingma 2016, Eq. 2-3]"""

    direction_number: int
    length_number: int
    direction: Tensor
    length: Tensor
    dim: int  # -1: one norm over everything
    is_the_parameter: bool = False

    @property
    def numbers(self) -> Sequence[int]:
        """Of the parameters behind it."""
        return [self.direction_number, self.length_number]

    def pull_back(self, rows: Tensor) -> Sequence[tuple[int, Tensor]]:
        """Gradients by direction and by length."""
        axes = [axis for axis in range(self.direction.ndim) if self.dim == -1 or axis != self.dim]
        norm = torch.linalg.vector_norm(self.direction, dim=axes, keepdim=True)
        unit = self.direction / norm
        by_weight = rows.view(-1, *self.direction.shape)
        along = (by_weight * unit).sum(dim=[axis + 1 for axis in axes], keepdim=True)  # (B, length's shape)
        by_direction = (by_weight - along * unit) * (self.length.reshape(norm.shape) / norm)
        return [(self.direction_number, by_direction.flatten(1)), (self.length_number, along.flatten(1))]


@dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """One layer's weight and bias, cut from autograd, and where their gradients belong."""

    weight: Tensor
    bias: Tensor | None
    target: Target
    bias_number: int | None


class Watch:
    """What one pass of the critic has used so far. Its layers write into `book` during backward."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], book: Book, anchor: Tensor) -> None:
        """anchor: a scalar that requires grad; every recorded layer hangs on it, so that backward reaches all."""
        self.book = book
        self.anchor = anchor
        self._names = list(parameters)
        self._numbers = {id(p): number for number, p in enumerate(parameters.values())}
        self._effective: dict[int, tuple[Tensor, Target]] = {}
        self._met: set[int] = set()

    def use(self, weight: Tensor | None, bias: Tensor | None) -> Use | None:
        """Note one layer's use of a weight and a bias. None when they are not the critic's own parameters.

        Raises SettingsError when a parameter is used the second time.
        """
        target = None if weight is None else self._target(weight)
        bias_number = None if bias is None else self._numbers.get(id(bias))
        if weight is None or target is None or (bias is not None and bias_number is None):
            return None  # `refuse_leftovers` finds it, should one of the two be a parameter
        self._meet([*target.numbers, *([] if bias_number is None else [bias_number])])
        return Use(
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            target=target,
            bias_number=bias_number,
        )

    def normed(self, direction: Tensor, length: Tensor, dim: int = 0) -> Tensor | None:
        """torch._weight_norm of two parameters."""
        a, b = self._numbers.get(id(direction)), self._numbers.get(id(length))
        if a is None or b is None:
            return None
        # Its graph stays: a use of this weight outside a recorded layer is then found like that of any parameter.
        weight: Tensor = torch._weight_norm(direction, length, dim)
        target = NormedWeight(
            direction_number=a, length_number=b, direction=direction.detach(), length=length.detach(), dim=dim
        )
        self._effective[id(weight)] = (weight, target)
        return weight

    def refuse_leftovers(self, scores: Tensor) -> None:
        """Raise SettingsError when a parameter reached the scores by an operation that is not recorded."""
        seen, frontier = set(), [scores.grad_fn]
        while frontier:
            node = frontier.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self._numbers:
                raise SettingsError(
                    f"{self._names[self._numbers[id(variable)]]}: used where no clipping is known for it; "
                    "nothing was trained. Use it in a convolution, linear, norm or PReLU layer."
                )
            frontier.extend(parent for parent, _ in node.next_functions)

    def _target(self, weight: Tensor) -> Target | None:
        number = self._numbers.get(id(weight))
        if number is not None:
            return Parameter(number=number)
        known = self._effective.get(id(weight))
        return known[1] if known else None

    def _meet(self, numbers: Sequence[int]) -> None:
        """Note that a layer uses these parameters. Raises SettingsError the second time."""
        again = self._met.intersection(numbers)
        if again:
            raise SettingsError(
                f"{self._names[min(again)]}: used twice in one pass of the critic; nothing was trained. "
                "Give each use a layer of its own."
            )
        self._met.update(numbers)
