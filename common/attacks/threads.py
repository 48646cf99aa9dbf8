"""Scoring on several cores, so that no score depends on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def one_thread_each(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`work` of every item, in order: as many workers as torch would use threads, each with one.

    The products of a single scan are small: two threads that wait for each other on a busy machine took ten times as
    long. It also keeps a score's rounding, and so its bin, free of how many cores a hospital has. Torch's number of
    threads is the caller's again once the iterator has ended or is closed. Gradient modes are each thread's own.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=max(1, min(before, os.cpu_count() or 1))) as workers:
            yield from workers.map(work, items)
    finally:
        torch.set_num_threads(before)
