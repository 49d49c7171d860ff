"""Looking in while the network trains."""
from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scepter.core import jsonl, pulse, streams
from scepter.core.calls import accepted
from scepter.core.env import we
from scepter.core.faults import ConfigError
from scepter.core.images import save_png, sheet, tile
from scepter.core.registry import HOOKS
from scepter.core.schema import param
from scepter.hooks.base import Hook


@HOOKS.register_class()
class ProbeDataHook(Hook):
    """Every INTERVAL steps: what the network put under probe_data, and what it gives for PROMPTS with its averaged weights.

    Goes to WORK_DIR/probes/step-<step>/, pictures as one sheet with their prompts, and to hooks that show pictures. Draws are keyed by
    SEED, so nothing of it disturbs the training. In EVAL_HOOKS it puts the first PICTURES samples of each evaluation on one sheet,
    WORK_DIR/eval_images/step-<step>.png (eval_images/quick/... of the one called quick); results without a picture go to a .jsonl of
    the same name.
    """

    INTERVAL: int = param(1000, 'Steps between probes.', least=1)
    PROMPTS: list[str] = param([], 'Prompts to draw.')
    ARGUMENTS: dict = param({}, 'More arguments of forward_test, e.g. {label: [0, 1, 2]}, or {num_samples: 8} without prompts.')
    SEED: int = param(2023, 'Seed of the drawn pictures, the same at each probe.')
    COLUMNS: int = param(8, 'Pictures in a row.', least=1)
    PICTURES: int = param(64, 'Pictures of an evaluation on its sheet.', least=1)

    def before_solve(self, solver: Any) -> None:
        for name in [*(['prompt'] if self.PROMPTS else []), *self.ARGUMENTS]:
            if name not in accepted(solver.model.forward_test, {name: None}):
                function = f'{type(solver.model).__name__}.forward_test'
                raise ConfigError(f'ProbeDataHook has {"PROMPTS" if name == "prompt" else name}, but {function} takes no {name}; it takes '
                                  f'{", ".join(inspect.signature(solver.model.forward_test).parameters)}')

    def before_all_iter(self, solver: Any) -> None:
        self.seen: list[tuple[int, np.ndarray | None, dict[str, Any]]] = []    # of an evaluation: number, picture, words

    def after_iter(self, solver: Any) -> None:
        if solver.mode == 'train' and solver.step % self.INTERVAL == 0:
            self._probe(solver)
        elif solver.mode == 'eval':
            self.seen += [(number, *_parted(result)) for number, result in zip(solver.batches[0][1].tolist(), solver.outputs['results'])
                          if number < self.PICTURES]

    def after_all_iter(self, solver: Any) -> None:
        if solver.mode == 'eval':
            seen = sorted((entry for part in we.gather(self.seen) for entry in part), key=lambda entry: entry[0])
            if we.is_main:
                path = solver.work_dir / 'eval_images' / solver.evaluation.name / f'step-{solver.step:08d}.png'
                self._save(solver, seen, path, path.with_suffix('.jsonl'))

    def _probe(self, solver: Any) -> None:
        folder = solver.work_dir / 'probes' / f'step-{solver.step:08d}'
        if we.is_main:
            self._write(solver, solver.outputs.get('probe_data', {}), folder)
        if self.PROMPTS or self.ARGUMENTS:
            # every process draws, so that none waits in a collective that the others never enter; the main one saves
            results = self._draw(solver)
            if we.is_main:
                self._save(solver, [(i, *_parted(result)) for i, result in enumerate(results)], folder / 'samples.png',
                           folder / 'results.jsonl')

    def _draw(self, solver: Any) -> list[dict[str, Any]]:
        given = {key: torch.as_tensor(value, device=we.device) if isinstance(value, list) and not isinstance(value[0], str) else value
                 for key, value in self.ARGUMENTS.items()}
        lengths = [len(value) for value in (self.PROMPTS, *self.ARGUMENTS.values()) if isinstance(value, list) and value]
        count = lengths[0] if lengths else int(self.ARGUMENTS.get('num_samples', 1))
        how = {**solver.test_arguments(), **({'prompt': list(self.PROMPTS)} if self.PROMPTS else {}), **given,
               'seed': self.SEED, 'row_seeds': streams.row_seeds(self.SEED, count)}
        with pulse.phase('evaluation'), solver.ema_weights(), torch.no_grad(), solver.autocast(), streams.current(self.SEED, range(count)):
            solver.test_mode()
            results = solver.model('test', **accepted(solver.model.forward_test, how))
            solver.train_mode()
        return results

    def _save(self, solver: Any, seen: list[tuple[int, np.ndarray | None, dict[str, Any]]], picture: Path, rows: Path) -> None:
        """Pictures to one sheet, in which every prompt is written too; the words of results without one to lines."""
        drawn = [(image, words) for _, image, words in seen if image is not None]
        if drawn:
            captions = [str(words.get('prompt', words.get('label', ''))) for _, words in drawn]
            page = sheet([image for image, _ in drawn], self.COLUMNS, captions)
            save_png(page, picture, {'prompts': captions})
            solver.log('samples', page)
        rows.unlink(missing_ok=True)    # of a step that a resumed run goes through again
        jsonl.append(rows, ({'number': number, **words} for number, image, words in seen if image is None))

    def _write(self, solver: Any, data: dict[str, Any], folder: Path) -> None:
        """Images to sheets, the rest to probe.json."""
        words: dict[str, Any] = {}
        for key, value in data.items():
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] in (1, 3):
                page = sheet(list(value[:64]), self.COLUMNS)
                save_png(page, folder / f'{key}.png')
                solver.log(key, page)
            elif isinstance(value, Tensor):
                words[key] = value.detach().float().cpu().tolist() if value.numel() <= 256 else f'tensor {list(value.shape)}'
            else:
                words[key] = value
        if words:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / 'probe.json').write_text(json.dumps(words, indent=1, default=str, ensure_ascii=False), encoding='utf-8')


def _parted(result: dict[str, Any]) -> tuple[np.ndarray | None, dict[str, Any]]:
    """A result's picture as a sheet shows it, if it has one, and its words and numbers."""
    words = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in result.items()
             if not isinstance(value, Tensor) or (value.numel() <= 4096 and value.ndim < 3)}
    image = result.get('image')
    return (tile(image) if isinstance(image, Tensor) and image.ndim == 3 else None), words
