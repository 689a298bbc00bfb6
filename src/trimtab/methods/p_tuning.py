"""P-tuning (Liu et al. 2021, arXiv 2103.10385): the model reads [P; E(x)] with P = f(H), H (tokens, D) and f learned.

f is a bidirectional LSTM with a two-layer head, as in the paper, or an MLP with two hidden layers, as in NVIDIA's
NeMo and HF PEFT, whose default it is. After training only P matters; H and f are kept to go on from.
"""

from enum import StrEnum
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from .. import weights
from ..prompts import Prompt, PromptConfig


class PromptEncoderReparameterizationType(StrEnum):
    MLP = "MLP"
    LSTM = "LSTM"


class LstmEncoder(nn.Module):
    def __init__(self, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(h[None])[0])[0]
        return out


class PromptEncoderConfig(PromptConfig):
    """P-tuning's settings, beside those of all prompts.

    encoder_reparameterization_type: MLP or LSTM. encoder_hidden_size: its width, by default the embedding's.
    encoder_num_layers, encoder_dropout: layers of the LSTM, and dropout between them.
    """

    peft_type: ClassVar[str] = "P_TUNING"
    trains: ClassVar[str] = "virtual tokens and an encoder"
    relative_rate: ClassVar[float] = 4.0
    when: ClassVar[str] = "As prompt tuning, where that is unsteady."
    evidence: ClassVar[str] = (
        "The tokens are tied together by an encoder while training: Liu et al. bring GPT-2 to BERT's level on "
        "SuperGLUE with it. The encoder costs memory in training only. The model reads a longer input for ever."
    )

    encoder_reparameterization_type: PromptEncoderReparameterizationType = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = Field(default=None, ge=1)
    encoder_num_layers: int = Field(default=2, ge=1)
    encoder_dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _mlp_has_two_layers(self) -> Self:
        mlp = self.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP
        if mlp and not self.inference_mode and (self.encoder_num_layers != 2 or self.encoder_dropout):
            raise ValueError(
                "the MLP always has two hidden layers and no dropout: encoder_num_layers and encoder_dropout are LSTM's"
            )
        return self

    def resolved(self, model: nn.Module) -> Self:
        config = super().resolved(model)
        return config.model_copy(update={"encoder_hidden_size": self.encoder_hidden_size or config.token_dim})

    def prompt(self, table: nn.Embedding, rows: int) -> Prompt:
        assert self.encoder_hidden_size is not None
        width, hidden = table.embedding_dim, self.encoder_hidden_size
        values = weights.new_parameter(table, rows, width)
        nn.init.normal_(values)
        encoder: nn.Module
        if self.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            encoder = LstmEncoder(width, hidden, self.encoder_num_layers, self.encoder_dropout)
        else:
            inner = (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
            encoder = nn.Sequential(*inner, nn.Linear(hidden, width))
        return Prompt(values, self.num_virtual_tokens or rows, encoder)
