"""``adaptrm export --push-to-hub``: an exported folder on the Hugging Face hub; its model's files and nothing else."""

import os
import re

from adaptrm import paths
from adaptrm.card.license import license_of
from adaptrm.errors import InputError
from adaptrm.hf.cache import local_copy
from adaptrm.parallel.distributed import told_to_all
from adaptrm.progress import say

# What an export writes: weights, config, tokenizer, templates, card.
FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(config|tokenizer|tokenizer_config)\.json"
    r"|(special_tokens_map|added_tokens|vocab)\.json|merges\.txt|tokenizer\.model|README\.md"
    r"|(chat_template|additional_chat_templates/[\w-]+)\.jinja",
    re.ASCII,
)
# Of an earlier upload, which would be read beside or instead of the new ones.
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
FAILED = ("cannot be uploaded", "check the token, its right to write, and the network")


def check_push(name: str) -> None:
    """Raise where nothing can be uploaded under a name: before the work is done, and without a network.

    Raises:
        InputError: it is not OWNER/NAME, there is no token, or the hub is switched off.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("no owner")
    except HFValidationError:
        raise InputError(f"--push-to-hub: {name!r} is no name on the hub; give OWNER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push-to-hub: HF_HUB_OFFLINE keeps everything from the hub; unset it")
    if get_token() is None:
        raise InputError("--push-to-hub: no token; set HF_TOKEN to one that may write, or run `hf auth login`")


def push(folder: str | os.PathLike, name: str, public: bool = False) -> str:
    """Upload a folder that ``export`` or ``merge`` wrote; process 0 does.

    Args:
        name: ``OWNER/NAME``, made where it is not there yet; what it holds of an earlier model is replaced.
        public: without it the repository is private, and one that is public is refused.

    Returns:
        Its address.

    Raises:
        InputError: see ``check_push``; no network, no right to write; a license asks for another name.
    """
    check_push(name)
    with told_to_all(name) as first:
        return _push(folder, name, public) if first else ""


def _push(folder: str | os.PathLike, name: str, public: bool) -> str:
    from huggingface_hub import HfApi

    here = local_copy(folder)
    license = license_of(here)
    duty = license and license.duty
    if duty and not name.partition("/")[2].startswith(duty.prefix):
        wanted = f"the {duty.title} asks for a name that begins with {duty.prefix!r} ({duty.text}, 1.b.i)"
        if public:
            raise InputError(f"{name}: {wanted}; give such a name")
        say(f"{name}: before it is handed on: {wanted}")
    present = sorted(paths.files(here, deep=True))
    files = [file for file in present if FILES.fullmatch(file)]
    if "config.json" not in files:
        raise InputError(f"{folder}: no config.json; this is no whole export")
    if left := [file for file in present if file not in files]:
        say(f"{folder}: not uploaded, for they are no files of the model: {', '.join(left)}")
    api = HfApi()
    with paths.told(name, *FAILED):
        api.create_repo(name, private=not public, exist_ok=True)
        is_private = bool(api.model_info(name).private)
        if not public and not is_private:
            raise InputError(f"{name}: is public; make it private there, or give --public")
        if public and is_private:
            say(f"{name}: was private before and stays so; its settings on the hub change that")
        options = {"allow_patterns": files, "delete_patterns": WEIGHTS, "commit_message": "adaptrm export"}
        api.upload_folder(repo_id=name, folder_path=here, **options)
    return f"{api.endpoint}/{name}"
