"""Configs that cannot be, or that ask for what the decoder does not compute: one line each, which names the field."""

import re

import pytest
from refusals import refused
from tiny import LLAMA3, tiny_config

from adaptrm.errors import InputError
from adaptrm.models import ModelConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization_config", {"quant_method": "gptq"}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
        ("is_causal", False),
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_a_field_in_force_is_an_error_that_names_it(name, value):
    raw = tiny_config().to_hf()
    assert ModelConfig.from_hf(raw) == tiny_config()
    message = refused(ModelConfig.from_hf, raw | {name: value}, "here")
    assert re.match(f"here: {name} = .* is in force and not implemented", message)


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("llama", {"sliding_window": 1024}, "1024 is"),
        ("mistral", {"sliding_window": 4096}, "4096 is"),
        ("mistral", {"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, "4096 is"),
        ("mistral", {"sliding_window": ...}, "4096, the family's default where it is absent, is"),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, "8 is"),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, "8 is"),
    ],
)
def test_a_sliding_window_in_force_is_an_error(family, fields, named):
    raw = tiny_config(model_type=family).to_hf() | fields
    message = refused(ModelConfig.from_hf, {name: value for name, value in raw.items() if value is not ...}, "here")
    assert message.startswith(f"here: sliding_window = {named} in force and not implemented")


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope"])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_other_rope_types_are_errors(kind, field):
    spelling = "rope_type" if kind != "linear" else "type"
    with pytest.raises(InputError, match=f"rope_type '{kind}' is in force"):
        ModelConfig.from_hf(tiny_config().to_hf() | {field: {spelling: kind, "factor": 4.0}})


def test_a_partial_rotary_factor_among_the_rope_parameters_is_an_error():
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(InputError, match="partial_rotary_factor"):
        ModelConfig.from_hf(tiny_config().to_hf() | {"rope_parameters": rope})


def test_rope_parameters_by_layer_type_are_an_error():
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert "rope_parameters.full_attention = " in refused(
        ModelConfig.from_hf, tiny_config(model_type="qwen3").to_hf() | {"rope_parameters": rope}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: "),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive number"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1; it must be a positive number"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0; it must be a positive number"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type \\['llama'\\] is not supported"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a whole number"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5; it must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True; it must be a whole number"),
        ({"vocab_size": float("inf")}, "vocab_size is inf; it must be a whole number"),
        ({"vocab_size": -448}, "vocab_size is -448; it must be a positive number of usual size"),
        ({"hidden_size": 10**30}, "hidden_size is 10+; it must be a positive number of usual size"),
        ({"hidden_size": 10**4000}, "hidden_size is 10+\\.\\.\\.0+; it must be a positive number of usual size"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers is 1073741824; it must be a positive number of usual size"),
        ({"hidden_size": 2**23, "intermediate_size": 2**23}, "sizes make a model of more than 1e\\+12 parameters"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be positive and finite"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; it must be positive and finite"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be positive and finite"),
        ({"rope_theta": 10**400}, "rope_theta is 10+.*; it must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Own"}}, "auto_map names code for the model; such code is never"),
        ({"auto_map": "code.Own"}, "auto_map names code for the model"),
        ({"rope_scaling": "abc"}, "rope_scaling is 'abc'; it must be an object"),
        ({"rope_scaling": [1]}, "rope_scaling is \\[1\\]; it must be an object"),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta is '1e4'; it must be a number"),
        ({"rope_scaling": {"rope_type": "llama3", **vars(LLAMA3), "factor": 0.0}}, "factor is 0.0; it must be pos"),
        ({"rope_scaling": {"rope_type": "llama3", **vars(LLAMA3), "high_freq_factor": 1}}, "1.0 must be above low"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "field 'low_freq_factor' is missing"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(change, message):
    assert re.search(message, refused(ModelConfig.from_hf, tiny_config().to_hf() | change))


def test_a_missing_field_is_an_error():
    raw = tiny_config().to_hf()
    del raw["intermediate_size"]
    with pytest.raises(InputError, match="field 'intermediate_size' is missing"):
        ModelConfig.from_hf(raw)
