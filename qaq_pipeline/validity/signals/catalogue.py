"""Every signal, in the order in which they are asked: the first that declares a pair invalid is its reason."""

from qaq_pipeline.schema.tables import RmiScores
from qaq_pipeline.validity.signals.echo import ECHO
from qaq_pipeline.validity.signals.implausible_query import IMPLAUSIBLE_QUERY
from qaq_pipeline.validity.signals.mismatch import MISMATCH
from qaq_pipeline.validity.signals.signal import Definition
from qaq_pipeline.validity.signals.unclosed import UNCLOSED
from qaq_pipeline.validity.signals.unfinished import UNFINISHED

SIGNALS: tuple[Definition, ...] = (ECHO, IMPLAUSIBLE_QUERY, MISMATCH, UNFINISHED, UNCLOSED)

SCORES_READ = tuple(name for name in RmiScores.columns() if any(name in one.columns for one in SIGNALS))
"""The columns of RmiScores that signals read."""
