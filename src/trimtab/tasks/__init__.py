"""The tasks: one file each, and the table of their names."""

from .audio_classification import AudioClassification
from .automatic_speech_recognition import SpeechRecognition
from .image_classification import ImageClassification
from .image_to_text import ImageToText
from .next_item import NextItem
from .question_answering import QuestionAnswering
from .rating_prediction import RatingPrediction
from .task import Data, Task
from .text2text_generation import Text2TextGeneration
from .text_classification import TextClassification
from .text_generation import TextGeneration
from .text_regression import TextRegression
from .token_classification import TokenClassification
from .visual_question_answering import VisualQuestionAnswering

__all__ = ["TASKS", "Data", "Task"]

TASKS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
    "text-regression": TextRegression,
    "token-classification": TokenClassification,
    "text-generation": TextGeneration,
    "text2text-generation": Text2TextGeneration,
    "question-answering": QuestionAnswering,
    "rating-prediction": RatingPrediction,
    "next-item": NextItem,
    "image-classification": ImageClassification,
    "visual-question-answering": VisualQuestionAnswering,
    "image-to-text": ImageToText,
    "audio-classification": AudioClassification,
    "automatic-speech-recognition": SpeechRecognition,
}
