"""Few-shot evaluation: measured accuracy with honest intervals, and a report of it.

`measure` runs the tasks, `outputs` writes the files that DVC reads, `report` the page for people.
Not for choosing a checkpoint: that is the validation split's business in `learn`.
"""

from reptile.evaluate.measure import Evaluation, Measurement, Score, evaluate
from reptile.evaluate.outputs import write_evaluation
from reptile.evaluate.summary import summary_table

__all__ = ["Evaluation", "Measurement", "Score", "evaluate", "summary_table", "write_evaluation"]
