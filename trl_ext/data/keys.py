"""Short hashes of content. Imports nothing heavy."""

import hashlib
import json
from typing import Any


def content_key(*parts: Any) -> str:
    """A short hash of anything that JSON can write, and of sets."""

    def plain(value: Any) -> Any:
        return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)

    text = json.dumps(parts, sort_keys=True, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
