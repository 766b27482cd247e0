"""Few-shot evaluation: accuracy with confidence intervals, and a report.

`measure` runs the tasks, `metrics` describes the scores, `write` writes the files that DVC reads,
`report` the page for people, `gate` decides what may be exported.
"""

from reptile.evaluate.measure import Evaluation, Measurement, evaluate
from reptile.evaluate.metrics import Metrics, Score
from reptile.evaluate.report.summary import summary_table
from reptile.evaluate.write import write_evaluation

__all__ = [
    "Evaluation",
    "Measurement",
    "Metrics",
    "Score",
    "evaluate",
    "summary_table",
    "write_evaluation",
]
