"""Models in and out of Hugging Face folders."""

from adaptrm.hf.export import save_weights
from adaptrm.hf.folder import open_folder, resolve_model
from adaptrm.hf.load import load_weights

__all__ = ["load_weights", "open_folder", "resolve_model", "save_weights"]
