"""As users have it: a wheel in an environment of its own beside Hugging Face's `kernels`, transformers and peft.

torch and the rest come from the environment of the tests, so little is installed: the wheel, and from the package index
setuptools, which builds it, and Hugging Face's kernels.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK_START = re.search(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.S)[1]
HUB_KERNELS = "import kernels; assert hasattr(kernels, 'get_kernel') and 'site-packages' in kernels.__file__;"
TINY = (
    "from transformers import GPT2Config, GPT2LMHeadModel;"
    "config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0);"
    "model = GPT2LMHeadModel(config);"
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # pip takes its time on a busy machine


def _run(*argv, cwd, code=0, **env):
    """A command in a folder; no project on its path but what is installed."""
    ours = ("PYTHON", "TRITON_INTERPRET", "AS_WITH_GPU", "VIRTUAL_ENV", "COVERAGE")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(list(map(str, argv)), cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with an environment in env/, the packages of the tests' own below it, and the wheel in it."""
    here = tmp_path_factory.mktemp("elsewhere")
    venv.create(here / "env", with_pip=False, symlinks=True)
    python = here / "env" / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=here).strip())
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    found = subprocess.run([*pip, "install", "-q", "kernels"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"needs a package index with Hugging Face's kernels: {found.stderr.strip().splitlines()[-1]}")
    source = here / "source"
    for name in ("kernels", "pyproject.toml", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    _run(*pip, "wheel", "-q", "--no-deps", "-w", here, source, cwd=here)
    (wheel,) = here.glob("*.whl")
    _run(*pip, "install", "-q", "--no-deps", wheel, cwd=here)
    (here / "empty").mkdir()
    return here


def test_wheel_holds_one_package_and_needs_little(here):
    code = (
        "import importlib.metadata as m; d = m.distribution('gpt2-kernels');"
        "print({p.parts[0] for p in d.files if 'dist-info' not in str(p)}, [r for r in d.requires if 'extra' not in r])"
    )
    out = _run(here / "env/bin/python", "-c", code, cwd=here / "empty")
    assert "'gpt2_kernels'" in out and "'..'" in out and out.count("'") == 2 * 5, out  # .. is bin/gpt2-kernels


def test_beside_hugging_faces_kernels(here):
    """Each is what it says, operators and all; transformers and peft load and train a model of their own."""
    code = HUB_KERNELS + TINY + (
        "import gpt2_kernels, torch, peft; assert 'site-packages' in gpt2_kernels.__file__;"
        "ids = torch.arange(8)[None]; before = model.eval()(ids).logits;"
        "torch.testing.assert_close(gpt2_kernels.patch(model)(ids).logits, before);"
        "adapted = peft.get_peft_model(model.train(), peft.LoraConfig(target_modules=['c_attn']));"
        "adapted(ids, labels=ids).loss.backward();"
        "names = [name for name in torch._C._dispatch_get_all_op_names() if 'layer_norm_fwd' in name];"
        "print({name.split('::')[0] for name in names})"
    )  # fmt: skip
    assert "{'gpt2_kernels'}" in _run(here / "env/bin/python", "-W", "ignore", "-c", code, cwd=here / "empty")


def test_command_checks_from_any_folder(here):
    command, cwd = here / "env/bin/gpt2-kernels", here / "empty"
    assert "backend auto picks" in _run(command, "info", cwd=cwd)
    assert "python -m bench" in _run(command, "--help", cwd=cwd)
    out = _run(command, "check", "--quick", "--op", "layer_norm", "bias_gelu", cwd=cwd)
    assert re.search(r"^[1-9]\d* comparisons .* all within the rule$", out, re.M), out


def test_quick_start_of_the_readme(here):
    _run(here / "env/bin/python", "-W", "ignore", "-c", QUICK_START, cwd=here / "empty")


def test_from_the_root_of_the_repository(here):
    """There `kernels` is ours: transformers and the benchmarks do not mind, nor that the wheel is there too."""
    python = here / "env/bin/python"
    code = TINY + (
        "from transformers import PreTrainedTokenizerFast, pipeline; from tokenizers import Tokenizer, models;"
        "import kernels, gpt2_kernels, torch;"
        "x, w = torch.randn(2, 4), torch.ones(4);"
        "assert kernels.layer_norm is not gpt2_kernels.layer_norm and not hasattr(kernels, 'get_kernel');"
        "torch.testing.assert_close(kernels.layer_norm(x, w), gpt2_kernels.layer_norm(x, w));"
        "print([torch.ops.kernels.layer_norm_fwd, torch.ops.gpt2_kernels.layer_norm_fwd]);"
        "words = Tokenizer(models.WordLevel({'?': 0, 'a': 1}, unk_token='?'));"
        "words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='?');"
        "pipe = pipeline('text-generation', model=kernels.patch(model), tokenizer=words, device=-1);"
        "assert pipe('a a', max_new_tokens=3)[0]['generated_text'].startswith('a a')"
    )
    assert "gpt2_kernels.layer_norm_fwd" in _run(python, "-W", "ignore", "-c", code, cwd=ROOT)
    out = _run(
        python, "-m", "bench", "train", "--preset", "tiny", "--vocab-size", "65", "--batch", "1", "--context", "8",
        "--provider", "hf", "hf+patch", "--seconds", "0.01", cwd=ROOT,
    )  # fmt: skip
    assert re.search(r"hf\+patch +.*ms", out) and "not here" not in out, out
    _run(python, "train.py", "--help", cwd=ROOT)


def test_an_editable_install_puts_nothing_else_on_the_path(here):
    """What `make` does."""
    env = here / "editable"
    shutil.copytree(here / "env", env, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", env / "bin/python")
    _run(*pip, "install", "-q", "--no-deps", "--force-reinstall", "-e", here / "source", cwd=here)
    for name in ("model", "bench", "train", "tests"):
        _run(env / "bin/python", "-c", f"import {name}", cwd=here / "empty", code=1)
    source = str(here / "source" / "kernels")
    code = HUB_KERNELS + "import gpt2_kernels; print(gpt2_kernels.__file__)"
    assert _run(env / "bin/python", "-c", code, cwd=here / "empty").startswith(source)
