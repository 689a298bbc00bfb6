"""What tasks over users and items share: each is a token of its own, such as <item:42>, new to tokenizer and model.

The embeddings of these tokens are trained beside whatever the method trains (methods/trainable_tokens.py). So all of
transformers' models that read tokens take users and items, with text around them or none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .models import Quantization
from .text import TextTask


@dataclass(frozen=True)
class IdentifierTask(TextTask):
    """One that is in no training row is read as plain text."""

    @staticmethod
    def add(tokenizer: Any, kind: str, names: Iterable[str]) -> None:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(f"<{kind}:{name}>", normalized=False) for name in sorted(set(names))])

    @cached_property
    def added(self) -> dict[str, int]:
        """The new tokens and their ids: the tokenizer makes this anew each time that it is asked."""
        return dict(self.reader.added_tokens_encoder)

    def knows(self, kind: str, name: str) -> bool:
        return f"<{kind}:{name}>" in self.added

    def token(self, kind: str, name: str) -> str:
        return f"<{kind}:{name}>" if self.knows(kind, name) else name

    def tokens(self) -> list[int]:
        kinds = ("<user:", "<item:")
        return sorted(i for token, i in self.added.items() if token.startswith(kinds))

    def load_model(self, model: str, quantization: Quantization) -> tuple[Any, list[str]]:
        """With rows for the new tokens, which start near the mean of the others."""
        found, fresh = super().load_model(model, quantization)
        return self._widened(found, True), fresh

    def outline(self, model: str) -> Any:
        return self._widened(super().outline(model), False)

    def _widened(self, model: Any, near_mean: bool) -> Any:
        if len(self.reader) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(self.reader), mean_resizing=near_mean)
        return model
