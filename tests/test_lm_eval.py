"""lm_eval, the real one, runs base + delta on a task file of our own; nothing is downloaded.

This is also the example: `load_model` gives what lm_eval's HFLM takes.
"""

import json
import math

import pytest
import torch
from test_evaluate import folders  # noqa: F401 - a fixture

import bitdelta
from bitdelta.merged_model import load_model

TASK = """
task: one_bit
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""

QUESTIONS = [
    {"question": "How many bits has a sign?", "choices": ["one", "two", "three"], "answer": 0},
    {"question": "Is a scale signed?", "choices": ["yes", "no"], "answer": 1},
    {"question": "What is a delta's base?", "choices": ["a model", "a text", "a plane"], "answer": 0},
    {"question": "The sign of zero is", "choices": ["plus", "minus"], "answer": 0},
]


@pytest.fixture
def task(tmp_path, monkeypatch):
    """lm_eval, and a manager that knows the task file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm_eval[hf]' to run it")
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm_eval without its extras")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "one_bit.yaml").write_text(TASK.format(questions=questions))
    return lm_eval, tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)


def run(task, base, delta):
    from lm_eval.models.huggingface import HFLM

    lm_eval, manager = task
    model, tokenizer = load_model(base, delta)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["one_bit"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    return found, model, tokenizer


def test_lm_eval_scores_base_and_delta(folders, task):
    found, model, tokenizer = run(task, folders / "base", folders / "delta")
    assert found["results"]["one_bit"]["sample_len"] == len(QUESTIONS)
    right = 0
    for sample in found["samples"]["one_bit"]:
        question = QUESTIONS[sample["doc_id"]]
        scores = [
            likelihood(model, tokenizer, question["question"], choice) for choice in question["choices"]
        ]
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(scores, rel=1e-3)
        right += max(range(len(scores)), key=scores.__getitem__) == question["answer"]
    assert found["results"]["one_bit"]["acc,none"] == right / len(QUESTIONS)


def likelihood(model, tokenizer, question, choice):
    """log p(" " + choice | question)."""
    context, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return math.fsum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole)))


def test_what_it_scores_is_what_merge_writes(folders, task, tmp_path):
    bitdelta.merge(folders / "base", folders / "delta", tmp_path / "merged")
    ours, _, _ = run(task, folders / "base", folders / "delta")
    merged, _, _ = run(task, tmp_path / "merged", None)
    base, _, _ = run(task, folders / "base", None)
    answers = [
        [sample["filtered_resps"] for sample in found["samples"]["one_bit"]] for found in (ours, merged, base)
    ]
    assert answers[0] == answers[1] != answers[2]
