"""A folder as on the Hub: with the code it loads where only torch and transformers are, without it no code runs."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import running_hub
from safetensors.torch import load_file
from test_modeling_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxForCausalLM
from modeling_fox.convert import convert
from modeling_fox.hub_fox import add_code

ROOT = Path(__file__).resolve().parents[1]
CODE = {
    f"{name}_fox.py"
    for name in (
        "attention",
        "cache",
        "configuration",
        "conversion",
        "eviction",
        "generation",
        "graphed",
        "hub",
        "masks",
        "modeling",
        "modeling_heads",
        "parallel",
    )
}

# Refuses our packages, and all that transformers does not need itself, even if they are installed.
ELSEWHERE = """
import sys
HIDDEN = {"modeling_fox", "fox_kernels", "fox_training", "fox_rl", "triton", "accelerate", "kernels", "datasets"}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, *args)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

source, again, given, answer = sys.argv[1:]
tokens, results = torch.load(given), {}
for name in ("eager", "sdpa"):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, attn_implementation=name)
    with torch.no_grad():
        results[name] = model(tokens, use_cache=False).logits
    results["text", name] = model.generate(tokens, max_new_tokens=8, do_sample=False)
    results["static", name] = model.generate(tokens, max_new_tokens=8, do_sample=False, cache_implementation="static")
try:
    model.set_attn_implementation("fox_acp")
except ImportError as error:
    results["fox_acp"] = str(error)
model.set_attn_implementation("sdpa")
model.save_pretrained(again)
for auto_class in (AutoModel, AutoModelForSequenceClassification):
    results[auto_class.__name__] = type(auto_class.from_pretrained(again, trust_remote_code=True)).__module__
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
results["tokens"] = tokenizer("a\\nb").input_ids
torch.save(results, answer)
"""


def test_a_folder_with_the_code_loads_where_only_torch_and_transformers_are(tmp_path):
    model, tokens = tiny_fox(attn_implementation="eager", pad_token_id=0), random_tokens(2, 12)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    text = model.generate(tokens, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path / "plain")
    write_tokenizer(tmp_path / "plain")
    convert(str(tmp_path / "plain"), tmp_path / "source", with_code=True)
    assert {file.name for file in (tmp_path / "source").glob("*.py")} == CODE | {"tokenization_fox.py"}
    torch.save(tokens, tmp_path / "tokens.pt")
    paths = [str(tmp_path / name) for name in ("source", "again", "tokens.pt", "answer.pt")]
    environment = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ELSEWHERE, *paths]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "answer.pt")
    assert torch.equal(got["eager"], expected)
    torch.testing.assert_close(got["sdpa"], expected, rtol=0, atol=1e-4)
    for name in ("eager", "sdpa"):
        assert torch.equal(got["text", name], text) and torch.equal(got["static", name], text)
    assert got["tokens"] == [256, 97, 92, 110, 98]  # the newline as JSON has it
    assert "needs the package fox_kernels" in got["fox_acp"]
    # Saved there it keeps the code, heads included.
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == CODE
    assert all(
        got[name].startswith("transformers_modules") for name in ("AutoModel", "AutoModelForSequenceClassification")
    )


WITH_KERNEL = """
import sys
sys.modules["fox_kernels"] = None
import torch
from transformers import AutoModelForCausalLM

source, given, answer = sys.argv[1:]
tokens, results = torch.load(given), {}
options = {"trust_remote_code": True, "attn_implementation": "someone/fox-kernels"}
try:
    AutoModelForCausalLM.from_pretrained(source, **options)
except ValueError as error:
    results["refused"] = str(error)
model = AutoModelForCausalLM.from_pretrained(source, allow_all_kernels=True, **options)
results["name"] = model.config._attn_implementation
with torch.no_grad():
    results["logits"] = model(tokens, use_cache=False).logits
for cache in ("dynamic", "static"):
    results[cache] = model.generate(tokens, max_new_tokens=8, do_sample=False, cache_implementation=cache)
attention = sys.modules[type(model).__module__.rpartition(".")[0] + ".attention_fox"]
results["operator"] = attention.forgetting_attention.__module__
torch.save(results, answer)
"""


def test_the_operator_comes_from_a_kernel_of_the_hub(tmp_path):
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "get_kernel"):
        pytest.skip("needs `pip install kernels`")
    model, tokens = tiny_fox(attn_implementation="fox_acp", pad_token_id=0), random_tokens(2, 12)
    model.save_pretrained(tmp_path / "source", with_code=True)
    build = [sys.executable, str(ROOT / "kernels" / "build_hub_kernel.py"), str(tmp_path / "kernel")]
    subprocess.run([*build, "--repo-id", "someone/fox-kernels"], check=True, capture_output=True)
    torch.save(tokens, tmp_path / "tokens.pt")
    environment = os.environ | {
        "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "LOCAL_KERNELS": f"someone/fox-kernels={tmp_path / 'kernel'}",
    }  # fmt: skip
    command = [sys.executable, "-c", WITH_KERNEL, *(str(tmp_path / x) for x in ("source", "tokens.pt", "answer.pt"))]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "answer.pt")
    assert "If you trust it, pass `allow_all_kernels=True` too" in got["refused"]
    assert got["name"] == "fox_acp" and got["operator"].startswith("_fox_kernels_cpu_")
    with torch.no_grad():
        assert torch.equal(got["logits"], model(tokens, use_cache=False).logits)
    text = model.generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(got["dynamic"], text) and torch.equal(got["static"], text)


def test_with_the_package_code_in_the_folder_is_never_run(tmp_path):
    model, tokens = tiny_fox(), random_tokens(1, 9)
    model.save_pretrained(tmp_path, with_code=True)
    for file in tmp_path.glob("*.py"):
        file.write_text("raise RuntimeError('this code ran')\n", encoding="utf-8")
    for options in ({}, {"trust_remote_code": True}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert type(loaded) is FoxForCausalLM
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_without_the_code_nothing_points_to_any(tmp_path):
    model = tiny_fox()
    model.save_pretrained(tmp_path / "with", with_code=True)
    model.save_pretrained(tmp_path / "without")
    FoxForCausalLM.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "again")
    for name in ("without", "again"):
        assert not list((tmp_path / name).glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))


def test_code_is_for_the_classes_that_it_holds(tmp_path):
    class MyFox(FoxForCausalLM):
        pass

    with pytest.raises(ValueError, match="`with_code` must be False for a MyFox"):
        tiny_fox(model_class=MyFox).save_pretrained(tmp_path, with_code=True)


def test_code_is_added_to_folders_of_fox_only(tmp_path):
    tiny_fox().save_pretrained(tmp_path / "later")
    tiny_fox().save_pretrained(tmp_path / "at once", with_code=True)
    assert set(add_code(tmp_path / "later")) == CODE | {"config.json"}
    later, at_once = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("later", "at once"))
    assert later == at_once
    with pytest.raises(
        ValueError, match="`folder` must hold a FoX model; the config.json of .* has the model_type None"
    ):
        add_code(tmp_path)
    with pytest.raises(ValueError, match="`with_code` must be False with `to='fla'`"):
        convert(str(tmp_path / "later"), tmp_path / "new", to="fla", with_code=True)


PUSHING = """
import sys
from transformers import AutoModelForCausalLM
from modeling_fox import FoxForCausalLM

model = FoxForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("user/plain")
model.push_to_hub("user/coded", with_code=True)
for name in ("user/plain", "user/coded"):
    again = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert type(again) is FoxForCausalLM and again.lm_head.weight.equal(model.lm_head.weight)
"""
PULLING = """
import sys
sys.modules["modeling_fox"] = sys.modules["fox_kernels"] = None
import torch
from transformers import AutoModelForCausalLM

given, answer = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained("user/coded", trust_remote_code=True, attn_implementation="eager")
with torch.no_grad():
    torch.save(model(torch.load(given), use_cache=False).logits, answer)
"""


def test_pushed_to_a_hub_it_loads_from_there_and_its_code_only_where_it_is_needed(tmp_path):
    model, tokens = tiny_fox(attn_implementation="eager"), random_tokens(2, 12)
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    with running_hub() as (hub, address):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_of_nobody", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "home")}

        def run(script, *names, path=""):
            command = [sys.executable, "-c", script, *(str(tmp_path / name) for name in names)]
            options = {"env": environment | {"PYTHONPATH": path}, "cwd": tmp_path}
            done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

        run(PUSHING, "model", path=os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
        plain = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
        assert {name: set(files) for name, files in hub.repositories.items()} == {
            "user/plain": plain, "user/coded": plain | CODE
        }  # fmt: skip
        # Where this package is imported not even a look is taken at the code there.
        assert any("user/coded/resolve/" in x for x in hub.requests) and not any("_fox.py" in x for x in hub.requests)
        run(PULLING, "tokens.pt", "answer.pt")
        assert {x.rpartition("/")[2] for x in hub.requests if x.startswith("GET") and "_fox.py" in x} == CODE
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "answer.pt"), model(tokens, use_cache=False).logits)


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("sprung",))


def test_pickled_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    tiny_fox().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold safetensors; got .* with pickled weights only"):
        FoxForCausalLM.from_pretrained(folder)
    # Who trusts the file says so, and even then only tensors are read.
    trusted = FoxForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert torch.equal(trusted.lm_head.weight, weights["lm_head.weight"])
    torch.save(weights | {"trap": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        FoxForCausalLM.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(ValueError, match="`weights_only` must be True"):
        FoxForCausalLM.from_pretrained(folder, use_safetensors=False, weights_only=False)
    assert not (tmp_path / "sprung").exists()
