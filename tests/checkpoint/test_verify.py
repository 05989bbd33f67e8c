"""`verify_checkpoint` finds everything that is wrong with a checkpoint and identifies its files."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from models import HEADS, tiny_config
from safetensors.torch import load_file, save_file

from fastgpt.checkpoint.headers import CheckpointFileError
from fastgpt.verify import MAX_PROBLEMS, verify_checkpoint


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def rewrite_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_problems(directory: Path, *expected: tuple[str, ...], kind: str = "problems") -> None:
    """There is one problem for each tuple of fragments and no other, each on one line."""
    problems = getattr(verify_checkpoint(directory), kind)
    assert len(problems) == len(expected), problems
    for fragments in expected:
        assert any(all(fragment in problem for fragment in fragments) for problem in problems), (fragments, problems)
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_sound_checkpoint(head, tied, tmp_path):
    model = getattr(transformers, head)(tiny_config(tie_word_embeddings=tied)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    messages: list[str] = []
    report = verify_checkpoint(tmp_path, tell=messages.append)
    assert report.problems == []
    assert report.n_parameters == model.num_parameters()
    assert report.dtypes == ["BF16"]
    names = {path.name for path in tmp_path.iterdir()}
    assert report.files.keys() == names >= {"config.json", "model.safetensors"}
    for name in names:
        assert report.files[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert any(name in message for message in messages)
    assert report.directory == str(tmp_path)
    assert report.warnings == []


def shard(directory: Path) -> list[Path]:
    """Split the checkpoint into several files."""
    model = transformers.GPT2LMHeadModel.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="150KB")
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 2
    return shards


def test_sound_shards(saved):
    n_parameters = verify_checkpoint(saved).n_parameters
    shards = shard(saved)
    report = verify_checkpoint(saved)
    assert report.problems == []
    assert report.n_parameters == n_parameters
    assert {path.name for path in shards} < report.files.keys()


def test_masks_and_a_copy_of_the_tied_head_are_no_parameters(saved):
    def as_first_released(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    n_parameters = verify_checkpoint(saved).n_parameters
    rewrite(saved / "model.safetensors", as_first_released)
    report = verify_checkpoint(saved)
    assert report.problems == []
    assert report.n_parameters == n_parameters


def test_a_table_stored_as_the_tied_head_alone_is_counted(saved):
    n_parameters = verify_checkpoint(saved).n_parameters
    rewrite(saved / "model.safetensors", lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    report = verify_checkpoint(saved)
    assert report.problems == report.warnings == []
    assert report.n_parameters == n_parameters


def test_every_problem_is_found(saved):
    def damage(tensors):
        del tensors["transformer.h.0.ln_1.weight"]
        del tensors["transformer.h.1.attn.c_proj.bias"]
        tensors["transformer.wpe.weight"] = torch.zeros(47, 64)
        tensors["transformer.ln_f.bias"] = torch.zeros(64, dtype=torch.int32)
        tensors["transformer.h.1.ln_2.bias"][5] = float("nan")
        tensors["transformer.h.0.mlp.c_fc.bias"][0] = float("-inf")
        tensors["score.wait"] = torch.zeros(2, 64)

    rewrite(saved / "model.safetensors", damage)
    assert_problems(
        saved,
        ("model.safetensors", "'h.0.ln_1.weight'"),
        ("model.safetensors", "'h.1.attn.c_proj.bias'"),
        ("model.safetensors", "'wpe.weight'", "(47, 64)", "(48, 64)"),
        ("model.safetensors", "'ln_f.bias'", "I32"),
        ("model.safetensors", "'transformer.h.1.ln_2.bias'", "NaN"),
        ("model.safetensors", "'transformer.h.0.mlp.c_fc.bias'", "Inf"),
    )


def test_what_loads_all_the_same_is_a_warning(saved):
    rewrite(saved / "model.safetensors", lambda t: t.update({"score.wait": torch.full((2, 64), float("nan"))}))
    rewrite_config(saved, model_type="llama")
    assert_problems(saved)
    told = (("model.safetensors", "'score.wait'", "GPT2LMHeadModel"), ("config.json", "'llama'"))
    assert_problems(saved, *told, kind="warnings")


def test_every_problem_of_the_configuration_is_found(saved):
    rewrite_config(saved, n_head=7, layer_norm_epsilon=0.0, activation_function="gloo")
    assert_problems(saved, ("n_head 7",), ("layer_norm_epsilon",), ("'gloo'",))


def test_damaged_files_do_not_hide_the_others(saved):
    first, second, *_ = shard(saved)
    first.write_bytes(first.read_bytes()[:4])
    name = next(iter(load_file(second)))
    rewrite(second, lambda tensors: tensors[name].view(-1)[0].fill_(float("nan")))
    assert_problems(saved, (first.name, "truncated"), (second.name, name, "NaN"))


def test_bug_a_file_that_vanishes_hides_what_was_found(saved):
    (saved / "config.json").write_text("{")
    (saved / "zz").write_text("")

    def remove(message: str) -> None:
        for name, step in (("model.safetensors", "reading"), ("zz", "hashing")):
            if message.startswith(step):
                (saved / name).unlink(missing_ok=True)

    report = verify_checkpoint(saved, tell=remove)
    assert any("not valid JSON" in problem for problem in report.problems)
    assert set(report.files) <= {"config.json", "generation_config.json"}


def test_missing_head(saved):
    rewrite_config(saved, architectures=["GPT2ForSequenceClassification"])
    assert_problems(saved, ("'score.weight'", "GPT2ForSequenceClassification"), kind="warnings")
    assert_problems(saved)
    rewrite_config(saved, architectures=["GPT2LMHeadModel"], tie_word_embeddings=False)
    assert_problems(saved, ("'lm_head.weight'", "GPT2LMHeadModel"), kind="warnings")


def test_absent_files(saved):
    (saved / "config.json").unlink()
    assert_problems(saved, ("config.json", "does not exist"))
    (saved / "model.safetensors").unlink()
    assert_problems(saved, ("config.json",), ("model.safetensors",))
    (saved / "pytorch_model.bin").write_bytes(b"")
    assert_problems(saved, ("config.json",), ("pytorch_model.bin", "pickle"))
    with pytest.raises(CheckpointFileError, match="no such directory"):
        verify_checkpoint(saved / "elsewhere")
    with pytest.raises(CheckpointFileError, match="is a file: give the directory"):
        verify_checkpoint(saved / "pytorch_model.bin")


def test_list_of_problems_ends(saved):
    rewrite_config(saved, n_layer=10**9)
    rewrite(saved / "model.safetensors", lambda t: t.update({f"x{i}": torch.zeros(1) for i in range(500)}))
    problems = verify_checkpoint(saved).problems
    assert len(problems) >= 100
    rewrite_config(saved, n_layer=2)
    warnings = verify_checkpoint(saved).warnings
    assert len(warnings) == MAX_PROBLEMS + 1
    assert warnings[-1].endswith("more")
