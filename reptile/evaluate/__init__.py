"""Few-shot evaluation: measured accuracy with honest intervals, and a report of it.

`measure` runs the tasks, `outputs` writes the files that DVC reads, `report` the page for people.
Not for choosing a checkpoint: that is the validation split's business in `learn`.
"""

from reptile.evaluate.measure import Evaluation, Measurement, Score, evaluate
from reptile.evaluate.report.summary import summary_table
from reptile.evaluate.write import write_evaluation

__all__ = ["Evaluation", "Measurement", "Score", "evaluate", "summary_table", "write_evaluation"]
