"""Saving and loading: safe, atomic, and complete or not at all."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from battery import Snapshot, close, far, run, same_bits
from models import Tiny, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_files import Crash, crashing
from torch import Tensor, nn

import trimtab
from trimtab import (
    AdapterError,
    AutoPeftModel,
    CheckpointError,
    LoraConfig,
    PeftConfig,
    PeftModel,
    checkpoint,
    get_peft_model,
)
from trimtab.files import CONFIG, WEIGHTS

PREFIX = "base_model.model."


def adapted(tiny: Tiny, targets: Any, seed: int = 1, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """The tiny model with a random adapter."""
    model, inputs = tiny
    get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": targets, **settings}))
    randomise(model, seed)
    return model, inputs


def mlp(seed: int = 1, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    return adapted(models.mlp(), ["first", "second"], seed, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of the MLP: two sites, and a trained head."""
    mlp(modules_to_save=["head"])[0].save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refusal(model: nn.Module, folder: str | Path, inputs: dict[str, Tensor] | None = None, **settings: Any) -> str:
    """Why the folder cannot be loaded; the model must be as it was then."""
    inputs = models.mlp().inputs if inputs is None else inputs
    before = Snapshot.of(model, inputs)
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(model, folder, **settings)
    before.holds(model, inputs)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    """Change the saved tensors, in place or by returning others; what the file says of itself stays."""
    with safe_open(folder / WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS, metadata)


def configure(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**settings, **changes}), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ atomic


@pytest.mark.parametrize("hard", [True, False], ids=["killed", "raised"])
@pytest.mark.parametrize("there", [True, False], ids=["over-old", "new-folder"])
def test_a_crash_while_saving_leaves_the_old_or_the_new(
    there: bool, hard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old and new differ in rank and scale, so that weights of one with the config of the other would not fit."""
    old, inputs = mlp(r=2)
    new, _ = mlp(r=3, lora_alpha=7, seed=2)
    expected = {2: run(old, inputs), 3: run(new, inputs), None: run(models.mlp().model, inputs)}
    outcomes = []
    write, save = PeftConfig.write, checkpoint.save_file
    for at in itertools.count():
        folder = tmp_path / str(at)
        if there:
            old.save_pretrained(folder)
        try:
            with crashing(at, hard) as clock:

                def half(path: Path, clock: Any = clock) -> None:
                    path.write_bytes(path.read_bytes()[:100])
                    clock.tick()

                def halfway(step: Callable[..., None], *arguments: Any, half: Any = half) -> None:
                    path = next(argument for argument in arguments if isinstance(argument, Path))
                    step(*arguments)
                    half(path)
                    step(*arguments)

                monkeypatch.setattr(checkpoint, "save_file", lambda *a, halfway=halfway: halfway(save, *a))
                monkeypatch.setattr(PeftConfig, "write", lambda *a, halfway=halfway: halfway(write, *a))
                new.save_pretrained(folder)
        except Crash:
            outcomes.append(survivor(folder, expected))
        else:
            break
        finally:
            monkeypatch.undo()
    assert outcomes == [2 if there else None] * 5 + [3] * 2  # half and fsync of each file, and the rename that commits


def survivor(folder: Path, expected: dict[int | None, Tensor]) -> int | None:
    """The rank of the adapter that a reader finds, if any; it must act as it did when it was saved."""
    model, inputs = models.mlp()
    try:
        PeftModel.from_pretrained(model, folder)
    except CheckpointError as error:
        if "holds no adapter" not in str(error):
            raise
        rank = None
    else:
        rank = model.peft_config["default"].r
    assert same_bits(run(model, inputs), expected[rank])
    return rank


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_checkpoint import mlp
from test_files import Clock
import trimtab.files as files

class Killed(Clock):
    def tick(self):
        self.now += 1
        if self.now == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

def ticking(clock, step):
    def stepped(*args):
        clock.tick()
        return step(*args)
    return stepped

old, new = mlp(r=2)[0], mlp(r=3, lora_alpha=7, seed=2)[0]
for at in itertools.count():
    folder = Path(sys.argv[1]) / str(at)
    old.save_pretrained(folder)
    child = os.fork()
    if not child:
        clock = Killed(at, True)
        os.replace, os.fsync = ticking(clock, os.replace), ticking(clock, os.fsync)
        new.save_pretrained(folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def in_a_process(script: str, *arguments: str | Path) -> str:
    """Run a script in a fresh Python that can import what this one can."""
    command = [sys.executable, "-c", script, *map(str, arguments), *sys.path]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_killed_process_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    in_a_process(KILLED, tmp_path)
    inputs = models.mlp().inputs
    expected = {2: run(mlp(r=2)[0], inputs), 3: run(mlp(r=3, lora_alpha=7, seed=2)[0], inputs)}
    found = [survivor(tmp_path / str(at), expected) for at in range(len(list(tmp_path.iterdir())))]
    assert found == [2, 2, 2, 3, 3, 3]  # two fsyncs, the rename that commits, the other, the folder's fsync; none


def test_left_over_files_of_an_earlier_crash_do_not_matter(folder: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        (folder / f"{name}.new").write_bytes(b"half of an ada")
    model, inputs = models.mlp()
    PeftModel.from_pretrained(model, folder)
    assert same_bits(run(model, inputs), run(mlp(modules_to_save=["head"])[0], inputs))
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


# -------------------------------------------------------------------------------- adapters that do not fit this model


def test_all_that_does_not_fit_is_in_one_error(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{PREFIX}first.lora_A.weight"], tensors[f"{PREFIX}head.bias"]
        tensors[f"{PREFIX}first.lora_C.weight"] = torch.ones(2)
        tensors[f"{PREFIX}third.lora_A.weight"] = torch.ones(2, 7)
        tensors[f"{PREFIX}second.lora_B.weight"] = torch.ones(2, 6)
        tensors[f"{PREFIX}head.weight"] = torch.ones(18)  # as many numbers, in another shape

    rewrite(folder, spoil)
    problems = (
        f"\nMissing: {PREFIX}first.lora_A.weight; {PREFIX}head.bias"
        f"\nUnexpected: {PREFIX}first.lora_C.weight; {PREFIX}third.lora_A.weight"
        f"\nOf the wrong shape: {PREFIX}second.lora_B.weight is (2, 6) in the file, (6, 2) here; "
        f"{PREFIX}head.weight is (18,) in the file, (3, 6) here"
    )
    expected = f"{folder / WEIGHTS} does not fit this Mlp. Nothing was changed.{problems}"
    assert refusal(models.mlp().model, folder) == expected
    model, inputs = mlp()
    before = Snapshot.of(model, inputs)
    with pytest.raises(CheckpointError) as caught:
        model.load_adapter(folder, "other")
    before.holds(model, inputs)
    assert str(caught.value) == expected
    assert list(model.peft_config) == ["default"]


def test_weights_that_do_not_fit_an_attached_adapter_change_nothing(folder: Path) -> None:
    model, inputs = mlp(modules_to_save=["head"], seed=2)
    rewrite(folder, lambda tensors: tensors.update({f"{PREFIX}head.bias": torch.ones(4)}))
    before = Snapshot.of(model, inputs)
    with pytest.raises(CheckpointError, match=r"head\.bias is \(4,\) in the file, \(3,\) here$"):
        checkpoint.load_weights(model, folder, "default")
    before.holds(model, inputs)


def test_weights_into_an_attached_adapter(folder: Path) -> None:
    model, inputs = mlp(modules_to_save=["head"], seed=2)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    checkpoint.load_weights(model, folder, "default")
    assert same_bits(run(model, inputs), run(mlp(modules_to_save=["head"])[0], inputs))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters  # an optimizer has them
    with pytest.raises(AdapterError, match=r"There is no adapter 'defualt'\. Did you mean 'default'\?"):
        checkpoint.load_weights(model, folder, "defualt")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 32}, ["Of the wrong shape", "v_proj.lora_A.weight is (2, 16) in the file, (2, 32)"]),
        ({"num_key_value_heads": 4}, ["v_proj.lora_B.weight is (8, 2) in the file, (16, 2) here"]),
        ({"num_hidden_layers": 1}, ["Unexpected", "model.layers.1.self_attn.q_proj.lora_A.weight"]),
        ({"num_hidden_layers": 3}, ["Missing", "model.layers.2.self_attn.v_proj.lora_B.weight"]),
    ],
    ids=["wider", "more-heads", "fewer-layers", "more-layers"],
)  # fmt: skip
def test_a_base_of_another_shape(settings: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    adapted(models.llama(), ["q_proj", "v_proj"])[0].save_pretrained(tmp_path)
    model, inputs = models.llama(**settings)
    reason = refusal(model, tmp_path, inputs)
    assert all(word in reason for word in words)


def test_a_base_of_another_architecture(tmp_path: Path) -> None:
    """Said before keys are compared: Llama and OPT have modules of the same names and sizes."""
    adapted(models.llama(), ["q_proj"])[0].save_pretrained(tmp_path)
    model, inputs = models.opt()
    assert (
        refusal(model, tmp_path, inputs)
        == f"The adapter in {tmp_path} was trained on a llama model; this is a opt model."
    )


def test_another_head_on_the_same_architecture(tmp_path: Path) -> None:
    adapted(models.bert(), ["query"], task_type="SEQ_CLS")[0].save_pretrained(tmp_path)
    classifier, inputs = models.bert()
    reason = refusal(classifier.bert, tmp_path, inputs)
    assert reason.startswith(
        f"The adapter in {tmp_path} does not fit BertModel: modules_to_save=['classifier'] matches no"
    )


def test_a_plain_model_without_the_sites(folder: Path) -> None:
    model, inputs = models.convolutions()
    reason = refusal(model, folder, inputs)
    assert reason.startswith(
        f"The adapter in {folder} does not fit Convolutions: target_modules=['first', 'second'] match"
    )


def test_lists_that_serve_several_architectures_load_without_a_warning(tmp_path: Path) -> None:
    with pytest.warns(trimtab.PartialTargetWarning, match="query"):
        adapted(models.mlp(), ["first", "query"])[0].save_pretrained(tmp_path)
    PeftModel.from_pretrained(models.mlp().model, tmp_path)


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    """Else the next run after a resumed one would differ."""
    model, _ = models.mlp()
    before = torch.get_rng_state()
    PeftModel.from_pretrained(model, folder)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------- files that are no adapter's


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, -1])
def test_a_file_that_was_cut_off(kept: int, folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    assert refusal(models.mlp().model, folder).startswith(f"{folder / WEIGHTS} is damaged or no safetensors file: ")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load_weights(mlp(modules_to_save=["head"])[0], folder, "default")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.describe(folder)


@pytest.mark.parametrize(
    "content", [b"\xff" * 200, b"PK\x03\x04" + b"\0" * 200, b"\x02" + b"\0" * 7 + b"[]"], ids=range(3)
)
def test_a_file_of_another_kind(content: bytes, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(content)
    assert "is damaged or no safetensors file: " in refusal(models.mlp().model, folder)


def test_a_file_without_weights(folder: Path) -> None:
    """Such files were written by saves that found nothing; loading one must not pass for loading an adapter."""
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors)] and None)
    reason = refusal(models.mlp().model, folder)
    assert [line.split(":")[0] for line in reason.splitlines()[1:]] == ["Missing"]
    assert reason.count(PREFIX) == 6


def test_numbers_that_are_none_are_kept(folder: Path) -> None:
    """What a diverged run saved is loaded as it is: the run shows it, not the file."""
    rewrite(folder, lambda tensors: tensors.update({f"{PREFIX}head.bias": torch.full((3,), torch.nan)}))
    model = PeftModel.from_pretrained(models.mlp().model, folder)
    assert model.head.adapters["default"].replacement.bias.isnan().all()


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / CONFIG).unlink()
    assert refusal(models.mlp().model, folder) == f"{folder} holds no adapter: there is no {CONFIG} in it."


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert refusal(models.mlp().model, folder) == f"{folder} holds no adapter: there is no {WEIGHTS} in it."


def test_a_folder_that_is_none(folder: Path, tmp_path: Path) -> None:
    assert "is no folder. Give the folder that save_pretrained wrote." in refusal(models.mlp().model, tmp_path / "none")
    assert "is no folder" in refusal(models.mlp().model, folder / WEIGHTS)
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refusal(models.mlp().model, tmp_path / "empty")
    reason = refusal(models.mlp().model, tmp_path, subfolder="adaptor")
    assert reason == f"{tmp_path} has no folder 'adaptor'. Did you mean 'adapter'?"


def test_the_folder_of_a_whole_model(tmp_path: Path) -> None:
    models.llama().model.save_pretrained(tmp_path)
    model, inputs = models.llama()
    assert refusal(model, tmp_path, inputs) == f"{tmp_path} holds no adapter: there is no {CONFIG} in it."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is damaged or no JSON file: Expecting value"),
        ('{"peft_type": "LORA", ', "is damaged or no JSON file: Expecting property name"),
        ("[]", "is not an adapter's configuration: it names no peft_type"),
        ('"LORA"', "is not an adapter's configuration: it names no peft_type"),
        ("{}", "is not an adapter's configuration: it names no peft_type"),
        ('{"peft_type": null}', "is not an adapter's configuration: it names no peft_type"),
        ('{"peft_type": ["LORA"]}', "is not an adapter's configuration: it names no peft_type"),
        ('{"peft_type": "LOAR"}', "is of the method 'LOAR'. Did you mean 'LORA'?"),
        ('{"peft_type": "lora"}', "is of the method 'lora'. Did you mean 'LORA'?"),
        ('{"peft_type": "LORA", "rr": 8}', "LoraConfig has no setting 'rr'. Did you mean 'r'?"),
        ('{"peft_type": "LORA", "r": "eight"}', "r='eight': "),
        ('{"peft_type": "LORA", "bias": "some"}', "bias='some': "),
        ('{"peft_type": "LORA", "init_lora_weights": "spectral"}', "init_lora_weights='spectral'"),
    ],
)
def test_configs_that_cannot_be_read(text: str, reason: str, folder: Path) -> None:
    (folder / CONFIG).write_text(text, encoding="utf-8")
    told = refusal(models.mlp().model, folder)
    assert told.startswith(f"{folder / CONFIG}")
    assert reason in told
    assert "\n" not in told


def test_a_config_that_is_not_text(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b"\xff\xfe{")
    assert "is damaged or no JSON file: 'utf-8' codec" in refusal(models.mlp().model, folder)


HF_ONLY = {
    "lora_bias": True, "use_qalora": True, "ensure_weight_tying": True, "layer_replication": [[0, 2]],
    "loftq_config": {"loftq_bits": 4}, "megatron_config": {},
    "arrow_config": {}, "use_bdlora": {}, "kasa_config": {}, "velora_config": {}, "monteclora_config": {},
    "qalora_group_size": 32, "megatron_core": "other.core",
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), HF_ONLY.items(), ids=HF_ONLY)
def test_settings_of_hf_peft_that_are_not_offered_here(key: str, value: Any, folder: Path) -> None:
    configure(folder, **{key: value})
    expected = f"{folder / CONFIG}: {key} is a setting of HF PEFT's LoraConfig that trimtab does not offer."
    assert refusal(models.mlp().model, folder) == expected
    assert set(HF_ONLY) == set(LoraConfig.hf_only)


@pytest.mark.parametrize("key", HF_ONLY)
def test_settings_of_hf_peft_that_are_switched_off_are_fine(key: str, folder: Path) -> None:
    configure(folder, **{key: LoraConfig.hf_only[key]})
    PeftModel.from_pretrained(models.mlp().model, folder)
    configure(folder, **{key: None})
    PeftModel.from_pretrained(models.mlp().model, folder)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_and_not_opened(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert refusal(models.mlp().model, folder) == (
        f"{folder} holds pickled weights (adapter_model.bin). Unpickling can run any code, so trimtab never does. "
        "Convert them with safetensors in an environment you trust."
    )
    assert not (tmp_path / "exploded").exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert (tmp_path / "exploded").exists()  # it would have


def test_pickles_beside_the_weights_are_not_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    PeftModel.from_pretrained(models.mlp().model, folder)
    assert not (tmp_path / "exploded").exists()


# --------------------------------------------------------------------------------------------------- what is recorded


def test_the_base_is_on_record(tmp_path: Path) -> None:
    models.llama().model.save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), revision="v2")
    model.save_pretrained(tmp_path / "adapter")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(tmp_path / "base")
    assert config.revision == "v2"
    assert config.auto_mapping == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    with safe_open(tmp_path / "adapter" / WEIGHTS, "pt") as opened:
        assert opened.metadata() == {
            "format": "pt", "base_model_class": "LlamaForCausalLM", "base_model_type": "llama"
        }  # fmt: skip


def test_with_a_task_no_class_is_recorded(tmp_path: Path) -> None:
    model, _ = adapted(models.llama(), ["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="org/llama")
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.task_type, config.auto_mapping, config.revision) == ("CAUSAL_LM", None, None)
    assert config.base_model_name_or_path == "org/llama"


def test_a_second_adapter_records_the_model_s_own_class(tmp_path: Path) -> None:
    """Not the generated one, which has the same name."""
    model, _ = mlp()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["second"]))
    assert model.peft_config["second"].auto_mapping == {"base_model_class": "Mlp", "parent_library": "models"}


def test_a_saved_adapter_does_not_train_unless_asked_to(folder: Path) -> None:
    assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["inference_mode"] is True
    model = PeftModel.from_pretrained(models.mlp().model, folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = PeftModel.from_pretrained(models.mlp().model, folder, is_trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".adapters.default." in name}


@pytest.mark.parametrize("build", [models.llama, models.bert], ids=["llama", "bert"])
def test_only_the_adapter_is_in_the_file(build: Callable[[], Tiny], tmp_path: Path) -> None:
    model, _ = adapted(build(), "all-linear", bias="all")
    model.save_pretrained(tmp_path)
    saved = sum(tensor.nbytes for tensor in load_file(tmp_path / WEIGHTS).values())
    own = [parameter for name, parameter in model.named_parameters() if ".adapters." in name]
    assert saved == sum(parameter.nbytes for parameter in own)
    header = int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little")
    assert (tmp_path / WEIGHTS).stat().st_size == 8 + header + saved
    assert header < 200 * (len(own) + 1)


def test_what_a_folder_holds_is_told_without_a_model(folder: Path) -> None:
    found = checkpoint.describe(folder)
    assert isinstance(found.config, LoraConfig)
    assert found.sites == {
        "first": {"lora_A.weight": (2, 5), "lora_B.weight": (7, 2)},
        "second": {"lora_A.weight": (2, 7), "lora_B.weight": (6, 2)},
        "head": {"weight": (3, 6), "bias": (3,)},
    }
    assert found.parameters == 2 * (5 + 7) + 2 * (7 + 6) + 3 * 6 + 3
    assert found.bytes == (folder / WEIGHTS).stat().st_size


# ------------------------------------------------------------------------------------------- options of save_pretrained


def test_a_given_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    model, inputs = mlp(bias="lora_only", modules_to_save=["head"])
    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    expected = run(model, inputs)
    randomise(model, seed=7)
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert same_bits(run(PeftModel.from_pretrained(models.mlp().model, tmp_path), inputs), expected)


def test_a_state_dict_without_the_adapter_is_refused(tmp_path: Path) -> None:
    model, _ = mlp()
    with pytest.raises(
        CheckpointError, match=r"^state_dict lacks first\.adapters\.default\.A\. Give the state dict of"
    ):
        model.save_pretrained(tmp_path / "adapter", state_dict=models.mlp().model.state_dict())
    assert not (tmp_path / "adapter").exists()


def test_selected_adapters(tmp_path: Path) -> None:
    model, _ = mlp()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["second"]))
    model.add_adapter("third", LoraConfig(r=2, target_modules=["second"]))
    model.save_pretrained(tmp_path, selected_adapters=["third"])
    assert {path.name for path in tmp_path.iterdir()} == {"third"}
    model.save_pretrained(tmp_path, selected_adapters=["default", "second"])
    assert {path.name for path in tmp_path.iterdir()} == {"third", "second", CONFIG, WEIGHTS}
    with pytest.raises(AdapterError, match=r"There is no adapter 'forth'"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["default", "forth"])
    assert not (tmp_path / "new").exists()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    mlp()[0].save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_other_processes_help_to_gather(tmp_path: Path) -> None:
    """Gathering shards is something that all processes do together, or the one that writes would wait for ever."""
    gathered = []

    class Shard(Tensor):
        def full_tensor(self) -> Tensor:
            gathered.append(self.shape)
            return self.as_subclass(Tensor)

    model, _ = mlp()
    shards = {name: value.as_subclass(Shard) for name, value in model.state_dict().items()}
    for main in (True, False):
        model.save_pretrained(tmp_path / str(main), state_dict=shards, is_main_process=main)
        assert len(gathered) == 4
        gathered.clear()
    PeftModel.from_pretrained(models.mlp().model, tmp_path / "True")


def test_pickles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Adapters are saved as safetensors only"):
        mlp()[0].save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert not (tmp_path / "adapter").exists()


def test_a_file_is_not_overwritten_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(CheckpointError, match=r"adapter is a file; an adapter is saved to a folder\.$"):
        mlp()[0].save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


def test_saving_a_merged_or_disabled_adapter_saves_the_same(tmp_path: Path) -> None:
    model, _ = mlp(modules_to_save=["head"])
    model.save_pretrained(tmp_path / "active")
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    active, *others = (load_file(tmp_path / name / WEIGHTS) for name in ("active", "disabled", "merged"))
    for other in others:
        assert set(other) == set(active)
        assert all(same_bits(other[key], active[key]) for key in active)


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_another_precision(dtype: torch.dtype, folder: Path) -> None:
    expected = {key: value.to(dtype) for key, value in load_file(folder / WEIGHTS).items()}
    rewrite(folder, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    model = PeftModel.from_pretrained(models.mlp().model, folder)
    model.save_pretrained(folder.parent / "again")
    again = load_file(folder.parent / "again" / WEIGHTS)
    assert {value.dtype for value in again.values()} == {torch.float32}
    assert all(torch.equal(again[key], expected[key].float()) for key in expected)


def test_a_half_precision_base_gets_float32_adapters(folder: Path) -> None:
    model = PeftModel.from_pretrained(models.mlp().model.to(torch.bfloat16), folder)
    saved = load_file(folder / WEIGHTS)
    assert torch.equal(model.first.adapters["default"].A, saved[f"{PREFIX}first.lora_A.weight"])
    assert torch.equal(model.head.adapters["default"].replacement.weight, saved[f"{PREFIX}head.weight"])


def test_loading_beside_an_active_adapter(folder: Path) -> None:
    model, inputs = mlp(seed=3)
    active, parameters = run(model, inputs), dict(model.named_parameters())
    model.load_adapter(folder, "other")
    assert model.active_adapters == ["default"]
    assert same_bits(run(model, inputs), active)
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    model.set_adapter("other")
    assert same_bits(run(model, inputs), run(mlp(modules_to_save=["head"])[0], inputs))
    model.set_adapter("default")
    assert same_bits(run(model, inputs), active)


def test_loading_beside_a_merged_adapter_is_refused(folder: Path) -> None:
    """A trained copy would start from merged weights, a trained bias from a merged bias."""
    model, inputs = mlp(seed=3)
    model.merge_adapter()
    before = Snapshot.of(model, inputs)
    with pytest.raises(
        AdapterError, match=r"\['default'\] are merged into the weights; call unmerge_adapter\(\) first"
    ):
        model.load_adapter(folder, "other")
    before.holds(model, inputs)


def test_loading_while_adapters_are_disabled(folder: Path) -> None:
    model, inputs = mlp(seed=3)
    active, base = run(model, inputs), run(models.mlp().model, inputs)
    with model.disable_adapter():
        model.load_adapter(folder, "other")
        assert same_bits(run(model, inputs), base)
    assert same_bits(run(model, inputs), active)


def test_names_that_are_taken_or_cannot_be(folder: Path) -> None:
    model, inputs = mlp()
    before = Snapshot.of(model, inputs)
    with pytest.raises(AdapterError, match="There is an adapter 'default' already"):
        model.load_adapter(folder, "default")
    with pytest.raises(AdapterError, match=r"'a\.b' cannot be an adapter's name"):
        model.load_adapter(folder, "a.b")
    with pytest.raises(AdapterError, match=r"has adapters already\. Use model\.load_adapter"):
        PeftModel.from_pretrained(model, folder, "other")
    before.holds(model, inputs)


FRESH = """
import sys
sys.path[:0] = sys.argv[3:]
import torch
import models
from battery import run
from safetensors.torch import save_file
from trimtab import PeftModel

model, inputs = models.bert()
torch.manual_seed(int(sys.argv[2]))
PeftModel.from_pretrained(model, sys.argv[1], "another name")
save_file({"logits": run(model, inputs)}, sys.argv[1] + "/logits")
"""


def test_a_fresh_process_with_another_seed_gives_the_same_outputs(tmp_path: Path) -> None:
    settings = {"bias": "all", "task_type": "SEQ_CLS", "rank_pattern": {"value": 3}}
    model, inputs = adapted(models.bert(), ["query", "value", "word_embeddings"], **settings)
    model.save_pretrained(tmp_path)
    in_a_process(FRESH, tmp_path, "4711")
    close(load_file(tmp_path / "logits")["logits"], run(model, inputs))
    far(run(model, inputs), run(models.bert().model, inputs))


def test_a_base_on_the_meta_device(tmp_path: Path) -> None:
    """The adapter has values at once; the base's are loaded after it."""
    model, inputs = mlp(bias="all", modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty: Any = models.Mlp().eval()
    PeftModel.from_pretrained(empty, tmp_path)
    assert {str(value.device) for name, value in empty.named_parameters() if ".adapters." in name} == {"cpu"}
    assert {str(value.device) for name, value in empty.named_parameters() if ".adapters." not in name} == {"meta"}
    state = models.mlp().model.state_dict()
    assert not empty.load_state_dict(state, strict=False, assign=True).unexpected_keys
    assert same_bits(run(empty, inputs), run(model, inputs))


def test_a_given_config_goes_before_the_saved_one(folder: Path) -> None:
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, LoraConfig)
    doubled = config.model_copy(update={"lora_alpha": 10})
    model = PeftModel.from_pretrained(models.mlp().model, folder, config=doubled)
    expected, inputs = mlp(modules_to_save=["head"], lora_alpha=10)
    assert same_bits(run(model, inputs), run(expected, inputs))


# -------------------------------------------------------------------------------------------------------- AutoPeftModel

TASKS: list[tuple[str, Any, str | None, Callable[[], nn.Module], list[str]]] = [
    ("CausalLM", trimtab.AutoPeftModelForCausalLM, "CAUSAL_LM", lambda: models.llama().model, ["q_proj"]),
    ("Seq2SeqLM", trimtab.AutoPeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM", lambda: models.t5().model, ["q"]),
    ("SequenceClassification", trimtab.AutoPeftModelForSequenceClassification, "SEQ_CLS",
     lambda: models.bert().model, ["query"]),
    ("TokenClassification", trimtab.AutoPeftModelForTokenClassification, "TOKEN_CLS",
     lambda: transformers.BertForTokenClassification(models.bert().model.config), ["query"]),
    ("QuestionAnswering", trimtab.AutoPeftModelForQuestionAnswering, "QUESTION_ANS",
     lambda: transformers.BertForQuestionAnswering(models.bert(num_labels=2).model.config), ["query"]),
    ("FeatureExtraction", trimtab.AutoPeftModelForFeatureExtraction, "FEATURE_EXTRACTION",
     lambda: transformers.BertModel(models.bert().model.config), ["query"]),
    ("any", AutoPeftModel, None, lambda: models.gpt2().model, ["c_attn"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("auto", "task", "build", "targets"), [row[1:] for row in TASKS], ids=[row[0] for row in TASKS]
)
def test_base_and_adapter_from_the_folder(
    auto: Any, task: str | None, build: Callable[[], nn.Module], targets: list[str], tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base: Any = type(build()).from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]
    inputs = {"input_ids": models.ids()}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = models.ids()

    @torch.no_grad()
    def first(model: nn.Module) -> Tensor:
        return model(**inputs)[0].clone()

    plain = first(base)
    model, _ = adapted(Tiny(base, inputs), targets, task_type=task)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter", "mine", is_trainable=True)
    assert isinstance(loaded, PeftModel)
    assert isinstance(loaded, type(build()))
    assert loaded.active_adapters == ["mine"]
    assert same_bits(first(loaded), first(model))
    far(first(loaded), plain)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == {
        name for name, _ in loaded.named_parameters() if ".adapters.mine." in name
    }


def saved_llama(tmp_path: Path, **settings: Any) -> Path:
    models.llama().model.save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], **settings)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_settings_go_to_the_base(tmp_path: Path) -> None:
    saved_llama(tmp_path).rename(tmp_path / "inner")
    (tmp_path / "outer").mkdir()
    (tmp_path / "inner").rename(tmp_path / "outer" / "inner")
    model: Any = AutoPeftModel.from_pretrained(tmp_path / "outer", subfolder="inner", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.adapters["default"].A.dtype == torch.float32


def test_an_adapter_that_names_no_base(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not name its base model\. Load that, then PeftModel"):
        AutoPeftModel.from_pretrained(folder)


def test_the_task_tells_the_class(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path, task_type="CAUSAL_LM")
    assert isinstance(AutoPeftModel.from_pretrained(folder), transformers.LlamaForCausalLM)
    configure(folder, task_type=None)
    with pytest.raises(CheckpointError, match="tells neither its task nor its base's class"):
        AutoPeftModel.from_pretrained(folder)


def test_a_base_that_is_gone(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"^The base model of {folder} cannot be loaded: [^\n]*base[^\n]*$"):
        AutoPeftModel.from_pretrained(folder)


def test_a_foreign_library_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_llama(tmp_path)
    (tmp_path / "foreign_library.py").write_text("raise SystemExit('imported')")
    (tmp_path / "transformers_too.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for library in ("foreign_library", "transformers_too"):
        configure(folder, auto_mapping={"base_model_class": "Model", "parent_library": library})
        with pytest.raises(
            CheckpointError, match=rf"asks for {library}\.Model\. Load it, then PeftModel\.from_pretrained"
        ):
            AutoPeftModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("transformers.models.llama.modeling_llama", "LlamaForEverything"),
        ("transformers.models.llamma", "LlamaForCausalLM"),
        ("transformers", "AutoConfig"),
        ("transformers", "logging"),
    ],
)
def test_classes_that_transformers_lacks(library: str, name: str, tmp_path: Path) -> None:
    folder = saved_llama(tmp_path)
    configure(folder, auto_mapping={"base_model_class": name, "parent_library": library})
    with pytest.raises(CheckpointError, match=rf"asks for {library}\.{name}, which this version of transformers lacks"):
        AutoPeftModel.from_pretrained(folder)


def test_words_added_before_training_have_room(tmp_path: Path, bert: Path) -> None:
    """The tokenizer beside the adapter tells how many there are."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    words = len(tokenizer)
    tokenizer.add_tokens(["superb", "dreadful", "so-so"])
    base = transformers.BertModel.from_pretrained(bert).eval()
    base.resize_token_embeddings(words + 3)
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["word_embeddings"])
    model = get_peft_model(base, config)
    randomise(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    inputs = dict(tokenizer("the film was superb", return_tensors="pt"))
    assert inputs["input_ids"].max() >= words
    loaded = AutoPeftModel.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == words + 3
    assert same_bits(run(loaded, inputs), run(model, inputs))


def test_a_tokenizer_of_the_base_s_size_changes_nothing(tmp_path: Path, bert: Path) -> None:
    base = transformers.BertModel.from_pretrained(bert)
    get_peft_model(base, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    loaded = AutoPeftModel.from_pretrained(tmp_path)
    assert same_bits(loaded.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_a_subclass_of_a_config_is_no_other_method(tmp_path: Path) -> None:
    """Files of the method are still read as the method's own class, unless the subclass is asked."""

    class Mine(LoraConfig):
        pass

    LoraConfig(r=3).save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    assert type(Mine.from_pretrained(tmp_path)) is Mine
