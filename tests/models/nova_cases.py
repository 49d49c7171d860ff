"""The reference cases of NOVA: tests/fixtures/nova, and further folders of its layout that NOVA_FIXTURES names (README.md there)."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import scepter.components  # noqa: F401
from scepter.core.config import Config
from scepter.core.registry import BACKBONES, MODELS
from scepter.models.nova.model import NovaModel
from scepter.models.nova.transformer import NovaTransformer
from scepter.weights.families.nova import read_scheduler
from scepter.weights.said import values_of

HERE = Path(__file__).resolve().parents[1] / 'fixtures' / 'nova'
PARTS = ('video_encoder', 'image_encoder', 'image_decoder')


def folders() -> list[Path]:
    """Every folder of every root; a root may itself be one case."""
    roots = [HERE, *(Path(word) for word in os.environ.get('NOVA_FIXTURES', '').split(os.pathsep) if word)]
    every = (folder for root in roots for folder in ([root] if (root / 'case.json').is_file() else sorted(root.iterdir())))
    return [folder for folder in every if folder.is_dir()]


def kind_of(folder: Path) -> str:
    """What a folder holds, by its files, whatever it is called. Raises ValueError where no test would look at it."""
    kinds = {'network': ('case.json',), 'autoencoder': ('io.safetensors',), 'schedulers': ('schedulers.safetensors', 'specs.json'),
             'guidance': ('guidance.safetensors', 'specs.json'), 'records': ('*.expected.json',)}
    found = [kind for kind, files in kinds.items() if all(any(folder.glob(file)) for file in files)]
    misc = ('num_preds.json', 'mask_and_dist.safetensors', 'ema.safetensors', 'lr.json')
    found += ['misc'] * any((folder / file).is_file() for file in misc)
    if len(found) != 1:
        raise ValueError(f'{folder} holds {" and ".join(found) or "nothing that a test knows"}: expected one of {", ".join(kinds)}, misc')
    return found[0]


def with_file(pattern: str, kind: str = 'network') -> list[Path]:
    """Every file of this name, in folders of this kind."""
    return [file for folder in folders() if kind_of(folder) == kind for file in sorted(folder.glob(pattern))]


def process_keys(scheduler: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler of the reference, or of a published folder, says of a NovaModel."""
    return values_of(read_scheduler({'_class_name' if key == 'class' else key: value for key, value in scheduler.items()}))


def label(path: Path) -> str:
    return f'{path.parent.name}-{path.stem}' if path.is_file() else path.name


class Case:
    """One network of the reference, its weights, and what was recorded with it."""

    def __init__(self, folder: Path):
        self.folder, self.told = folder, json.loads((folder / 'case.json').read_text(encoding='utf-8'))

    def read(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f'{name}.safetensors')

    def config(self) -> Config:
        """Its config, with sizes spelled out where the reference knows them by names of its own."""
        values = {key.upper(): value for key, value in self.told['transformer'].items()}
        values['ARCH'] = [self._spelled(part, name) for part, name in zip(PARTS, values['ARCH'])]
        return Config({'NAME': 'NovaTransformer', **values})

    def _spelled(self, part: str, name: str) -> str:
        size = self.told.get('arch_table', {}).get(part, {}).get(name)
        if size is None:
            return name
        kind, heads = ('mlp', '') if part == 'image_decoder' else ('vit', f"h{size['num_heads']}")
        return f"{kind}_d{size['depth']}w{size['embed_dim']}{heads}"

    def network(self) -> NovaTransformer:
        config = self.config()
        assert not list(BACKBONES.faults(config, ''))
        network = BACKBONES.build(config)
        network.load_state_dict({name: value.float() for name, value in self.read('model').items()})
        return network

    def model(self) -> NovaModel:
        """The network with its process, as a published folder's scheduler says it."""
        config = Config({'NAME': 'NovaModel', 'NETWORK': self.config(), **process_keys(self.told['scheduler']),
                         'SCALE_FACTOR': self.told['vae_scaling_factor'], 'SHIFT_FACTOR': self.told.get('vae_shift_factor') or 0.0,
                         'LOSS_REPEAT': self.told['loss_repeat']})
        assert not list(MODELS.faults(config, ''))
        model = MODELS.build(config)
        model.model.load_state_dict(self.network().state_dict())
        return model

    def told_to(self, network: NovaTransformer, recorded: dict[str, Tensor]) -> Any:
        return self.labels(recorded) if network.is_told_class else self.texts(recorded)

    def texts(self, recorded: dict[str, Tensor]) -> list[Tensor]:
        """The prompts' features; what was dropped in training is empty."""
        texts = [recorded[f'in.prompt.{i}'] for i in range(sum(name.startswith('in.prompt.') for name in recorded))]
        dropped = recorded['rand.prompt_dropped'].tolist() if 'rand.prompt_dropped' in recorded else [0] * len(texts)
        return [text[:0] if drop else text for text, drop in zip(texts, dropped)]

    def labels(self, recorded: dict[str, Tensor]) -> Tensor:
        """The classes; those that were dropped in training are the one behind the last."""
        kept = recorded['rand.label_keep_u'].flatten() > 0.1 if 'rand.label_keep_u' in recorded else torch.ones(len(recorded['in.label']))
        return torch.where(kept.bool(), recorded['in.label'], 1000)


def close(ours: Tensor, theirs: Tensor, atol: float, what: Any = '') -> None:
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    torch.testing.assert_close(ours.detach().to(theirs.dtype), theirs, rtol=0, atol=atol, msg=lambda m: f'{what}: {m}')
