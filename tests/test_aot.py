"""Steps compiled for machines that are not here: targets, shapes, memory by part; the big ones are slow."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec

import jax
import pytest
from commands import adaptrm, in_process
from refusals import refused
from tiny import tiny_causal_lm, tiny_config

from adaptrm.config import config_folder, load_options
from adaptrm.hf.load import abstract_model
from adaptrm.models import CausalLM, SequenceClassifier
from adaptrm.models.known import KNOWN
from adaptrm.parallel import make_mesh
from adaptrm.plan import CHIPS, devices_of, measure, score_step, shapes_of, steps_of, train_step

SHIPPED = sorted(config_folder().glob("*.yaml"))
# Parameters by the model cards: of the language model, and of the reward model with a head of one label.
COUNTS = {
    "meta-llama/Llama-3.1-8B-Instruct": (CausalLM, 8_030_261_248),
    "meta-llama/Llama-3.2-3B": (CausalLM, 3_212_749_824),
    "meta-llama/Meta-Llama-3-70B-Instruct": (CausalLM, 70_553_706_496),
    # Without the head over the vocabulary; a row for the pad token and a head of one label more.
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": (SequenceClassifier, 8_030_261_248 - 128256 * 4096 + 2 * 4096),
}


@pytest.mark.parametrize("name", COUNTS)
def test_known_shapes_make_the_published_number_of_parameters(name):
    model_type, count = COUNTS[name]
    _, abstract = abstract_model(model_type, KNOWN[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == count


@pytest.mark.parametrize("target", ["", "h100", "h100:", "h100:0", "h100:-8", "v5p", "v5p:2x", "v5p:x2", "v9:2x2", "8"])
def test_a_target_that_is_none_is_an_error_that_lists_what_there_is(target):
    message = refused(devices_of, target)
    assert message.startswith(f"--target {target}: ") and "v5p:2x2x2" in message and "known: v5e" in message


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("h100:12", "give the number of GPUs: up to 8, or a multiple of it"),
        ("h100:2x8", "give the number of GPUs"),
        ("h100:99999", "has 99999 devices; no more than 10000"),
        ("v5p:999x999x999", "has 997002999 devices"),
    ],
)
def test_numbers_of_devices_that_cannot_be_are_errors(target, message):
    assert message in refused(devices_of, target)


@pytest.mark.parametrize(("target", "extra"), [("v5p:2x2x2", "tpu"), ("h100:8", "cuda")])
def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys, target, extra):
    if find_spec("libtpu" if extra == "tpu" else "jax_cuda13_plugin"):
        pytest.skip(f"this environment can compile for {target}")
    code, out, err = in_process(monkeypatch, capsys, "plan", "reward-llama31-8b", "--target", target)
    assert (code, out) == (2, "")
    assert err == f"adaptrm: --target {target}: this jax cannot compile for {extra}; pip install 'adaptrm[{extra}]'\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_causal_lm(tmp_path_factory.mktemp("aot") / "lm", vocab_size=512)


def options(verb: str, folder, **overrides):
    return load_options("tiny", verb, {"model.scratch": None, "model.pretrained": str(folder)} | overrides)


def test_shapes_come_from_a_folder_or_the_table_and_never_from_the_hub(folder):
    found = shapes_of("here: reward", options("reward", folder).model)
    assert found == tiny_config(vocab_size=512)
    known = options("reward", "meta-llama/Llama-3.2-3B").model
    assert shapes_of("here: reward", known).hidden_size == 3072
    message = refused(shapes_of, "here: reward", options("reward", "owner/name").model)
    assert message.startswith("here: reward.model.pretrained: the shapes of owner/name are not known here")
    assert "meta-llama/Llama-3.2-3B" in message
    nothing = options("reward", folder, **{"model.pretrained": None}).model
    assert "here: reward.model.pretrained is missing" in refused(shapes_of, "here: reward", nothing)


def test_parts_are_what_the_program_is_given(folder):
    """On the CPU devices of the tests: what XLA holds as arguments is what the parts add up to."""
    chip = CHIPS["v5e"]
    steps = dict(steps_of("here", "judge", options("judge", folder), jax.devices()))
    assert list(steps) == ["train judge", "score"]
    found = {name: measure(step, chip) for name, step in steps.items()}
    for name, figures in found.items():
        parts = sum(figures.get(part, 0) for part in ("parameters", "optimizer", "batch"))
        # jit drops what a loss does not read, and the step has counters.
        assert figures["arguments"] == pytest.approx(parts, rel=0.01), name
        assert figures["fits"] and figures["temporaries"] > 0 and figures["compiler_flops"] > 0
        assert figures["rows"] == 8 and figures["row_length"] == 128
    train, score = found["train judge"], found["score"]
    assert train["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    # Both moments of AdamW in float32; norms are small enough to forget.
    assert train["optimizer"] == pytest.approx(2 * train["parameters"], rel=1e-3)
    assert score["parameters"] * 2 == train["parameters"]
    assert train["flops"] == 3 * score["flops"]


def test_a_step_of_so_many_pairs_is_planned_with_a_row_each(folder):
    mesh = make_mesh(1, 4, 1, devices=jax.devices()[:4])
    given = options("reward", folder, **{"data.exact_batch": True, "data.pairs_per_step": 6})
    step = train_step("reward", given, tiny_config(), mesh)
    assert step.shape == (8, 128)  # six pairs, and rows in multiples of the devices
    assert step.parts["batch"]["leaves"].shape == (8, 2)


def test_an_adapter_has_a_label_for_each_rule_of_its_pool(folder):
    given = options("judge", folder, **{"data.rules": "safety-24"})
    step = train_step("adapter", given, tiny_config(), make_mesh())
    assert step.parts["parameters"]["score"]["weight"].shape == (24, 32)
    assert step.parts["batch"]["targets"].shape == (8, 2, 24)
    with jax.set_mesh(step.mesh):
        step.jitted.lower(*step.arguments)


def test_adapters_are_trained_over_a_model_in_the_dtype_of_the_computation(folder):
    given = options("reward", folder, **{"model.lora.rank": 4, "model.dtype": "bfloat16"})
    step = train_step("reward", given, tiny_config(), make_mesh())
    state, _ = step.arguments
    assert {x.dtype.name for x in jax.tree.leaves(state.frozen)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
    with jax.set_mesh(step.mesh):
        step.jitted.lower(*step.arguments)


def products_of(step) -> list[str]:
    """The matrix products of a lowered step, where nobody has asked for a precision."""
    with jax.set_mesh(step.mesh), jax.default_matmul_precision("default"):
        text = step.jitted.trace(*step.arguments).lower().as_text()
    return re.findall(r"stablehlo\.dot_general .*", text)


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("verb", ["reward", "judge"])
def test_products_of_float32_are_float32_on_every_platform(folder, verb, lora):
    """A TPU or a GPU would round the operands, and nothing here would show it."""
    given = options(verb, folder, **{"model.lora.rank": lora} if lora else {})
    assert given.model.dtype == "float32"
    step = train_step(verb, given, tiny_config(), make_mesh(devices=jax.devices()[:1]))
    assert len(products := products_of(step)) > 20 and all("f32>" in line for line in products)
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []


def test_so_are_those_that_score_in_float32_and_only_those():
    step = score_step(128, tiny_config(), make_mesh(devices=jax.devices()[:1]))
    definition, answers, _, params, *batch = step.arguments
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), params)
    exact = replace(step, arguments=(definition, answers, "float32", wide, *batch))
    for of, wanted in ((exact, "HIGHEST"), (step, "DEFAULT")):
        assert len(products := products_of(of)) > 8  # the last layer's attention is one of its own
        assert [line for line in products if f"precision = [{wanted}, {wanted}]" not in line] == []


def test_a_judge_scores_split_and_in_int8(folder):
    whole, narrow = (score_step(128, tiny_config(), make_mesh(tensor=2), quantize) for quantize in (None, "int8"))
    assert narrow.shape == whole.shape == (4, 128) and narrow.flops == whole.flops  # a row for two devices
    layers = narrow.parts["parameters"]["model"]["layers"]
    assert (layers["mlp"]["up_proj"]["weight"].dtype, layers["mlp"]["up_proj"]["scale"].dtype) == ("int8", "float32")
    assert (
        layers["input_layernorm"]["weight"].dtype == narrow.parts["parameters"]["lm_head"]["weight"].dtype == "bfloat16"
    )
    with jax.set_mesh(narrow.mesh):
        narrow.jitted.lower(*narrow.arguments)
    message = refused(lambda: list(steps_of("here", "judge", options("judge", folder), jax.devices(), tensor=3)))
    assert message == "--tensor 3: mesh data=1 x fsdp=2 x tensor=3 needs 6 devices, there are 8"


def test_what_does_not_fit_is_told(folder):
    step = score_step(128, tiny_config(), make_mesh())
    assert not measure(step, replace(CHIPS["v5e"], memory=1000))["fits"]


def test_a_mesh_that_does_not_fit_the_target_is_an_error(folder):
    given = options("reward", folder, **{"mesh.tensor": 3})
    message = refused(lambda: list(steps_of("here: reward", "reward", given, jax.devices())))
    assert message.startswith("here: reward: mesh data=1") and "there are 8" in message


# Minutes and up to eight gigabytes of memory each: pytest -m aot_tpu, pytest -m aot_gpu.
HEADERS = {file.stem: re.findall(r"^# Targets.*: (.+)$", file.read_text(), re.M) for file in SHIPPED}


def test_every_large_config_names_its_targets():
    large = {name for name in HEADERS if re.search(r"-\d+b\b", name)}
    assert large == {name for name, targets in HEADERS.items() if targets}
    eights = {name for name in large if name.startswith("reward-") and name.endswith("-8b")}
    assert len(eights) >= 2
    for name in eights:
        assert HEADERS[name] == ["v5p:2x2x2 v5e:4x4 v6e:2x4 h100:8"]


def cases(platform: str) -> list:
    """Every config with every target of a platform that its header names, and which of its steps."""
    found = []
    for file in SHIPPED:
        header = r"^# Targets(?: to (\w+(?: --\w+ \w+)*))?(?: \(.*\))?: (.+)$"
        for step, targets in re.findall(header, file.read_text(), re.M):
            on = [t for t in targets.split() if CHIPS[t.partition(":")[0]].platform == platform]
            name = "-".join([file.stem, *step.replace("--", "").split()])
            found += [pytest.param(file.stem, target, step or "train", id=f"{name}-{target}") for target in on]
    return found


def compiles_and_fits(config: str, target: str, step: str) -> None:
    done = adaptrm("plan", config, "--target", target, "--only", *step.split(), "--json", long=True)
    print(done.stdout)  # what tools/plan_table.py makes a row of
    (step,) = json.loads(done.stdout)["steps"].values()
    parts = sum(step.get(part, 0) for part in ("parameters", "optimizer", "batch"))
    assert step["fits"], step
    assert step["arguments"] == pytest.approx(parts, rel=0.01)
    assert step["peak"] > parts


@pytest.mark.slow
@pytest.mark.aot_tpu
@pytest.mark.parametrize(("config", "target", "step"), cases("tpu"))
def test_tpu_steps_compile_and_fit(config, target, step):
    pytest.importorskip("libtpu", reason="pip install 'adaptrm[tpu]'")
    compiles_and_fits(config, target, step)


@pytest.mark.slow
@pytest.mark.aot_gpu
@pytest.mark.parametrize(("config", "target", "step"), cases("cuda"))
def test_gpu_steps_compile_and_fit(config, target, step):
    pytest.importorskip("jax_cuda13_plugin", reason="pip install 'adaptrm[cuda]'")
    compiles_and_fits(config, target, step)
