"""Text to text: sources and targets, padding, smoothed labels, scores of what is written, and a run that translates."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, write_csv
from transformers import EvalPrediction, Seq2SeqTrainingArguments

from trimtab import LoraConfig, get_peft_model, run
from trimtab import recipe as recipes
from trimtab.errors import ConfigError, DataError, RecipeError
from trimtab.objective import Objective
from trimtab.tasks import Data
from trimtab.tasks.text2text_generation import Text2TextGeneration, scores
from trimtab.trainer import RunTrainer
from trimtab.training import train

GERMAN = {"film": "Film", "meal": "Essen", "room": "Raum", "good": "gut", "bad": "schlecht", "fine": "schön"}
PAIRS = [
    (f"{start} {thing} was {word}", f"{GERMAN[thing]} {GERMAN[word]}")
    for start in ("a", "the")
    for thing in ("film", "meal", "room")
    for word in ("good", "bad", "fine")
]


def built(folder: Path, kind: str) -> Path:
    """The folder of a tiny encoder-decoder with a tokenizer of words that ends each text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForSeq2SeqLM, BartConfig, PreTrainedTokenizerFast, T5Config

    words = ["<pad>", "</s>", "<unk>", *WORDS[5:], *GERMAN.values(), "translate:"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    ids = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        config: Any = T5Config(**ids, **sizes, decoder_start_token_id=0, dropout_rate=0.0)
    else:
        both = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
                {"layers": 2, "ffn_dim": 128, "attention_heads": 4}.items()}  # fmt: skip
        config = BartConfig(**ids, **both, dropout=0.0, d_model=64, max_position_embeddings=32,
                            decoder_start_token_id=1, forced_eos_token_id=None, init_std=0.2)  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["t5", "bart"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "a.csv", PAIRS, ("en", "de"))


def prepare(base: Path, path: Path, **data: Any) -> tuple[Text2TextGeneration, dict[str, Any], list[str]]:
    said: list[Any] = []
    data = {"columns": {"source": "en", "target": "de"}, **data}
    found = Text2TextGeneration.from_data(Data(train=path, validation=path, **data), str(base), 0, said.append)
    return *found, list(map(str, said))


def recipe(folder: Path, base: Path, **more: str) -> Path:
    parts = {"data": "", "training": "", **more}
    (folder / "recipe.yaml").write_text(
        f"""
task: text2text-generation
model: {base}
data: {{train: a.csv, validation: a.csv, columns: {{source: en, target: de}}, prefix: "translate: "{parts["data"]}}}
method: {{name: lora, r: 16, target_modules: all-linear}}
training: {{epochs: 50, batch_size: 6, learning_rate: 0.01, eval_strategy: steps, eval_steps: 50,
  generation_max_length: 8{parts["training"]}}}
output: run
""",
        encoding="utf-8",
    )
    return folder / "recipe.yaml"


def test_the_target_is_learned_with_its_end(base: Path, pairs: Path) -> None:
    task, rows, _ = prepare(base, pairs, prefix="translate: ")
    assert task.show(rows["train"][0]) == [("translate: a film was good </s>", False), ("Film gut </s>", True)]
    batch = task.collate([rows["train"][0], {"input_ids": [3], "attention_mask": [1], "labels": [1]}])
    assert batch["labels"][1].tolist() == [1, -100, -100]
    assert batch["attention_mask"][1].tolist() == [1, 0, 0, 0, 0, 0]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_which_column_is_which_is_not_guessed_of_languages(base: Path, pairs: Path) -> None:
    with pytest.raises(DataError, match=r"which column is the source\? It has: en, de\. .*source: \.\.\., target"):
        prepare(base, pairs, columns={})


def test_long_sources_and_targets_are_cut_and_told(base: Path, pairs: Path) -> None:
    _, rows, said = prepare(base, pairs, max_length=2)
    assert [len(row["labels"]) for row in rows["train"]] == [2] * len(PAIRS)
    assert "train: 18 of 18 sources cut to 2 tokens" in said
    assert "train: 18 of 18 targets cut to 2 tokens" in said


def test_scores_by_hand() -> None:
    """One word of three is missing: ROUGE-1 and -L have precision 1 and recall 2/3, ROUGE-2 1 and 1/2."""
    found = scores(["the good"], ["the good film"])
    assert found["rouge1"] == found["rougeL"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert found["rouge2"] == pytest.approx(2 * 1 * (1 / 2) / (1 + 1 / 2))
    # chrF: the mean over n = 1..6 of character n-gram precision (1 in all) and recall, F with beta 2. Without blanks
    # 7 letters of 11 are there: of n-grams 8 - n of 12 - n.
    recall = np.mean([(8 - n) / (12 - n) for n in range(1, 7)])
    assert found["chrf"] == pytest.approx(100 * 5 * recall / (4 + recall))
    # BLEU of the same four words and one more: precisions 4/5, 3/4, 2/3, 1/2, and it is not shorter.
    found = scores(["a b c d x"], ["a b c d e"])
    assert found["bleu"] == pytest.approx(100 * math.prod([4 / 5, 3 / 4, 2 / 3, 1 / 2]) ** (1 / 4))


def test_padding_of_what_was_written_is_no_text(base: Path, pairs: Path) -> None:
    task, rows, _ = prepare(base, pairs)
    written = np.full((len(PAIRS), 6), -100)
    for i, row in enumerate(rows["train"]):
        written[i, 1 : 1 + len(row["labels"])] = row["labels"]
    written[:, 0] = 0  # what the decoder starts with
    found = task.metrics(EvalPrediction(written, None), rows["train"])
    assert found["chrf"] == pytest.approx(100)
    assert found["rouge1"] == pytest.approx(1)


def test_smoothed_labels_have_the_same_decoder_inputs(base: Path, pairs: Path, tmp_path: Path) -> None:
    """The loss is (1 - e) * -log p of the label + e * the mean of -log p, over the tokens that are labels."""
    task, rows, _ = prepare(base, pairs)
    model, _ = task.load_model(str(base), "none")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type=task.task_type))
    settings = Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = RunTrainer(tmp_path, task.metrics, Objective(0.1), write=task.write, model=model, args=settings)
    batch = task.collate([rows["train"][0], {"input_ids": [3], "attention_mask": [1], "labels": [1]}])
    model.eval()
    with torch.no_grad():
        likely = -model(**batch).logits.log_softmax(-1)
    labels = batch["labels"]
    each = 0.9 * likely.gather(-1, labels.clamp(min=0)[..., None])[..., 0] + 0.1 * likely.mean(-1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = trainer.compute_loss(model.train(), batch)
    assert loss.item() == pytest.approx(each[labels != -100].mean().item(), rel=1e-5)


def test_a_run_translates(base: Path, pairs: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = train(recipes.read(recipe(tmp_path, base)), lambda line: said.append(str(line)))
    assert any("translate: a film was good </s> [Film gut </s>]" in line for line in said)
    assert result.metrics["untrained"]["validation"]["chrf"] < 30
    assert result.metrics["validation"]["chrf"] > 95
    history = (result.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert all("eval_chrf" in entry for entry in map(json.loads, history) if "eval_loss" in entry)
    found = run.load(result.folder)
    assert found.task.predict(found.model, ["a meal was bad"]) == [{"text": "Essen schlecht"}]
    assert found.task.inputs(pairs)[0] == "a film was good"
    assert run.merge(result.folder, tmp_path / "merged") < 1e-4
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text(encoding="utf-8"))
    assert config["max_length"] == 8


def test_generation_is_set_by_the_recipe(base: Path, pairs: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, base, training=", max_steps: 2, generation_num_beams: 2")
    model = run.load(train(recipes.read(path), lambda _: None).folder).model
    assert (model.generation_config.max_length, model.generation_config.num_beams) == (8, 2)
    plain = recipes.read(path)
    del plain.training["generation_max_length"]
    if base.name == "t5":
        assert run.load(train(plain, lambda _: None).folder).model.generation_config.max_length == 128
    else:
        with pytest.raises(ConfigError, match=r"bart writes up to 32 tokens; training.generation_max_length is 128"):
            train(plain, lambda _: None)
    with pytest.raises(RecipeError, match=r"predict_with_generate cannot be set in a recipe"):
        recipes.read(path, ["training.predict_with_generate=false"])


def test_keys_of_other_tasks_are_refused(base: Path, pairs: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, base)
    with pytest.raises(RecipeError, match=r"recipe.yaml:4: data.prefix is of no use to text-generation"):
        recipes.read(path, ["task=text-generation", "data.columns={text: en}"])
    with pytest.raises(RecipeError, match=r"training has no key 'generation_max_length'"):
        recipes.read(path, ["task=text-generation", "data={train: a.csv}"])
