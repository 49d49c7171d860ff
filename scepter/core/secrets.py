"""What must not be shown: values under secret keys, and keys inside URLs."""
from __future__ import annotations

import re
from typing import Any


class FromEnv(str):
    """A string that was written with ${NAME}: it reads as the value, and is saved as it was written."""
    written: str

    def __new__(cls, value: str, written: str) -> FromEnv:
        text = super().__new__(cls, value)
        text.written = written
        return text

    def __reduce__(self) -> tuple:
        return FromEnv, (str(self), self.written)

    def __deepcopy__(self, memo: dict) -> FromEnv:
        return self


_SECRET = re.compile(r'(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|APPKEY|(OSS_)?[AS]K|ACCESS_ID'
                     r'|(ACCESS|API|SECRET|PRIVATE)_KEY(_ID|_SECRET)?)$', re.IGNORECASE)
_secrets: set[str] = set()


def is_secret(key: str) -> bool:
    """Whether the value of a key of this name must not be shown: OSS_SK, HF_TOKEN, PASSWORD, ..."""
    return bool(_SECRET.search(str(key)))


_IN_URL = re.compile(r'(?<=://)[^/\s@]+:[^/\s@]+(?=@)'
                     r'|(?<=[?&])((?:[\w-]*(?:signature|credential|token|access_?key_?id|secret|password)|sig)=)[^&\s\'"]+', re.IGNORECASE)


def hide(text: str) -> str:
    """The text without any secret that a config of this process has held, and without keys inside URLs."""
    for secret in _secrets:
        text = text.replace(secret, '***')
    return hide_in_urls(text)


def hide_in_urls(text: str) -> str:
    return _IN_URL.sub(lambda m: f'{m[1] or ""}***', text)


def note_secrets(value: Any, key: str = '') -> None:
    if isinstance(value, dict):
        for k, v in value.items():
            note_secrets(v, k)
    elif isinstance(value, list):
        for v in value:
            note_secrets(v, key)
    elif isinstance(value, str) and len(value) >= 4 and is_secret(key):
        _secrets.add(str(value))
