"""Tasks over recordings: how they are heard, what is learned, scores, and runs that tell tones from each other."""

import io
import string
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import write_csv

from trimtab import recipe as recipes
from trimtab import run
from trimtab.errors import ConfigError, DataError
from trimtab.tasks import Data
from trimtab.tasks.audio_classification import AudioClassification
from trimtab.tasks.automatic_speech_recognition import SpeechRecognition
from trimtab.training import train

RATE = 16000
TONES = {"high": 3000.0, "low": 200.0}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Whisper that hears one second, with a processor whose tokens are letters."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("models") / "tiny-whisper"
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"]
    letters = [*string.ascii_lowercase, "\u0120"]  # the last is a space; what follows <|notimestamps|> are times
    vocabulary = {token: i for i, token in enumerate([*letters, *special])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special[1:])
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": 27, "eos_token_id": 27, "pad_token_id": 27, "decoder_start_token_id": 28}
    config = WhisperConfig(
        vocab_size=len(vocabulary),
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=50,
        max_target_positions=12,
        init_std=0.4,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **ends,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_length=12, is_multilingual=False, return_timestamps=False, no_timestamps_token_id=30, **ends
    )
    model.half().save_pretrained(folder)  # as the published ones are
    return folder


def recording(tone: float, seconds: float = 0.5, rate: int = RATE, kind: str = "wav", channels: int = 1) -> bytes:
    samples = 0.4 * np.sin(2 * np.pi * tone * np.arange(int(seconds * rate)) / rate)
    into = io.BytesIO()
    soundfile.write(into, np.stack([samples] * channels, 1), rate, format=kind)
    return into.getvalue()


def dataset(folder: Path, count: int) -> Path:
    """A .zip of tones, a table of them beside it."""
    rows = [(f"{i}.wav", list(TONES)[i % 2]) for i in range(count)]
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for i, (name, label) in enumerate(rows):
            archive.writestr(name, recording(TONES[label] * (1 + 0.01 * i), rate=(8000, 16000, 22050)[i % 3]))
    write_csv(folder / "labels.csv", rows, ("file", "label"))
    return folder / "train.zip"


def heard(whisper: Path, content: bytes) -> Any:
    return AudioClassification({}, AudioClassification.load_reader(str(whisper)), []).decoded(content)


def test_recordings_are_heard_at_the_model_s_rate(whisper: Path) -> None:
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(8000) / RATE)
    for content in (
        recording(440),
        recording(440, rate=8000),
        recording(440, rate=44100, kind="flac"),
        recording(440, rate=8000, channels=2),
    ):
        samples = heard(whisper, content)
        assert samples.dtype == np.float32
        assert samples.shape == (8000,)
        assert np.abs(samples - expected)[500:-500].max() < 2e-3  # at the ends a resampler hears silence beyond
    loud = io.BytesIO()
    soundfile.write(loud, np.array([[0.5, -0.25]] * 100), RATE, format="wav")
    assert np.allclose(heard(whisper, loud.getvalue()), 0.125)
    spectrum = np.abs(np.fft.rfft(heard(whisper, recording(440, kind="mp3"))))
    assert abs(np.fft.rfftfreq(len(heard(whisper, recording(440, kind="mp3"))), 1 / RATE)[spectrum.argmax()] - 440) < 3


def test_recordings_that_cannot_be_heard(whisper: Path) -> None:
    silence, broken = io.BytesIO(), io.BytesIO()
    soundfile.write(silence, np.zeros((0, 1)), RATE, format="wav")
    soundfile.write(broken, np.array([0.0, np.nan]), RATE, format="wav", subtype="FLOAT")
    fast = bytearray(recording(440))
    fast[24:28] = (2**31 - 1).to_bytes(4, "little")  # where a WAV file has its rate
    for content, message in [
        (b"no recording", "is no recording that can be read: Format not recognised"),
        (recording(440)[:-100], "is cut off: it is shorter than it says"),
        (bytes(fast), "says that it has 2147483647 samples a second: it is damaged"),
        (silence.getvalue(), "holds no samples"),
        (broken.getvalue(), "holds samples that are no numbers"),
    ]:
        with pytest.raises(DataError, match=message):
            heard(whisper, content)
    whole = recording(440)
    for size in (len(whole), 0x7FFFF024, 2**32 - 1):  # with the header's 8 bytes; from SoX, and others, by a pipe
        said = whole[:4] + size.to_bytes(4, "little") + whole[8:]
        assert np.array_equal(heard(whisper, said), heard(whisper, whole))


def test_a_feature_extractor_without_a_limit_pads_a_batch(tmp_path: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path)
    task = AudioClassification({}, Wav2Vec2FeatureExtractor.from_pretrained(tmp_path), [])
    assert task.longest() is None
    batch = task.features([np.ones(5, np.float32), np.ones(3, np.float32)])
    assert batch["input_values"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 3 + [0] * 2]


def test_what_is_too_long(tmp_path: Path, whisper: Path) -> None:
    for i, seconds in enumerate((0.5, 0.5, 1.5, 0.5)):
        (tmp_path / f"{i}.wav").write_bytes(recording(400, seconds))
    rows = [("0.wav", "high"), ("1.wav", "low"), ("2.wav", "low"), ("3.wav", "high and low and high")]
    path = write_csv(tmp_path / "a.csv", rows, ("file", "label"))
    said: list[str] = []
    data = Data(train=path, validation=path)
    _, found = SpeechRecognition.from_data(data, str(whisper), 0, lambda line: said.append(str(line)))
    assert len(found["train"]) == 2
    assert "train: 1 rows dropped, whose recordings are longer than 1 seconds" in said
    assert "train: 1 rows dropped, whose texts are longer than 12 tokens" in said
    write_csv(path, rows[:3], ("file", "label"))
    _, found = AudioClassification.from_data(data, str(whisper), 0, lambda line: said.append(str(line)))
    assert len(found["train"]) == 3
    assert "train: 1 of 3 recordings cut to 1 seconds" in said


def test_the_text_is_learned_from_its_first_token_to_its_end(tmp_path: Path, whisper: Path) -> None:
    path = dataset(tmp_path, 4)
    task, rows = SpeechRecognition.from_data(Data(train=path, validation=path), str(whisper), 0, lambda _: None)
    assert task.show(rows["train"][0]) == [("0.wav (0.5 s)", False), ("<|notimestamps|>high<|endoftext|>", True)]
    batch = task.collate([rows["train"][0], rows["train"][1]])
    assert batch["input_features"].shape == (2, 8, 100)
    assert batch["labels"][1].tolist() == [*rows["train"][1]["labels"], -100]


def test_errors_of_words_and_characters(tmp_path: Path, whisper: Path) -> None:
    from transformers import EvalPrediction

    path = dataset(tmp_path, 4)
    task, _ = SpeechRecognition.from_data(Data(train=path, validation=path), str(whisper), 0, lambda _: None)
    wanted, written = ["one two three", "four"], ["one too three", "four five"]
    ids = [task.tokenizer(text).input_ids for text in written]
    width = max(map(len, ids))
    predicted = np.array([row + [-100] * (width - len(row)) for row in ids])
    found = task.metrics(
        EvalPrediction(predicted, None), {"labels": [task.tokenizer(text).input_ids for text in wanted]}
    )
    # A word replaced and one put in, of 4; a letter replaced and " five" put in, of 17 characters.
    assert found == pytest.approx({"wer": 2 / 4, "cer": 6 / 17})


def test_a_model_that_does_not_write_is_refused(tmp_path: Path, bert: Path) -> None:
    path = dataset(tmp_path, 4)
    with pytest.raises(ConfigError, match="is a bert model, which does not write text"):
        SpeechRecognition.from_data(Data(train=path, validation=path), str(bert), 0, lambda _: None)


RECIPE = """
task: {task}
model: {model}
data: {{train: train.zip, validation: 0.25}}
method: {{name: lora, r: 8, target_modules: all-linear}}
training: {{epochs: {epochs}, batch_size: 6, learning_rate: {rate}}}
output: run
"""


def test_a_run_learns_to_tell_tones(tmp_path: Path, whisper: Path) -> None:
    dataset(tmp_path, 24)
    text = RECIPE.format(task="audio-classification", model=whisper, epochs=3, rate=0.003)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    result = train(recipes.read(tmp_path / "recipe.yaml"), lambda _: None)
    assert result.metrics["validation"]["accuracy"] == 1
    found = run.load(result.folder)
    (tmp_path / "tone.flac").write_bytes(recording(3100, kind="flac"))
    [answer] = found.task.predict(found.model, found.task.asked([str(tmp_path / "tone.flac")]))
    assert answer["label"] == "high"


def test_a_run_learns_to_write(tmp_path: Path, whisper: Path) -> None:
    dataset(tmp_path, 24)
    text = RECIPE.format(task="automatic-speech-recognition", model=whisper, epochs=30, rate=0.04)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    settings = recipes.read(tmp_path / "recipe.yaml", ["training.generation_max_length=12"])
    result = train(settings, lambda _: None)
    assert result.metrics["untrained"]["validation"]["wer"] >= 1
    assert result.metrics["validation"]["wer"] == result.metrics["validation"]["cer"] == 0
    merged = tmp_path / "merged"
    assert run.merge(result.folder, merged) < 1e-4
    found = run.load(result.folder)
    (tmp_path / "tone.wav").write_bytes(recording(3100))
    assert found.task.predict(found.model, [str(tmp_path / "tone.wav")]) == [{"text": "high"}]


def test_smoothed_labels_have_the_same_decoder_inputs(tmp_path: Path, whisper: Path) -> None:
    """As the model makes them of labels: the logits are the same."""
    from trimtab.trainer import _decoder_inputs

    path = dataset(tmp_path, 4)
    task, rows = SpeechRecognition.from_data(Data(train=path, validation=path), str(whisper), 0, lambda _: None)
    model, _ = task.load_model(str(whisper), "none")
    batch = task.collate([rows["train"][i] for i in range(4)])
    batch["labels"][0, -1] = -100
    own = model.eval()(**batch).logits
    ids = _decoder_inputs(model, batch.pop("labels"))
    assert torch.equal(model(**batch, decoder_input_ids=ids).logits, own)
