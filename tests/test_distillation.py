"""Distillation: its loss, who can teach, and a run with a teacher."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import WORDS, review, write_csv
from test_strategies import batches, changed, close, saved, silent, still  # noqa: F401
from torch.nn import functional as F

from trimtab import LoraConfig, PromptTuningConfig, get_peft_model
from trimtab import recipe as recipes
from trimtab.distillation import load
from trimtab.errors import ConfigError
from trimtab.objective import Distillation, Objective, Teacher
from trimtab.tasks import TASKS, Data
from trimtab.trainer import RunTrainer
from trimtab.training import train

CPU = torch.device("cpu")


def quiet(model: Any) -> Any:
    """Without dropout, so that training mode computes the same."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


CONFIGS = {"lora": LoraConfig(r=2, target_modules="all-linear"), "prompt": PromptTuningConfig(num_virtual_tokens=2)}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("task", ["text-classification", "token-classification", "text-generation"])
def test_the_loss_is_that_of_the_paper(
    batches: Any,  # noqa: F811
    tmp_path: Path,
    task: str,
    method: str,
    weighted: bool,
) -> None:
    """(1 - a) CE + a T^2 KL over learned positions alone, of two accumulated batches as of both in one."""
    if weighted and task == "text-generation":
        pytest.skip("tokens have no weights")
    model, batch = batches[task]
    torch.manual_seed(1)
    teacher = quiet(type(model)(model.config)).eval()
    made: Any = quiet(get_peft_model(model, CONFIGS[method]))
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0]) if weighted else None
    taught = Teacher(Distillation(teacher="x", temperature=3.0, weight=0.25), teacher)
    settings = transformers.Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = RunTrainer(tmp_path, lambda *_: {}, Objective(0.0, weights, taught), model=made, args=settings)
    parts = [{name: value[at] for name, value in batch.items()} for at in (slice(0, 1), slice(1, 3))]
    items = trainer._get_num_items_in_batch(parts, CPU)
    found = sum(trainer.compute_loss(made.train(), dict(part), num_items_in_batch=items) for part in parts)

    ids, labels = batch["input_ids"], batch["labels"]
    own, theirs = made.eval()(ids).logits, teacher(ids).logits
    if task == "text-generation":
        own, theirs, labels = own[:, :-1], theirs[:, :-1], labels[:, 1:]
    own, theirs, labels = (found[labels != -100] for found in (own, theirs, labels))
    p, q = (found.div(3).softmax(-1) for found in (own, theirs))
    apart = (q * (q.log() - p.log())).sum(-1)
    w = torch.ones(len(labels)) if weights is None else weights[labels]
    expected = 0.75 * F.cross_entropy(own, labels, weights) + 0.25 * 9 * (w * apart).sum() / w.sum()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    plain = made.eval()(**parts[1]).loss
    torch.testing.assert_close(trainer.compute_loss(made, dict(parts[1]), num_items_in_batch=items), plain)


def classifier(folder: Path, bert: Path, labels: list[str]) -> str:
    torch.manual_seed(3)
    names, ids = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    config = transformers.BertConfig.from_pretrained(bert, id2label=names, label2id=ids, num_hidden_layers=3)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    for path in bert.glob("token*"):
        shutil.copy(path, folder)
    return str(folder)


def task_of(tmp_path: Path, bert: Path) -> Any:
    path = write_csv(tmp_path / "rows.csv", [review(i) for i in range(12)])
    return TASKS["text-classification"].from_data(Data(train=path), str(bert), 0, silent)[0]


def taught(name: str, task: Any) -> Teacher:
    return load(Distillation(teacher=name), task, torch.float32, CPU)


def test_classes_go_by_their_names(tmp_path: Path, bert: Path) -> None:
    task = task_of(tmp_path, bert)
    assert task.labels == ["blame", "praise"]
    name = classifier(tmp_path / "teacher", bert, ["praise", "blame"])
    plain = transformers.BertForSequenceClassification.from_pretrained(name).eval()
    batch = {**task.example(), "labels": torch.tensor(0), "unknown": torch.tensor(0)}
    assert torch.equal(taught(name, task).logits(batch), plain(**task.example()).logits[:, [1, 0]])


def test_who_cannot_teach(tmp_path: Path, bert: Path) -> None:
    task = task_of(tmp_path, bert)
    with pytest.raises(ConfigError, match=r"knows the classes bad, good; those of the data are blame, praise"):
        taught(classifier(tmp_path / "others", bert, ["good", "bad"]), task)
    with pytest.raises(ConfigError, match=r"its classifier would be new"):
        taught(str(bert), task)
    name = classifier(tmp_path / "words", bert, ["blame", "praise"])
    words = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate([*WORDS[:-1], "other"])})
    words.save_pretrained(name)
    with pytest.raises(ConfigError, match="reads otherwise"):
        taught(name, task)


def test_a_run_with_a_run_as_teacher(recipe: Path, still: str) -> None:  # noqa: F811
    """Plain descent, so that a wrong scale would show; the same with accumulated batches."""
    teacher = train(changed(recipe, "training.epochs=8", "method.r=8", "output=teacher"), silent).folder
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    settings = [still, "training.optim=sgd", "training.max_grad_norm=1e9"]
    distilled = [*settings, "training.distillation={teacher: teacher, weight: 1.0}"]
    result = train(changed(recipe, *distilled), silent)
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before
    assert result.metrics["trainable_parameters"] == 2 * 2 * 2 * 2 * 64 + 2 * 64 + 2
    written = recipes.read(result.folder / "recipe.yaml")
    assert written.training["distillation"]["teacher"] == str(teacher)
    assert len(written.made_with["teacher"]) == 64
    parts = ["training.batch_size=2", "training.gradient_accumulation_steps=3", "output=parts"]
    close(saved(result), saved(train(changed(recipe, *distilled, *parts), silent)))
    plain = saved(train(changed(recipe, *settings, "output=plain"), silent))
    assert any(not torch.equal(value, plain[name]) for name, value in saved(result).items())


def test_a_run_of_another_task_cannot_teach(recipe: Path, tmp_path: Path, llama: Path) -> None:
    (tmp_path / "text.txt").write_text("the film was good\nthe meal is bad\n" * 20, encoding="utf-8")
    other = tmp_path / "other.yaml"
    other.write_text(
        f"task: text-generation\nmodel: {llama}\ndata: {{train: text.txt}}\ntraining: {{max_steps: 1, "
        "eval_strategy: no, warmup_steps: 0}\noutput: other\n",
        encoding="utf-8",
    )
    train(changed(other), silent)
    with pytest.raises(ConfigError, match="was trained for text-generation, which is another task"):
        train(changed(recipe, "training.distillation={teacher: other}"), silent)
