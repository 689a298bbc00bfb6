"""The loss of a causal model without its logits, which are made for a few tokens at a time and never all held.

    L = 1/N sum_i -log softmax(W h_i + b)[y_i]

over the tokens i whose next one y_i is not ignored; N is their number, or that of all accumulated batches. With a
vocabulary of 150,000 the logits of 4,096 tokens are 2.5 GB in float32, and the plain loss holds them three times. Here
the gradient of h is taken with each chunk, as Liger Kernel does (Hsu et al. 2024, arXiv 2410.10989), so that nothing is
computed twice. Whatever the head is, and whatever acts there, is called as it is. Ignored tokens never reach it.

The model is called as it is, too: its head passes the hidden states on, and its `loss_function` takes them for logits.
Where they do not arrive there untouched (Gemma 2 caps logits, Cohere and Granite scale them), the plain loss has to do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import weights
from .tasks.token_classification import IGNORED

CHUNK = 2**23  # logits that are held at a time


class Passing(nn.Module):
    """Stands where the head was."""

    hidden: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden


@contextmanager
def without_logits(model: Any) -> Iterator[None]:
    """Inside, the model's loss is L of its hidden states, and the logits that it returns are those hidden states.

    Raises (when the model is called): RuntimeError: something was made of the logits before the loss.
    """
    head, own, passing = model.get_output_embeddings(), vars(model).get("_loss_function"), Passing()

    def loss_function(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if logits is not passing.hidden:
            raise RuntimeError(f"{type(model).__name__} changes its logits before the loss.")
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        learned = shift_labels.to(logits.device) != ignore_index
        items = torch.as_tensor(learned.sum() if num_items_in_batch is None else num_items_in_batch)
        labels = shift_labels.to(logits.device)[learned]
        return cross_entropy(head, logits[learned], labels, items.to(logits.device), max(1, CHUNK // vocab_size))

    model.set_output_embeddings(passing)
    model.loss_function = loss_function
    try:
        yield
    finally:
        model.set_output_embeddings(head)
        if own is None:
            del model._loss_function
        else:
            model.loss_function = own


def is_right(model: Any, batch: dict[str, Any]) -> bool:
    """Whether the logits of such a batch are more than a chunk, and the loss in `without_logits` is the model's own.

    That is tried on the row that has most labels.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = model.get_output_embeddings()
    if head is None or weights.is_sharded(head) or model.loss_function is not ForCausalLMLoss:
        return False
    row = int((batch["labels"] != IGNORED).sum(1).argmax())
    one = {name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain = model(**one)
            if batch["labels"].numel() * plain.logits.shape[-1] <= CHUNK:
                return False
            with without_logits(model):
                found = model(**one).loss
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError):  # what a head that is none may lead to
        return False
    finally:
        model.train(training)
    return torch.allclose(found, plain.loss, rtol=1e-3, equal_nan=True)


def cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, items: Tensor, rows: int) -> Tensor:
    """L of hidden states h (n, H) and labels y (n,), with N = items, made of `rows` of them at a time."""
    trained = [value for value in head.parameters() if value.requires_grad] if isinstance(head, nn.Module) else []
    result: Tensor = _CrossEntropy.apply(head, labels, items, rows, hidden, *trained)  # type: ignore[no-untyped-call]
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        labels: Tensor,
        items: Any,
        rows: int,
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        learns_hidden = ctx.needs_input_grad[4]
        grad_hidden = torch.empty_like(hidden) if learns_hidden else None
        grads = [torch.zeros_like(value) for value in trained]
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                h = hidden[part].detach().requires_grad_(learns_hidden)
                loss = F.cross_entropy(head(h).float(), labels[part], reduction="sum") / items
            total += loss.detach()
            if not loss.requires_grad:
                continue
            found = list(torch.autograd.grad(loss, [h, *trained] if learns_hidden else trained, materialize_grads=True))
            if grad_hidden is not None:
                grad_hidden[part] = found.pop(0)
            for grad, more in zip(grads, found, strict=True):
                grad += more
        ctx.save_for_backward(grad_hidden, *grads)
        return total if len(hidden) else total / items  # no label: 0 / 0, as of the plain loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(None if own is None else grad * own for own in ctx.saved_tensors)
