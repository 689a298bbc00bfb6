"""Photos and texts: questions about photos with ViLT, and captions; what is read, and runs that learn colours."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import EvalPrediction, TrainingArguments

from trimtab import recipe as recipes
from trimtab import run
from trimtab.errors import ConfigError, DataError
from trimtab.objective import Objective
from trimtab.tasks import TASKS, Data
from trimtab.trainer import RunTrainer
from trimtab.training import train

COLOURS = {"blue": (40, 60, 220), "red": (220, 60, 40)}
VOCABULARY = [*WORDS, "blue", "red", "?"]


def tokenizer() -> Any:
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab={word: i for i, word in enumerate(VOCABULARY)}, model_max_length=16)


@pytest.fixture(scope="module")
def vilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny ViLT without a head, with its processor."""
    from transformers import ViltConfig, ViltImageProcessorPil, ViltModel, ViltProcessor

    folder = tmp_path_factory.mktemp("models") / "tiny-vilt"
    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=len(VOCABULARY),
        image_size=32,
        patch_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    ViltModel(config).save_pretrained(folder)
    ViltProcessor(ViltImageProcessorPil(size={"shortest_edge": 32}), tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny ViT whose photos a tiny GPT-2 describes."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, ViTConfig, ViTImageProcessorPil
    from transformers import VisionEncoderDecoderModel as Model

    folder = tmp_path_factory.mktemp("models") / "tiny-captioner"
    torch.manual_seed(0)
    sees = ViTConfig(image_size=16, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                     num_attention_heads=2, initializer_range=0.2)  # fmt: skip
    writes = GPT2Config(vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=2, n_positions=16,
                        add_cross_attention=True, is_decoder=True, initializer_range=0.2, bos_token_id=2,
                        eos_token_id=3, pad_token_id=0)  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(sees, writes)
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 2, 3, 0
    Model(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BLIP, whose start token its tokenizer does not know, as the pretrained one's."""
    from transformers import BlipConfig, BlipForConditionalGeneration, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "tiny-blip"
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "initializer_range": 0.2}
    sees = {**small, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1}
    writes = {**small, "vocab_size": len(VOCABULARY) + 1, "num_hidden_layers": 2, "max_position_embeddings": 32,
              "encoder_hidden_size": 32, "bos_token_id": len(VOCABULARY), "eos_token_id": 2, "sep_token_id": 3,
              "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    config = BlipConfig(text_config=writes, vision_config=sees, projection_dim=32)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def git(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny GIT."""
    from transformers import GitConfig, GitForCausalLM, GitProcessor, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "tiny-git"
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "initializer_range": 0.2}
    sees = {**small, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1}
    config = GitConfig(vision_config=sees, **small, vocab_size=len(VOCABULARY), num_hidden_layers=2,
                       max_position_embeddings=32, bos_token_id=2, eos_token_id=3, pad_token_id=0)  # fmt: skip
    GitForCausalLM(config).save_pretrained(folder)
    GitProcessor(ViTImageProcessorPil(size={"height": 16, "width": 16}), tokenizer()).save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[CLS] {% for part in m['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} ? {% else %}"
    "{{ m['content'][0]['text'] }} [SEP] {% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaVA, which chats about photos: a CLIP sees and a Llama writes."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedTokenizerFast
    from transformers import LlavaForConditionalGeneration as Model
    from transformers import LlavaProcessor as Processor

    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    torch.manual_seed(0)
    words = [*VOCABULARY, "<image>"]
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sees = CLIPVisionConfig(**small, image_size=16, patch_size=8, initializer_range=0.2)
    writes = LlamaConfig(**small, vocab_size=len(words), num_key_value_heads=2, max_position_embeddings=64,
                         initializer_range=0.2, bos_token_id=2, eos_token_id=3, pad_token_id=0)  # fmt: skip
    config = LlavaConfig(
        vision_config=sees, text_config=writes, image_token_index=len(VOCABULARY), pad_token_id=0, eos_token_id=3
    )
    Model(config).save_pretrained(folder)
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = WhitespaceSplit()
    reads = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]",
        model_max_length=64, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    side = {"height": 16, "width": 16}
    Processor(
        CLIPImageProcessorPil(size=side, crop_size=side), reads, patch_size=8, chat_template=CHAT,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def photos(folder: Path, count: int, start: int = 0) -> list[tuple[str, str]]:
    """Files with noise of one colour, written into a folder, and their colours."""
    folder.mkdir(exist_ok=True)
    found = []
    for i in range(start, start + count):
        colour = ("blue", "red")[i % 2]
        noise = np.random.default_rng(i).normal(0, 30, (32, 32 + 8 * (i % 3), 3))
        Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        found.append((f"{folder.name}/{i}.png", colour))
    return found


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(folder: Path, count: int, start: int = 0) -> list[dict[str, Any]]:
    """Is it blue, and is it red? Neither the photo nor the question tells the answer alone."""
    return [
        {"image": file, "question": f"is the film {asked} ?", "answer": "yes" if asked == colour else "no"}
        for file, colour in photos(folder, count, start)
        for asked in COLOURS
    ]


def prepare(task: str, model: Path, **data: Any) -> tuple[Any, dict[str, Any], list[str]]:
    said: list[str] = []
    found, rows = TASKS[task].from_data(Data(**data), str(model), 0, lambda line: said.append(str(line)))
    return found, rows, said


def recipe(folder: Path, **settings: Any) -> recipes.Recipe:
    (folder / "recipe.yaml").write_text(json.dumps({**settings, "output": "run"}), encoding="utf-8")
    return recipes.read(folder / "recipe.yaml")


# Questions


def test_photo_and_question_are_read_as_the_model_s_own_processor_reads_them(tmp_path: Path, vilt: Path) -> None:
    from transformers import ViltProcessor

    path = lines(tmp_path / "a.jsonl", questions(tmp_path / "p", 4))
    task, rows, said = prepare("visual-question-answering", vilt, train=path, validation=path)
    assert said[0].startswith("Columns guessed: image is the file, question is the text, answer is the label")
    assert [text for text, _ in task.show(rows["train"][1])][1:] == ["is the film red ?", "no"]
    batch = task.collate([rows["train"][i] for i in range(4)])
    images = [Image.open(tmp_path / "p" / f"{i // 2}.png") for i in range(4)]
    own = ViltProcessor.from_pretrained(vilt, backend="pil")
    expected = own(images, rows["train"]["text"][:4], padding=True, return_tensors="pt")
    assert batch.keys() == expected.keys() | {"labels"}
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    assert batch["labels"].tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]
    short, _, said = prepare("visual-question-answering", vilt, train=path, validation=path, max_length=5)
    assert "train: 8 of 8 texts cut to 5 tokens" in said
    assert short.collate([rows["train"][0]])["input_ids"].shape == (1, 5)


def test_scores_of_answers(tmp_path: Path, vilt: Path) -> None:
    path = lines(tmp_path / "a.jsonl", questions(tmp_path / "p", 2))
    task, rows, _ = prepare("visual-question-answering", vilt, train=path, validation=path)
    logits = np.array([[0, 1], [1, 0], [0, 1], [0, 1]])  # the truth is yes, no, no, yes
    found = task.metrics(EvalPrediction(logits, None), rows["validation"])
    assert found == pytest.approx({"accuracy": 3 / 4, "f1_macro": (4 / 5 + 2 / 3) / 2})
    assert task.baseline(rows["train"], rows["validation"])["accuracy"] == 0.5


def test_a_run_learns_to_answer(tmp_path: Path, vilt: Path) -> None:
    lines(tmp_path / "a.jsonl", questions(tmp_path / "p", 12))
    lines(tmp_path / "b.jsonl", questions(tmp_path / "q", 4, start=12))
    method = {"name": "lora", "r": 8, "target_modules": "all-linear"}
    settings = recipe(tmp_path, task="visual-question-answering", model=str(vilt), method=method,
                      data={"train": "a.jsonl", "validation": "b.jsonl"},
                      training={"epochs": 30, "batch_size": 8, "learning_rate": 0.01})  # fmt: skip
    result = train(settings, lambda _: None)
    assert result.metrics["validation"]["accuracy"] == 1
    assert result.metrics["majority"]["validation"]["accuracy"] == 0.5
    found = run.load(result.folder)
    asked = found.task.asked([str(tmp_path / "q" / "12.png"), "is the film blue ?"] * 2)
    answers = found.task.predict(found.model, asked)
    assert [answer["label"] for answer in answers] == ["yes", "yes"]
    assert found.task.title(asked[0]) == (str(tmp_path / "q" / "12.png"), "is the film blue ?")
    given = found.task.inputs(tmp_path / "b.jsonl")
    assert given[1] == (str(tmp_path / "q" / "12.png"), "is the film red ?")
    assert [answer["label"] for answer in found.task.predict(found.model, given)][:2] == ["yes", "no"]
    with pytest.raises(DataError, match=r"reads 2 things at a time \(file, text\), not 1"):
        found.task.asked(["a.png"])
    assert run.merge(result.folder, tmp_path / "merged") < 1e-4


def test_a_model_that_writes_answers_has_no_classes(tmp_path: Path, bert: Path) -> None:
    path = lines(tmp_path / "a.jsonl", questions(tmp_path / "p", 2))
    with pytest.raises(ConfigError, match="is a bert model, which has no class for each answer"):
        prepare("visual-question-answering", bert, train=path, validation=path)


# Captions


def captions(folder: Path, count: int, start: int = 0) -> list[dict[str, Any]]:
    texts = {"blue": "a very blue room", "red": "the film is red"}
    return [{"image": file, "caption": texts[colour]} for file, colour in photos(folder, count, start)]


def test_the_loss_is_that_of_the_caption_and_its_end(tmp_path: Path, captioner: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [*captions(tmp_path / "p", 2), {"image": "p/0.png", "caption": "blue"}])
    task, rows, _ = prepare("image-to-text", captioner, train=path, validation=path)
    assert [task.show(row)[1] for row in rows["train"]] == [
        ("a very blue room [SEP]", True), ("the film is red [SEP]", True), ("blue [SEP]", True)
    ]  # fmt: skip
    batch = task.collate([rows["train"][i] for i in range(3)])
    assert batch["labels"][2].tolist() == [VOCABULARY.index("blue"), 3, -100, -100, -100]
    model, fresh = task.load_model(str(captioner), "none")
    assert fresh == []
    losses = []
    for i in range(3):
        ids = torch.tensor([rows["train"][i]["labels"]])
        pixels = batch["pixel_values"][i : i + 1]
        before = torch.cat([torch.tensor([[2]]), ids[:, :-1]], 1)
        likely = model.eval()(pixel_values=pixels, decoder_input_ids=before).logits.log_softmax(-1)
        losses += (-likely[0].gather(1, ids[0][:, None])).flatten().tolist()
    assert model(**batch).loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    task.reader.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    assert task.labels("blue") == batch["labels"][2, :2].tolist()  # GPT-2's does not end its texts
    with pytest.raises(ConfigError, match=r"data\.prefix is of no use: .* is asked nothing beside the photo"):
        prepare("image-to-text", captioner, train=path, validation=path, prefix="what is it ?")
    _, rows, said = prepare("image-to-text", captioner, train=path, validation=path, max_length=3)
    assert "train: 2 of 3 texts cut to 3 tokens" in said
    assert max(map(len, rows["train"]["labels"])) == 3


@pytest.mark.parametrize("name", ["blip", "git", "llava"])
def test_the_loss_of_one_sequence_is_that_of_the_caption(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Also where the recipe has an objective of its own."""
    folder = request.getfixturevalue(name)
    path = lines(tmp_path / "a.jsonl", [*captions(tmp_path / "p", 2), {"image": "p/0.png", "caption": "blue"}])
    prefix = {"prefix": "what is the room"} if name == "llava" else {}
    task, rows, _ = prepare("image-to-text", folder, train=path, validation=path, **prefix)
    shown = task.show(rows["train"][2])
    assert shown[-1] == ("blue [SEP]", True)
    assert shown[1:-1] == ([("[CLS] <image> what is the room ? ", False)] if name == "llava" else [])
    batch = task.collate([rows["train"][i] for i in range(3)])
    model, fresh = task.load_model(str(folder), "none")
    assert fresh == []
    start = {"blip": [len(VOCABULARY)], "git": [2]}.get(name)
    if start is None:  # five tokens of the photo, of which the first is not used
        start = [2, *[len(VOCABULARY)] * 4, *map(VOCABULARY.index, ["[UNK]", "is", "the", "room", "?"])]
    losses = []
    for i in range(3):
        caption = rows["train"][i]["labels"]
        alone = torch.tensor([start + caption])
        logits = model.eval()(pixel_values=batch["pixel_values"][i : i + 1], input_ids=alone).logits
        likely = logits[0, -len(caption) - 1 : -1].log_softmax(-1)
        losses += (-likely[range(len(caption)), caption]).tolist()
    assert model(**batch).loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    settings = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = RunTrainer(tmp_path, task.metrics, Objective(), model=model, args=settings)
    assert trainer.compute_loss(model.eval(), batch).item() == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("name", ["captioner", "blip", "git", "llava"])
def test_a_run_learns_to_describe(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lines(tmp_path / "a.jsonl", captions(tmp_path / "p", 16))
    lines(tmp_path / "b.jsonl", captions(tmp_path / "q", 4, start=16))
    method = {"name": "lora", "r": 8, "target_modules": "all-linear"}
    settings = recipe(tmp_path, task="image-to-text", model=str(request.getfixturevalue(name)), method=method,
                      data={"train": "a.jsonl", "validation": "b.jsonl"},
                      training={"epochs": 15, "batch_size": 8, "learning_rate": 0.02,
                                "generation_max_length": 6})  # fmt: skip
    result = train(settings, lambda _: None)
    assert result.metrics["untrained"]["validation"]["chrf"] < 50
    assert result.metrics["validation"]["chrf"] == pytest.approx(100)
    found = run.load(result.folder)
    paths = [str(tmp_path / "q" / "16.png"), str(tmp_path / "q" / "17.png")]
    texts = [{"text": "a very blue room"}, {"text": "the film is red"}]
    assert found.task.predict(found.model, found.task.asked(paths)) == texts
    assert found.task.predict(found.model, found.task.inputs(tmp_path / "b.jsonl"))[:2] == texts
    assert run.merge(result.folder, tmp_path / "merged") < 1e-4


def test_what_writes_no_captions(tmp_path: Path, bert: Path, captioner: Path, llava: Path) -> None:
    path = lines(tmp_path / "a.jsonl", captions(tmp_path / "p", 2))
    with pytest.raises(ConfigError, match="is a bert model, which does not write of photos"):
        prepare("image-to-text", bert, train=path, validation=path)
    mute = shutil.copytree(llava, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="is a llava model, and its processor has no chat template"):
        prepare("image-to-text", mute, train=path, validation=path)
    settings = recipe(
        tmp_path, task="image-to-text", model=str(captioner), data={"train": "a.jsonl", "validation": 0.5}
    )
    with pytest.raises(ConfigError, match=r"writes up to 16 tokens; training\.generation_max_length is 128"):
        train(settings, lambda _: None)
