"""Looking in while the network trains."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scepter.core import streams
from scepter.core.calls import accepted
from scepter.core.env import we
from scepter.core.images import grid, save_png, save_results
from scepter.core.registry import HOOKS
from scepter.core.schema import param
from scepter.hooks.base import Hook


@HOOKS.register_class()
class ProbeDataHook(Hook):
    """Every INTERVAL steps: what the network put under probe_data, and pictures it draws for PROMPTS with its averaged weights.

    Goes to WORK_DIR/probes/step-<step>/. Draws are keyed by SEED, so nothing of it disturbs the training. In EVAL_HOOKS it saves the
    results of the evaluation, in WORK_DIR/eval_images/step-<step>/.
    """

    INTERVAL: int = param(1000, 'Steps between probes.', least=1)
    PROMPTS: list[str] = param([], 'Prompts to draw.')
    SEED: int = param(2023, 'Seed of the drawn pictures, the same at each probe.')
    COLUMNS: int = param(8, 'Pictures in a row.', least=1)

    def after_iter(self, solver: Any) -> None:
        if solver.mode == 'train' and solver.step % self.INTERVAL == 0:
            self._probe(solver)
        elif solver.mode == 'eval':
            folder = solver.work_dir / 'eval_images' / f'step-{solver.step:08d}'
            save_results(solver.outputs.get('results', []), solver.batches[0][1].tolist(), folder)

    def _probe(self, solver: Any) -> None:
        folder = solver.work_dir / 'probes' / f'step-{solver.step:08d}'
        if we.is_main:
            self._write(solver.outputs.get('probe_data', {}), folder)
        if self.PROMPTS:
            # every process draws, so that none waits in a collective that the others never enter; the main one saves
            with solver.ema_weights(), torch.no_grad(), solver.autocast(), streams.current(self.SEED, range(len(self.PROMPTS))):
                solver.test_mode()
                how = {**solver.test_arguments(), 'prompt': list(self.PROMPTS), 'seed': self.SEED}
                results = solver.model.forward_test(**accepted(solver.model.forward_test, how))
                solver.train_mode()
            if we.is_main:
                save_png(grid([r['image'] for r in results], self.COLUMNS), folder / 'samples.png', {'prompts': list(self.PROMPTS)})

    def _write(self, data: dict[str, Any], folder: Path) -> None:
        """Images to PNG grids, the rest to probe.json."""
        words: dict[str, Any] = {}
        for key, value in data.items():
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] in (1, 3):
                save_png(grid(list(value[:64]), self.COLUMNS), folder / f'{key}.png')
            elif isinstance(value, Tensor):
                words[key] = value.detach().float().cpu().tolist() if value.numel() <= 256 else f'tensor {list(value.shape)}'
            else:
                words[key] = value
        if words:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / 'probe.json').write_text(json.dumps(words, indent=1, default=str, ensure_ascii=False), encoding='utf-8')

