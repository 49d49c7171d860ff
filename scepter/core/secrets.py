"""What must not be shown: values under secret keys, what came from the environment, and keys inside URLs."""
from __future__ import annotations

import os
import re
from typing import Any

LONG = 8    # characters from which on a value of the environment is known again in running text; a shorter one may be any word
_ENV = re.compile(r'\$\{(\w+)\}')


class FromEnv(str):
    """A string that was written with ${NAME}: it reads as the value, and is shown and saved as it was written."""
    written: str

    def __new__(cls, value: str, written: str) -> FromEnv:
        text = super().__new__(cls, value)
        text.written = written
        for name in _ENV.findall(written):    # also in a process that got it from another one
            note_environment(name)
        return text

    def __repr__(self) -> str:
        return repr(self.written)

    def __reduce__(self) -> tuple:
        return FromEnv, (str(self), self.written)

    def __deepcopy__(self, memo: dict) -> FromEnv:
        return self


_SECRET = re.compile(r'(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|APPKEY|(OSS_)?[AS]K|ACCESS_ID'
                     r'|(ACCESS|API|SECRET|PRIVATE)_KEY(_ID|_SECRET)?)$', re.IGNORECASE)
_secrets: set[str] = set()
_environment: dict[str, str] = {}    # value -> ${NAME}


def is_secret(key: str) -> bool:
    """Whether the value of a key of this name must not be shown: OSS_SK, HF_TOKEN, PASSWORD, ..."""
    return bool(_SECRET.search(str(key)))


_IN_URL = re.compile(r'(?<=://)[^/\s@]+:[^/\s@]+(?=@)'
                     r'|(?<=[?&])((?:[\w-]*(?:signature|credential|token|access_?key_?id|secret|password)|sig)=)[^&\s\'"]+', re.IGNORECASE)


def hide(text: str) -> str:
    """The text without any secret that a config of this process has held, ${NAME} for what came from there, no keys inside URLs."""
    for secret in _secrets:
        text = text.replace(secret, '***')
    for value in sorted(_environment, key=len, reverse=True):    # a longer one may hold a shorter one
        text = re.sub(rf'(?<!\w){re.escape(value)}(?!\w)', _environment[value], text)
    return hide_in_urls(text)


def hide_in_urls(text: str) -> str:
    """The text without the passwords, keys and signatures of the URLs in it."""
    return _IN_URL.sub(lambda m: f'{m[1] or ""}***', text)


def note_secrets(value: Any, key: str = '') -> None:
    """Remember every secret of a config, so that `hide` takes it out of whatever is written."""
    if isinstance(value, dict):
        for k, v in value.items():
            note_secrets(v, k)
    elif isinstance(value, list):
        for v in value:
            note_secrets(v, key)
    elif isinstance(value, str) and len(value) >= 4 and is_secret(key):
        _secrets.add(str(value))


def note_environment(name: str) -> None:
    """Remember the value of a variable that a config names, where it is long enough to be known again and no number."""
    value = os.environ.get(name, '')
    if len(value) >= LONG and not re.fullmatch(r'[-+.\d_eE]+', value):
        _environment.setdefault(value, f'${{{name}}}')
