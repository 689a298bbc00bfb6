"""What a recipe asks of a training beside the plain one: rates, another loss, and what acts between the steps."""

from typing import Any

import transformers

from . import distillation, layers
from .errors import ConfigError
from .objective import OBJECTIVES, Distillation, Objective, class_weights
from .optimizers import EMBEDDING_LR, loraplus_rates
from .recipe import Recipe


def rates(recipe: Recipe, arguments: transformers.TrainingArguments, model: Any) -> dict[Any, float]:
    """How much of the learning rate each parameter has, where the recipe makes a difference. Raises: ConfigError."""
    found: dict[Any, float] = {}
    if ratio := recipe.training.get("loraplus_lr_ratio"):
        found = loraplus_rates(model, ratio, EMBEDDING_LR / arguments.learning_rate)
    if decay := recipe.training.get("layerwise_lr_decay"):
        found |= {parameter: rate * found.get(parameter, 1.0) for parameter, rate in layers.rates(model, decay).items()}
    return found


def objective(
    recipe: Recipe, arguments: transformers.TrainingArguments, model: Any, task: Any, rows: Any
) -> Objective | None:
    """What is minimized, where the recipe asks for more than the model's own loss, or that is of one batch only.

    The mean over all labels of accumulated batches is not the mean of their means. Raises: ConfigError.
    """
    asked = {name: recipe.training[name] for name in OBJECTIVES if recipe.training.get(name)}
    if not asked and (task.divides_loss or not task.cross_entropy):
        return None
    for key in asked:
        refuse(model, f"training.{key}", "makes_loss", "makes a loss of its own")
    weights, taught = asked.get("class_weights"), asked.get("distillation")
    return Objective(
        asked.get("label_smoothing_factor", 0.0),
        weights and class_weights(weights, task.labels, rows["labels"]),
        taught and distillation.load(Distillation(**taught), task, model.dtype, arguments.device),
    )


def refuse(model: Any, key: str, trait: str, reason: str) -> None:
    """Raise a ConfigError where one of the recipe's methods has a trait beside which the key means nothing."""
    config = model.peft_config["default"]
    for method in (config, *config.union_of()):
        if getattr(method, trait):
            raise ConfigError(f"{key}: {type(method).__name__} {reason}. Leave out the one or the other.")


def callbacks(recipe: Recipe, model: Any) -> list[transformers.TrainerCallback]:
    """What acts between the steps, as the recipe asks. Raises: ConfigError."""
    asked, found = recipe.training, list[transformers.TrainerCallback]()
    if patience := asked.get("early_stopping_patience"):
        found.append(transformers.EarlyStoppingCallback(patience, asked.get("early_stopping_threshold", 0.0)))
    if begin := asked.get("gradual_unfreezing"):
        refuse(model, "training.gradual_unfreezing", "compares_layers", "compares all layers, which must train at once")
        found.append(layers.GradualUnfreezing(model, begin, asked.get("unfreezing_ratio", 1.0)))
    return found
