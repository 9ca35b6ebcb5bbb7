"""The sentences that people read are asserted in snapshots, `__snapshots__/test_<module>.ambr`.

A test asserts reasons and numbers itself and leaves the words to the snapshot. After a change of words run
`pytest --snapshot-update`, and read the difference.
"""

from __future__ import annotations

from collections.abc import Callable

Check = Callable[[object], None]
"""Asserts that what a person is shown is the sentence in the snapshot: the fixture `check_sentence`."""
