"""The one progress bar: a line with the time left, in a terminal, a notebook and a log alike."""

import sys

from tqdm import tqdm


def bar(iterable=None, what: str = "", **options) -> tqdm:
    """A text bar over `iterable`, or one that is advanced by hand where `total` is given."""
    return tqdm(iterable, desc=what, file=sys.stdout, mininterval=1, ncols=88, **options)
