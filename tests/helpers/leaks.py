"""Search for a secret that must not be there."""

import base64


def find(needle, *contents):
    """How often a text is in some bytes, as it stands or in base64."""
    forms = needle.encode(), base64.b64encode(needle.encode())[:-4]
    return sum(content.count(form) for content in contents for form in forms)
