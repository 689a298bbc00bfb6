"""Text generation: what is learned of a row, blocks of long texts, scores, and a run that learns to answer."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import review
from safetensors.torch import load_file

from trimtab import recipe as recipes
from trimtab import run
from trimtab.errors import ConfigError, DataError
from trimtab.tasks import Data
from trimtab.tasks.text_generation import TextGeneration
from trimtab.training import train

ASKED = [{"prompt": review(i)[0] + " ?", "answer": "yes" if i % 2 == 0 else "no"} for i in range(24)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(model: Path, **data: Any) -> tuple[TextGeneration, dict[str, Any], list[str]]:
    said: list[Any] = []
    task, rows = TextGeneration.from_data(Data(**data), str(model), 0, said.append)
    return task, rows, list(map(str, said))


def learned(task: TextGeneration, row: dict[str, Any]) -> str:
    return "".join(f"[{text}]" if is_learned else f"{text} " for text, is_learned in task.show(row)).strip()


def refusal(model: Path, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(model, **data)
    return str(caught.value)


def test_only_the_answer_is_learned_with_the_token_that_ends_it(tmp_path: Path, llama: Path) -> None:
    path = write(tmp_path / "a.jsonl", ASKED)
    task, rows, said = prepare(llama, train=path, validation=path)
    assert said[0] == "Columns guessed: prompt is the prompt, answer is the answer (data.columns changes this)"
    assert learned(task, rows["train"][0]) == "<user> the film was good ? <assistant> [yes <end>]"
    [row] = [task.collate([rows["train"][0], {"input_ids": [1] * 20, "attention_mask": [1] * 20, "labels": [1] * 20}])]
    assert row["labels"][0].tolist()[9:] == [-100] * 11  # padding is not learned, though it is the same token
    assert row["labels"][0].tolist().count(2) == 1
    assert row["attention_mask"].sum(-1).tolist() == [9, 20]


def test_an_input_goes_behind_its_instruction(tmp_path: Path, llama: Path) -> None:
    rows = [{"instruction": "is the film", "input": "good", "output": "yes"}, {"instruction": "no", "output": "no"}]
    path = write(tmp_path / "a.jsonl", [rows[0], rows[1] | {"input": ""}])
    task, found, _ = prepare(llama, train=path, validation=path)
    assert learned(task, found["train"][0]) == "<user> is the film good <assistant> [yes <end>]"
    assert learned(task, found["train"][1]) == "<user> no <assistant> [no <end>]"


def test_every_answer_of_a_chat_is_learned(tmp_path: Path, llama: Path) -> None:
    chat = [("user", "film ?"), ("assistant", "good"), ("user", "meal ?"), ("assistant", "bad")]
    other = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in chat]
    for name, messages in {"messages": [{"role": r, "content": c} for r, c in chat], "conversations": other}.items():
        path = write(tmp_path / f"{name}.jsonl", [{name: messages}] * 4)
        task, found, _ = prepare(llama, train=path, validation=path)
        shown = "<user> film ? <assistant> [good <end>]<user> meal ? <assistant> [bad <end>]"
        assert learned(task, found["train"][0]) == shown


def test_answers_are_learned_whole_or_not_at_all(tmp_path: Path, llama: Path) -> None:
    long = {"role": "assistant", "content": "good " * 20}
    chat = [{"role": "user", "content": "film ?"}, {"role": "assistant", "content": "good"}]
    path = write(tmp_path / "a.jsonl", [{"messages": [*chat, chat[0], long]}, {"messages": [chat[0], long]}])
    task, found, said = prepare(llama, train=path, validation=path, max_length=16)
    assert [learned(task, row) for row in found["train"]] == ["<user> film ? <assistant> [good <end>]"]
    assert "train: 1 chats cut after the last answer that ends within 16 tokens" in said
    assert "train: 1 rows dropped, of which no answer ends within 16 tokens" in said
    path = write(tmp_path / "b.jsonl", [{"messages": [chat[0], long]}] * 2)
    message = refusal(llama, train=path, validation=path, max_length=16)
    assert "of no row an answer ends within 16 tokens" in message
    assert "starts: '<user> film ? <assistant> good good" in message


def test_without_a_chat_template_prompt_and_answer_are_lines(tmp_path: Path, llama: Path) -> None:
    path = write(tmp_path / "a.jsonl", ASKED)
    task, _, _ = prepare(llama, train=path)
    task.reader.chat_template = None
    ids, labels, whole = task._chat([{"role": "user", "content": "film ?"}, {"role": "assistant", "content": "good"}])
    words = ["<s>", "film", "?", "good", "<end>"]  # this tokenizer has no token for the end of a line
    assert task.reader.convert_ids_to_tokens(ids) == words
    assert labels == [-100] * 3 + ids[3:]
    assert whole


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path: Path, llama: Path) -> None:
    path = write(tmp_path / "a.jsonl", ASKED)
    task, _, _ = prepare(llama, train=path)
    task.reader.chat_template = "{{ messages | length }} good {% if add_generation_prompt %} film {% endif %}"
    with pytest.raises(ConfigError, match="writes a message differently when others follow"):
        task._chat([{"role": "user", "content": "film ?"}, {"role": "assistant", "content": "good"}])


def test_texts_are_learned_whole_in_blocks(tmp_path: Path, llama: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "the film was good and the meal"}, {"text": "bad"}])
    task, rows, _ = prepare(llama, train=path, validation=path, max_length=3)
    shown = ["[the film was]", "[good and the]", "[meal <end>]", "[bad <end>]"]
    assert [learned(task, row) for row in rows["train"]] == shown


def test_of_a_text_file_the_end_is_set_aside(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"the film was {word}\n" for word in ("good", "bad") * 5), encoding="utf-8")
    task, rows, _ = prepare(llama, train=tmp_path / "a.txt", validation=0.2)
    assert learned(task, rows["validation"][0]) == "[the film was good the film was bad <end>]"
    assert len(rows["train"][0]["input_ids"]) == 8 * 4 + 1
    (tmp_path / "one.txt").write_text("good", encoding="utf-8")
    assert "1 lines are too few" in refusal(llama, train=tmp_path / "one.txt")


def test_columns_that_make_no_row(tmp_path: Path, llama: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "film", "label": "good"}])
    assert "which columns hold the text? Say so in the recipe" in refusal(llama, train=path)
    path = write(tmp_path / "b.jsonl", [{"messages": [{"who": "me"}]}])
    assert "is a list of {role, content} (or {from, value}), not" in refusal(llama, train=path)


def test_perplexity_is_that_of_the_learned_tokens(tmp_path: Path, llama: Path) -> None:
    from transformers import EvalPrediction

    path = write(tmp_path / "a.jsonl", ASKED)
    task, rows, _ = prepare(llama, train=path)
    model, _ = task.load_model(str(llama), "none")
    batch = task.collate([rows["train"][i] for i in range(3)])
    with torch.no_grad():
        logits = model(**batch).logits
    found = task.metrics(EvalPrediction(task.reduced(logits, batch["labels"]).numpy(), batch["labels"].numpy()), None)
    losses, hits = [], []
    for row, labels in zip(logits.log_softmax(-1), batch["labels"], strict=True):
        for t, label in enumerate(labels.tolist()):
            if label != -100:
                losses.append(-row[t - 1, label].item())
                hits.append(row[t - 1].argmax().item() == label)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(np.mean(hits))


def test_a_run_learns_to_answer(tmp_path: Path, llama: Path) -> None:
    write(tmp_path / "a.jsonl", ASKED)
    (tmp_path / "recipe.yaml").write_text(
        f"""
task: text-generation
model: {llama}
data: {{train: a.jsonl, validation: 0.25}}
method: {{name: lora, r: 4, target_modules: all-linear}}
training: {{epochs: 30, batch_size: 6, learning_rate: 0.02}}
output: run
""",
        encoding="utf-8",
    )
    said: list[str] = []
    result = train(recipes.read(tmp_path / "recipe.yaml"), lambda line: said.append(str(line)))
    assert any("Example 1, what is learned in brackets: <user> the" in line and "<end>]" in line for line in said)
    assert result.metrics["validation"]["perplexity"] < 1.5 < result.metrics["untrained"]["validation"]["perplexity"]
    found = run.load(result.folder)
    prompts = ["the film was good ?", "the film was bad ?", [{"role": "user", "content": "the meal was bad ?"}]]
    assert [answer["text"] for answer in found.task.predict(found.model, prompts)] == ["yes", "no", "no"]
    (tmp_path / "asked.txt").write_text("the film was good ?\n", encoding="utf-8")
    assert found.task.inputs(tmp_path / "asked.txt") == ["the film was good ?"]
    assert found.task.inputs(tmp_path / "a.jsonl")[:1] == ["the film was good ?"]


def test_accumulated_gradients_are_those_of_all_learned_tokens(tmp_path: Path, llama: Path) -> None:
    """Batches with few learned tokens count less than those with many."""
    words = "good fine bad dull very not".split()
    rows = [{"prompt": "film ?", "answer": " ".join(words[: 1 + i % 6])} for i in range(12)]
    write(tmp_path / "a.jsonl", rows)
    text = f"""
task: text-generation
model: {llama}
data: {{train: a.jsonl, validation: a.jsonl}}
method: {{name: lora, r: 2, target_modules: [q_proj, v_proj]}}
training: {{epochs: 1, optim: sgd, learning_rate: 0.05, warmup_steps: 0, max_grad_norm: 1.0e+9, eval_strategy: "no"}}
output: run
"""
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    found = []
    for name, settings in {"whole": ["training.batch_size=6"], "parts": ["training.batch_size=2"]}.items():
        more = ["training.gradient_accumulation_steps=3"] if name == "parts" else []
        recipe = recipes.read(tmp_path / "recipe.yaml", [*settings, *more, f"output={tmp_path / name}"])
        found.append(load_file(train(recipe, lambda _: None).folder / "adapter_model.safetensors"))
    whole, parts = found
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-5)
