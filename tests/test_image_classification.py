"""Image classification: how photos and their labels are found, and runs that learn colours, with ViT and ResNet."""

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trimtab import recipe as recipes
from trimtab import run
from trimtab.cli import main
from trimtab.errors import DataError
from trimtab.tasks import Data
from trimtab.tasks.image_classification import ImageClassification
from trimtab.training import train

COLOURS = {"blue": (40, 60, 220), "red": (220, 60, 40)}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny ViT without a head, with its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny ResNet whose norms have seen other images than these."""
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "tiny-resnet"
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    for name, statistics in model.named_buffers():
        if name.endswith("running_mean"):
            statistics.normal_()
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def photo(colour: str, i: int) -> Image.Image:
    """The i-th of an endless series of photos of one colour, with noise."""
    noise = np.random.default_rng(i).normal(0, 30, (10, 12, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def packed(image: Image.Image, kind: str = "png") -> bytes:
    into = io.BytesIO()
    image.save(into, kind)
    return into.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def unpack(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def photos(count: int, start: int = 0, top: str = "") -> dict[str, bytes]:
    """In a folder for each colour."""
    kinds = {"png": "png", "JPG": "jpeg"}
    return {
        f"{top}{colour}/{start + i:03}.{end}": packed(photo(colour, start + i), kinds[end])
        for i in range(count)
        for colour in COLOURS
        for end in [("png", "JPG")[i % 2]]
    }


def table(rows: list[tuple[Any, ...]]) -> bytes:
    into = io.StringIO()
    csv.writer(into).writerows(rows)
    return into.getvalue().encode()


def prepare(model: Path, **data: Any) -> tuple[ImageClassification, dict[str, Any], list[str]]:
    said: list[str] = []
    task, rows = ImageClassification.from_data(Data(**data), str(model), 0, lambda line: said.append(str(line)))
    return task, rows, said


def found(model: Path, path: Path, **data: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Names and labels of the rows in `path`, and what was said."""
    task, rows, said = prepare(model, train=path, validation=path, **data)
    pairs = [(task.show(row)[0][0].rpartition("/")[2], task.labels[row["labels"]]) for row in rows["train"]]
    return sorted(pairs), said


def refusal(model: Path, path: Path, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(model, train=path, **data)
    return str(caught.value)


EXPECTED = [("000.png", "blue"), ("000.png", "red"), ("001.JPG", "blue"), ("001.JPG", "red")]


@pytest.mark.parametrize("top", ["", "all/photos/"])
def test_folders_are_classes(tmp_path: Path, vit: Path, top: str) -> None:
    files = photos(2, top=top)
    extra = {f"{top}notes.txt": b"", "__MACOSX/red/._000.png": b"no image", f"{top}red/.hidden.png": b"no image"}
    for path in (pack(tmp_path / "a.zip", files | extra), unpack(tmp_path / "b", files | extra)):
        pairs, said = found(vit, path)
        assert pairs == EXPECTED
        assert said[:2] == [
            f"train: 1 other files in {path.name} left out, such as {top}notes.txt",
            f"train: labels are the folders that the 4 files in {path.name} lie in",
        ]


def test_a_table_inside_or_beside_names_the_files(tmp_path: Path, vit: Path) -> None:
    files = {name.replace("/", "-"): content for name, content in photos(2).items()}
    rows = [("nr", "picture", "class"), *((i, name, name.split("-")[0]) for i, name in enumerate(files))]
    columns = {"file": "picture"}
    expected = [(name, name.split("-")[0]) for name in sorted(files)]
    inside = pack(tmp_path / "a.zip", files | {"meta/labels.csv": table(rows)})
    pairs, said = found(vit, inside, columns=columns)
    assert pairs == expected
    assert said[0] == "train: 4 of 4 files in a.zip are named by picture in meta/labels.csv"
    assert said[2] == "Columns guessed: class is the label (data.columns changes this)"
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "labels.csv").write_bytes(table(rows))
    (beside / "broken.json").write_text("no json")
    pairs, said = found(vit, unpack(beside / "photos", files), columns=columns)
    assert pairs == expected
    assert said[0].startswith("train: not looked for labels in broken.json: ")
    other = [("p/blue-000.png", "red"), ("red-000", "blue"), ("gone.png", "red")]
    (beside / "photos.csv").write_bytes(table([("picture", "label"), *other]))
    pairs, said = found(vit, beside / "photos", columns=columns)  # of the folder's name, so the other is not asked
    assert pairs == [("blue-000.png", "red"), ("red-000.png", "blue")]
    assert "train: 1 rows of photos.csv name no file in photos: gone.png, ..." in said


def test_the_rows_of_a_split_are_those_of_its_file(tmp_path: Path, vit: Path) -> None:
    """Files of the same name in two splits, with other labels."""
    rows = [("split", "file", "label"), ("train", "1.png", "red"), ("train", "2.png", "blue"), ("dev", "1.png", "blue")]
    (tmp_path / "labels.csv").write_bytes(table(rows))
    first = pack(tmp_path / "train.zip", {f"{i}.png": packed(photo("red", i)) for i in (1, 2, 3)})
    second = pack(tmp_path / "dev.zip", {"1.png": packed(photo("red", 4))})
    task, encoded, said = prepare(vit, train=first, validation=second)
    assert [(row["file"].split("::")[0], task.labels[row["labels"]]) for row in encoded["train"]] == [
        ("zip://1.png", "red"),
        ("zip://2.png", "blue"),
    ]
    assert [task.labels[row["labels"]] for row in encoded["validation"]] == ["blue"]
    assert said[0] == "train: 2 of 3 files in train.zip are named by file in labels.csv, of the rows with split train"
    assert refusal(vit, first.rename(tmp_path / "x.zip")) == (
        "labels.csv names 1.png in x.zip twice, in row 1 and in row 3."
    )


def test_a_table_given_itself(tmp_path: Path, vit: Path) -> None:
    import datasets

    unpack(tmp_path / "p", photos(2))
    rows = [(f"p/{name}", name.split("/")[0]) for name in photos(2)]
    (tmp_path / "a.csv").write_bytes(table([("image", "label"), *rows]))
    assert found(vit, tmp_path / "a.csv")[0] == EXPECTED
    (tmp_path / "b.csv").write_bytes(table([("image", "label"), *rows, ("p/red/9.png", "red")]))
    assert "names p/red/9.png, but there is no file" in refusal(vit, tmp_path / "b.csv")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["blue", "red"])})
    held = [{"bytes": content, "path": None} for content in photos(2).values()]
    made = datasets.Dataset.from_dict({"image": held, "label": [label for _, label in rows]}, features=features)
    made.to_parquet(tmp_path / "c.parquet")
    task, encoded, _ = prepare(vit, train=tmp_path / "c.parquet", validation=tmp_path / "c.parquet")
    assert [task.labels[row["labels"]] for row in encoded["train"]] == [label for _, label in rows]
    assert [row["file"] for row in encoded["train"]] == list(photos(2).values())
    given = task.inputs(tmp_path / "c.parquet")
    assert task.title(given[0]) == f"a file of {len(given[0])} bytes"


def test_what_is_refused(tmp_path: Path, vit: Path) -> None:
    red = packed(photo("red", 0))
    for name in ("../red/1.png", "/red/1.png", "C:\\red\\1.png"):
        message = refusal(vit, pack(tmp_path / "a.zip", {name: red}))
        assert f"{name!r}, which leads out of it" in message
    assert "nothing says what its 2 files are" in refusal(vit, pack(tmp_path / "b.zip", {"1.png": red, "2.png": red}))
    assert "holds no files that end in .bmp" in refusal(vit, pack(tmp_path / "c.zip", {"1.txt": red}))
    (tmp_path / "d.zip").write_bytes(b"no zip")
    assert "d.zip cannot be read: File is not a zip file" in refusal(vit, tmp_path / "d.zip")
    assert "does not exist. Did you mean 'd.zip'?" in refusal(vit, tmp_path / "dd.zip")
    broken = {"red/1.png": red, "blue/1.png": red[:60]}
    path = pack(tmp_path / "e.zip", broken)
    assert "blue/1.png is no image that can be read" in refusal(vit, path, validation=path)
    odd = pack(tmp_path / "odd.zip", {"red/1.png": red, "blue/1.png": b"no image"})
    assert "blue/1.png is no image of a known format." in refusal(vit, odd, validation=odd)
    deep = packed(Image.fromarray(np.zeros((4, 4), np.uint16)))
    path = pack(tmp_path / "f.zip", {"red/1.png": red, "blue/1.png": deep})
    assert "has more than 8 bits a channel" in refusal(vit, path, validation=path)


def test_photos_are_as_the_camera_held_them(vit: Path) -> None:
    task = ImageClassification({}, ImageClassification.load_reader(str(vit)), [])
    upright = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # it was turned a quarter to the left
    into = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(into, "png", exif=exif)
    assert np.array_equal(np.array(task.decoded(into.getvalue())), np.array(upright))
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 255)).convert("P")
    assert task.decoded(packed(clear)).mode == "RGB"
    task.reader.image_mean = [0.5]
    assert task.decoded(packed(clear)).mode == "L"


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--json", *arguments])
    assert ended.value.code == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


RECIPE = """
task: image-classification
model: {model}
data: {{train: train.zip, validation: 0.25, test: test}}
method: {{name: lora, r: 4, target_modules: {targets}}}
training: {{epochs: 6, batch_size: 8, learning_rate: 0.01}}
output: run
"""


@pytest.mark.parametrize(("name", "targets"), [("vit", "[q_proj, v_proj]"), ("resnet", "[convolution]")])
def test_a_run_learns_colours(
    tmp_path: Path, name: str, targets: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path / "train.zip", photos(12))
    unpack(tmp_path / "test", photos(4, start=12))
    model = request.getfixturevalue(name)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=model, targets=targets), encoding="utf-8")
    said: list[str] = []
    shorter = ["training.epochs=2"] if name == "resnet" else []  # after more the loss is exactly 0
    result = train(recipes.read(tmp_path / "recipe.yaml", shorter), lambda line: said.append(str(line)))
    assert result.metrics["test"]["accuracy"] == 1
    assert result.metrics["majority"]["test"]["accuracy"] == 0.5
    assert any(line.startswith("Example 1, what is learned in brackets: ") and "[blue]" in line for line in said)
    saved = json.loads((result.folder / "task.json").read_text(encoding="utf-8"))
    assert saved == {"names": {"file": "file", "label": "label"}, "labels": ["blue", "red"]}
    paths = [str(tmp_path / "test" / label / "012.png") for label in COLOURS]
    answers = predicted(capsys, str(result.folder), *paths)
    assert [answer["label"] for answer in answers] == list(COLOURS)
    assert [answer["input"] for answer in answers] == paths
    answers = predicted(capsys, str(result.folder), "--file", str(tmp_path / "train.zip"))
    assert [answer["input"].split("/")[0] for answer in answers] == [answer["label"] for answer in answers]
    task = run.load(result.folder).task
    with pytest.raises(DataError, match=r"012\.pgn does not exist\. Did you mean '012\.png'\?"):
        task.asked([str(tmp_path / "test" / "red" / "012.pgn")])
    with pytest.raises(DataError, match="is a folder: give it with --file"):
        task.asked([str(tmp_path / "test")])
