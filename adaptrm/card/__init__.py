"""The model card of the folders that are written here."""
