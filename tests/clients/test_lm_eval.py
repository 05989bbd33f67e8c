"""lm-evaluation-harness on local tasks: likelihoods, rolling likelihoods and generated answers."""

import json
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval")

QUESTIONS = [
    {"question": "ROMEO: I am", "choices": ["gone", "the sun and moon"], "answer": 0, "text": "My lord, I will go."},
    {
        "question": "KING: My",
        "choices": ["lord,", "no", "way to him"],
        "answer": 1,
        "text": "What say you? He is dead",
    },
    {"question": "JULIET: O", "choices": ["death", "Romeo, Romeo"], "answer": 1, "text": "Speak, thou wretched man!"},
]
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def test_harness_on_local_tasks(demo_pair, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(questions)}}, "test_split": "test"}
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name} | data | task))  # which is YAML too
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    *models, tokenizer = demo_pair()
    responses = []
    for model in models:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu")
        result = lm_eval.simple_evaluate(harness, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0)
        samples = result["samples"]
        likelihoods = [
            response[0] if isinstance(response, tuple) else response
            for task in ("choice", "text")
            for sample in samples[task]
            for responses_of_one in sample["resps"]
            for response in responses_of_one
        ]
        responses.append((likelihoods, [sample["resps"] for sample in samples["answer"]]))
    (theirs, their_answers), (ours, our_answers) = responses
    assert len(theirs) == 7 + 3, "seven choices and three texts"
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert our_answers == their_answers
