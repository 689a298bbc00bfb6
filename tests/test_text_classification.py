"""Text classification: rows from files, columns, classes, and the modules that are new."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import review, write_csv

from trimtab.errors import ConfigError, DataError
from trimtab.tasks import Data
from trimtab.tasks import rows as files
from trimtab.tasks.text_classification import TextClassification

ROWS = [(*review(i),) for i in range(12)]
Prepared = tuple[TextClassification, dict[str, Any], list[str]]


def prepare(bert: Path, **data: Any) -> Prepared:
    said: list[str] = []
    task, rows = TextClassification.from_data(Data(**data), str(bert), 0, said.append)
    return task, rows, said


def refusal(bert: Path, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(bert, **data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path) -> Path:
    """The rows in the format that the name says."""
    import datasets

    kind = next(end for end in reversed(path.suffixes) if end != ".gz")
    plain = path.with_name(path.name.removesuffix(".gz"))
    columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    records = [{"text": text, "label": label} for text, label in ROWS]
    if kind == ".parquet":
        datasets.Dataset.from_dict(columns).to_parquet(str(plain))
    elif kind == ".json":
        plain.write_text(json.dumps(records), encoding="utf-8")
    elif kind == ".jsonl":
        plain.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        separator = {".csv": ",", ".tsv": "\t"}[kind]
        plain.write_text("\n".join(separator.join(row) for row in [("text", "label"), *ROWS]), encoding="utf-8")
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", list(files.FORMATS))
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str, packed: str) -> None:
    found = files.read(write(tmp_path / f"rows{kind}{packed}"))
    assert list(zip(found["text"], found["label"], strict=True)) == ROWS


def test_a_name_with_brackets_and_spaces_is_a_name(tmp_path: Path) -> None:
    assert len(files.read(write_csv(tmp_path / "my rows [1] *.csv", ROWS))) == len(ROWS)


def test_words_that_look_like_gaps_are_words(tmp_path: Path) -> None:
    found = files.read(write_csv(tmp_path / "a.csv", [("NA", "None"), ("null", "nan")]))
    assert (list(found["text"]), list(found["label"])) == (["NA", "null"], ["None", "nan"])


def test_columns_are_guessed_and_told(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS, ("Review", "Sentiment"))
    task, _, said = prepare(bert, train=path)
    assert task.names == {"text": "Review", "label": "Sentiment"}
    assert said[0] == "Columns guessed: Review is the text, Sentiment is the label (data.columns changes this)"


def test_given_columns_are_taken_and_not_told(tmp_path: Path, bert: Path) -> None:
    rows = [(i, label, text) for i, (text, label) in enumerate(ROWS)]
    path = write_csv(tmp_path / "a.csv", rows, ("label", "answer", "words"))
    task, rows_, said = prepare(bert, train=path, columns={"text": "words", "label": "answer"})
    assert task.labels == ["blame", "praise"]
    assert not any("guessed" in line for line in said)
    assert set(rows_["train"]["labels"]) == {0, 1}


def test_pairs_become_one_sequence(tmp_path: Path, bert: Path) -> None:
    path = write_csv(
        tmp_path / "a.csv", [("the film", "the meal", i % 2) for i in range(8)], ("premise", "hypothesis", "label")
    )
    task, rows, _ = prepare(bert, train=path)
    assert task.names == {"text": "premise", "text_pair": "hypothesis", "label": "label"}
    assert task.reader.decode(rows["train"][0]["input_ids"]) == "[CLS] the film [SEP] the meal [SEP]"
    assert rows["train"][0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert task.inputs(path)[0] == ("the film", "the meal")


def test_numbers_as_classes_keep_their_order(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [(f"film {i}", i % 11) for i in range(44)])
    assert prepare(bert, train=path)[0].labels == [str(i) for i in range(11)]


def test_class_names_of_parquet_files_are_kept(tmp_path: Path, bert: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["film"] * 8, "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "a.parquet"))
    assert prepare(bert, train=tmp_path / "a.parquet")[0].labels == ["no", "yes"]


def test_a_fraction_is_set_aside_with_the_shares_of_the_classes(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [(f"film {i}", "rare" if i % 4 == 0 else "common") for i in range(40)])
    _, rows, _ = prepare(bert, train=path, validation=0.2)
    assert sorted(rows["validation"]["labels"]) == [0] * 6 + [1] * 2
    assert len(rows["train"]) == 32


def test_empty_rows_are_dropped_and_counted(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [*ROWS, ("", "praise"), ("film", ""), ("  ", "blame")])
    _, rows, said = prepare(bert, train=path)
    assert "train: 15 rows read, 12 kept, 3 empty dropped" in said
    assert len(rows["train"]) + len(rows["validation"]) == 12


def test_long_texts_are_cut_and_counted(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [*ROWS, ("good " * 50, "praise")])
    _, rows, said = prepare(bert, train=path, validation=path)
    assert "train: 1 of 13 texts cut to 32 tokens" in said
    assert max(map(len, rows["train"]["input_ids"])) == 32
    _, rows, said = prepare(bert, train=path, validation=path, max_length=5)
    assert max(map(len, rows["train"]["input_ids"])) == 5


def test_more_tokens_than_the_model_can_read_are_refused(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length=33 is more than the 32 tokens"):
        prepare(bert, train=write_csv(tmp_path / "a.csv", ROWS), max_length=33)
    with pytest.raises(ConfigError, match=r"data\.max_length=2 leaves no room for words beside the 2 special tokens"):
        prepare(bert, train=write_csv(tmp_path / "a.csv", ROWS), max_length=2)


def test_files_that_cannot_be_read(tmp_path: Path, bert: Path) -> None:
    good = write_csv(tmp_path / "good.csv", ROWS)
    assert "goood.csv does not exist. Did you mean 'good.csv'?" in refusal(bert, train=tmp_path / "goood.csv")
    assert "is a folder; give a file" in refusal(bert, train=tmp_path)
    assert "is of no known format; known are .csv" in refusal(bert, train=write_csv(tmp_path / "a.xls", ROWS))
    (tmp_path / "empty.csv").touch()
    assert "empty.csv cannot be read: " in refusal(bert, train=tmp_path / "empty.csv")
    assert "header.csv holds no rows." in refusal(bert, train=write_csv(tmp_path / "header.csv", []))
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,a\n".encode("latin-1"))
    assert "it is not UTF-8 (byte 3). Convert it: iconv -f LATIN1" in refusal(bert, train=tmp_path / "latin.csv")
    (tmp_path / "wide.csv").write_bytes("text,label\na,b\n".encode("utf-16"))
    assert "it is not UTF-8 (byte 0). Convert it: iconv -f UTF-16" in refusal(bert, train=tmp_path / "wide.csv")
    (tmp_path / "semicolon.csv").write_text("text;label\na;b\n", encoding="utf-8")
    assert "has one column, 'text;label'. Are ';' what parts them?" in refusal(bert, train=tmp_path / "semicolon.csv")
    (tmp_path / "nested.jsonl").write_text('{"text": ["a", "b"], "label": "c"}\n', encoding="utf-8")
    assert "nested.jsonl, column 'text': A cell holds \"['a', 'b']\"" in refusal(bert, train=tmp_path / "nested.jsonl")
    (tmp_path / "torn.csv").write_text('text,label\n"never closed,a\n', encoding="utf-8")
    assert "torn.csv cannot be read: " in refusal(bert, train=tmp_path / "torn.csv")
    (tmp_path / "torn.jsonl").write_text('{"text": "a", "label"\n', encoding="utf-8")
    assert "torn.jsonl cannot be read: " in refusal(bert, train=tmp_path / "torn.jsonl")
    (tmp_path / "no.parquet").write_text("no parquet", encoding="utf-8")
    assert "no.parquet cannot be read: " in refusal(bert, train=tmp_path / "no.parquet")
    (tmp_path / "no.csv.gz").write_text("not packed", encoding="utf-8")
    assert "no.csv.gz cannot be read: " in refusal(bert, train=tmp_path / "no.csv.gz")
    assert "does not exist" in refusal(bert, train=good, test=tmp_path / "nothing.csv")


def test_columns_that_are_not_there(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS, ("words", "label"))
    assert "which column is the text? It has: words, label. Say so in the recipe" in refusal(bert, train=path)
    said = refusal(bert, train=path, columns={"text": "word"})
    assert said.endswith("has no column 'word' (data.columns.text). It has: words, label.")
    other = write_csv(tmp_path / "other.csv", ROWS)
    said = refusal(bert, train=other, validation=path)
    assert said.endswith("a.csv has no column 'text'. It has: words, label.")


def test_rows_with_nothing_to_learn(tmp_path: Path, bert: Path) -> None:
    one = write_csv(tmp_path / "one.csv", [(text, "same") for text, _ in ROWS])
    assert "one.csv has one class only, 'same'" in refusal(bert, train=one)
    gaps = write_csv(tmp_path / "gaps.csv", [("", "a"), ("b", "")])
    assert "gaps.csv: no row has both text and label." in refusal(bert, train=gaps)
    few = write_csv(tmp_path / "few.csv", ROWS[:1])
    assert "too few to set 0.1 aside" in refusal(bert, train=few)
    strange = write_csv(tmp_path / "strange.csv", [("film", "sideways")])
    good = write_csv(tmp_path / "good.csv", ROWS)
    assert "test: the label 'sideways' is none that was trained on: " in refusal(bert, train=good, test=strange)
    numbers = write_csv(tmp_path / "numbers.csv", [(f"film {i}", i / 7) for i in range(60)])
    assert "labels in" in refusal(bert, train=numbers)


def test_new_modules_are_found(tmp_path: Path, bert: Path) -> None:
    task, _, _ = prepare(bert, train=write_csv(tmp_path / "a.csv", ROWS))
    model, fresh = task.load_model(str(bert), "none")
    assert fresh == ["classifier"]
    assert model.config.id2label == {0: "blame", 1: "praise"}
    model.save_pretrained(tmp_path / "whole")
    assert task.load_model(str(tmp_path / "whole"), "none")[1] == []
    three = TextClassification(task.names, task.reader, task.max_length, ["a", "b", "c"])
    model, fresh = three.load_model(str(tmp_path / "whole"), "none")
    assert (fresh, model.classifier.out_features) == (["classifier"], 3)


def test_a_new_head_of_several_layers_is_one_module(tmp_path: Path, bert: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "roberta")
    task, _, _ = prepare(bert, train=write_csv(tmp_path / "a.csv", ROWS))
    assert task.load_model(str(tmp_path / "roberta"), "none")[1] == ["classifier"]


def test_a_decoder_gets_a_padding_token(tmp_path: Path, bert: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(
        tmp_path / "gpt2"
    )
    task, _, _ = prepare(bert, train=write_csv(tmp_path / "a.csv", ROWS))
    model, fresh = task.load_model(str(tmp_path / "gpt2"), "none")
    assert fresh == ["score"]
    short, long = task.predict(model, ["good"]), task.predict(model, ["good", "the film was not very good"])
    assert short[0]["probabilities"] == pytest.approx(long[0]["probabilities"], abs=1e-6)


def test_metrics_are_the_textbook_s(tmp_path: Path, bert: Path) -> None:
    from transformers import EvalPrediction

    task, rows, _ = prepare(bert, train=write_csv(tmp_path / "a.csv", ROWS), validation=tmp_path / "a.csv")
    truth, guess = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    found = task.metrics(EvalPrediction(torch.eye(2)[guess].numpy(), truth.numpy()), None)
    # F1 of class 0: precision 1, recall 2/3 -> 4/5; of class 1: precision 1/2, recall 1 -> 2/3
    assert found == pytest.approx({"accuracy": 3 / 4, "f1_macro": (4 / 5 + 2 / 3) / 2})
    assert task.baseline(rows["train"], rows["validation"]) == pytest.approx({"accuracy": 1 / 2, "f1_macro": 1 / 3})


def test_models_that_are_not_there(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS)
    for model, message in {
        str(bert) + "x": "There is no model folder .*Did you mean 'tiny-bert'",
        str(tmp_path): "cannot be loaded",
        "nobody/nothing-here": "The model nobody/nothing-here cannot be loaded",
    }.items():
        with pytest.raises(ConfigError, match=message):
            prepare(Path(model), train=path)


def test_pairs_are_asked_in_the_order_they_were_learned(tmp_path: Path, bert: Path) -> None:
    header = ("premise", "second", "label")
    path = write_csv(tmp_path / "a.csv", [("a film", "the meal", "x"), ("the room", "a film", "y")] * 5, header)
    data = Data(train=path, validation=path, columns={"text_pair": "second"})  # named first, read second
    task, rows = TextClassification.from_data(data, str(bert), 0, lambda _: None)
    assert task.reader.decode(rows["train"][0]["input_ids"]) == "[CLS] a film [SEP] the meal [SEP]"
    assert task.inputs(path)[0] == ("a film", "the meal")
    assert task.asked(["a film", "the meal"]) == [("a film", "the meal")]
    with pytest.raises(DataError, match=r"This task reads 2 texts at a time \(text, text_pair\), not 3"):
        task.asked(["a", "b", "c"])
