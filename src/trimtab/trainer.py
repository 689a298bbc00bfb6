"""transformers' Trainer for models with adapters, and the one of a run, which stops at the step that shows a fault."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from . import causal_loss, checkpoint, files
from .errors import TrainingError
from .lockstep import Job
from .model import PeftModel
from .objective import Objective
from .optimizers import with_rates
from .tasks.token_classification import IGNORED

BAD_BATCH = "bad_batch.safetensors"
MEMORY = ("not enough memory", "can't allocate memory", "out of memory")  # what PyTorch says where it has no class


class Trainer(transformers.Trainer):
    """transformers' Trainer; a model with adapters resumes, and gets its best checkpoint, from the adapter files.

    The plain one trains and saves such a model too, but reads checkpoints of full models and of HF PEFT only.
    """

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the plain Trainer has it, which goes through all modules of the model in every step to count weights."""
        name = getattr(self.model, "main_input_name", "input_ids")
        return 6 * int(inputs[name].numel()) * self._weights if name in inputs else 0

    @functools.cached_property
    def _weights(self) -> int:
        model: Any = self.model
        return model.num_parameters(exclude_embeddings=True) if hasattr(model, "num_parameters") else 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a model that FSDP2 sharded the adapter as well, which all processes gather: the plain one saves shards."""
        target = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled and isinstance(target, PeftModel):
            target.save_pretrained(output_dir or str(self.args.output_dir), is_main_process=self.args.should_save)
        else:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        if isinstance(target, PeftModel):
            _read(target, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        target = self.accelerator.unwrap_model(self.model)
        if isinstance(target, PeftModel):
            _read(target, Path(self.state.best_model_checkpoint or ""))
        else:
            super()._load_best_model()


def _read(model: PeftModel, folder: Path) -> None:
    """Read the weights of all adapters, from where `save_pretrained` puts them."""
    for name in model.peft_config:
        own = folder / name
        checkpoint.load_weights(model, own if files.current(own, files.WEIGHTS).is_file() else folder, name)


class RunTrainer(Trainer):
    """The Trainer of a run: it stops at a loss or gradient that cannot be right, and keeps the batch that gave it."""

    def __init__(
        self,
        output: Path,
        metrics: Callable[[Any, Any], dict[str, float]],
        objective: Objective | None = None,
        rates: Mapping[nn.Parameter, float] | None = None,
        job: Job | None = None,
        write: Callable[[Any, dict[str, Any]], Tensor] | None = None,
        **settings: Any,
    ) -> None:
        """metrics: scores of an EvalPrediction and of the rows that it is of, in their order. objective: what is
        minimized in place of the model's own loss. rates: how much of the learning rate parameters have, if not all.
        job: of several in lockstep, the one that this is. write: gives the ids that a model writes for a batch, where
        scores are of those."""
        super().__init__(
            compute_metrics=lambda found: metrics(found, self.evaluated),
            compute_loss_func=self._loss if objective else None,
            **settings,
        )
        self.objective: Objective | None = objective
        self.spares_logits: bool | None = None  # not known yet
        self.taught: Tensor | None = None  # the teacher's logits of the batch
        self.rates = rates
        self.write = write
        self.evaluated: Any = None
        self.output = output
        self.batch: dict[str, Any] = {}
        self.job = job
        if job is not None:
            self.accelerator.backward = self._backward
        self.remove_callback(transformers.PrinterCallback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        made = self.optimizer or with_rates(super().create_optimizer(model), self.rates or {})
        self.optimizer: torch.optim.Optimizer = made
        return made

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Of what is trained: the plain Trainer goes through all modules of the model in every step."""
        trained: nn.Module = model
        if not self.is_fsdp_enabled:  # with it accelerate looks for the model that has them
            trained = nn.ParameterList(value for group in self.optimizer.param_groups for value in group["params"])
        return super()._clip_grad_norm(trained)  # type: ignore[no-untyped-call]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Where there is an objective, the model does not get the labels: what it makes of them is made here.

        That is the decoder's inputs of an encoder-decoder, and in training the penalty of the adapters (`learning`).
        What virtual tokens say of a row's first token is left out.
        """
        if self.objective is None:
            spared = self.model.training and not return_outputs and self._spares_logits(inputs)  # type: ignore[union-attr]
            with causal_loss.without_logits(self.model) if spared else nullcontext():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own: Any = self.model
        if self.write and own.config.is_encoder_decoder:
            inputs = {**inputs, "decoder_input_ids": _decoder_inputs(own, inputs["labels"])}
        items = num_items_in_batch if own.training else None
        self.taught = self.objective.teacher.logits(inputs) if self.objective.teacher and own.training else None
        loss, outputs = super().compute_loss(model, inputs, True, items)
        if own.training and (penalty := own.penalty()) is not None:
            loss = loss + penalty / getattr(self, "current_gradient_accumulation_steps", 1)  # once a step
        return (loss, outputs) if return_outputs else loss

    def _spares_logits(self, batch: dict[str, Any]) -> bool:
        """Whether the model's loss can be made without its logits, and they are many; found out at the first batch."""
        if self.spares_logits is None:
            # fp16's gradients are scaled only after they are taken, when those of small chunks would be zeros.
            fixed = self.args.fp16 or self.args.torch_compile
            self.spares_logits = not fixed and causal_loss.is_right(self.model, batch)
        return self.spares_logits

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        model: Any = self.model
        objective = self.objective if self.objective and model.training else Objective()
        logits, taught = outputs["logits"], self.taught
        if self._loss_shifts_labels:
            size = labels.shape[1]  # GIT's logits have the photo's before the text's
            logits, labels = logits[:, -size:-1], labels[:, 1:]
            taught = None if taught is None else taught[:, -size:-1]
        items = objective.count(labels).to(logits.device) if num_items_in_batch is None else num_items_in_batch
        return objective.loss(logits, labels, items, taught)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The weights of all labels, where classes have weights, in place of their number."""
        items = super()._get_num_items_in_batch(batch_samples, device)
        if self.objective is None or self.objective.weights is None:
            return items
        own = torch.stack([self.objective.count(batch["labels"]) for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(own).sum() if self.args.average_tokens_across_devices else own

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.batch = dict(inputs)
        with contextlib.nullcontext() if self.job is None else self.job.step():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._check(loss)
        return loss

    def _backward(self, loss: Tensor) -> None:
        self._check(loss)  # before it is one of several
        assert self.job is not None
        self.job.backward(loss)

    def _check(self, loss: Tensor) -> None:
        if not math.isfinite(value := loss.item()):
            self._stop(
                f"The loss is {value}", "a lower training.learning_rate, more training.warmup_ratio, and no fp16"
            )
        if value == 0:
            self._stop(
                "The loss is exactly 0, so that nothing is learned", "other labels: those of this batch are ignored"
            )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.write is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return loss, self.write(self.model, inputs), inputs["labels"]

    def evaluation_loop(self, dataloader: Any, *args: Any, **settings: Any) -> Any:
        self.evaluated = dataloader.dataset
        # Before training there is no optimizer, and accelerate shards no model without: each process has all of it.
        sharded, self.is_fsdp_enabled = self.is_fsdp_enabled, self.is_fsdp_enabled and self.optimizer is not None
        try:
            return super().evaluation_loop(dataloader, *args, **settings)
        finally:
            self.is_fsdp_enabled = sharded

    def forget_evaluation(self) -> None:
        """Let training prepare the model anew: accelerate takes one that was evaluated for one that is ready.

        So several processes would each train a model of its own, without a word.
        """
        model: Any = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        model._is_accelerate_prepared = False
        self.accelerator.free_memory()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        model: Any = self.accelerator.unwrap_model(self.model)
        ready = all(config.is_final for config in model.peft_config.values())
        return ready and super()._determine_best_metric(metrics, trial)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """The rows as they come: where training groups them by length, Trainer would here, too."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if not math.isfinite(value := float(logs.get("grad_norm", 0))):
            self._stop(f"The norm of the gradient is {value}", "a lower training.learning_rate, and no fp16")

    def _stop(self, what: str, remedy: str) -> None:
        path = self.output / BAD_BATCH
        save_file({name: value.contiguous().cpu() for name, value in self.batch.items()}, path)
        rate = f"(it is {self.args.learning_rate:g})"
        remedy = remedy.replace("learning_rate", f"learning_rate {rate}")
        raise TrainingError(f"{what} in step {self.state.global_step + 1}. Try {remedy}. The batch is in {path}.")

    def try_longest(self, length: Callable[[Any], int]) -> None:
        """Take the costliest step first, forward and back, and forget it: what is too big for the memory shows now.

        Raises:
            TrainingError: out of memory, with what to change.
        """
        rows: Any = self.train_dataset
        size = min(self.args.per_device_train_batch_size, len(rows))
        longest = sorted(range(len(rows)), key=lambda i: length(rows[i]), reverse=True)[:size]
        assert self.data_collator is not None
        batch = self._prepare_inputs(self.data_collator([rows[i] for i in longest]))
        cards = list(range(torch.cuda.device_count()))
        model: Any = self.model
        try:
            with torch.random.fork_rng(cards), self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model.train(), batch)
            loss.backward()
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
                words in str(error) for words in MEMORY
            ):
                raise
            raise TrainingError(
                f"The memory does not hold the longest batch, {size} rows of up to {length(rows[longest[0]])}. Halve "
                f"training.batch_size and double training.gradient_accumulation_steps, which trains the same; or set "
                "training.gradient_checkpointing: true, or a smaller data.max_length."
            ) from None
        finally:
            model.zero_grad()


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """The labels after the start token, without the last: (B, T)."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):  # Whisper has none
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return shifted
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, model.config.pad_token_id)], 1)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: Trainer writes its state last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_whole(path)), None)


def had_stopped(checkpoint: Path) -> bool:
    """Whether training was to end with this checkpoint, as early stopping has it."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
