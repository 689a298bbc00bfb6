"""`trimtab train` by several processes: the run that one process makes of batches as large as theirs together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import trimtab
from test_strategies import changed, close, saved, silent, still  # noqa: F401

from trimtab.training import Result, train

# 24 rows, validated by others, in batches of 3 for each of two processes; plain descent, for Adam hides a wrong scale.
SETTINGS = [
    "data.validation=test.csv", "training.batch_size=3", "training.optim=sgd", "training.learning_rate=0.1",
    "training.max_grad_norm=1e9", "training.per_device_eval_batch_size=4",
]  # fmt: skip
MORE = {
    "with a penalty": ["method={name: adalora, init_r: 3, target_r: 2, target_modules: [query, value]}"],
    "with strategies": [
        "training.label_smoothing_factor=0.1", "training.class_weights={praise: 2.0}",
        "training.early_stopping_patience=3", "training.gradual_unfreezing=output", "training.layerwise_lr_decay=0.5",
        "training.gradient_accumulation_steps=2", "training.gradient_checkpointing=true",
    ],
}  # fmt: skip


def launched(*program: str, **settings: str) -> str:
    """What two processes of a program wrote to the terminal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", port, *program]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        **settings,
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("more", MORE)
def test_two_processes_make_the_run_of_one(recipe: Path, still: str, more: str) -> None:  # noqa: F811
    overrides = [word for override in (still, *SETTINGS, *MORE[more]) for word in ("--set", override)]
    said = launched("-m", "trimtab", "train", str(recipe), *overrides)
    assert said.count("train: 24 rows read") == 1
    assert said.count("Saved in") == 1
    folder = recipe.parent / "run"
    found = Result(folder, json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    steps = [json.loads(line)["step"] for line in (folder / "history.jsonl").read_text().splitlines() if "loss" in line]
    assert steps == sorted(steps)
    assert not (folder / "checkpoints").exists()
    alone = train(changed(recipe, still, *SETTINGS, *MORE[more], "training.batch_size=6", "output=alone"), silent)
    assert found.metrics["steps"] == alone.metrics["steps"]
    close(saved(alone), saved(found))
    for score, value in alone.metrics["validation"].items():
        assert found.metrics["validation"][score] == pytest.approx(value, abs=1e-5), score


WATCHED = """
import os, sys
from pathlib import Path
from torch import distributed
from trimtab import recipe, training
from trimtab.tasks.text_classification import TextClassification

def say(word):  # in one write: pieces of two processes' lines would mix
    os.write(1, f"{word}: {distributed.is_initialized()}\\n".encode())

def encode(task, *args, encode=TextClassification.encode):
    say("encoding")
    return encode(task, *args)

TextClassification.encode = encode
training.train(recipe.read(Path(sys.argv[1]), sys.argv[2:]), lambda line: None)
say("trained")
"""


def test_rows_are_encoded_before_processes_wait_for_each_other(recipe: Path, still: str) -> None:  # noqa: F811
    program = recipe.parent / "watched.py"
    program.write_text(WATCHED)
    said = launched(str(program), str(recipe), still, *SETTINGS, "training.epochs=1")
    assert said.count("encoding: False") == 2 * 3  # processes, splits
    assert said.count("trained: True") == 2


SHARDED = """
import os, sys
from pathlib import Path
from accelerate.state import AcceleratorState, DistributedType
from trimtab import recipe, training
from trimtab.trainer import RunTrainer

def state(self, *args, fsdp_plugin=None, init=AcceleratorState.__init__, **settings):
    init(self, *args, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

def training_step(self, *args, step=RunTrainer.training_step):
    if self.state.global_step == int(os.environ["STOP_AT"]):
        sys.exit()
    return step(self, *args)

AcceleratorState.__init__ = state
RunTrainer.training_step = training_step
training.train(recipe.read(Path(sys.argv[1]), sys.argv[2:]), lambda line: None, resume=True)
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",  # by default accelerate shards BERT's embeddings twice, which fails
}  # fmt: skip


def test_two_processes_share_a_model_and_resume(recipe: Path, still: str) -> None:  # noqa: F811
    """FSDP2, which accelerate uses with graphics cards only: here it is told to, as it would be there."""
    program = recipe.parent / "sharded.py"
    program.write_text(SHARDED)
    settings = [still, *SETTINGS, "training.optim=adamw_torch", "training.learning_rate=0.01"]
    for stop in ("6", "-1"):  # of 8 steps, 4 an epoch
        launched(str(program), str(recipe), *settings, STOP_AT=stop, **FSDP)
    folder = recipe.parent / "run"
    found = Result(folder, json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    alone = train(changed(recipe, *settings, "training.batch_size=6", "output=alone"), silent)
    assert found.metrics["steps"] == alone.metrics["steps"]
    close(saved(alone), saved(found))
    for score, value in alone.metrics["validation"].items():
        assert found.metrics["validation"][score] == pytest.approx(value, abs=1e-5), score
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if "loss" in line] == list(range(1, 9))


def test_a_model_that_would_not_be_shared_is_refused(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert trimtab("train", recipe) == 2
    assert "accelerate was told to shard the model (FSDP)" in capfd.readouterr().err
