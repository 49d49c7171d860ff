"""transformer/config.json of a published NOVA folder: read into the config of a NovaTransformer, and written from one."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scepter.core.config import plain
from scepter.core.errors import CheckpointError
from scepter.models.nova.transformer import NovaTransformer

CLASS = 'NOVATransformer3DModel'
KEYS = ('image_dim', 'image_size', 'image_stride', 'text_token_dim', 'text_token_len', 'image_base_size', 'video_base_size',
        'video_mixer_rank', 'rotary_pos_embed', 'arch')


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of the network of a config.json, or of the folder that holds it.

    Raises CheckpointError where there is none, it is of another class, or has keys that no NOVA network has.
    """
    file = Path(path) / 'config.json' if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{file}: {error}') from error
    if not isinstance(values, dict) or values.get('_class_name', CLASS) != CLASS:
        found = values.get('_class_name') if isinstance(values, dict) else values
        raise CheckpointError(f'{file} is of {found!r}, expected the config of a {CLASS}')
    unknown = sorted(key for key in values if key not in KEYS and not key.startswith('_'))
    if unknown:
        raise CheckpointError(f'{file} has {", ".join(unknown)}, which no {CLASS} is known to have: expected {", ".join(KEYS)}')
    return {'NAME': NovaTransformer.__name__, **{key.upper(): values[key] for key in KEYS if values.get(key) is not None}}


def write_config(network: NovaTransformer, folder: str | Path) -> None:
    """config.json of this network in a folder that is there, as `read_config` and the published code read it."""
    values = {'_class_name': CLASS, **{key: plain(network.cfg[key.upper()]) for key in KEYS}}
    (Path(folder) / 'config.json').write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
