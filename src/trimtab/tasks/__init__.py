"""The tasks: one file each, and the table of their names."""

from .task import Data, Task
from .text_classification import TextClassification

__all__ = ["TASKS", "Data", "Task"]

TASKS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
}
