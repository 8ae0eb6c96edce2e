"""How wrong input is refused: with one readable line."""

import pytest

from adaptrm.errors import InputError


def refused(call, *args, **options) -> str:
    """The message with which a call refuses its input."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000, message
    return message
