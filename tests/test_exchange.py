"""lm-eval and TransformerLens on an exported folder: scores and logits are ours. `make exchange` installs both."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_folders import write_run

from model import checkpoint, choices, hf
from model.choices import Choice
from model.evaluate import bits_per_byte, evaluate
from model.tokenizer import TrainedTokenizer

ROOT = Path(__file__).parent.parent
QUESTIONS, TEXT = "tests/lm-eval/questions.jsonl", "Book/the-winter-light.txt"
COMMAND = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("lm_eval "))
C = 64  # context
ODD = [  # spaces at the cut, a context that does not fit, characters of several bytes
    {"ctx": "The tide  ", "endings": ["came in.", " did not"], "label": 1},
    {"ctx": "It rained, and the fog came, and the bell rang. " * 9, "endings": ["Then\nit stopped.", "!"], "label": 0},
    {"ctx": "Moss said", "endings": ["“é” 中🙂", "nothing."], "label": 0},
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def package(name: str, module: str):
    """The module; skips the test where its package is missing."""
    return pytest.importorskip(module, reason=f"needs the {name} package: make exchange installs it")


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """What the README's command needs: the tasks with their files, and a folder that is exported."""
    here = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "tests/lm-eval", here / "tests/lm-eval")
    with (here / QUESTIONS).open("a") as file:
        file.writelines(json.dumps(question) + "\n" for question in ODD)
    text = (ROOT / TEXT).read_text()[:8000] + "“é” 中🙂"
    (here / TEXT).parent.mkdir()
    (here / TEXT).write_text(text)
    torch.manual_seed(0)
    write_run(here / "run", TrainedTokenizer.train([text], 400), n_positions=C)
    hf.export(here / "run", here / "first-run-hf")
    return here


@pytest.fixture(scope="module")
def model(here):
    return checkpoint.load_model(here / "run")


@pytest.fixture(scope="module")
def scored(here):
    """What lm-eval finds: {task: {metric: value}}, {task: [sample]}."""
    package("lm-eval", "lm_eval")
    argv = [sys.executable, "-m", *shlex.split(COMMAND), "--output_path", "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(here / "cache")}
    done = subprocess.run(argv, cwd=here, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = here.glob("out/*/results_*.json")
    samples = {}
    for task in ("questions", "text"):
        (path,) = here.glob(f"out/*/samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(results.read_text())["results"], samples


def test_questions_are_answered_as_by_lm_eval(here, model, scored):
    results, samples = scored
    model, tokenizer = model
    questions, endings = choices.load(here / QUESTIONS, tokenizer, C)
    sums = choices.log_probs(model, endings, batch_size=16)
    theirs = [[float(log_p) for log_p, _ in sample["filtered_resps"]] for sample in samples["questions"]]
    np.testing.assert_allclose(sums, np.concatenate(theirs), atol=1e-3, rtol=0)
    found = choices.accuracy(questions, sums)
    assert found.acc == results["questions"]["acc,none"] != found.acc_norm == results["questions"]["acc_norm,none"]
    for question, sample in zip(questions, samples["questions"], strict=True):
        own, sums = np.split(sums, [len(question.endings)])
        found = choices.accuracy([question], own)
        assert (found.acc, found.acc_norm) == (sample["acc"], sample["acc_norm"])


def test_text_is_measured_as_by_lm_eval(here, model, scored):
    """Whole windows are the same if the text begins with the end of text; the last one of lm-eval is full."""
    results, samples = scored
    model, tokenizer = model
    text = (here / TEXT).read_text()
    ids = np.array([tokenizer.eot_id, *tokenizer.encode(text)])
    n = len(ids) - 1
    n_last = n % C
    assert n_last
    whole = evaluate(model, ids[: n - n_last + 1], context=C, batch_size=16) * (n - n_last)
    last = -choices.log_probs(model, [Choice(ids[-C - 1 :], n_last)], batch_size=1)[0]
    assert whole + last == pytest.approx(-float(samples["text"][0]["filtered_resps"][0]), abs=1e-3)
    n_bytes = len(text.encode())
    theirs = results["text"]["bits_per_byte,none"]
    assert theirs == pytest.approx(bits_per_byte((whole + last) / n, n, n_bytes), rel=1e-6)
    # python -m model.evaluate RUN --data FILE: the text alone, and a last window of the tokens that are left
    assert theirs == pytest.approx(
        bits_per_byte(evaluate(model, ids[1:], context=C, batch_size=16), n, n_bytes), rel=0.005
    )


def test_lines_of_hellaswag_are_read_as_by_lm_eval(tmp_path):
    task = package("lm-eval", "lm_eval.tasks.hellaswag.utils")
    line = {
        "activity_label": "Mending  nets",
        "ctx_a": "[header] How to mend [title] Find the hole [step] first.",
        "ctx_b": "the Keeper  then",
        "endings": [" cuts [substeps] it. [title] Out", "sits down.  "],
        "label": "1",
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    ((_, question),) = choices.read_questions(tmp_path / "q.jsonl")
    (theirs,) = task.process_docs(task.datasets.Dataset.from_list([line]))
    assert [question.context, list(question.endings), question.label] == [
        theirs[name] for name in ("query", "choices", "gold")
    ]


def test_transformer_lens_computes_our_logits(here, model):
    lens = package("transformer-lens", "transformer_lens.model_bridge")
    model, tokenizer = model
    bridge = lens.TransformerBridge.boot_transformers(str(here / "first-run-hf"), device="cpu")
    text = "They lifted Etta Swale on to the Tinker in a coal net"
    ids = bridge.to_tokens(text, prepend_bos=False)
    assert ids.tolist() == [tokenizer.encode(text)]
    with torch.no_grad():
        logits = model(ids)[0]
        assert logits.std() > 0.1
        torch.testing.assert_close(bridge(ids), logits, atol=1e-4, rtol=0)
        bridge.enable_compatibility_mode()  # weights as in its HookedTransformer: LayerNorm folded in, centred
        torch.testing.assert_close(bridge(ids).log_softmax(-1), logits.log_softmax(-1), atol=1e-4, rtol=0)
