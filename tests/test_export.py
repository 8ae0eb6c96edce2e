"""Exported reward models, read by transformers as other tools read them."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from commands import adaptrm, pair_rows, write_rows
from folders import hf_tensors, raw_tensors, write_folder
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file
from tiny import random_state, tiny_causal_lm, tiny_config, tiny_pairs, tiny_tokenizer

from adaptrm.config import parse_options
from adaptrm.data.chat import DATE, ChatTokenizer, choose_pad_token
from adaptrm.data.preferences import ResponseSet
from adaptrm.errors import InputError
from adaptrm.export import export_run, probe, verify
from adaptrm.models import SequenceClassifier
from adaptrm.models.config import FAMILIES
from adaptrm.parallel import make_mesh
from adaptrm.reward_model import RewardModel
from adaptrm.train.run import train
from adaptrm.train.save import save_model
from adaptrm.train.start import open_run

# A tokenizer puts this before every text, as Llama 3's does with its own.
BEGINNING = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
TEXT_AFTER_BEGINNING = {
    "type": "TemplateProcessing",
    "single": [BEGINNING, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [BEGINNING, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A reward model from a language model whose pad token is its end token, as SmolLM2's is."""
    out = tmp_path_factory.mktemp("export")
    tiny_causal_lm(out / "lm")
    settings = json.loads((out / "lm" / "tokenizer_config.json").read_text())
    (out / "lm" / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": settings["eos_token"]}))
    spec = json.loads((out / "lm" / "tokenizer.json").read_text()) | {"post_processor": TEXT_AFTER_BEGINNING}
    (out / "lm" / "tokenizer.json").write_text(json.dumps(spec))
    write_rows(out / "pairs.jsonl", pair_rows([replace(p, preferred="a") for p in tiny_pairs(8)]))
    section = {
        "model": {"pretrained": str(out / "lm"), "remat": "none"},
        "data": {"pairs": str(out / "pairs.jsonl"), "labels": "human", "row_length": 512, "rows_per_step": 8},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    }
    train("reward", parse_options(section, "test"), out / "run")
    return out / "run"


def conversations() -> list:
    return [pair.conversation(side) for pair in tiny_pairs(4) for side in "ab"]


def test_export_and_verify_by_the_command_line(run, tmp_path):
    done = adaptrm("export", run, tmp_path / "out", "--verify", "--json")
    found = json.loads(done.stdout)["verified_by"]
    assert found["adaptrm"] <= 1e-5
    assert found.get("transformers", 0) <= 1e-4
    assert "transformers" not in found or found["transformers"] > 0  # read by other code, rounded otherwise
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "export" / name).read_bytes()


def test_the_config_is_that_of_a_classifier_and_the_pad_token_is_safe(run):
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"}
    chat = ChatTokenizer.from_folder(run / "export")
    assert config["pad_token_id"] == chat.tokenizer.pad_token_id == 0  # <|endoftext|>, which no template writes
    assert all(config["pad_token_id"] not in chat.encode_chat(c)[-2:] for c in conversations())
    assert "rope_parameters" not in config and config["rope_theta"] > 0  # transformers 4 reads these names
    settings = json.loads((run / "export" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [1, 8])
def test_rewards_equal_those_of_transformers(run, side, batch):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "export", padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations()]
    theirs = []
    for start in range(0, len(texts), batch):
        some = tokenizer(texts[start : start + batch], add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            theirs.append(model(input_ids=some["input_ids"], attention_mask=some["attention_mask"]).logits[:, 0])
    ours = RewardModel.from_pretrained(run).score(conversations())
    np.testing.assert_allclose(ours, torch.cat(theirs).numpy(), atol=1e-4)
    assert np.ptp(ours) > 1e-2  # the rewards differ at all


def test_tools_that_tokenize_rendered_text_read_the_same_rewards(run, tmp_path):
    """RewardBench, this pipeline and vLLM's classify pass on all that the tokenizer adds; the latter two give out the
    sigmoid of a single label, unless it is a regression's."""
    pytest.importorskip("torch")
    from transformers import AutoTokenizer, pipeline

    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (run.parent / "lm", run / "export"))
    texts = [after.apply_chat_template(c, tokenize=False) for c in conversations()]
    for conversation, text in zip(conversations(), texts, strict=True):
        plain = after.apply_chat_template(conversation, tokenize=True, return_dict=False)
        assert before(text)["input_ids"] == [1, *plain] and after(text)["input_ids"] == plain
    settings = json.loads((run / "export" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # transformers 4 would add token types
    ask = pipeline("text-classification", model=str(run / "export"), device="cpu")
    theirs = [found["score"] for found in ask(texts, batch_size=3)]
    np.testing.assert_allclose(RewardModel.from_pretrained(run).score(conversations()), theirs, atol=1e-4)
    # A language model keeps what its tokenizer does.
    ChatTokenizer.from_folder(run.parent / "lm").save(tmp_path, None)
    assert AutoTokenizer.from_pretrained(tmp_path)(texts[0])["input_ids"] == before(texts[0])["input_ids"]


# Fields by which other loaders would look for another head, and where they read them.
OTHER_HEADS = {
    "value_head_prefix": "value_head",  # openrlhf 0.11.2, models/model.py: getattr(config, "value_head_prefix", ...)
    "mean": 2.0,  # the same, _get_reward_model: if hasattr(config, "mean"): self.mean[0] = config.mean
    "std": 3.0,
    "normalize_reward": True,
    "classifier_from_token": ["no", "yes"],  # vllm 0.33.0, model_executor/models/adapters.py: seq_cls_model_loader
    "method": "from_2_way_softmax",
}
# vllm 0.33.0, model_executor/models/registry.py: _normalize_arch turns ForSequenceClassification into one of these.
VLLM_MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_that_openrlhf_and_vllm_look_for(tmp_path, family):
    config = tiny_config(model_type=family)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    raw = config.to_hf() | OTHER_HEADS | {"architectures": ["ForRewardModeling"]}
    _, params = random_state(SequenceClassifier, config, num_labels=1)
    save_model(tmp_path / "out", params, raw, ChatTokenizer(tokenizer), ("<|endoftext|>", 0))

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    # openrlhf, models/model.py: setattr(self, "score", nn.Linear(config.hidden_size, 1, bias=False)), and the decoder
    # under base_model_prefix, "model" in each of these families. vllm, adapters.py: self.score = ReplicatedLinear(
    # hidden_size, num_labels, bias=False); a score.bias would be added, an lm_head is not looked for.
    assert tensors["score.weight"].shape == (1, config.hidden_size)
    assert all(name.startswith("model.") for name in tensors.keys() - {"score.weight"})
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in hf_tensors(config, head="score").items()}
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    (architecture,) = saved["architectures"]
    # vllm, config/model.py: ("ForSequenceClassification", ("pooling", "classify")).
    assert architecture.endswith("ForSequenceClassification")
    assert architecture.replace("ForSequenceClassification", "ForCausalLM") in VLLM_MODELS
    assert len(saved["id2label"]) == 1  # from which transformers, and so vllm, has num_labels
    # vllm, layers/pooler/activations.py: if problem_type == "regression": return PoolerIdentity().
    assert saved["problem_type"] == "regression"
    assert not OTHER_HEADS.keys() & saved.keys()
    # openrlhf, utils/utils.py: if tokenizer.pad_token is None: tokenizer.pad_token = tokenizer.eos_token; then
    # model.config.pad_token_id = tokenizer.pad_token_id.
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == tokenizer.convert_ids_to_tokens(saved["pad_token_id"]) != settings["eos_token"]


def test_saving_what_was_loaded_gives_the_same_weights(run, tmp_path):
    model = RewardModel.from_pretrained(run / "export")
    model.save_pretrained(tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / "export" / weights).read_bytes()
    np.testing.assert_array_equal(
        RewardModel.from_pretrained(tmp_path / "again").score(conversations()), model.score(conversations())
    )


def test_pairs_and_conversations_give_the_same_rewards(run, monkeypatch):
    model = RewardModel.from_pretrained(run)
    np.testing.assert_allclose(model.score_pairs(tiny_pairs(4)).reshape(-1), model.score(conversations()), atol=1e-5)
    assert model.score([]).shape == (0,) and model.score_pairs([]).shape == (0, 2)
    # Sets of several sizes, one of them a pair.
    pair = tiny_pairs(2)[1]
    sets = [ResponseSet("s", pair.prompt, (*pair.responses, pair.response_a), (1.0, 0.0, 0.0)), pair]
    of_set, of_pair = model.score_sets(sets)
    assert of_set.dtype == np.float32
    np.testing.assert_allclose(of_set, model.score([pair.conversation(side) for side in "aba"]), atol=1e-5)
    np.testing.assert_allclose(of_pair, of_set[:2], atol=1e-5)
    # However many are packed together, none is lost between one lot and the next.
    together = model.score(conversations())
    monkeypatch.setattr("adaptrm.train.classifier.TREES_AT_ONCE", 3)
    np.testing.assert_allclose(model.score(conversations()), together, atol=1e-5)


def test_a_pad_token_that_ends_conversations_is_told_and_read_as_transformers_does(run, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    RewardModel.from_pretrained(run).save_pretrained(tmp_path / "unsafe")
    folder = tmp_path / "unsafe"
    # A template whose last token is the end token, and pad = end: transformers reads the reward before it.
    template = (folder / "chat_template.jinja").read_text().replace("<|im_end|>\n", "<|im_end|>")
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "config.json").read_text())
    end = ChatTokenizer.from_folder(folder).tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": end}))
    with pytest.warns(UserWarning, match="also ends conversations"):
        ours = RewardModel.from_pretrained(folder).score(conversations())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for conversation, reward in zip(conversations(), ours, strict=True):
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == end
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert float(model(ids).logits[0, 0]) == pytest.approx(float(reward), abs=1e-4)


def test_a_pad_token_is_added_where_no_special_token_is_free(tmp_path):
    tiny_causal_lm(tmp_path / "lm", vocab_size=len(tiny_tokenizer(tmp_path / "tokenizer")))
    chat = ChatTokenizer.from_folder(tmp_path / "lm")
    assert choose_pad_token(chat) == ("<|endoftext|>", 0)
    template = "{{ '<|endoftext|>' }}" + chat.tokenizer.chat_template
    (tmp_path / "lm" / "chat_template.jinja").write_text(template)
    write_rows(tmp_path / "pairs.jsonl", pair_rows([replace(p, preferred="b") for p in tiny_pairs(8)]))
    section = {
        "model": {"pretrained": str(tmp_path / "lm"), "remat": "none"},
        "data": {"pairs": str(tmp_path / "pairs.jsonl"), "labels": "human", "row_length": 512, "rows_per_step": 8},
    }
    train("reward", parse_options(section, "test"), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    saved = ChatTokenizer.from_folder(tmp_path / "run" / "export")
    assert saved.tokenizer.pad_token == "<|pad|>"
    assert config["pad_token_id"] == saved.tokenizer.pad_token_id == config["vocab_size"] - 1
    assert export_run(tmp_path / "run", tmp_path / "out", check=True)["adaptrm"] <= 1e-5


def test_a_date_in_the_template_is_frozen(tmp_path):
    tiny_causal_lm(tmp_path / "lm")
    dated = (
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{{ '<|im_start|>system\nToday is ' + date_string + '<|im_end|>\n' }}"
    )
    file = tmp_path / "lm" / "chat_template.jinja"
    file.write_text(dated + file.read_text())
    chat = ChatTokenizer.from_folder(tmp_path / "lm")
    assert DATE in chat.tokenizer.decode(chat.encode_chat(conversations()[0]))
    chat.save(tmp_path / "saved", "<|endoftext|>")
    saved = ChatTokenizer.from_folder(tmp_path / "saved").tokenizer
    assert DATE in saved.apply_chat_template(conversations()[0], tokenize=False)


def test_bfloat16_weights_are_compared_by_what_they_compute_in_float32(run, tmp_path, capsys):
    found = export_run(run, tmp_path / "out", check=True, dtype="bfloat16")
    assert all(difference <= 1e-4 for difference in found.values())
    assert "rounding to bfloat16 moves what the checkpoint computes by" in capsys.readouterr().err
    exact = raw_tensors(run / "export")
    rounded = {
        name: ("BF16", shape, np.frombuffer(data, np.float32).astype(bfloat16).tobytes())
        for name, (_, shape, data) in exact.items()
    }
    assert raw_tensors(tmp_path / "out") == rounded
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "Weights: bfloat16" in (tmp_path / "out" / "README.md").read_text()
    # What the rounding itself changes is more than the tolerance: it is not what is compared.
    start, mesh = open_run(run), make_mesh()
    expected = probe(*start.checkpoint(run, mesh), start.chat, start.pad[1], mesh)
    with pytest.raises(RuntimeError, match="it computes something else"):
        verify(tmp_path / "out", expected)


def test_a_published_reward_model_goes_out_as_it_came_in(tmp_path):
    """Skywork's Llama 3.1: bfloat16, a vocabulary of 128257 whose last token is the pad, which no mesh axis divides."""
    tiny_tokenizer(tmp_path / "in")
    file = tmp_path / "in" / "tokenizer.json"
    spec = json.loads(file.read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary |= {f"filler {number}": number for number in range(len(vocabulary), 128256)}
    pad = spec["added_tokens"][0] | {"id": 128256, "content": "[PAD]"}
    file.write_text(json.dumps(spec | {"added_tokens": [*spec["added_tokens"], pad]}))
    config = tiny_config(vocab_size=128257, hidden_size=16)
    fields = {"pad_token_id": 128256, "id2label": {"0": "LABEL_0"}, "architectures": ["LlamaForSequenceClassification"]}
    write_folder(tmp_path / "in", config, hf_tensors(config, bfloat16, "score"), 3, **fields)
    model = RewardModel.from_pretrained(tmp_path / "in", "bfloat16", make_mesh(1, 8, 1))
    assert model.pad == ("[PAD]", 128256)
    model.save_pretrained(tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "in")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["vocab_size"], written["pad_token_id"], written["torch_dtype"]) == (128257, 128256, "bfloat16")
    again = RewardModel.from_pretrained(tmp_path / "out", "bfloat16")
    assert again.pad == model.pad and again.chat.tokenizer.pad_token_id == 128256
    np.testing.assert_allclose(again.score(conversations()[:2]), model.score(conversations()[:2]), atol=1e-2)


def test_folders_that_are_no_reward_model_say_so(run, tmp_path):
    with pytest.raises(InputError, match=r"has no score.weight; this is not a reward model"):
        tiny_causal_lm(tmp_path / "lm")
        RewardModel.from_pretrained(tmp_path / "lm")
    with pytest.raises(InputError, match=r"no config\.yaml; this is not a run folder"):
        export_run(tmp_path / "lm", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty and not a model folder"):
        export_run(run, tmp_path / "mine")
    # A model of somebody else is not written over, and one of ours leaves nothing of the old one behind.
    with pytest.raises(InputError, match="holds something that adaptrm did not write"):
        export_run(run, tmp_path / "lm")
    export_run(run, tmp_path / "ours")
    (tmp_path / "ours" / "model-00001-of-00002.safetensors").write_bytes(b"")
    (tmp_path / "ours" / "model.safetensors.index.json").write_text("{}")
    export_run(run, tmp_path / "ours", check=True)
    assert [p.name for p in (tmp_path / "ours").glob("model*")] == ["model.safetensors"]


def test_an_export_that_was_killed_is_made_again(run, tmp_path):
    out = tmp_path / "out"
    export_run(run, out)
    whole = (out / "model.safetensors").read_bytes()
    (out / "config.json").rename(out / "config.json.partial")  # as a kill before the last step leaves it
    (out / "model.safetensors").rename(out / "model.safetensors.partial")
    export_run(run, out, check=True)
    assert (out / "model.safetensors").read_bytes() == whole


def test_verify_sees_weights_that_are_not_those_of_the_run(run, tmp_path):
    out = tmp_path / "out"
    export_run(run, out)
    start = open_run(run)
    definition, params = start.checkpoint(run, make_mesh())
    expected = probe(definition, params, start.chat, start.pad[1], make_mesh())
    assert verify(out, expected)["adaptrm"] <= 1e-5
    tensors = load_file(out / "model.safetensors")
    tensors["score.weight"] = -tensors["score.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="it computes something else"):
        verify(out, expected)
