"""The finished student under lm-evaluation-harness, as any other Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddk_train.job import train
from tests.helpers import Configure, jsonl

TASK = """
task: ddk_letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {data}.cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_student_runs_under_the_evaluation_harness(configure: Configure, tmp_path: Path) -> None:
    harness = pytest.importorskip("lm_eval", reason="lm_eval is not installed; it is large")
    from lm_eval.tasks import TaskManager

    run = train(configure(steps=60, interval=60, lr=1e-2, weighting="uniform"))
    # The student has read two alphabets: after some of one comes more of it.
    questions = [("abc d", "e", "x"), ("xyz z", "y", "b"), ("cab e", "a", "z"), ("zzy x", "x", "c")]
    lines = [
        {"question": text, "choices": [good, bad][:: 1 - 2 * (n % 2)], "answer": n % 2}
        for n, (text, good, bad) in enumerate(questions)
    ]
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "test.jsonl"
    data.write_text(jsonl(lines))
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK.format(data=data))
    found = harness.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(run.student), "device": "cpu", "dtype": "float32"},
        tasks=["ddk_letters"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )
    assert found["results"]["ddk_letters"]["acc,none"] >= 0.75
