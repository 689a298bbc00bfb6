"""Several recipes at once: each must come to what it comes to alone, whatever the others are and whatever they do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import review, trimtab, write_csv
from safetensors.torch import load_file
from test_text2text_generation import built
from torch import Tensor

from trimtab import causal_loss, files, many, record
from trimtab import recipe as recipes
from trimtab.errors import ConfigError, TrainingError
from trimtab.many import train_many
from trimtab.recipe import Recipe
from trimtab.training import train

# MiniLM's, or any BERT's, own dropout is 0.1 and acts in training: its numbers are each job's own, too.
DIFFERENT = {
    "a": ["method.lora_dropout=0.1"],
    "b": ["method.r=5", "training.learning_rate=0.02", "training.seed=4", "training.lr_scheduler_type=cosine"],
    "c": ["method={name: ia3}", "training.batch_size=4", "training.seed=1"],
    "d": ["method={name: bottleneck, reduction_factor: 8, dropout: 0.2}", "training.gradient_accumulation_steps=2"],
    "e": ["method={name: lora, r: 2, use_dora: true}", "training.epochs=1"],
    "f": ["method={name: prompt_tuning, num_virtual_tokens: 3}"],
    "g": ["method={name: prefix_tuning, num_virtual_tokens: 3}"],
    "h": ["method={name: adalora, target_r: 2, init_r: 3, tinit: 1, tfinal: 1, deltaT: 1}"],
}


def silent(line: Any) -> None:
    pass


@pytest.fixture
def folder(recipe: Path) -> Path:
    """A recipe of texts of different lengths, so that batches of different jobs are padded to different lengths."""
    long = [
        (f"{text}{' very' * (i % 7)} {text}"[: 40 + 9 * i], label)
        for i, (text, label) in enumerate(map(review, range(24)))
    ]
    write_csv(recipe.parent / "train.csv", long)
    return recipe.parent


def read(folder: Path, name: str, *overrides: str) -> Recipe:
    return recipes.read(folder / "recipe.yaml", [*overrides, f"output={folder / name}"])


def weights(recipe: Recipe) -> dict[str, Tensor]:
    return load_file(recipe.output / files.WEIGHTS)


def losses(recipe: Recipe) -> list[float]:
    return [line["loss"] for line in record.read(recipe.output / record.HISTORY) if "loss" in line]


def test_each_job_comes_to_what_it_comes_to_alone(folder: Path) -> None:
    alone = {name: read(folder, f"alone-{name}", *own) for name, own in DIFFERENT.items()}
    together = {name: read(folder, name, *own) for name, own in DIFFERENT.items()}
    for recipe in alone.values():
        train(recipe, silent)
    ranking = train_many(list(together.values()), silent)
    assert [one.error for one in ranking.outcomes] == [None] * len(DIFFERENT)
    assert ranking.shared > 0.6  # the two with virtual tokens give their embeddings and a cache, which none else does
    for name, recipe in alone.items():
        torch.testing.assert_close(weights(together[name]), weights(recipe), rtol=1e-5, atol=1e-5)
        assert losses(together[name]) == pytest.approx(losses(recipe), rel=1e-5), name
        found = [json.loads((one.output / "metrics.json").read_text()) for one in (recipe, together[name])]
        assert found[0]["steps"] == found[1]["steps"]
        for split in ("validation", "test"):
            assert found[1][split] == pytest.approx(found[0][split], rel=1e-4), name


def test_at_equal_shapes_the_bits_are_those_of_a_job_alone(folder: Path) -> None:
    write_csv(folder / "train.csv", [review(i) for i in range(24)])  # all of one length
    settings = {"a": ["method.lora_dropout=0.1"], "b": ["method.r=2", "training.seed=4"], "c": ["training.seed=2"]}
    alone = [read(folder, f"alone-{name}", *own) for name, own in settings.items()]
    for recipe in alone:
        train_many([recipe], silent)
    together = [read(folder, name, *own) for name, own in settings.items()]
    train_many(together, silent)
    for one, other in zip(alone, together, strict=True):
        mine, its = weights(one), weights(other)
        assert all(torch.equal(mine[key], its[key]) for key in mine)
        assert losses(one) == losses(other)


@pytest.mark.parametrize("chunk", [2**23, 64])  # logits that are made at a time: all are few enough, or none
def test_a_causal_model_with_checkpointed_layers(
    folder: Path, llama: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_loss, "CHUNK", chunk)
    write_csv(
        folder / "train.csv", [(review(i)[0] + " very" * (i % 4), "yes") for i in range(24)], ("prompt", "response")
    )
    own = [f"model={llama}", "task=text-generation", "data={train: train.csv}", "method.target_modules=all-linear"]
    own += ["training.activation_checkpointing=true", "training.epochs=1"]
    varied = {"a": ["method.lora_dropout=0.2"], "b": ["method.r=3", "training.batch_size=4"]}
    alone = [read(folder, f"alone-{name}", *own, *more) for name, more in varied.items()]
    together = [read(folder, name, *own, *more) for name, more in varied.items()]
    for recipe in alone:
        train(recipe, silent)
    assert train_many(together, silent).shared > 0.5
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(weights(other), weights(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder(folder: Path, tmp_path: Path, kind: str) -> None:
    words = "film meal room good bad fine".split()
    rows = [(" ".join(words[: 1 + i % 5]), " ".join(["Film", "gut", "Raum", "Essen"][: 1 + i % 4])) for i in range(24)]
    write_csv(folder / "train.csv", rows, ("source", "target"))
    own = [f"model={built(tmp_path / kind, kind)}", "task=text2text-generation", "data={train: train.csv}"]
    own += ["training.epochs=1", "training.generation_max_length=4"]
    varied = {
        "a": ["method={name: lora, r: 2, lora_dropout: 0.1, target_modules: all-linear}", "training.batch_size=3"],
        "b": ["method={name: bottleneck, reduction_factor: 8, dropout: 0.1}", "training.batch_size=1"],
        "c": ["method={name: lora, r: 2, use_dora: true, target_modules: all-linear}", "training.batch_size=2"],
    }
    alone = [read(folder, f"alone-{name}", *own, *more) for name, more in varied.items()]
    together = [read(folder, name, *own, *more) for name, more in varied.items()]
    for recipe in alone:
        train(recipe, silent)
    # BART's encoder and decoder are one part, which is computed together for equal lengths only.
    assert train_many(together, silent).shared > (0.5 if kind == "t5" else 0.1)
    for one, other in zip(alone, together, strict=True):
        assert losses(other) == pytest.approx(losses(one), rel=1e-5)
        torch.testing.assert_close(weights(other), weights(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["training.bf16=true", "quantization=nf4", "quantization=int8"])
def test_in_other_precisions(folder: Path, how: str) -> None:
    write_csv(folder / "train.csv", [review(i) for i in range(24)])
    varied = {"a": ["method.lora_dropout=0.2", how], "b": ["method.r=3", "training.seed=2", how]}
    alone = [read(folder, f"alone-{name}", *own) for name, own in varied.items()]
    together = [read(folder, name, *own) for name, own in varied.items()]
    for recipe in alone:
        train(recipe, silent)
    assert train_many(together, silent).shared == 1
    coarse = 1e-5 if "nf4" in how else 2e-2  # bfloat16 and 8 bits round by the shape of the batch
    for one, other in zip(alone, together, strict=True):
        assert losses(other) == pytest.approx(losses(one), rel=coarse)


def test_a_job_that_fails_stops_alone(folder: Path) -> None:
    good = [read(folder, name, f"training.seed={seed}") for name, seed in (("a", 0), ("b", 1))]
    train_many(good, silent)
    before = [weights(recipe) for recipe in good]
    bad = read(folder, "bad", "training.learning_rate=1e30", "training.max_grad_norm=0")
    ranking = train_many([good[0], bad, good[1]], silent)
    assert [one.name for one in ranking.outcomes if one.error] == ["bad"]
    assert isinstance(ranking.outcomes[-1].error, TrainingError)
    assert all(torch.equal(was[key], value) for was, recipe in zip(before, good, strict=True)
               for key, value in weights(recipe).items())  # fmt: skip


class Stopped(transformers.TrainerCallback):
    """Stops a training after two steps, as a user may."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_job_can_be_cancelled_and_the_others_are_not_changed(folder: Path) -> None:
    both = [read(folder, "a"), read(folder, "b", "training.seed=1")]
    train_many(both, silent)
    before = weights(both[0])
    train_many(both, silent, lambda name: [Stopped()] if name == "b" else [])
    assert all(torch.equal(before[key], value) for key, value in weights(both[0]).items())
    assert len(losses(both[1])) == 2


def test_a_job_that_joins_late_is_changed_by_nothing(folder: Path) -> None:
    write_csv(folder / "train.csv", [review(i) for i in range(24)])
    own = {"a": ["training.epochs=1"], "b": ["method.lora_dropout=0.1"], "c": ["training.seed=5", "method.r=3"]}
    first = [read(folder, f"first-{name}", *more) for name, more in own.items()]
    train_many(first, silent)
    then = [read(folder, name, *more) for name, more in own.items()]
    ranking = train_many(then, silent, at_once=2)  # c begins when a has ended
    assert 0.5 < ranking.shared < 1
    for one, other in zip(first, then, strict=True):
        mine, its = weights(one), weights(other)
        assert [key for key in mine if not torch.equal(mine[key], its[key])] == [], other.output.name


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.bf16=true"], "bf16 differs"),
        (["quantization=int8"], "quantization differs"),
        (["task=text-regression"], "task differs"),
        (["output=run"], "Two recipes write to"),
    ],
)
def test_what_cannot_share_a_base_is_refused(folder: Path, overrides: list[str], says: str) -> None:
    path = folder / "recipe.yaml"
    with pytest.raises(ConfigError, match=says):
        train_many([recipes.read(path), recipes.read(path, ["output=other", *overrides])], silent)


KILLED = """
import os, sys
from pathlib import Path
import transformers
from trimtab import kernels, recipe as recipes
from trimtab.many import train_many

kernels.FEW = 0  # as in this process

class Killed(transformers.TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), 9)

train_many([recipes.read(Path(path)) for path in sys.argv[1:]], lambda line: None, lambda name: [Killed()])
"""


def test_what_was_killed_goes_on_to_the_same_bits(folder: Path) -> None:
    write_csv(folder / "train.csv", [review(i) for i in range(24)])  # of one length: in the end one job is alone
    own = {"a": ["method.lora_dropout=0.1"], "b": ["training.seed=3", "method.r=3"], "c": ["training.epochs=1"]}
    whole = [read(folder, f"whole-{name}", *more) for name, more in own.items()]
    train_many(whole, silent)
    paths = []
    for name, more in own.items():
        paths.append(folder / f"{name}.yaml")
        read(folder, name, *more).write(paths[-1])
    ended = subprocess.run([sys.executable, "-c", KILLED, *map(str, paths)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -9
    assert trimtab("train", *paths, "--resume") == 0
    for name, recipe in zip(own, whole, strict=True):
        mine, its = weights(recipe), load_file(folder / name / files.WEIGHTS)
        assert [key for key in mine if not torch.equal(mine[key], its[key])] == [], name
    assert (folder / many.CURVES).is_file()


def test_a_sweep_ranks_every_combination(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vary = ["--vary", "method.r=1,2", "--vary", "training.learning_rate=0.0001,0.02"]
    assert trimtab("sweep", folder / "recipe.yaml", *vary, "--set", "training.epochs=4") == 0
    out = capsys.readouterr().out
    sweep = folder / "run-sweep"
    ranked = json.loads((sweep / many.RANKING).read_text())
    assert ranked["shared"] == 1
    scores = [one["validation"]["accuracy"] for one in ranked["recipes"]]
    assert scores == sorted(scores, reverse=True)
    assert "learning_rate=0.02" in ranked["recipes"][0]["name"]
    for r in (1, 2):
        for rate in ("0.0001", "0.02"):
            found = sweep / f"r={r},learning_rate={rate}"
            assert load_file(found / files.WEIGHTS)["base_model.model.bert.encoder.layer.0.attention.self.query."
                                                    "lora_A.weight"].shape[0] == r  # fmt: skip
            assert f"r={r},learning_rate={rate}" in out
    before = (sweep / "r=1,learning_rate=0.02" / "metrics.json").stat().st_mtime_ns
    assert trimtab("sweep", folder / "recipe.yaml", *vary, "--set", "training.epochs=4", "--resume") == 0
    assert (sweep / "r=1,learning_rate=0.02" / "metrics.json").stat().st_mtime_ns == before  # nothing was left to do


def test_a_sweep_says_what_is_wrong_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for vary, says in (("method.r", "KEY=VALUE"), ("method.r=4,4", "KEY=VALUE"), ("method.rr=4,8", "no key 'rr'")):
        assert trimtab("sweep", folder / "recipe.yaml", "--vary", vary) == 2
        assert says.lower() in capsys.readouterr().err.lower()
