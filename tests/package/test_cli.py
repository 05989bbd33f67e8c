"""The command line: results on standard output, one-line errors on standard error, exit codes 0, 1 and 2."""

import json
import subprocess

import pytest
import torch
from commands import assert_one_line_error, in_process
from fastgpt_kernels import KernelUnavailableError
from models import tiny_config

import fastgpt
from fastgpt import cli, ops
from fastgpt import generate as engine


def test_generate_streams_the_prompt_and_its_continuation(run) -> None:
    result = run("generate", "ROMEO:", "--seed", "1", "--max-new-tokens", "30", "--dtype", "float32")
    assert result.code == 0
    assert result.out.startswith("ROMEO:")
    assert len(result.out) > 40
    assert "tokens/s" in result.err
    assert "torch path on cpu" in result.err
    again = run("generate", "ROMEO:", "--seed", "1", "--max-new-tokens", "30")
    assert again.out == result.out
    other = run("generate", "ROMEO:", "--seed", "2", "--max-new-tokens", "30")
    assert other.out != result.out


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_are_rounded(kind: str, run, tmp_path) -> None:
    result = run("generate", "ROMEO:", "--seed", "1", "--max-new-tokens", "5", f"--{kind}")
    assert result.code == 0
    assert f"float32 with {kind} weights" in result.err
    file = tmp_path / "text.txt"
    file.write_text("To be, or not to be, that is the question")
    losses = [json.loads(run("eval", str(file), "--json", *option).out)["loss"] for option in ([], [f"--{kind}"])]
    assert 0 < abs(losses[0] - losses[1]) < 0.1


def test_weights_are_rounded_in_one_way(run) -> None:
    result = run("generate", "ROMEO:", "--int8", "--int4")
    assert result.code == 2
    assert "say --int8 or --int4, not both" in result.err


def test_generate_json_holds_the_same_text(run) -> None:
    streamed = run("generate", "ROMEO:", "--seed", "3", "--max-new-tokens", "20")
    result = run("generate", "ROMEO:", "--seed", "3", "--max-new-tokens", "20", "--json")
    fields = json.loads(result.out)
    assert fields["prompt"] + fields["text"] == streamed.out.removesuffix("\n")
    assert fields["n_new_tokens"] <= 20
    assert fields["seed"] == 3
    assert fields["prefill_tokens_per_s"] > 0
    assert fields["decode_tokens_per_s"] > 0


def test_generate_stops_at_the_end_of_the_context(run) -> None:
    result = run("generate", "ROMEO:", "--seed", "1", "--max-new-tokens", "1000", "--json")
    fields = json.loads(result.out)
    assert fields["n_prompt_tokens"] + fields["n_new_tokens"] <= 256


def test_one_of_a_kind_is_singular(run, tmp_path) -> None:
    assert "prefill 1 token at" in (err := run("generate", "a", "--seed", "3", "--max-new-tokens", "1").err)
    assert "decode 1 token at -" in err
    file = tmp_path / "text.txt"
    file.write_text("a")
    assert ": 1 token in windows" in run("eval", str(file)).out
    fastgpt.GPT2LMHeadModel(tiny_config()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert run("verify", str(tmp_path)).out.endswith(" 1 problem\n")


def test_settings_of_a_checkpoint_keep_it_to_one_text(run, tmp_path) -> None:
    command = "generate", "ROMEO:", "--seed", "3", "--max-new-tokens", "20", "--json"
    plain = json.loads(run(*command).out)
    for part in fastgpt.load_demo():
        part.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    searching = {"do_sample": True, "num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True}
    file.write_text(json.dumps(searching | {"output_scores": True}))
    found = json.loads(run(*command, "--model", str(tmp_path)).out)
    assert (found["text"], found["n_new_tokens"]) == (plain["text"], plain["n_new_tokens"])
    word = plain["text"].split()[2]
    file.write_text(json.dumps({"stop_strings": [word]}))
    stopped = json.loads(run(*command, "--model", str(tmp_path)).out)["text"]
    assert word in stopped
    assert plain["text"].startswith(stopped)
    assert len(stopped) < len(plain["text"])


def test_greedy_needs_no_seed(run) -> None:
    texts = {run("generate", "ROMEO:", "--temperature", "0", "--max-new-tokens", "8").out for _ in range(2)}
    assert len(texts) == 1


def test_prompt_lookup_gives_the_same_text_in_fewer_forwards(run, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, decode = [], engine.decode_tokens
    monkeypatch.setattr(engine.lookup, "decode_tokens", lambda *call: sizes.append(call[2].shape[1]) or decode(*call))
    command = "generate", "ROMEO:", "--temperature", "0", "--max-new-tokens", "40", "--dtype", "float32"
    plain = run(*command)
    assert sizes == []
    assert run(*command, "--prompt-lookup", "5").out == plain.out
    assert max(sizes) == 6
    assert len(sizes) < 39
    assert run(*command, "--prompt-lookup", str(10**30)).out == plain.out


def test_bench_of_several_dtypes_and_batches(run, tmp_path) -> None:
    file = tmp_path / "result.json"
    lists = "--dtype", "float32, bfloat16", "--batch", "1, 2,1"
    command = ["bench", "--model", "demo", *lists, "--workload", "prefill"]
    result = run(*command, "--prompt-tokens", "8", "--baselines", "hf-sdpa", "--runs", "5", "--json", str(file))
    assert result.code == 0
    written = json.loads(file.read_text())
    assert written["environment"]["versions"]["torch"] == torch.__version__
    measured = {
        (dtype, part, inner["options"]["dtype"], inner["options"]["batch"])
        for dtype in ("float32", "bfloat16")
        for part, inner in written[dtype].items()
    }
    assert measured == {(d, f"batch {n}", d, n) for d in ("float32", "bfloat16") for n in (1, 2)}
    assert result.out.count("demo (demo weights), bfloat16 on cpu") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "word " * 400], ["tokens", "context is 256"]),
        (["generate", ""], ["prompt is empty"]),
        (["generate", "hi", "--model", "nobody/no-such-model"], ["nobody/no-such-model", "directory", "--model demo"]),
        (["params", "gpt2-xxl"], ["gpt2-xxl", "gpt2-xl"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_work_that_fails_is_one_line_and_exit_1(run, arguments: list[str], words: list[str]) -> None:
    assert_one_line_error(run(*arguments), 1, *words)


def test_directory_without_weights(run, tmp_path) -> None:
    assert_one_line_error(run("generate", "hi", "--model", str(tmp_path)), 1, str(tmp_path))
    tiny_config().save_pretrained(tmp_path)
    assert_one_line_error(run("generate", "hi", "--model", str(tmp_path)), 1, str(tmp_path), "safetensors")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        *(
            (["--wrong"], "--wrong"),
            (["generate", "hi", "--wrong"], "--wrong"),
            (["generate"], "Missing argument"),
            (["wrong"], "wrong"),
        ),
        (["generate", "hi", "--max-new-tokens", "no"], "--max-new-tokens"),
        (["generate", "hi", "--prompt-lookup", "0"], "--prompt-lookup"),
        (["generate", "hi", "--temperature", "-1"], "--temperature"),
        (["generate", "hi", "--temperature", "nan"], "--temperature"),
        (["generate", "hi", "--temperature", "1e-38"], "temperature must be 1e-30 or more"),
        (["generate", "hi", "--top-p", "1.5"], "--top-p"),
        (["generate", "hi", "--top-p", "nan"], "top"),
        (["generate", "hi", "--top-k", "-2"], "--top-k"),
        (["generate", "hi", "--seed", str(2**64)], "--seed"),
        (["generate", "hi", "--dtype", "float8"], "float8"),
        (["generate", "hi", "--device", "meta"], "meta"),
        (["generate", "hi", "--device", "tpu9"], "tpu9"),
        (["doctor", "--device", "tpu9"], "tpu9"),
        (["doctor", "--model", "demo"], "--measure"),
        (["generate", "h\udcff"], "not UTF-8"),
        (["eval", "/"], "/ is a directory: give a text file"),
        (["verify", ""], "the path is empty"),
        (["train", "", "--out", "run"], "the path is empty"),
        (["train", "/", "--out="], "the path is empty"),
        (["bench", "--batch", "two"], "two"),
        (["bench", "--prompt-tokens", "1"], "--prompt-tokens"),
        (["bench", "--batch", "1,0"], "batch must be 1 or more, not 0"),
        (["bench", "--workload", "sleep"], "sleep"),
        (["bench", "--baselines", "magic"], "magic"),
        (["bench", "--dtype", ""], "unknown dtype ''"),
        (["bench", "--model", "demo", "--batch", "1,2", "--profile", "trace.json"], "--profile"),
        (["params", "gpt2", "--context", "5000"], "5000"),
        (["params", "gpt2", "--bandwidth", "inf"], "bandwidth"),
        (["params", "gpt2", "--matrix-rate", "nan"], "matrix_rate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line_and_exit_2(run, arguments: list[str], word: str) -> None:
    assert_one_line_error(run(*arguments), 2, "--help", word)


def test_without_a_command_the_help_is_shown(run) -> None:
    result = run()
    assert (result.code, result.err) == (0, "")
    assert result.out.lstrip().startswith("Usage: fastgpt")
    assert result.out == run("--help").out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_version(run) -> None:
    result = run("--version")
    assert (result.code, result.out) == (0, f"fastgpt {fastgpt.__version__}\n")


def test_a_device_that_is_not_here(run) -> None:
    assert_one_line_error(run("generate", "hi", "--device", "cuda"), 2, "CUDA", "--device cpu")


def test_what_follows_two_dashes_is_a_prompt(run) -> None:
    result = run("generate", "--max-new-tokens", "1", "--debug", "--", "--debug")
    assert result.code == 0
    assert result.out.startswith("--debug")


def test_an_interrupt_ends_in_one_line_and_the_next_call_is_right(run, monkeypatch) -> None:
    command = "generate", "ROMEO:", "--temperature", "0", "--max-new-tokens", "8"
    expected, decode, calls = run(*command).out, engine.decode_one_token, []

    def interrupted(*call):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*call)

    model, tokenizer = fastgpt.load_demo()
    ids = tokenizer("ROMEO:", return_tensors="pt").input_ids
    monkeypatch.setattr(engine.host_loop, "decode_one_token", interrupted)
    result = run(*command)
    assert (result.code, result.err) == (130, "error: interrupted\n")
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0]) == expected.removesuffix("\n")


@pytest.mark.parametrize("value", ["nonsense", ""])
def test_wrong_backend_in_the_environment(value: str) -> None:
    environment = {"FASTGPT_BACKEND": value}
    wrong = in_process(["generate", "hi"], stdout=subprocess.PIPE, environment=environment)
    doctor = in_process(["doctor", "--json"], stdout=subprocess.PIPE, environment=environment)
    out, err = wrong.communicate(timeout=120)
    assert (wrong.returncode, out, err.count("\n")) == (2, "", 1)
    assert f"unknown backend '{value}'" in err
    out, err = doctor.communicate(timeout=120)
    assert (doctor.returncode, err) == (1, "")
    diagnosis = json.loads(out)
    assert diagnosis["backend_setting"] == value
    told = [operation["reason"] for operation in diagnosis["operations"].values()]
    for text in (*told, diagnosis["generate"], diagnosis["parity"]["obstacle"]):
        assert f"unknown backend '{value}'" in text


def test_doctor_explains_kernels_that_cannot_run(run, monkeypatch) -> None:
    def kernel(operation: str):
        raise KernelUnavailableError("no kernel on this machine")

    monkeypatch.setattr("fastgpt_kernels.kernel", kernel)
    with fastgpt.backend("triton"):
        result = run("doctor", "--device", "cpu", "--json")
    diagnosis = json.loads(result.out)
    assert result.code == 1
    assert diagnosis["parity"]["obstacle"] == "no kernel on this machine"
    assert diagnosis["operations"]["layer_norm"] == {"backend": "none", "reason": "no kernel on this machine"}


def test_a_missing_head_is_told(run, tmp_path, caplog) -> None:
    _, tokenizer = fastgpt.load_demo()
    tokenizer.save_pretrained(tmp_path)
    fastgpt.GPT2Model(tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=False)).save_pretrained(tmp_path)
    assert run("generate", "ROMEO:", "--model", str(tmp_path), "--max-new-tokens", "2").code == 0
    assert "lm_head.weight" in caplog.text
    caplog.clear()
    fastgpt.GPT2Model(tiny_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    assert run("generate", "ROMEO:", "--model", str(tmp_path), "--max-new-tokens", "2").code == 0
    assert "lm_head.weight" not in caplog.text


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="gpt2-xxl"):
        cli.main(["params", "gpt2-xxl", "--debug"])


def test_params(run) -> None:
    assert json.loads(run("params", "gpt2-xl", "--json").out)["total"] == 1_557_611_200
    table = run("params", "gpt2")
    assert table.code == 0
    assert "124,439,808" in table.out


def test_verify(run, tmp_path) -> None:
    fastgpt.GPT2LMHeadModel(tiny_config()).save_pretrained(tmp_path)
    result = run("verify", str(tmp_path), "--json")
    assert result.code == 0
    assert json.loads(result.out)["problems"] == []
    assert run("verify", str(tmp_path)).code == 0
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run("verify", str(tmp_path))
    assert result.code == 1
    assert "model.safetensors" in result.out + result.err


def test_doctor(run) -> None:
    result = run("doctor", "--device", "cpu", "--json")
    diagnosis = json.loads(result.out)
    assert result.code == 0
    assert diagnosis["parity"]["passed"]
    assert diagnosis["operations"]["causal_attention"]["backend"] == "torch"
    assert diagnosis["device_name"]
    assert "torch" in run("doctor", "--device", "cpu").out


def test_doctor_fails_when_the_answers_are_wrong(run, monkeypatch: pytest.MonkeyPatch) -> None:
    layer_norm = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda *arguments: layer_norm(*arguments) * 1.001)
    result = run("doctor", "--device", "cpu")
    assert result.code == 1
    assert "FAILED" in result.out
